# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence against a loop over samples."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, RequestError, RunError
from optimum_moe_prune.evaluation.losses import evaluate
from optimum_moe_prune.evaluation.speed import measure_generation


@torch.no_grad()
def test_figures_equal_a_loop_over_samples(
    kind: str, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optimum_moe_prune.evaluation.divergence as module

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


def test_intervals_are_those_of_a_paired_bootstrap(samples: CalibrationSet) -> None:
    from scipy.stats import bootstrap

    model, reference = make_model(seed=1), make_model()
    found = evaluate(model, samples, reference=reference).domains["all"]
    rows = []
    for ids in samples.token_ids:
        alone = [evaluate(m, ids).domains["default"].loss * (len(ids) - 1) for m in (model, reference)]
        rows.append((*alone, len(ids) - 1))
    mine, theirs, tokens = np.array(rows).T

    def lost(a: np.ndarray, b: np.ndarray, n: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a.sum(axis) - b.sum(axis)) / n.sum(axis)

    expected = bootstrap((mine, theirs, tokens), lost, paired=True, n_resamples=20_000, method="percentile", rng=0)
    low, high = found.lost_interval
    width = high - low
    assert low < found.lost < high
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.08 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.08 * width)
    least, most = found.perplexity_difference_interval
    assert least < found.perplexity - found.reference_perplexity < most
    assert found.lost_interval == evaluate(model, samples, reference=reference).domains["all"].lost_interval
    assert evaluate(model, samples, reference=reference, seed=1).domains["all"].lost_interval != found.lost_interval
    few = evaluate(model, make_texts(7), make_tokenizer(), reference=reference).domains["all"]
    assert few.lost_interval is None
    single = evaluate(model, samples.token_ids[0], reference=reference).domains["default"]
    assert single.lost_interval is None and single.lost is not None


def test_generation_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    found = measure_generation(str(tmp_path / "model"), prompt_tokens=100, new_tokens=6, repeats=1)
    assert found.prompt_tokens == 58 and found.new_tokens == 6  # the model was made for 64
    assert found.tokens_per_second > 0 and found.prompt_seconds > 0
    assert sum(p.numel() * 4 for p in model.parameters()) < found.peak_memory_bytes
    held = torch.ones(2**29, dtype=torch.float32)  # 2 GiB of this process are not of that one
    del held
    again = measure_generation(str(tmp_path / "model"), prompt_tokens=100, new_tokens=6, repeats=1)
    assert again.peak_memory_bytes < 1.2 * found.peak_memory_bytes < 2**31
    with pytest.raises(RequestError, match="new_tokens is 1"):
        measure_generation(str(tmp_path / "model"), new_tokens=1)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(RunError, match=r"the speed of .*model cannot be measured: "):
        measure_generation(str(tmp_path / "model"))
