# SPDX-License-Identifier: Apache-2.0
"""What the original predicts: kept once, whole or its top, in memory or layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, make_model
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe_prune import CalibrationSet
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.errors import RequestError, RunError
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.models.memory import Compute, open_skeleton
from optimum_moe_prune.models.skeleton import Skeleton
from optimum_moe_prune.recovery import teacher
from optimum_moe_prune.recovery.teacher import Targets, teacher_outputs
from optimum_moe_prune.storage.workspace import Workspace


@torch.no_grad()
def log_p(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The log-probabilities of the predicted tokens of a sample ``(T - 1, V)``."""
    return torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), dim=1)


def skeleton(folder: Path) -> Skeleton:
    layout = open_layout(folder)
    return open_skeleton(layout, Compute(stream=True).settled(layout))


def test_a_small_vocabulary_is_kept_whole(samples: CalibrationSet) -> None:
    model, other = make_model(), make_model(seed=1)
    found = teacher_outputs(LayerByLayer(model), samples, batch_size=3)
    assert found.is_whole and found.vocab_size == VOCABULARY
    for batch in samples.batches(5):
        targets = found.of(samples, batch)
        numbers = batch.samples.tolist()
        expected = torch.cat([log_p(model, samples.token_ids[n]) for n in numbers])
        torch.testing.assert_close(targets.log_p.double(), expected, atol=1e-5, rtol=0)
        theirs = torch.cat([log_p(other, samples.token_ids[n]) for n in numbers])
        kl = (expected.exp() * (expected - theirs)).sum(1)
        torch.testing.assert_close(targets.kl(theirs.float()).double(), kl, atol=1e-5, rtol=1e-5)


def test_of_a_large_one_the_top_and_all_others_together(
    samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "FULL_VOCABULARY", 8)
    monkeypatch.setattr(teacher, "TOP", 8)
    monkeypatch.setattr(teacher.teacher_shapes, "__defaults__", (8,))
    model, other = make_model(), make_model(seed=1)
    found = teacher_outputs(LayerByLayer(model), samples)
    assert not found.is_whole
    (batch,) = samples.picked([4]).batches(1)
    targets = found.of(samples.picked([4]), batch)
    p, q = (log_p(m, samples.token_ids[4]).exp() for m in (model, other))
    top = p.argsort(1, descending=True)[:, :8]
    coarse = [torch.cat([m.gather(1, top), 1 - m.gather(1, top).sum(1, keepdim=True)], 1) for m in (p, q)]
    expected = (coarse[0] * (coarse[0] / coarse[1]).log()).sum(1)
    torch.testing.assert_close(targets.kl(q.log().float()).double(), expected, atol=1e-4, rtol=1e-4)


def test_the_top_of_everything_is_everything() -> None:
    p, logits = torch.log_softmax(torch.randn(5, 20) * 3, 1), torch.randn(5, 20)
    values, ids = p.topk(20, dim=1)
    certain = torch.full((5,), -torch.inf)  # what all others have: there are none
    torch.testing.assert_close(Targets(values, ids, certain).kl(logits), Targets(p).kl(logits))
    leaf = logits.requires_grad_()
    Targets(values, ids, certain).kl(leaf).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    torch.testing.assert_close(leaf.grad, logits.softmax(1) - p.exp())


def test_streamed_continued_and_in_memory_are_one(
    samples: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("qwen2_moe")
    model.save_pretrained(tmp_path / "model")
    expected = teacher_outputs(LayerByLayer(model), samples, batch_size=4).tensors["log_p"]
    workspace = Workspace(tmp_path / "work")
    real = Skeleton.forward

    def fails(self: Skeleton, index: int, *args: object) -> Tensor:
        if index == 2:
            raise KeyboardInterrupt
        return real(self, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Skeleton, "forward", fails)
    with pytest.raises(KeyboardInterrupt):
        teacher_outputs(skeleton(tmp_path / "model"), samples, batch_size=4, workspace=workspace)
    ran: list[int] = []

    def noted(self: Skeleton, index: int, *args: object) -> Tensor:
        ran.append(index)
        return real(self, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Skeleton, "forward", noted)
    found = teacher_outputs(skeleton(tmp_path / "model"), samples, batch_size=4, workspace=workspace)
    assert set(ran) == {2}
    torch.testing.assert_close(found.tensors["log_p"], expected, atol=1e-5, rtol=0)
    again = teacher_outputs(skeleton(tmp_path / "model"), samples, batch_size=4, workspace=workspace)
    assert torch.equal(again.tensors["log_p"], found.tensors["log_p"]) and set(ran) == {2}
    with pytest.raises(RequestError, match="something else"):
        teacher_outputs(skeleton(tmp_path / "model"), samples.picked([0, 1]), workspace=workspace)


def test_what_it_refuses(samples: CalibrationSet) -> None:
    model = make_model()
    found = teacher_outputs(LayerByLayer(model), samples.picked([0, 1]))
    (batch,) = samples.picked([2]).batches(1)
    with pytest.raises(RequestError, match="is not among them"):
        found.of(samples.picked([2]), batch)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(RunError, match="predicts NaN"):
        teacher_outputs(LayerByLayer(model), samples)
