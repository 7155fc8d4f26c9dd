# SPDX-License-Identifier: Apache-2.0
"""The refit: the exact solution, never worse on what is held back, the same in memory and from files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import VOCABULARY, load, make_model, make_texts, make_tokenizer, save_checkpoint
from oracles import layout_of
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe_prune import CalibrationSet
from optimum_moe_prune.architectures.structure import part
from optimum_moe_prune.checkpoints.layout import model_dtype
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.down import SingleExpert, down_projection
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.models.skeleton import Skeleton
from optimum_moe_prune.recovery import layer_refit, least_squares
from optimum_moe_prune.recovery import refit as refitting
from optimum_moe_prune.recovery.least_squares import Sums, best_change, grouped, solved
from optimum_moe_prune.recovery.refit import Refit, refit
from optimum_moe_prune.recovery.split import Split, split_samples
from optimum_moe_prune.recovery.writing import put_into_model
from optimum_moe_prune.storage.workspace import Workspace

Retained = dict[int, tuple[int, ...]]


def samples_of(model: PreTrainedModel, count: int = 40, length: int = 24) -> CalibrationSet:
    generator = torch.Generator().manual_seed(5)
    size = min(VOCABULARY, model.config.get_text_config().vocab_size)
    return CalibrationSet.build([torch.randint(3, size, (length,), generator=generator) for _ in range(count)])


def half(model: PreTrainedModel) -> Retained:
    """Every second expert, but for the first layer, which is whole."""
    blocks = moe_blocks(model)
    whole = {blocks[0].layer: tuple(range(blocks[0].num_experts))}
    return {**{block.layer: tuple(range(0, block.num_experts, 2)) for block in blocks}, **whole}


def made(kind: str) -> PreTrainedModel:
    return make_model(kind) if kind in ("mixtral", "qwen2_moe") else tiny_model(kind)


# ------------------------------------------------------------------------------------------- least squares


def tokens(generator: torch.Generator, count: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Features of three experts that some of the tokens have, and the same with zeros ``(T, 3 I)``; residuals."""
    phi, rows, whole = [], [], torch.zeros(count, 15)
    for expert in range(3):
        at = torch.randperm(count, generator=generator)[: count // 2].sort().values
        phi.append(torch.randn(len(at), 5, generator=generator))
        rows.append(at)
        whole[at, expert * 5 : expert * 5 + 5] = phi[-1]
    return phi, rows, whole, torch.randn(count, 4, generator=generator)


def summed(generator: torch.Generator, count: int) -> Sums:
    phi, rows, _, residual = tokens(generator, count)
    sums = Sums.zeros(15, 4, torch.device("cpu"))
    sums.add(phi, rows, residual)
    return sums


def test_sums_and_solution_are_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    phi, rows, whole, residual = tokens(generator, 60)
    whole, exact = whole.double(), residual.double()
    sums = Sums.zeros(15, 4, torch.device("cpu"))
    sums.add(phi, rows, residual)
    gram = whole.T @ whole
    assert torch.allclose(sums.gram, gram, atol=1e-5)
    ridge = 0.3 * float(gram.diagonal().mean())
    stacked = torch.cat([whole, ridge**0.5 * torch.eye(15).double()])
    expected = torch.linalg.lstsq(stacked, torch.cat([exact, torch.zeros(15, 4).double()])).solution
    found = solved(sums, 0.3)
    assert found is not None and torch.allclose(found, expected, atol=1e-5)
    assert sums.error(expected) == pytest.approx(float((exact - whole @ expected).square().sum()), rel=1e-5)
    own = sums.without(expected)  # as if the change had been made already
    assert torch.allclose(own.products, whole.T @ (exact + whole @ expected), atol=1e-4)
    assert float(own.energy) == pytest.approx(float((exact + whole @ expected).square().sum()), rel=1e-5)


def test_a_ridge_that_helps_nobody_else_is_not_taken() -> None:
    fit = summed(torch.Generator().manual_seed(0), 60)
    held_back = Sums(fit.gram, -fit.products, fit.energy)  # whatever helps there makes this worse
    now = torch.zeros(15, 4, dtype=torch.float64)
    change, ridge = best_change(fit, held_back, now)
    assert ridge is None and change is now
    errors = {value: fit.error(solved(fit, value)) for value in least_squares.RIDGES}  # type: ignore[arg-type]
    assert best_change(fit, fit, now)[1] == min(errors, key=errors.__getitem__) == 0.01


def test_experts_in_groups() -> None:
    assert grouped(5, 10, 30) == [range(3), range(3, 5)]
    assert grouped(3, 100, 30) == [range(1), range(1, 2), range(2, 3)]


# ------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_what_is_judged_is_what_the_refitted_model_gives(kind: str) -> None:
    """The divergences are those of the pruned model with the new weights; the original is as it was."""
    model, changed = made(kind), made(kind)
    split, retained = split_samples(samples_of(model)), half(model)
    found = refit(LayerByLayer(model), split, retained, batch_size=4)
    assert all(map(torch.equal, model.state_dict().values(), changed.state_dict().values()))
    assert any(result.is_changed for result in found.layers)
    assert all(result.error_after <= result.error_before for result in found.layers)
    parameters = dict(changed.named_parameters())
    for row, weights in enumerate(({}, found.weights)):
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, value in weights.items():
                layer = int(name.split("layers.")[1].split(".")[0])
                parameters[name][list(retained[layer])] = value
            for block in moe_blocks(changed):
                stack.enter_context(block.restricted(retained[block.layer]))
            for number, ids in enumerate(split.held_back.token_ids):
                pruned = changed(ids[None]).logits[0, :-1].float().log_softmax(-1)
                original = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
                kl = float((original.exp() * (original - pruned)).sum())
                assert float(found.divergences[row, number]) == pytest.approx(kl, rel=1e-3, abs=1e-4)


def straight_refit(model: PreTrainedModel, split: Split, retained: tuple[int, ...], ridge: float) -> Tensor:
    """The first cut layer of a Mixtral, written out: the new down projections ``(R, H, I)``."""
    block = moe_blocks(model)[1]
    seen: list[Tensor] = []
    handle = block.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for ids in split.fit.token_ids:
            model(ids[None])
    handle.remove()
    x = torch.cat([hidden.reshape(-1, hidden.shape[-1]) for hidden in seen])
    down = down_projection(block)
    assert down is not None
    with torch.no_grad():
        outputs = [SingleExpert(block, expert).features(x, down) for expert in range(block.num_experts)]
    logits = x @ block.router.weight.detach().T

    def weights(columns: tuple[int, ...]) -> Tensor:
        top = logits[:, list(columns)].softmax(-1).topk(2)
        shares = top.values / top.values.sum(1, keepdim=True)
        return torch.zeros(len(x), len(columns)).scatter(1, top.indices, shares)

    every, left = weights(tuple(range(8))), weights(retained)
    residual = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(8):
        residual += every[:, expert, None] * outputs[expert][1]
    for place, expert in enumerate(retained):
        residual -= left[:, place, None] * outputs[expert][1]
    phi = torch.cat([left[:, place, None] * outputs[e][0] for place, e in enumerate(retained)], dim=1).double()
    gram = phi.T @ phi
    change = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), phi.T @ residual)
    own = part(block.decoder_layer, down.path).detach()[list(retained)]
    return own + change.view(len(retained), down.width, -1).mT.float()


def test_the_first_layer_is_the_straight_solution() -> None:
    model = make_model()
    split, retained = split_samples(samples_of(model, 60)), half(model)
    found = refit(LayerByLayer(model), split, retained)
    first = found.layers[0]
    assert first.layer == 1 and not first.left_out and first.ridges[0] is not None
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.allclose(found.weights[name], straight_refit(model, split, retained[1], first.ridges[0]), atol=1e-4)


def test_groups_of_experts_come_near_the_joint_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another on what the others leave, in chunks whose features are made anew."""
    model = make_model(num_hidden_layers=2)
    split, retained = split_samples(samples_of(model, 20)), half(model)
    joint = refit(LayerByLayer(model), split, retained).layers[0]
    monkeypatch.setattr(layer_refit, "grouped", lambda count, width: grouped(count, width, 24))
    monkeypatch.setattr(layer_refit, "SWEEPS", 5)
    apart = refit(LayerByLayer(model), split, retained).layers[0]
    assert len(apart.ridges) == 4 and apart.error_after == pytest.approx(joint.error_after, rel=0.05)
    monkeypatch.setattr(layer_refit, "_FEATURE_BYTES", 200 * 4 * 24 * 2)
    chunks = refit(LayerByLayer(model), split, retained).layers[0]
    assert chunks.error_after == pytest.approx(apart.error_after, rel=1e-3)


def equal(a: Refit, b: Refit, exactly: bool = True) -> None:
    assert sorted(a.weights) == sorted(b.weights)
    for name in a.weights:
        if exactly:
            assert torch.equal(a.weights[name], b.weights[name])
        else:
            assert torch.allclose(a.weights[name].float(), b.weights[name].float(), rtol=1e-2, atol=1e-3)
    assert torch.allclose(a.divergences.sum(1), b.divergences.sum(1), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_files_as_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_checkpoint("qwen2_moe", tmp_path / "model", make_tokenizer(), dtype)
    model = load(folder)
    split, retained = split_samples(samples_of(model)), half(model)
    expected = refit(LayerByLayer(model, dtype=torch.float32), split, retained, batch_size=4)
    assert all(value.dtype == dtype for value in expected.weights.values())
    layout = layout_of(folder)
    skeleton = Skeleton(layout, model_dtype(layout.config, layout.checkpoint, "auto"), computing=torch.float32)
    equal(expected, refit(skeleton, split, retained, batch_size=4, workspace=Workspace(tmp_path / "work")), False)


class Stopped(Exception):
    pass


def test_an_interrupted_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    split, retained = split_samples(samples_of(model)), half(model)
    expected = refit(LayerByLayer(model), split, retained, workspace=Workspace(tmp_path / "whole"))
    real: Callable[..., None] = refitting._Pass._layer
    for layer in (1, 2):

        def stopping(self: refitting._Pass, index: int, layer: int = layer) -> None:
            if index == layer:
                raise Stopped
            real(self, index)

        monkeypatch.setattr(refitting._Pass, "_layer", stopping)
        with pytest.raises(Stopped):
            refit(LayerByLayer(model), split, retained, workspace=Workspace(tmp_path / "work"))
    monkeypatch.setattr(refitting._Pass, "_layer", real)
    equal(expected, refit(LayerByLayer(model), split, retained, workspace=Workspace(tmp_path / "work")))
    monkeypatch.setattr(refitting._Pass, "_layer", stopping)  # nothing is left to do
    equal(expected, refit(LayerByLayer(model), split, retained, workspace=Workspace(tmp_path / "work")))


def test_experts_that_few_tokens_reach_stay_as_they_are() -> None:
    model = make_model()
    split, retained = split_samples(samples_of(model, 8, 10)), half(model)
    found = refit(LayerByLayer(model), split, retained)
    changed = [result for result in found.layers if result.is_changed]
    assert changed and any(result.left_out for result in changed)
    for result in changed:
        own = part(moe_blocks(model)[result.layer].decoder_layer, "mlp.experts.down_proj").detach()
        new = found.weights[f"model.layers.{result.layer}.mlp.experts.down_proj"]
        for place, expert in enumerate(retained[result.layer]):
            assert torch.equal(own[expert], new[place]) == (expert in result.left_out)


def test_weights_are_put_back_by_what_was_there() -> None:
    model = make_model()
    before = put_into_model(model, {"model.layers.0.mlp.experts.down_proj": torch.zeros(8, 32, 24)})
    assert not model.model.layers[0].mlp.experts.down_proj.any()
    put_into_model(model, before)
    assert torch.equal(make_model().model.layers[0].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj)


def test_a_split_holds_back_a_fifth_of_each_domain() -> None:
    samples = CalibrationSet.build(make_texts(40), make_tokenizer())
    split = split_samples(samples)
    parts = (split.fit, split.held_back)
    hashes = [{sample.hash for sample in some.samples} for some in parts]
    assert not hashes[0] & hashes[1] and hashes[0] | hashes[1] == {sample.hash for sample in samples.samples}
    for domain in {sample.domain for sample in samples.samples}:
        fit, held_back = (sum(sample.domain == domain for sample in some.samples) for some in parts)
        assert held_back == round(0.2 * (fit + held_back)) > 0


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "granitemoe", "nemotron_h"])
def test_experts_that_no_token_reaches_are_not_run(kind: str) -> None:
    """Of a few tokens that are held back some experts see none, and some models cannot run an expert on none."""
    model = made(kind)
    found = refit(LayerByLayer(model), split_samples(samples_of(model, 2, 2)), half(model))
    assert bool(torch.isfinite(found.divergences).all()) and not found.weights
    found = refit(LayerByLayer(model), split_samples(samples_of(model, 40, 2)), half(model))
    assert bool(torch.isfinite(found.divergences).all())
