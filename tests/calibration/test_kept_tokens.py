# SPDX-License-Identifier: Apache-2.0
"""Which tokens are kept, and what is estimated from them."""

from __future__ import annotations

import hashlib

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_moe_prune import CalibrationSet, Need, RequestError
from optimum_moe_prune.calibration import dense
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.config import MoEPrunerConfig
from optimum_moe_prune.statistics.needs import PER_TOKEN, SUMS_OF_KEPT, tensor_names
from optimum_moe_prune.statistics.samples import Sample, keep_tokens, sums_of_kept


def samples_of(lengths: list[int]) -> list[Sample]:
    named = [(hashlib.sha256(f"{i} {n}".encode()).hexdigest(), n) for i, n in enumerate(lengths)]
    return [Sample(name, "d", length) for name, length in sorted(named)]


def kept_of(samples: list[Sample], max_tokens: int, seed: int = 0) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {sample.hash: set() for sample in samples}
    for sample, position in zip(*(t.tolist() for t in keep_tokens(samples, max_tokens, seed)), strict=True):
        found[samples[sample].hash].add(position)
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_each_sample_has_its_share_and_at_least_a_few(lengths: list[int], most: int, seed: int) -> None:
    samples = samples_of(lengths)
    kept, total = kept_of(samples, most, seed), sum(lengths)
    assert sum(map(len, kept.values())) == min(most, total)
    few = min(8, max(1, min(most, total) // len(lengths))) if most >= len(lengths) else 0
    for sample in samples:
        mine = len(kept[sample.hash])
        assert mine >= min(few, sample.num_tokens, 8 if most >= 8 * len(lengths) else 1)
        assert all(0 <= position < sample.num_tokens for position in kept[sample.hash])
        if most >= 8 * len(lengths):  # what the first few take is missing from all shares alike
            assert mine <= max(8, most * sample.num_tokens / total + 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=10), st.integers(1, 200), st.integers(1, 50), st.integers(0, 9)
)
def test_kept_of_all_is_kept_of_any_part(lengths: list[int], most: int, more: int, seed: int) -> None:
    samples = samples_of(lengths)
    whole = kept_of(samples, most, seed)
    assert all(whole[name] <= positions for name, positions in kept_of(samples, most + more, seed).items())
    for part in (samples[::2], samples[1:], samples[:1]):
        assert all(whole[name] <= positions for name, positions in kept_of(part, most, seed).items())


def test_another_seed_keeps_others() -> None:
    samples = samples_of([100, 200, 50])
    assert kept_of(samples, 60, 0) != kept_of(samples, 60, 1)
    assert {len(v) for v in kept_of(samples, 70, 0).values()} == {10, 20, 40}


@pytest.mark.parametrize("width", [(), (5,)])
def test_sums_are_those_of_the_mean_kept_token(width: tuple[int, ...]) -> None:
    of = torch.tensor([0, 0, 2, 2, 2, 3])
    lengths = torch.tensor([2, 7, 9, 4])
    values = torch.rand(6, *width)
    found = sums_of_kept(values, of, lengths)
    wide = values.double()
    expected = [wide[:2].sum(0), 7 * wide.mean(0), 3 * wide[2:5].sum(0), 4 * wide[5]]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)
    assert torch.equal(found[0], wide[0] + wide[1])  # all of them are kept: nothing is estimated


@pytest.mark.parametrize("needs", [{Need.DENSE_NORMS}, {Need.SINGLE_ERROR}, set(Need)], ids=["norms", "error", "all"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_what_is_kept_is_as_if_all_were(
    kind: str, samples: CalibrationSet, needs: set[Need], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind)
    model.set_experts_implementation(implementation)
    everything = collect(model, samples, needs, batch_size=4, max_tokens="all")
    assert len(everything.token_sample) == samples.num_tokens
    monkeypatch.setattr("optimum_moe_prune.calibration.observer.chunk_size", lambda *a: 3)
    monkeypatch.setattr(dense, "_CACHED_BYTES", 4 * 32 * 3 * 3)  # three experts in a call, and what is left
    some = collect(model, samples, needs, batch_size=4, max_tokens=70)
    place = {
        token: row
        for row, token in enumerate(
            zip(everything.token_sample.tolist(), everything.token_position.tolist(), strict=True)
        )
    }
    rows = torch.tensor([place[t] for t in zip(some.token_sample.tolist(), some.token_position.tolist(), strict=True)])
    assert some.provenance["dense_tokens"] == 70 and everything.provenance["dense_tokens"] == samples.num_tokens
    lengths = torch.tensor([sample.num_tokens for sample in samples.samples])
    per_token = tensor_names(needs, PER_TOKEN)
    for index, layer in some.layers.items():
        for name, found in layer.tensors.items():
            wanted = everything.layers[index].tensors[name]
            if name in per_token:
                wanted = wanted[rows]
            if name in SUMS_OF_KEPT:
                wanted = sums_of_kept(layer.tensors[SUMS_OF_KEPT[name]], some.token_sample, lengths).expand_as(found)
            scale = float(wanted.abs().mean()) if wanted.numel() else 0.0
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * scale)


def test_kept_tokens_stand_for_all_of_their_samples(samples: CalibrationSet) -> None:
    """Of short samples more are kept than their share; they do not count more for it."""
    few = collect(make_model(), samples, {Need.ROUTING, Need.GRAM}, max_tokens=120)
    kept = torch.bincount(few.token_sample, minlength=len(samples))
    lengths = torch.tensor([sample.num_tokens for sample in samples.samples]).double()
    assert len(set((kept / lengths).tolist())) > 1
    layer = few.with_domain_weights(None).layers[0]
    share = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, few.token_sample, layer.token_weights)
    torch.testing.assert_close(share / 120, lengths / lengths.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.loss_weights.square(), (lengths / kept) * 120 / lengths.sum(), rtol=1e-12, atol=0)
    weighted = few.with_domain_weights({"low": 3.0, "high": 1.0}).layers[0]
    low = torch.tensor([sample.domain == "low" for sample in samples.samples])
    share = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, few.token_sample, weighted.token_weights)
    torch.testing.assert_close(share[low].sum() / share.sum(), torch.tensor(0.75).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(share[low] / share[low].sum(), lengths[low] / lengths[low].sum(), rtol=1e-12, atol=0)
    everything = collect(make_model(), samples, {Need.ROUTING, Need.GRAM}).with_domain_weights(None).layers[0]
    assert everything.kept_weights is None and everything.root_weights is None


def test_all_tokens_by_name_and_what_is_no_number() -> None:
    assert MoEPrunerConfig(max_tokens="all").max_tokens == "all"
    assert MoEPrunerConfig.from_dict(MoEPrunerConfig(max_tokens="all").to_dict()).max_tokens == "all"
    for wrong in (0, "some", 2.5, None):
        with pytest.raises(RequestError, match=r'max_tokens is .*an integer of at least 1 or "all"'):
            MoEPrunerConfig(max_tokens=wrong)


@pytest.mark.parametrize("wrong", [0, -1, None, True, 1.5, "8192", "ALL", 2**63])
def test_a_wrong_number_of_kept_tokens_is_refused(wrong: object) -> None:
    samples = CalibrationSet.build([torch.arange(9)])
    with pytest.raises(RequestError, match=r"max_tokens is .*; it must be an integer of at least 1 or \"all\"\."):
        collect(make_model(), samples, {Need.ROUTING}, max_tokens=wrong)  # type: ignore[arg-type]
