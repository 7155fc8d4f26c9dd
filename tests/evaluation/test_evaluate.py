# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence against a loop over samples."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, RequestError, RunError
from optimum_moe_prune.evaluation.comparison import Comparison, ModelResult, reference_of
from optimum_moe_prune.evaluation.losses import DomainResult, Evaluation, evaluate
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
        assert found.lost == pytest.approx((loss - reference_loss) / tokens, rel=1e-4)
        assert found.reference_perplexity == pytest.approx(math.exp(reference_loss / tokens), rel=1e-5)
        assert found.kl_divergence == pytest.approx(divergence / tokens, rel=1e-4)
        assert found.top1_agreement == pytest.approx(agreement / tokens)
    alone = evaluate(model, samples)
    assert alone.domains["low"].perplexity == pytest.approx(result.domains["low"].perplexity, rel=1e-6)
    assert set(alone.to_dict()["low"]) == {"samples", "tokens", "loss", "perplexity"}


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


def test_a_loss_is_what_it_is_however_large(samples: CalibrationSet, tmp_path: Path) -> None:
    model, reference = make_model(), make_model()
    with torch.no_grad():
        reference.lm_head.weight *= 2e3 / evaluate(model, samples).domains["all"].loss
        model.lm_head.weight.copy_(reference.lm_head.weight * 3)
    found = evaluate(model, samples, reference=reference).domains["all"]
    assert found.loss > 1.5 * found.reference_loss > 1.5 * 710
    assert found.lost == found.loss - found.reference_loss and found.lost_interval[0] < found.lost
    assert found.perplexity == found.reference_perplexity == math.inf
    assert found.perplexity_difference_interval is None
    exact = DomainResult(9, 90, 800.0, 800.0 - 1e-9, 0.0, 1.0)
    assert exact.loss == 800 and exact.lost == pytest.approx(1e-9, rel=1e-3)
    near = DomainResult(9, 90, 0.5 + 1e-9, 0.5, 0.0, 1.0)
    assert near.lost == pytest.approx(1e-9, rel=1e-3)
    evaluation = Evaluation({"a": exact, "b": near})
    assert "inf" in evaluation.summary()
    values = evaluation.to_dict()
    assert values["a"]["perplexity"] is None and values["a"]["loss"] == 800.0
    assert values["b"]["perplexity"] == math.exp(0.5 + 1e-9)
    comparison = Comparison({"m": ModelResult(evaluation), "r": ModelResult(reference_of(evaluation))}, "r")
    path = comparison.save(tmp_path / "found.json")
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Comparison.load(path) == comparison
    assert comparison.models["r"].evaluation.domains["a"].loss == exact.reference_loss


def test_files_of_before_are_read() -> None:
    before = {
        "samples": 8,
        "tokens": 80,
        "perplexity": 20.0,
        "reference_perplexity": 10.0,
        "kl_divergence": 0.5,
        "top1_agreement": 0.75,
        "lost_interval": [0.5, 0.9],
        "perplexity_difference_interval": [8, 12],
        "lost": math.log(2),
    }
    values = {"format_version": 1, "reference": None, "models": {"m": {"domains": {"d": before}}}}
    found = Comparison.from_dict(values).models["m"].evaluation.domains["d"]
    assert found.loss == math.log(20) and found.reference_loss == math.log(10)
    now = found.to_dict()
    assert set(now) - set(before) == {"loss", "reference_loss"} and set(before) <= set(now)
    for name, value in before.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert now[name] == pytest.approx(expected), name
    for name, value in (("perplexity", None), ("perplexity", math.inf), ("perplexity", -1), ("lost_interval", [1])):
        with pytest.raises(RequestError, match="the evaluation is damaged"):
            Comparison.from_dict({**values, "models": {"m": {"domains": {"d": {**before, name: value}}}}})


def test_equal_texts_and_many_texts_have_intervals() -> None:
    from optimum_moe_prune.evaluation.losses import _intervals

    assert _intervals(np.full((9, 2), 3.0), np.full(9, 2.0), seed=0) == ((0, 0), (0, 0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 500, 10_000).astype(float)
    losses = np.column_stack([2.1 * tokens, 2.0 * tokens]) + rng.normal(size=(10_000, 2))
    began = time.perf_counter()
    lost, difference = _intervals(losses, tokens, seed=0)
    assert time.perf_counter() - began < 20
    assert lost == pytest.approx((0.1, 0.1), abs=1e-3) and lost[0] < lost[1]
    assert difference == pytest.approx([math.exp(2.1) - math.exp(2)] * 2, abs=0.01)


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
