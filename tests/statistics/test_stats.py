# SPDX-License-Identifier: Apache-2.0
"""Statistics on disk, merged, and re-weighted."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from oracles import assert_same
from transformers import PreTrainedTokenizerBase

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPrunerConfig, Need, RequestError
from optimum_moe_prune.architectures.routers import rule_from_dict
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.statistics.needs import IN_FORMAT_1
from optimum_moe_prune.statistics.samples import Sample, keep_tokens
from optimum_moe_prune.statistics.stats import LayerStats


@pytest.fixture
def stats(kind: str, samples: CalibrationSet) -> CalibrationStats:
    return collect(make_model(kind), samples, set(Need))


def test_saved_statistics_come_back_to_the_bit(stats: CalibrationStats, tmp_path: Path) -> None:
    stats.save(tmp_path / "stats")
    loaded = CalibrationStats.load(tmp_path / "stats")
    assert_same(stats, loaded, rtol=0)
    for name in ("model", "samples", "needs", "max_tokens", "seed", "provenance"):
        assert getattr(loaded, name) == getattr(stats, name)
    assert {i: layer.routing for i, layer in loaded.layers.items()} == {
        i: layer.routing for i, layer in stats.layers.items()
    }
    assert sorted(p.name for p in (tmp_path / "stats").iterdir()) == sorted(
        ["stats.json", "tokens.safetensors", *(f"layer_{i:05d}.safetensors" for i in stats.layers)]
    )
    for method in ("mosaic", "enumeration", "reap"):
        config = MoEPrunerConfig(method=method, num_experts=4)
        assert build_plan(loaded, config).retained == build_plan(stats, config).retained


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_folders_of_earlier_versions_are_read_and_written_as_they_were(name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "data" / f"statistics_{name}"
    CalibrationStats.load(folder).save(tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("max_tokens", [60, 8192])
def test_merged_parts_equal_the_whole(kind: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    texts = make_texts(14)
    parts = [
        collect(make_model(kind), CalibrationSet.build(part, tokenizer), set(Need), max_tokens=max_tokens)
        for part in (texts[:5], texts[5:], texts)
    ]
    merged = parts[1].merge(parts[0])
    assert_same(merged, parts[2], rtol=1e-5)
    config = MoEPrunerConfig(method="mosaic", num_experts=4)
    assert build_plan(merged, config).retained == build_plan(parts[2], config).retained


def test_several_parts_are_merged_at_once_and_from_folders(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = make_texts(14)
    folders = []
    for number, part in enumerate((texts[9:], texts[:5], texts[5:9])):
        stats = collect(make_model(kind), CalibrationSet.build(part, tokenizer), set(Need), max_tokens=60)
        folders.append(stats.save(tmp_path / str(number)))
    first, *others = map(CalibrationStats.load, folders)
    merged = first.merge(*others)
    whole = collect(make_model(kind), CalibrationSet.build(texts, tokenizer), set(Need), max_tokens=60)
    assert_same(merged, whole, rtol=1e-5)
    assert_same(others[1].merge(first.merge(others[0])), merged, rtol=0)
    assert_same(CalibrationStats.load(merged.save(tmp_path / "merged")), merged, rtol=0)
    assert len(merged.provenance["merged"]) == 3
    with pytest.raises(RequestError, match=r"is or holds .*/1/layer_00000.safetensors, which is read"):
        merged.save(folders[1], overwrite=True)


class Asked(dict):
    """A layer's tensors, made when they are asked for; knows how many bytes of tensors are alive then."""

    most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        Asked.most = max(Asked.most, bytes_alive())
        return super().__getitem__(name).to(torch.float32) * 1


def bytes_alive() -> int:
    storages = (thing.untyped_storage() for thing in gc.get_objects() if type(thing) is torch.Tensor)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_merging_holds_one_tensor_at_a_time_in_memory(tmp_path: Path) -> None:
    """Layers of 0.8 MB, 8 of them in each of three statistics."""
    tokens, num_layers, experts = 400, 8, 32
    rule = rule_from_dict({"top_k": 2, "renormalise": True, "cast_weights": False})
    shape = (tokens, experts * (experts + 1) // 2)

    def part(number: int) -> CalibrationStats:
        samples = (Sample(f"{number:064x}", "default", tokens),)
        sample, position = keep_tokens(samples, 10**6, 0)
        tensors = Asked(gram=torch.zeros(()).expand(shape))
        layers = {i: LayerStats(experts, rule, tensors, torch.ones(1), sample) for i in range(num_layers)}
        facts = {"model_type": "mixtral", "top_k": 2, "fingerprint": "f"}
        return CalibrationStats(facts, samples, layers, frozenset({Need.GRAM}), sample, position, 10**6, 0)

    layer = 4 * shape[0] * shape[1]
    parts = [part(number) for number in range(3)]
    before = bytes_alive()
    Asked.most = 0
    parts[0].merge(*parts[1:]).save(tmp_path / "merged")
    assert 0 < Asked.most - before < 3 * 3 * layer  # of 8 * 3: the merged tensor, its file's pages, and a part
    loaded = CalibrationStats.load(tmp_path / "merged")
    assert loaded.layers[7].tensors["gram"].shape == (3 * tokens, shape[1])


def test_format_1_is_read_saved_and_merged(samples: CalibrationSet, tmp_path: Path) -> None:
    """It lacks the largest elements of outputs; what is made of it lacks them too, and stays format 1."""
    stored = Path(__file__).resolve().parent.parent / "data" / "statistics_mixtral"
    assert json.loads((stored / "stats.json").read_text())["format_version"] == 1
    old = CalibrationStats.load(stored)
    again = CalibrationStats.load(old.save(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "stats.json").read_text())["format_version"] == 1
    for index, layer in old.layers.items():
        assert "norm_applied" in set(layer.tensors) and "max_element" not in set(layer.tensors)
        assert set(again.layers[index].tensors) == set(layer.tensors)
        assert all(torch.equal(again.layers[index].tensors[name], tensor) for name, tensor in layer.tensors.items())

    model, tokenizer = make_model(), make_tokenizer()
    one, two = (
        collect(model, CalibrationSet.build(t, tokenizer), set(Need)) for t in (make_texts(3), make_texts(4, seed=9))
    )
    assert json.loads((one.save(tmp_path / "new") / "stats.json").read_text())["format_version"] == 3
    layers = {
        i: replace(layer, tensors={n: t for n, t in layer.tensors.items() if n != "max_element"})
        for i, layer in two.layers.items()
    }
    for merged in (one.merge(replace(two, layers=layers)), replace(two, layers=layers).merge(one)):
        whole = one.merge(two)
        for index, layer in merged.layers.items():
            assert set(whole.layers[index].tensors) - set(layer.tensors) == {"max_element"}
        assert_same(merged, whole, rtol=0)
        assert_same(CalibrationStats.load(merged.save(tmp_path / "merged", overwrite=True)), whole, rtol=0)


def test_statistics_of_format_1_are_merged_as_such(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    parts = [
        collect(make_model(), CalibrationSet.build(texts, tokenizer), set(Need))
        for texts in (make_texts(3), make_texts(4, seed=9))
    ]
    old = []
    for part in parts:
        layers = {
            i: replace(layer, tensors={IN_FORMAT_1.get(name, name): t for name, t in layer.tensors.items()})
            for i, layer in part.layers.items()
        }
        old.append(CalibrationStats.load(replace(part, layers=layers).save(tmp_path / f"old{len(old)}")))
    merged = CalibrationStats.load(old[0].merge(old[1]).save(tmp_path / "merged"))
    whole = parts[0].merge(parts[1])
    for index, layer in merged.layers.items():
        for name, tensor in layer.tensors.items():
            new = {then: now for now, then in IN_FORMAT_1.items()}.get(name, name)
            assert torch.equal(tensor, whole.layers[index].tensors[new])
        assert "max_norm" in set(layer.tensors)
    assert json.loads((tmp_path / "merged" / "stats.json").read_text())["format_version"] == 1


def test_what_does_not_belong_together_is_not_merged(
    samples: CalibrationSet, tokenizer: PreTrainedTokenizerBase
) -> None:
    others = CalibrationSet.build(make_texts(4, seed=9), tokenizer)
    stats = collect(make_model(), samples, {Need.ROUTING})
    with pytest.raises(RequestError, match="12 samples are in both"):
        stats.merge(stats)
    with pytest.raises(RequestError, match=r"model is .* in one and .* in the other"):
        stats.merge(collect(make_model(seed=1), others, {Need.ROUTING}))
    with pytest.raises(RequestError, match=r"needs is .*'routing'"):
        stats.merge(collect(make_model(), others, {Need.ROUTING, Need.GRAM}))
    with pytest.raises(RequestError, match=r"logits is torch.float32 in one and torch.bfloat16 in the other"):
        coarse = collect(make_model().to(torch.bfloat16), others, {Need.ROUTING})
        stats.merge(replace(coarse, model=stats.model))
    with pytest.raises(RequestError, match="seed is 0 in one and 3 in the other"):
        stats.merge(collect(make_model(), others, {Need.ROUTING}, seed=3))
    with pytest.raises(RequestError, match="max_tokens is 8192 in one and all in the other"):
        stats.merge(collect(make_model(), others, {Need.ROUTING}, max_tokens="all"))


def test_domain_weights_set_the_share_of_tokens(samples: CalibrationSet) -> None:
    stats = collect(make_model(), samples, {Need.ROUTING})
    weighted = stats.with_domain_weights({"low": 3, "high": 1})
    layer = weighted.layers[0]
    table = layer.tensors["routed_tokens"]
    low = torch.tensor([s.domain == "low" for s in stats.samples])
    tokens = stats.domains
    total = sum(tokens.values())
    expected = table[low].sum(0) * (0.75 * total / tokens["low"]) + table[~low].sum(0) * (
        0.25 * total / tokens["high"]
    )
    torch.testing.assert_close(layer.total("routed_tokens"), expected)
    assert layer.total("routed_tokens").sum() == pytest.approx(total * layer.routing.top_k)
    assert torch.equal(stats.layers[0].total("routed_tokens"), table.sum(0)), "the original is as it was"


@pytest.mark.parametrize(
    "weights",
    [
        {"low": 1},
        {"low": 1, "high": 0},
        {"low": 1, "high": 1, "mid": 1},
        {"low": 1, "high": float("inf")},
        {"low": 1, "high": "2"},
    ],
)
def test_wrong_domain_weights_are_refused(samples: CalibrationSet, weights: dict[str, float]) -> None:
    stats = collect(make_model(), samples, {Need.ROUTING})
    with pytest.raises(RequestError, match=r"a positive number for each domain of the calibration \(high, low\)"):
        stats.with_domain_weights(weights)


def test_what_a_method_lacks_is_named(samples: CalibrationSet) -> None:
    stats = collect(make_model(), samples, {Need.ROUTING})
    with pytest.raises(RequestError, match="'reap' needs the statistics routed_norms, and these hold routing"):
        build_plan(stats, MoEPrunerConfig(method="reap", num_experts=4))


@pytest.fixture
def saved(samples: CalibrationSet, tmp_path: Path) -> Path:
    return collect(make_model(), samples, {Need.ROUTING}).save(tmp_path / "stats")


def edit(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "stats.json").read_text())
    (folder / "stats.json").write_text(json.dumps(header | changes))


def test_a_newer_format_is_refused(saved: Path) -> None:
    edit(saved, format_version=99)
    with pytest.raises(RequestError, match="format version 99; this package reads up to 3"):
        CalibrationStats.load(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": [{"hash": 1}]},
        {"needs": ["routing", "gram"]},
        {"needs": ["telepathy"]},
        {
            "layers": {
                "0": {"num_experts": 10**12, "routing": {"top_k": 2, "renormalise": True, "cast_weights": False}}
            }
        },
        {"layers": {"../../x": {"num_experts": 8, "routing": {}}}},
        {"layers": []},
        {"samples": []},
        {"model": 3},
        {"model": {"model_type": "mixtral", "top_k": "2", "fingerprint": ""}},
        {"model": {"model_type": "mixtral", "top_k": 3, "fingerprint": ""}},
        {"provenance": [1]},
        {"seed": "0"},
        {"model": None, "provenance": None, "max_tokens": None, "samples": None},
    ],
)
def test_damaged_headers_are_refused(saved: Path, changes: dict[str, object]) -> None:
    edit(saved, **changes)
    with pytest.raises(RequestError, match="are damaged"):
        CalibrationStats.load(saved)


def test_damaged_files_are_refused(saved: Path) -> None:
    layer = saved / "layer_00001.safetensors"
    content = layer.read_bytes()
    layer.write_bytes(content[: len(content) // 2])
    with pytest.raises(RequestError, match="are damaged"):
        CalibrationStats.load(saved)
    layer.unlink()
    with pytest.raises(RequestError, match="are damaged"):
        CalibrationStats.load(saved)
    (saved / "stats.json").write_text("{" * 100_000)
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        CalibrationStats.load(saved)
    (saved / "stats.json").unlink()
    with pytest.raises(RequestError, match=r"holds no calibration statistics \(stats.json is missing\)"):
        CalibrationStats.load(saved)


def test_an_output_in_the_way_stays_as_it_is(samples: CalibrationSet, tmp_path: Path) -> None:
    stats = collect(make_model(), samples, {Need.ROUTING})
    target = tmp_path / "stats"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(RequestError, match="exists and is not empty"):
        stats.save(target)
    with pytest.raises(RequestError, match="holds something else than an output of this package"):
        stats.save(target, overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["stats", "mine.txt"]
    (target / "mine.txt").unlink()
    stats.save(target)
    (target / "later").touch()
    with pytest.raises(RequestError, match="it has later, which this package did not write"):
        stats.save(target, overwrite=True)
    (target / "later").unlink()
    stats.save(target, overwrite=True)
    assert (target / "stats.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]
