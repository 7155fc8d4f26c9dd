# SPDX-License-Identifier: Apache-2.0
"""One decoder layer in memory gives what the whole model gives, to the bit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from conftest import load, make_model, make_texts, save_checkpoint
from oracles import assert_identical, calibrated, layout_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import optimum_moe_prune.calibration.calibrate as calibrating
import optimum_moe_prune.models.memory as memory
import optimum_moe_prune.storage.growing as growing
from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    RequestError,
    RunError,
    list_methods,
)
from optimum_moe_prune.architectures.fingerprint import same_routers
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.calibration.streamed import collect_streamed as collect_skeleton
from optimum_moe_prune.checkpoints.checkpoint import SINGLE_FILE
from optimum_moe_prune.checkpoints.layout import Layout, model_dtype
from optimum_moe_prune.models.memory import available_memory
from optimum_moe_prune.models.skeleton import Skeleton, _ReadAhead
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.statistics.needs import OF_A_FORWARD_PASS
from optimum_moe_prune.storage.growing import Store


def collect_streamed(
    layout: Layout, samples: CalibrationSet, needs: Iterable[Need], dtype: str = "auto", **settings: object
) -> CalibrationStats:
    skeleton = Skeleton(layout, model_dtype(layout.config, layout.checkpoint, dtype))
    return collect_skeleton(skeleton, samples, needs, **settings)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_same_statistics_to_the_bit(
    folder: Path, samples: CalibrationSet, batch_size: int, dtype: str, tmp_path: Path
) -> None:
    settings = {"batch_size": batch_size, "max_tokens": 70, "seed": 3}
    expected = collect(load(folder, dtype=dtype), samples, Need, **settings)
    layout = layout_of(folder)
    for store in (Store(), Store(tmp_path / "kept")):
        found = collect_streamed(layout, samples, Need, **settings, dtype=dtype, store=store)
        if dtype == "auto":
            assert_identical(found, expected)
        else:  # the model in memory was loaded in another precision, and so are its routers
            assert found.model["fingerprint"] == layout.fingerprints()["fingerprint"]
            assert_identical(found, CalibrationStats(**{**vars(expected), "model": found.model}))
        assert found.provenance["dtype"] == expected.provenance["dtype"]


@pytest.mark.parametrize("needs", [{Need.ROUTING}, {Need.ROUTING, Need.ROUTED_NORMS}, {Need.COACTIVATION}])
def test_every_class_of_cost(folder: Path, samples: CalibrationSet, needs: set[Need]) -> None:
    assert_identical(collect_streamed(layout_of(folder), samples, needs), collect(load(folder), samples, needs))


@pytest.mark.parametrize("settings", [{"save_original_format": False}, {"max_shard_size": "20KB"}])
def test_fused_and_sharded_files(
    kind: str, settings: dict[str, object], samples: CalibrationSet, tmp_path: Path
) -> None:
    make_model(kind).save_pretrained(tmp_path / "model", **settings)
    found = collect_streamed(layout_of(tmp_path / "model"), samples, Need)
    assert_identical(found, collect(load(tmp_path / "model"), samples, Need))


def test_sliding_windows_and_unequal_layers(samples: CalibrationSet, tmp_path: Path) -> None:
    make_model(sliding_window=5).save_pretrained(tmp_path / "model")
    pruner = MoEPruner.from_pretrained(tmp_path / "model", method="random", sparsity=0.3, allocation="global", seed=2)
    pruner.prune_checkpoint(tmp_path / "unequal")
    assert pruner.pruning_plan is not None and pruner.pruning_plan.uniform_num_experts is None
    for name in ("model", "unequal"):
        found = collect_streamed(layout_of(tmp_path / name), samples, Need)
        assert_identical(found, collect(load(tmp_path / name), samples, Need))


def test_every_method_plans_the_same(folder: Path, samples: CalibrationSet) -> None:
    a, b = collect(load(folder), samples, Need), collect_streamed(layout_of(folder), samples, Need)
    for method in set(list_methods()) - {"auto"}:
        config = MoEPrunerConfig(method=method, sparsity=0.4)
        assert build_plan(a, config).retained == build_plan(b, config).retained


def test_one_layer_is_in_memory(folder: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    resident: list[list[str]] = []
    forward = Skeleton.forward

    def watching(self: Skeleton, index: int, *args: object) -> torch.Tensor:
        resident.append([name for name, p in self.model.named_parameters() if not p.is_meta])
        expected = {name for name, _ in self.model.named_parameters() if f".layers.{index}." in name}
        assert set(resident[-1]) == expected | {"model.norm.weight"}
        return forward(self, index, *args)

    monkeypatch.setattr(Skeleton, "forward", watching)
    collect_streamed(layout_of(folder), samples, {Need.ROUTING})
    assert len(resident) == 3 * samples.num_batches(8)


def test_nothing_but_files_when_memory_is_bounded(
    folder: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept beyond the bound lies in files without names; the numbers are the same."""
    expected = collect(load(folder), samples, Need)
    monkeypatch.setattr(growing, "IN_MEMORY_BYTES", 0)
    first, second = Store(), Store()
    assert_identical(collect(load(folder), samples, Need, store=first), expected)
    assert_identical(collect_streamed(layout_of(folder), samples, Need, store=second), expected)
    assert first.spilled and second.spilled


def test_in_memory_up_to_the_bound(folder: Path, samples: CalibrationSet) -> None:
    store = Store()
    collect(load(folder), samples, Need, store=store)
    assert not store.spilled


# ------------------------------------------------------------------------------------------- which way


def test_the_way_is_chosen_by_memory(
    folder: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layout = layout_of(folder)
    assert 2**20 < available_memory("cpu") < 2**50
    for free, streamed in ((2**50, False), (1000, True)):
        monkeypatch.setattr(memory, "available_memory", lambda _, free=free: free)
        with caplog.at_level(logging.WARNING):
            stats = calibrated(layout, samples, {Need.ROUTING})
        assert stats.provenance["streamed"] is streamed
        assert ("so one layer is held at a time (stream=True)" in caplog.text) is streamed
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a whole model"))
        assert calibrated(layout, samples, {Need.ROUTING}, stream=True).provenance["streamed"]
        monkeypatch.undo()


def test_a_container_has_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = available_memory("cpu")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
    assert abs(available_memory("cpu") - free) < free / 2
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")  # another system: accelerate knows
    assert abs(available_memory("cpu") - free) < free / 2
    (tmp_path / "memory.max").write_text("3000\n")
    assert available_memory("cpu") == 2000


def test_the_pruner_streams(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEPrunerConfig(method="mosaic", num_experts=4)
    whole = MoEPruner.from_pretrained(folder, config)
    whole.prune_checkpoint(tmp_path / "whole", calibration=make_texts(), stream=False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a whole model"))
    streamed = MoEPruner.from_pretrained(folder, config)
    streamed.prune_checkpoint(tmp_path / "streamed", calibration=make_texts(), stream=True)
    assert streamed.pruning_plan is not None and whole.pruning_plan is not None
    assert streamed.pruning_plan.retained == whole.pruning_plan.retained
    assert (tmp_path / "streamed" / SINGLE_FILE).read_bytes() == (tmp_path / "whole" / SINGLE_FILE).read_bytes()
    stats = MoEPruner.from_pretrained(folder, config).calibrate(calibration=make_texts(), stream=True)
    assert stats.provenance["streamed"]


# ------------------------------------------------------------------------------------------- damage


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


def test_missing_and_misshapen_tensors_are_named_before_long_work(
    folder: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Skeleton, "embedded", lambda *_: pytest.fail("work began"))
    name = "model.layers.1.self_attn.k_proj.weight"
    edited(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(RequestError, match=f"{SINGLE_FILE}: {name} has shape .* and config.json says"):
        collect_streamed(layout_of(folder), samples, {Need.ROUTING})
    edited(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(RequestError, match=f"lacks {name}; the checkpoint is damaged"):
        collect_streamed(layout_of(folder), samples, {Need.ROUTING})


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
@pytest.mark.parametrize("end", [".1.self_attn.k_proj.weight", ".2.{}.experts.5.{}.weight", ".0.{}.gate.weight"])
def test_weights_that_are_not_finite_are_named(
    end: str, streamed: bool, folder: Path, kind: str, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = end.format(*(("block_sparse_moe", "w2") if kind == "mixtral" else ("mlp", "down_proj")))
    name = f"model.layers{end}"
    edited(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(float("nan")))
    if end.endswith("gate.weight"):
        monkeypatch.setattr(Skeleton, "embedded", lambda *_: pytest.fail("work began"))
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(RunError, match=f"{SINGLE_FILE}: {name} holds NaN or infinite weights"):
        calibrated(layout_of(folder), samples, {Need.ROUTING}, stream=streamed)


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_both_ways_refuse_what_is_missing(
    streamed: bool, folder: Path, samples: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fill what is missing with random numbers, and a layer without experts could be dense."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("work began"))
    whole = load_file(folder / SINGLE_FILE)
    edited(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(RequestError, match=r"lacks model.layers.1.self_attn.k_proj.weight"):
        calibrated(layout_of(folder), samples, {Need.ROUTING}, stream=streamed)
    without = {n: t for n, t in whole.items() if ".layers.2." not in n or not (".experts." in n or ".gate." in n)}
    save_file(without, folder / SINGLE_FILE, metadata={"format": "pt"})
    for method in ("random", "reap"):
        pruner = MoEPruner.from_pretrained(folder, method=method, num_experts=4)
        with pytest.raises(RequestError, match=r"layer 2 of .* has experts, and the files hold none"):
            pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts(), stream=streamed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_cannot_be_written_is_refused_before_the_calibration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "calibrate", lambda *_, **__: pytest.fail("work began"))
    pruner = MoEPruner.from_pretrained(folder, method="reap", num_experts=4)
    edited(folder, lambda tensors: tensors.update({"mtp.layers.0.mlp.experts.0.w1": torch.ones(2)}))
    with pytest.raises(RequestError, match=r"mtp.layers.0.mlp.experts.0.w1 .* are experts outside the model's layers"):
        pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts())
    edited(folder, lambda tensors: tensors.pop("mtp.layers.0.mlp.experts.0.w1"))
    usage = shutil.disk_usage(tmp_path)
    size = (folder / SINGLE_FILE).stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    with pytest.raises(RequestError, match="make room, or name a folder on another disk"):
        pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_tied_weights_and_the_bare_decoder(kind: str, samples: CalibrationSet, tmp_path: Path) -> None:
    model = make_model(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    model.base_model.save_pretrained(tmp_path / "bare")
    for name in ("tied", "bare"):
        needs = set(Need) if name == "tied" else OF_A_FORWARD_PASS  # a decoder predicts nothing
        found = collect_streamed(layout_of(tmp_path / name), samples, needs)
        expected = collect(load(tmp_path / "tied"), samples, needs)
        assert found.model["fingerprint"] == expected.model["fingerprint"]
        assert_identical(CalibrationStats(**{**vars(found), "model": expected.model}), expected)


def test_one_kept_token_and_one_expert(samples: CalibrationSet, tmp_path: Path) -> None:
    make_model(num_local_experts=1, num_experts_per_tok=1).save_pretrained(tmp_path / "model")
    found = collect_streamed(layout_of(tmp_path / "model"), samples, Need, max_tokens=1)
    assert_identical(found, collect(load(tmp_path / "model"), samples, Need, max_tokens=1))
    assert len(found.token_sample) == 1


def test_wrong_tokens(folder: Path) -> None:
    wrong = CalibrationSet.build([torch.tensor([5, 96])])
    with pytest.raises(RequestError, match="token id 96 is outside the model's vocabulary of 96"):
        collect_streamed(layout_of(folder), wrong, {Need.ROUTING})


def test_reading_ahead_changes_nothing(folder: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    ahead = _ReadAhead.read
    monkeypatch.setattr(_ReadAhead, "read", lambda self, names: (read.extend(names), ahead(self, names))[1])
    layout = layout_of(folder)
    assert_identical(
        collect_streamed(layout, samples, {Need.ROUTING}),
        collect_streamed(layout, samples, {Need.ROUTING}, read_ahead=False),
    )
    assert set(read) == {name for name in layout.checkpoint.tensors if ".layers.1." in name or ".layers.2." in name}


def test_precision_of_the_files_is_the_configs(
    tokenizer: PreTrainedTokenizerBase, samples: CalibrationSet, tmp_path: Path
) -> None:
    """Files in float32, a config that says bfloat16: from_pretrained rounds, and so does the stream."""
    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer, torch.float32)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "dtype": "bfloat16"}))
    found = collect_streamed(layout_of(folder), samples, Need)
    assert found.provenance["dtype"] == "bfloat16"
    expected = collect(load(folder), samples, Need)
    assert same_routers(found.model, expected.model)  # in the files they are not rounded
    assert_identical(CalibrationStats(**{**vars(found), "model": expected.model}), expected)
    values.pop("dtype")
    (folder / "config.json").write_text(json.dumps(values))
    assert_identical(collect_streamed(layout_of(folder), samples, Need), collect(load(folder), samples, Need))
