# SPDX-License-Identifier: Apache-2.0
"""Distillation: against a plain loop over torch's own optimiser, never worse, and nothing left behind."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import assert_equal_states, make_model, make_texts, make_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe_prune import CalibrationSet
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.recovery import distil as distillation
from optimum_moe_prune.recovery.distil import distil
from optimum_moe_prune.recovery.masters import Master
from optimum_moe_prune.recovery.shares import Shares
from optimum_moe_prune.recovery.split import Split, split_samples
from optimum_moe_prune.recovery.steps import Distilled, DistilOptions, Watch, step_batches
from optimum_moe_prune.recovery.teacher import TeacherOutputs, teacher_outputs
from optimum_moe_prune.recovery.trained import Trained, norms_before, trained_of

FEW = DistilOptions(steps=3, tokens=40, check_every=1, warm_up=0)


@dataclass(frozen=True)
class Case:
    """A pruned model, and what it is to learn."""

    model: PreTrainedModel
    split: Split
    teacher: TeacherOutputs

    def distil(self, options: DistilOptions = FEW, **more: object) -> Distilled:
        return distil(self.model, self.split.fit, self.split.held_back, self.teacher, options=options, **more)  # type: ignore[arg-type]


def case(kind: str = "mixtral", dtype: torch.dtype = torch.float32) -> Case:
    model = make_model(kind).to(dtype)
    samples = CalibrationSet.build(make_texts(16), make_tokenizer())
    teacher = teacher_outputs(LayerByLayer(model), samples)
    for number, block in enumerate(moe_blocks(model)):
        block.retain([number, 3, 4, 5])
    setattr(model.config, "num_local_experts" if kind == "mixtral" else "num_experts", 4)
    return Case(model, split_samples(samples), teacher)


def held_back_kl(case: Case, model: PreTrainedModel) -> float:
    """By hand, one sample after another."""
    total, tokens = 0.0, 0
    held_back = case.split.held_back
    for number in range(len(held_back)):
        (batch,) = held_back.picked([number]).batches(1)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids).logits[0, :-1]
        total += float(case.teacher.of(held_back.picked([number]), batch).kl(logits).sum())
        tokens += len(logits)
    return total / tokens


def put(model: PreTrainedModel, tensors: dict[str, Tensor]) -> PreTrainedModel:
    model = copy.deepcopy(model)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            assert tensor.dtype == named[name].dtype
            named[name].copy_(tensor)
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_steps_are_those_of_a_plain_loop(kind: str) -> None:
    given = case(kind)
    found = given.distil()
    model = copy.deepcopy(given.model)
    groups = []
    for name, parameter in model.named_parameters():
        share = {"down_proj": 1e-2, "gate.weight": 6e-3, "post_attention_layernorm.weight": 6e-3}
        ends = [rate for end, rate in share.items() if name.endswith(end) and "shared" not in name]
        has_experts = ".1." not in name or kind == "mixtral"
        parameter.requires_grad_(bool(ends) and has_experts)
        if parameter.requires_grad:
            groups.append({"params": [parameter], "start": ends[0] * float(parameter.detach().square().mean().sqrt())})
    optimiser = torch.optim.Adam(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-15)
    options = FEW.in_memory(given.split.fit, given.split.held_back)
    course = step_batches(given.split.fit, options)
    kls = [held_back_kl(given, model)]
    for step in range(3):
        for group in optimiser.param_groups:
            group["lr"] = group["start"] * (1 - 0.9 * step / 2)
        losses = [
            given.teacher.of(given.split.fit, batch).kl(
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1][
                    batch.attention_mask[:, 1:].bool()
                ]
            )
            for batch in next(course)
        ]
        torch.cat(losses).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        kls.append(held_back_kl(given, model))
    torch.testing.assert_close([kl for _, kl in found.looks], kls, atol=1e-6, rtol=1e-5)
    assert found.best == 3 and found.kl_after["all"] == found.looks[-1][1] < found.kl_before["all"]
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert found.memory == sum(
        5 * tensor.nbytes for tensor in trained.values()
    )  # with gradient, moments, and the best
    assert sum(found.numbers.values()) == sum(tensor.numel() for tensor in trained.values())
    assert found.tensors.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(found.tensors[name], tensor, atol=2e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    given = case("qwen2_moe")
    given.model.train()
    frozen = given.model.model.layers[0].mlp.gate.weight
    frozen.requires_grad_(False)
    before = copy.deepcopy(given.model)
    given.distil()
    assert_equal_states(given.model, before)
    assert all(module.training for module in given.model.modules())
    assert [p.requires_grad for p in given.model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in given.model.parameters())
    for module in given.model.modules():
        assert "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


def test_the_best_state_is_kept_and_it_is_never_worse() -> None:
    given = case()
    options = DistilOptions(steps=9, tokens=40, check_every=1, patience=2, rates={"experts": 3.0})
    worse = given.distil(options, what=["experts"])
    assert not worse.is_better and worse.best == 0 and worse.steps == 2  # patience
    assert worse.kl_after == worse.kl_before
    better = given.distil(DistilOptions(steps=12, tokens=100, check_every=4))
    assert better.kl_after["all"] < 0.99 * better.kl_before["all"] and better.best in (4, 8, 12)
    assert held_back_kl(given, put(given.model, dict(better.tensors))) == pytest.approx(
        better.kl_after["all"], rel=1e-5
    )
    assert better.kl_after["all"] == min(kl for _, kl in better.looks)


def test_what_is_measured_is_rounded() -> None:
    given = case(dtype=torch.bfloat16)
    found = given.distil(dtype="float32")
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    model = put(given.model, dict(found.tensors)).float()
    model.model.rotary_emb.inv_freq = make_model().model.rotary_emb.inv_freq  # of a model that is loaded it is float32
    assert held_back_kl(given, model) == pytest.approx(found.kl_after["all"], rel=1e-5)


def test_a_narrow_model_is_trained_in_a_wider_precision() -> None:
    given = case("qwen2_moe", torch.bfloat16)
    found = given.distil(dtype="float32")
    wide = Case(copy.deepcopy(given.model).float(), given.split, given.teacher).distil()
    assert found.looks[0][1] == pytest.approx(wide.looks[0][1], rel=1e-4)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    for name, tensor in found.tensors.items():
        assert float((tensor.float() - wide.tensors[name]).abs().mean()) < 0.003 * float(
            wide.tensors[name].abs().mean()
        )


def test_it_is_rounded_to_what_will_be_stored() -> None:
    given = case(dtype=torch.bfloat16)
    wide = Case(copy.deepcopy(given.model).float(), given.split, given.teacher)
    found = wide.distil(stored=torch.bfloat16)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    model = put(given.model, dict(found.tensors)).float()
    assert held_back_kl(given, model) == pytest.approx(found.kl_after["all"], rel=1e-5)


def test_layers_that_are_run_once_more_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    expected = given.distil()
    monkeypatch.setattr(distillation, "_ACTIVATION_BYTES", 0)
    found = given.distil()
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in expected.tensors.items())


def test_a_change_of_low_rank() -> None:
    given = case()
    found = given.distil(DistilOptions(steps=3, tokens=40, check_every=1, rank=2))
    assert found.rank == 2 and found.memory < given.distil().memory
    name = "model.layers.1.mlp.experts.down_proj"
    change = found.tensors[name] - dict(given.model.named_parameters())[name]
    values = torch.linalg.svdvals(change)
    assert bool((values[:, 1] > 1e-5).all()) and bool((values[:, 2] < 1e-6).all())


@pytest.mark.parametrize(
    ("what", "end"), [("experts", "down_proj"), ("router", "gate.weight"), ("norms", "norm.weight")]
)
def test_only_what_is_asked_for(what: str, end: str) -> None:
    found = case().distil(what=[what])
    assert len(found.tensors) == 3 and all(name.endswith(end) for name in found.tensors)
    assert set(found.numbers) == {what}


def test_a_loss_that_is_no_number_ends_it() -> None:
    given = case()
    rates = {"experts": 1e38, "router": 1e38, "norms": 1e38}
    found = given.distil(DistilOptions(steps=9, tokens=40, check_every=5, rates=rates))
    assert not found.is_better and found.steps < 9
    assert any("NaN" in note for note in found.notes)


def test_bad_requests() -> None:
    given = case()
    with pytest.raises(RequestError, match="recover_what is wings; what can be trained: experts, router, norms"):
        given.distil(what=["wings"])
    with pytest.raises(RequestError, match="recover_what is empty"):
        given.distil(what=[])
    with pytest.raises(RequestError, match="patience is 0; it must be at least 1"):
        DistilOptions(patience=0)
    with pytest.raises(RequestError, match="96 output tokens and the original 5"):
        Case(given.model, given.split, TeacherOutputs(5, {}, {})).distil()
    assert any("only 4 samples are held back to judge by" in note for note in given.distil().notes)


def test_what_is_left_to_the_amount_of_text() -> None:
    def text(tokens: int) -> CalibrationSet:
        return CalibrationSet.build(list(torch.arange(tokens).view(-1, 500)))

    def settled(fit: int, held_back: int) -> tuple[int | None, ...]:
        options = DistilOptions().in_memory(text(fit), text(held_back))
        return options.steps, options.tokens, options.check_every

    assert settled(1000, 500) == (60, 512, 15)
    assert settled(10_000, 1000) == (118, 512, 15)  # six times the text
    assert settled(100_000, 20_000) == (180, 512, 53)  # the looks take a fourth of the time
    streamed = DistilOptions().streamed(text(100_000))
    assert (streamed.steps, streamed.tokens, streamed.check_every) == (16, 37_500, 1)
    assert streamed.rate("experts") == pytest.approx(1e-2 * (37_500 / 512) ** 0.5)


def test_a_worse_domain_is_not_taken() -> None:
    watch = Watch(patience=2)
    assert watch.look(0, {"all": 1.0, "a": 1.0, "b": 1.0})
    assert not watch.look(1, {"all": 0.5, "a": 0.1, "b": 1.06}) and not watch.is_over
    assert watch.look(2, {"all": 0.8, "a": 0.7, "b": 1.04})
    assert not watch.look(3, {"all": 0.8, "a": 0.7, "b": 0.9}) and not watch.is_over
    assert not watch.look(4, {"all": float("nan"), "a": 0.1, "b": 0.1}) and watch.is_over
    assert watch.best == 2 and watch.after["all"] == 0.8
    watch = Watch(patience=1)
    watch.look(0, {"all": 1e-3, "a": 1e-6, "b": 2e-3})
    assert watch.look(1, {"all": 9e-4, "a": 9e-5, "b": 1.8e-3})  # differences that are none


def test_an_expert_that_takes_more_than_half_ends_it() -> None:
    shares = Shares()
    assert shares.take({0: 0.3, 1: 0.7}) is None
    assert shares.take({0: 0.49, 1: 0.76}) is None
    shares.keep()
    assert "expert of layer 0 had 51%" in str(shares.take({0: 0.51, 1: 0.7}))
    assert "expert of layer 1 had 78%" in str(shares.take({0: 0.3, 1: 0.78}))
    assert shares.changes == {0: (0.3, 0.49), 1: (0.7, 0.76)}


def test_shares_are_those_of_real_tokens() -> None:
    given = case()
    found = given.distil()
    weights = torch.zeros(4, dtype=torch.float64)
    block = moe_blocks(given.model)[1]
    gate = given.model.model.layers[1].mlp.gate

    def added(output: tuple[Tensor, ...]) -> None:
        weights.index_add_(0, output[2].flatten(), output[1].flatten().double())

    hook = gate.register_forward_hook(lambda m, i, o: added(o))
    with torch.no_grad():
        for ids in given.split.held_back.token_ids:
            given.model(input_ids=ids[None])
    hook.remove()
    assert found.shares[block.layer][0] == pytest.approx(float(weights.max() / weights.sum()), rel=1e-5)


def test_code_that_forbids_gradients_is_named() -> None:
    given = case("qwen2_moe")
    for block in moe_blocks(given.model):
        block.experts.forward = torch.no_grad()(block.experts.forward)
    notes = given.distil().notes  # norms are reached through the shared expert
    assert [note.split()[0] for note in notes[1:]] == ["'experts'", "'router'"]
    with pytest.raises(RequestError, match="no gradient flows"):
        given.distil(what=["experts"])


def test_rows_beyond_the_experts_stay() -> None:
    start = torch.randn(5, 4)
    master = Master(Trained("router", "router", 0, rows=3), start, 0.1)
    (master.value() ** 2).sum().backward()
    master.step(0, 1.0)
    assert torch.equal(master.rounded()[3:], start[3:]) and not bool((master.rounded()[:3] == start[:3]).any())


def test_wide_matrices_change_less() -> None:
    start = torch.randn(4, 8)
    rates = [Master(Trained("down", "experts", 0, width=width), start, 0.1).rates[0] for width in (1, 128, 512)]
    scale = float(start.square().mean().sqrt())
    assert rates == pytest.approx([0.1 * scale, 0.1 * scale, 0.05 * scale])


def test_a_norm_that_counts_from_one() -> None:
    model = make_model()
    batch = torch.tensor([[5, 6, 7]])

    def run() -> None:
        with torch.no_grad():
            model(input_ids=batch)

    norm = model.model.layers[1].post_attention_layernorm
    assert norms_before(moe_blocks(model), run)[1].centre == 0
    norm.forward = lambda x: torch.nn.functional.rms_norm(x, (32,), 1 + norm.weight)
    found = trained_of(model, moe_blocks(model), ["norms"], run)
    assert [one.centre for one in found] == [0, 1, 0]
