# SPDX-License-Identifier: Apache-2.0
"""Statistics of heads for further tokens (MTP): those of one more layer, run as transformers runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import aligned, make_texts
from heads import (
    HEAD,
    LAYERS,
    checkpoint,
    heads_of_tiny_models,  # noqa: F401  # a fixture
    loaded,
    transformers_head,
    two_heads,
)
from oracles import assert_identical, assert_same, calibrated
from transformers import PreTrainedTokenizerFast

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPruner, MoEPrunerConfig, Need, PruningPlan
from optimum_moe_prune.calibration.calibrate import calibrate
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.evaluation.measure_sensitivity import measure_sensitivity
from optimum_moe_prune.methods import list_methods
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.publishing.report import write_report
from optimum_moe_prune.storage.growing import Store


@pytest.fixture(params=list(HEAD))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    return checkpoint(kind, tmp_path / "model", loads=False)


@pytest.mark.usefixtures("heads_of_tiny_models")
def test_what_is_gathered_is_what_the_head_computes(kind: str, tmp_path: Path, samples: CalibrationSet) -> None:
    """Token by token, through the head as transformers loads it."""
    folder = checkpoint(kind, tmp_path / "model")
    stats = calibrated(open_layout(folder), samples, "all", stream=False)
    assert sorted(stats.layers) == sorted({**open_layout(folder).layers, LAYERS: None})
    assert [n for n, layer in stats.layers.items() if layer.is_head] == [LAYERS]
    model = loaded(folder)
    head = transformers_head(model)
    block = head.layers[0].mtp_block.mlp
    tensors = stats.layers[LAYERS].tensors
    kept = list(zip(stats.token_sample.tolist(), stats.token_position.tolist(), strict=True))
    for number, ids in enumerate(samples.token_ids):
        seen: list[torch.Tensor] = []
        handle = block.register_forward_pre_hook(lambda _m, inputs, seen=seen: seen.append(inputs[0][0]))
        with torch.no_grad():
            hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1]
            following = torch.cat([ids[1:], ids[:1]])[None]  # at its end a sample is followed by its beginning
            positions = torch.arange(1, len(ids) + 1)[None]
            head.forward_layer(0, hidden, positions, None, input_ids=following)
        handle.remove()
        rows = [row for row, (sample, _) in enumerate(kept) if sample == number]
        places = [position for sample, position in kept if sample == number]
        torch.testing.assert_close(tensors["inputs"][rows], seen[0][places], rtol=1e-4, atol=1e-4)
        assert int(tensors["routed_tokens"][number].sum()) == 3 * len(ids)


def test_streamed_and_in_memory_and_continued(folder: Path, tmp_path: Path, samples: CalibrationSet) -> None:
    layout = open_layout(folder)
    whole = calibrated(layout, samples, "all", stream=False)
    streamed = calibrated(layout, samples, "all", stream=True)
    assert LAYERS in streamed.layers and streamed.layers[LAYERS].is_head
    assert_same(streamed, whole, rtol=1e-4)

    commit = Store.commit

    class Stop(Exception):
        pass

    for after in (LAYERS - 1, LAYERS, LAYERS + 1):  # before the last layer, before the head, at the end

        def stop(self: Store, finished: int, *whole: Any, after: int = after) -> None:
            commit(self, finished, *whole)
            if finished == after:
                raise Stop

        work = tmp_path / f"work{after}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(Store, "commit", stop)
            calibrated(layout, samples, "all", stream=True, folder=work)
        continued = calibrated(layout, samples, "all", stream=True, folder=work)
        assert_identical(continued, streamed)


@pytest.mark.parametrize("stream", [False, True])
def test_in_a_wider_precision_than_the_files(
    stream: bool, tmp_path: Path, samples: CalibrationSet, multiplied: Callable[[float], None]
) -> None:
    """The head's layer as well, on embeddings that are widened for it."""
    layout = open_layout(checkpoint("deepseek_v3", tmp_path / "model", torch.bfloat16))
    expected = calibrated(layout, samples, "all", stream=stream, dtype="float32")
    multiplied(12.0)
    found = calibrated(layout, samples, "all", stream=stream)
    assert found.provenance["dtype"] == "float32" and found.layers[LAYERS].is_head
    assert found.layers.keys() == expected.layers.keys()
    assert_same(found, expected, 2e-3)


def test_a_quantised_head_is_read_as_plain_numbers(tmp_path: Path, samples: CalibrationSet) -> None:
    plain = checkpoint("deepseek_v3", tmp_path / "model")  # and beside it the one it was made of
    for stream in (False, True):
        stats, expected = (
            calibrated(open_layout(folder), samples, "all", stream=stream, dtype="float32")
            for folder in (tmp_path / "quantised", plain)
        )
        assert stats.of_heads is not None and expected.of_heads is not None
        assert_same(stats.of_heads, expected.of_heads, rtol=1e-4)


def test_two_heads(tmp_path: Path, samples: CalibrationSet) -> None:
    layout = open_layout(two_heads(tmp_path / "model"))
    whole, streamed = (calibrated(layout, samples, "all", stream=stream) for stream in (False, True))
    assert whole.of_heads is not None and sorted(whole.of_heads.layers) == [4, 5]
    assert_same(streamed, whole, rtol=1e-4)
    assert build_plan(whole, MoEPrunerConfig(method="enumeration", num_experts=8)).heads == (4, 5)


def test_the_model_is_calibrated_as_without_heads(folder: Path, samples: CalibrationSet) -> None:
    stats = calibrated(open_layout(folder), samples, "all", stream=False)
    memory = calibrate(aligned(loaded(folder)), samples)
    assert not memory.of_heads
    assert_same(stats.without_heads, memory, rtol=1e-4)


def test_files_and_merging(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    layout = open_layout(folder)
    texts = make_texts()
    halves = [CalibrationSet.build(part, tokenizer) for part in (texts[::2], texts[1::2])]
    a, b = (calibrated(layout, half, "all", stream=False) for half in halves)
    a.save(tmp_path / "a")
    again = CalibrationStats.load(tmp_path / "a")
    assert again.layers[LAYERS].is_head and not again.layers[LAYERS - 1].is_head
    assert a.merge(b).layers[LAYERS].is_head


@pytest.mark.parametrize("method", sorted(set(list_methods()) - {"auto", "random"}))
def test_every_method_plans_a_head_by_itself(method: str, folder: Path, samples: CalibrationSet) -> None:
    stats = calibrated(open_layout(folder), samples, ["all", Need.FISHER], stream=False)
    config = MoEPrunerConfig(method=method, num_experts=8, allocation="uniform")
    plan = build_plan(stats, config)
    assert plan.heads == (LAYERS,) and len(plan.retained[LAYERS]) == 8
    without = build_plan(stats.without_heads, config)
    assert without.retained == plan.without_heads.retained and without.scores == plan.without_heads.scores
    if plan.scores is not None:
        assert len(plan.scores[LAYERS]) == 12
    for mtp in ("keep", "drop"):
        assert build_plan(stats, MoEPrunerConfig(**{**config.to_dict(), "mtp": mtp})).retained == without.retained


@pytest.mark.parametrize("stream", [False, True])
def test_from_texts_to_a_pruned_checkpoint(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, stream: bool
) -> None:
    pruner = MoEPruner(MoEPrunerConfig(method="reap", num_experts=8), source=folder, tokenizer=tokenizer)
    pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts(), stream=stream)
    plan = PruningPlan.load(tmp_path / "out")
    assert plan.retained[LAYERS] == pruner.pruning_plan.retained[LAYERS] and plan.scores[LAYERS]
    assert not [note for note in plan.provenance["notes"] if "without statistics" in note]
    assert "pruned in the same way" in (tmp_path / "out" / "README.md").read_text()
    head = open_layout(tmp_path / "out").heads[0]
    assert head.layer.num_experts == 8 and not head.problem


def test_reports_and_sensitivities_are_of_the_layers(folder: Path, tmp_path: Path, samples: CalibrationSet) -> None:
    stats = calibrated(open_layout(folder), samples, "all", stream=False)
    recipe = MoEPrunerConfig(method="reap", num_experts=8, sensitivity_samples=2)
    sensitivity = measure_sensitivity(folder, samples, [recipe], stats, counts=[8], sparsities=())
    assert LAYERS not in sensitivity.methods["reap"].layers
    by_sensitivity = MoEPrunerConfig(method="reap", num_experts=10, allocation="sensitivity")
    assert not build_plan(stats, by_sensitivity, sensitivity=sensitivity).heads
    plans = {"reap": build_plan(stats, recipe), "kept": build_plan(stats, MoEPrunerConfig("reap", 8, mtp="keep"))}
    write_report(tmp_path / "report.html", stats=stats, plans=plans)
    assert "8 of 12" in (tmp_path / "report.html").read_text()


def test_a_head_that_cannot_be_run(tmp_path: Path, samples: CalibrationSet, caplog: pytest.LogCaptureFixture) -> None:
    """It is said before the calibration, which goes on without it."""
    from architectures.published import read
    from architectures.published_formats import write
    from heads import config_of

    whole = checkpoint("qwen3_5", tmp_path / "whole")
    tensors = read(whole)
    del tensors["mtp.fc.weight"]
    folder = write(tmp_path / "model", tensors, config_of(whole))
    stats = calibrated(open_layout(folder), samples, "all", stream=False)
    assert not stats.of_heads and "eh_proj" in stats.provenance["heads_left_out"]
    assert "heads for further tokens are not calibrated" in caplog.text


def test_an_older_transformers_is_named(
    tmp_path: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers 5.14 has no ``MtpModel.forward_layer``; the model itself is calibrated all the same."""
    from transformers.modeling_layers import MtpModel

    monkeypatch.delattr(MtpModel, "forward_layer", raising=False)
    folder = checkpoint("deepseek_v3", tmp_path / "model")
    stats = calibrated(open_layout(folder), samples, "all")
    assert stats.layers and not stats.of_heads
    assert "cannot run heads alone; 5.23 can" in caplog.text
