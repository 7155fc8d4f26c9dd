# SPDX-License-Identifier: Apache-2.0
"""Distillation with one layer in memory: the steps of a model in memory, and what is interrupted goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import make_model, make_texts, make_tokenizer
from transformers import PreTrainedModel

from optimum_moe_prune import CalibrationSet
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.models.memory import Compute
from optimum_moe_prune.models.skeleton import Skeleton
from optimum_moe_prune.recovery import cost
from optimum_moe_prune.recovery.distil import distil
from optimum_moe_prune.recovery.distil_streamed import distil_streamed
from optimum_moe_prune.recovery.masters import Master
from optimum_moe_prune.recovery.split import Split, split_samples
from optimum_moe_prune.recovery.steps import Distilled, DistilOptions
from optimum_moe_prune.recovery.teacher import TeacherOutputs, teacher_outputs
from optimum_moe_prune.storage.workspace import Workspace

FEW = DistilOptions(steps=3, tokens=60, check_every=2, warm_up=0, batch_size=4)


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "probe", lambda *args: None)


def split() -> Split:
    return split_samples(CalibrationSet.build(make_texts(16), make_tokenizer()))


def taught(model: PreTrainedModel) -> TeacherOutputs:
    return teacher_outputs(LayerByLayer(model), CalibrationSet.build(make_texts(16), make_tokenizer()))


def streamed(
    folder: Path, teacher: TeacherOutputs, options: DistilOptions = FEW, workspace: Workspace = Workspace()
) -> Distilled:
    parts = split()
    return distil_streamed(
        open_layout(folder), parts.fit, parts.held_back, teacher, options=options, compute=Compute(stream=True),
        workspace=workspace,
    )  # fmt: skip


def assert_same(a: Distilled, b: Distilled) -> None:
    torch.testing.assert_close(a.looks, b.looks, atol=1e-6, rtol=1e-5)
    assert (a.best, a.steps, a.rank, a.numbers, a.notes) == (b.best, b.steps, b.rank, b.numbers, b.notes)
    assert a.shares.keys() == b.shares.keys()
    for layer, changes in a.shares.items():
        assert changes == pytest.approx(b.shares[layer], rel=1e-5)
    assert set(a.tensors) == set(b.tensors) and len(a.tensors) == len(b.tensors) > 0
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype
        torch.testing.assert_close(tensor, b.tensors[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), [("mixtral", 2), ("qwen2_moe", 0)])
def test_steps_are_those_in_memory(kind: str, rank: int, tmp_path: Path) -> None:
    model, parts = make_model(kind), split()
    teacher = taught(model)
    for block in moe_blocks(model):
        block.retain([0, 2, 4, 5])
    setattr(model.config, "num_local_experts" if kind == "mixtral" else "num_experts", 4)
    model.save_pretrained(tmp_path)
    options = DistilOptions(**{**vars(FEW), "rank": rank})
    in_memory = distil(model, parts.fit, parts.held_back, teacher, options=options)
    assert_same(streamed(tmp_path, teacher, options), in_memory)


def test_layers_that_hand_on_what_they_looked_at(tmp_path: Path) -> None:
    """States are bytes then, through which no gradient goes."""
    model, parts = tiny_model("glm_moe_dsa"), split()
    teacher = taught(tiny_model("glm_moe_dsa", seed=1))
    model.save_pretrained(tmp_path)
    options = DistilOptions(steps=1, tokens=60, check_every=1, warm_up=0)
    assert_same(
        streamed(tmp_path, teacher, options), distil(model, parts.fit, parts.held_back, teacher, options=options)
    )


def test_it_is_rounded_to_the_precision_of_the_checkpoint(tmp_path: Path) -> None:
    model, parts = make_model().to(torch.bfloat16), split()
    model.save_pretrained(tmp_path)
    teacher = taught(make_model(seed=1))
    options = DistilOptions(steps=1, tokens=60, check_every=1, warm_up=0)
    found = distil_streamed(
        open_layout(tmp_path), parts.fit, parts.held_back, teacher, options=options, compute=Compute("float32")
    )
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("unreached", [None, "norms"])
def test_it_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreached: str | None
) -> None:
    """With the same to say of what no gradient reached."""
    value = Master.value
    monkeypatch.setattr(Master, "value", lambda m: value(m).detach() if m.trained.role == unreached else value(m))
    model = make_model()
    teacher = taught(make_model(seed=1))
    model.save_pretrained(tmp_path / "model")
    options = DistilOptions(**{**vars(FEW), "check_every": 1})
    expected = streamed(tmp_path / "model", teacher, options)
    assert expected.best and any("'norms' stayed as they were" in note for note in expected.notes) == bool(unreached)
    workspace = Workspace(tmp_path / "work")
    real = Skeleton.traced
    calls = 0

    def interrupted(after: int) -> None:
        """Begin, or go on, and stop in the middle of a layer's gradients."""

        def traced(self: Skeleton, index: int, *args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == after:
                raise KeyboardInterrupt
            return real(self, index, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Skeleton, "traced", traced)
        with pytest.raises(KeyboardInterrupt):
            streamed(tmp_path / "model", teacher, options, workspace)

    interrupted(after=5)
    interrupted(after=10)
    found = streamed(tmp_path / "model", teacher, options, workspace)
    assert_same(found, expected)
    calls = 0
    assert_same(streamed(tmp_path / "model", teacher, options, workspace), expected)
    assert not calls  # it was finished
    with pytest.raises(RequestError, match="check_every is 1 there and 2 now"):
        streamed(tmp_path / "model", teacher, FEW, workspace)


def test_what_it_takes_is_said_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, parts = make_model(), split()
    model.save_pretrained(tmp_path)
    layout = open_layout(tmp_path)
    found = cost.streamed_cost(layout, parts.fit, parts.held_back, FEW, Compute(stream=True))
    assert (found.steps, found.reads, found.seconds) == (3, 7 * layout.checkpoint.nbytes, None)
    assert "3 steps of about 60 tokens" in found.sentence()
    with caplog.at_level(logging.INFO):
        streamed(tmp_path, taught(model))
    sentence = found.sentence().partition("; files")[0]  # what is kept of what is trained is known later
    assert any(sentence in message for message in caplog.messages)
