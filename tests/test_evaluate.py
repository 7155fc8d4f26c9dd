# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence against a loop over samples."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_model, make_texts
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, RequestError, RunError
from optimum_moe_prune.evaluate import evaluate


@torch.no_grad()
def test_figures_equal_a_loop_over_samples(
    kind: str, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optimum_moe_prune.divergence as module

    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * 96 * 7)  # one sample at a time
    model, reference = make_model(kind, seed=1), make_model(kind)
    result = evaluate(model, samples, reference=reference, batch_size=5)
    sums: dict[str, torch.Tensor] = {}
    for sample, ids in zip(samples.samples, samples.token_ids, strict=True):
        p, q = (torch.log_softmax(m(input_ids=ids[None]).logits[0, :-1].double(), -1) for m in (model, reference))
        figures = torch.tensor(
            [
                len(ids) - 1,
                -p.gather(1, ids[1:, None]).sum(),
                -q.gather(1, ids[1:, None]).sum(),
                (q.exp() * (q - p)).sum(),
                (p.argmax(1) == q.argmax(1)).sum(),
            ]
        )
        for domain in (sample.domain, "all"):
            sums[domain] = sums.get(domain, 0) + figures
    assert list(result.domains) == ["high", "low", "all"]
    for domain, found in result.domains.items():
        tokens, loss, reference_loss, divergence, agreement = sums[domain].tolist()
        assert found.tokens == tokens
        assert found.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-5)
        assert found.loss == pytest.approx(loss / tokens, rel=1e-5)
        assert found.reference_perplexity == pytest.approx(math.exp(reference_loss / tokens), rel=1e-5)
        assert found.kl_divergence == pytest.approx(divergence / tokens, rel=1e-4)
        assert found.top1_agreement == pytest.approx(agreement / tokens)
    alone = evaluate(model, samples)
    assert alone.domains["low"].perplexity == pytest.approx(result.domains["low"].perplexity, rel=1e-6)
    assert set(alone.to_dict()["low"]) == {"samples", "tokens", "perplexity"}


def test_a_model_does_not_diverge_from_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model()
    result = evaluate(model, make_texts(4), tokenizer, reference=model).domains["all"]
    assert result.kl_divergence == pytest.approx(0, abs=1e-6) and result.top1_agreement == 1
    assert "lost (nats)" in evaluate(model, make_texts(2), tokenizer, reference=model).summary()


def test_one_domain_has_no_total(tokenizer: PreTrainedTokenizerBase) -> None:
    assert list(evaluate(make_model(), ["w1 w2 w3"], tokenizer).domains) == ["default"]


def test_modes_are_restored_and_mistakes_refused(samples: CalibrationSet) -> None:
    model = make_model().train()
    evaluate(model, samples)
    assert model.training
    with pytest.raises(RequestError, match="the model has 96 output tokens and the reference 100"):
        evaluate(model, samples, reference=make_model(vocab_size=100))
    with pytest.raises(RequestError, match="token id 95 is outside the model's vocabulary of 50"):
        evaluate(make_model(vocab_size=50), torch.tensor([3, 95]))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="the loss on domain 'high' is nan"):
        evaluate(model, samples)
