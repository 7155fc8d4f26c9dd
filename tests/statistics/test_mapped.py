# SPDX-License-Identifier: Apache-2.0
"""Tensors of statistics where they lie: the same values, nothing written, and large ones read no other way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import softmax_rule
from synthetic import random_statistics

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig, RequestError
from optimum_moe_prune.planning.build import quiet_plan
from optimum_moe_prune.statistics.files import LayerFile
from optimum_moe_prune.statistics.mapped import mapped

LARGE = ("gram", "inputs", "coactivation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics") / "all"
    stats = random_statistics(softmax_rule(2), 3, 8)
    for index, layer in stats.layers.items():
        lacks = {"token_dense_norm": torch.ones(120, 8), "token_output_energy": torch.ones(120, 1)}
        stats.layers[index] = replace(layer, tensors={**lacks, **layer.tensors})
    return stats.save(folder)


def test_a_mapped_tensor_is_the_one_in_the_file(folder: Path) -> None:
    stats = CalibrationStats.load(folder)
    for layer in stats.layers.values():
        for name in layer.tensors:
            found = mapped(layer.tensors, name)
            assert torch.equal(found, layer.tensors[name]) and found.dtype == layer.tensors[name].dtype
        mapped(layer.tensors, "gram").zero_()  # a copy of its own is written to
        assert layer.tensors["gram"].any()
        with pytest.raises(KeyError):
            mapped(layer.tensors, "nothing")
    in_memory = {"gram": torch.ones(2)}
    assert mapped(in_memory, "gram") is in_memory["gram"]


def test_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    whole = folder / "layer_00000.safetensors"
    short = tmp_path / "short.safetensors"
    short.write_bytes(whole.read_bytes()[:-8])
    for path, said in ((short, "damaged"), (tmp_path / "none.safetensors", "missing")):
        with pytest.raises(RequestError, match=said):
            mapped(LayerFile(path, ("gram",)), "gram")
    with pytest.raises(RequestError, match="it lacks 'norms'"):
        mapped(LayerFile(whole, ("norms",)), "norms")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mosaic", {}),
        ("mosaic", {"num_generalists": 2, "num_domains": "auto"}),
        ("enumeration", {}),
        ("enumeration", {"search": "greedy"}),
        ("pathfinder", {"transitions": "conditional"}),
    ],
    ids=str,
)
def test_no_plan_has_a_large_tensor_in_memory(
    folder: Path, method: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = MoEPrunerConfig(method=method, sparsity=0.5, method_options=options)
    stats = CalibrationStats.load(folder)
    in_memory = {i: replace(layer, tensors=dict(layer.tensors)) for i, layer in stats.layers.items()}
    expected = quiet_plan(replace(stats, layers=in_memory), recipe)
    read = LayerFile.__getitem__

    def reading(tensors: LayerFile, name: str) -> torch.Tensor:
        assert name not in LARGE
        return read(tensors, name)

    monkeypatch.setattr(LayerFile, "__getitem__", reading)
    assert quiet_plan(stats, recipe).retained == expected.retained
