# SPDX-License-Identifier: Apache-2.0
"""Statistics against a straight loop over tokens and experts, and what must not change them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from oracles import assert_same, straight_loop
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe_prune import CalibrationSet, Need, RequestError, RunError
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.statistics.needs import DENSE, OF_A_FORWARD_PASS, WITHOUT_TEXT

EVERYTHING = {*(OF_A_FORWARD_PASS - WITHOUT_TEXT), Need.MEAN_OUTPUTS}
NEEDS = [
    {Need.ROUTING},
    {Need.ROUTING, Need.ROUTED_NORMS},
    {Need.ROUTING, Need.GRAM},
    {Need.ROUTING, Need.SINGLE_ERROR, Need.INPUTS},
    {Need.ROUTING, Need.DENSE_NORMS},
    {Need.COACTIVATION},
    {Need.MEAN_OUTPUTS},
    {Need.MEAN_OUTPUTS, Need.DENSE_NORMS},
    EVERYTHING,
]


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "+".join(sorted(map(str, needs))))
@torch.no_grad()
def test_statistics_equal_a_straight_loop(model: PreTrainedModel, samples: CalibrationSet, needs: set[Need]) -> None:
    stats = collect(model, samples, needs, batch_size=5)
    expected = straight_loop(model, samples)
    assert set(stats.layers) == set(expected)
    for index, layer in stats.layers.items():
        assert layer.tensors, "something was gathered"
        for name, found in layer.tensors.items():
            wanted = expected[index][name].to(found.dtype)
            scale = float(wanted.abs().mean()) if wanted.numel() else 0.0
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("max_tokens", [40, 8192])
def test_batch_size_and_order_do_not_matter(kind: str, tokenizer: object, max_tokens: int) -> None:
    model, texts = make_model(kind), make_texts(15)
    results = []
    for batch_size, records in ((1, texts), (4, texts[::-1]), (15, texts)):
        built = CalibrationSet.build(records, tokenizer)
        results.append(collect(model, built, EVERYTHING, batch_size=batch_size, max_tokens=max_tokens))
    assert len(results[0].token_sample) == min(
        max_tokens, results[0].token_sample.new_tensor(sum(results[0].domains.values()))
    )
    for other in results[1:]:
        assert_same(results[0], other, rtol=1e-5)


def test_padding_never_counts(kind: str) -> None:
    """A short sample beside a long one gives what it gives alone, whatever the tokenizer says about padding."""
    model, tokenizer = make_model(kind), make_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", "w7"
    long, short = make_texts(1, length=(40, 40))[0], {"text": "w5 w6 w7", "domain": "low"}
    together = collect(model, CalibrationSet.build([long, short], tokenizer), EVERYTHING, batch_size=2)
    alone = collect(model, CalibrationSet.build([short], tokenizer), EVERYTHING)
    row = [s.num_tokens for s in together.samples].index(4)
    for index, layer in alone.layers.items():
        for name in ("routed_tokens", "norm", "single_error", "probability"):
            torch.testing.assert_close(
                together.layers[index].tensors[name][row], layer.tensors[name][0], rtol=1e-5, atol=1e-6
            )
        assert together.layers[index].tensors["routed_tokens"].sum() == (41 + 4) * layer.routing.top_k


def block_outputs(model: PreTrainedModel, samples: CalibrationSet, needs: set[Need] | None) -> dict[int, Tensor]:
    """Outputs of the MoE blocks on the first batch, observed with some needs, or plain."""
    outputs: dict[int, Tensor] = {}
    blocks = moe_blocks(model)
    handles = [
        b.module.register_forward_hook(lambda _m, _i, o, layer=b.layer: outputs.__setitem__(layer, o.detach()))
        for b in blocks
    ]
    if needs is None:
        with torch.no_grad():
            batch = next(samples.batches(1))
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    else:
        one = CalibrationSet(samples.samples[:1], samples.token_ids[:1])
        collect(model, one, needs, batch_size=1)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "+".join(sorted(map(str, needs))))
def test_the_observing_forward_is_the_models_own(
    kind: str, samples: CalibrationSet, needs: set[Need], implementation: str
) -> None:
    model = make_model(kind)
    model.set_experts_implementation(implementation)
    one = CalibrationSet(samples.samples[:1], samples.token_ids[:1])
    plain, observed = block_outputs(model, one, None), block_outputs(model, one, needs)
    for layer, expected in plain.items():
        # The first block sees the very same input; later ones inherit the rounding of those before.
        bar = 1e-6 if layer == 0 else 1e-5
        torch.testing.assert_close(observed[layer], expected, rtol=0, atol=bar * float(expected.abs().max()))


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "+".join(sorted(map(str, needs))))
def test_bfloat16_is_observed_as_it_is(kind: str, samples: CalibrationSet, needs: set[Need]) -> None:
    model = make_model(kind).to(torch.bfloat16)
    one = CalibrationSet(samples.samples[:1], samples.token_ids[:1])
    plain, observed = block_outputs(model, one, None), block_outputs(model, one, needs)
    for layer, expected in plain.items():
        assert observed[layer].dtype == torch.bfloat16
        torch.testing.assert_close(observed[layer], expected, rtol=2e-2, atol=2e-2)
    stats = collect(model, samples, needs)
    if Need.ROUTING in needs:
        assert stats.layers[0].tensors["logits"].dtype == torch.bfloat16


def test_the_model_is_left_as_it_was(model: PreTrainedModel, samples: CalibrationSet) -> None:
    model.train()
    model.model.layers[0].eval()  # a part that stays fixed
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hooks = [(len(b.router._forward_hooks), "forward" in vars(b.experts)) for b in moe_blocks(model)]
    collect(model, samples, EVERYTHING)
    assert [module.training for module in model.modules()] == modes
    assert [(len(b.router._forward_hooks), "forward" in vars(b.experts)) for b in moe_blocks(model)] == hooks
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad == (name != "lm_head.weight")


def test_a_failing_pass_leaves_the_model_as_it_was(samples: CalibrationSet) -> None:
    model = make_model()
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        collect(model, samples, EVERYTHING)
    handle.remove()
    assert all("forward" not in vars(b.experts) and not b.router._forward_hooks for b in moe_blocks(model))


def test_kept_tokens_are_those_with_the_lowest_hash(samples: CalibrationSet) -> None:
    few, more = (collect(make_model(), samples, {Need.ROUTING}, max_tokens=n) for n in (20, 50))
    pairs = [set(zip(s.token_sample.tolist(), s.token_position.tolist(), strict=True)) for s in (few, more)]
    assert len(pairs[0]) == 20 and len(pairs[1]) == 50
    assert pairs[0] < pairs[1]
    other = collect(make_model(), samples, {Need.ROUTING}, max_tokens=20, seed=1)
    assert set(zip(other.token_sample.tolist(), other.token_position.tolist(), strict=True)) != pairs[0]
    # sums are over all tokens, kept or not
    assert torch.equal(few.layers[0].tensors["routed_tokens"], more.layers[0].tensors["routed_tokens"])


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    wrong = CalibrationSet.build([torch.tensor([1, 2, 400])])
    with pytest.raises(RequestError, match=r"token id 400 is outside the model's vocabulary of 96"):
        collect(make_model(), wrong, {Need.ROUTING})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.down_proj", "model.norm.weight"])
def test_nan_weights_are_named(samples: CalibrationSet, name: str) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = float("nan")
    with pytest.raises(RunError, match=f"{name} holds NaN or infinite weights"):
        collect(model, samples, {Need.ROUTING})


@pytest.mark.parametrize(
    "needs",
    [needs for needs in NEEDS if needs & (DENSE | {Need.ROUTED_NORMS})],
    ids=lambda needs: "+".join(sorted(needs)),
)
def test_infinite_activations_are_named_by_layer(samples: CalibrationSet, needs: set[Need]) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj.mul_(1e38)  # the last one: no later layer notices
    with pytest.raises(RunError, match="layer 2: an expert's output is NaN or infinite"):
        collect(model, samples, needs)


def test_gram_matrices_keep_their_precision_under_autocast(samples: CalibrationSet) -> None:
    model = make_model()
    expected = collect(model, samples, {Need.GRAM}).layers[0].tensors["gram"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = collect(model, samples, {Need.GRAM, Need.SINGLE_ERROR})
    gram = stats.layers[0].tensors["gram"]
    assert gram.dtype == torch.float32
    # The outputs were rounded to bfloat16, their products were not.
    assert not torch.equal(gram.bfloat16().float(), gram)
    torch.testing.assert_close(gram, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_hold_at_least_one_sample(samples: CalibrationSet, batch_size: int) -> None:
    with pytest.raises(RequestError, match=f"batch_size is {batch_size}"):
        collect(make_model(), samples, {Need.ROUTING}, batch_size=batch_size)


@pytest.fixture
def unusable() -> Iterator[dict[str, PreTrainedModel]]:
    peft, quantised, meta = make_model(), make_model(), make_model()
    peft.peft_config = {}
    quantised.hf_quantizer = object()
    meta.model.layers[0].to("meta")
    yield {"PEFT adapters": peft, "is quantised": quantised, "on the meta device": meta}


def test_models_without_plain_parameters_are_refused(
    unusable: dict[str, PreTrainedModel], samples: CalibrationSet
) -> None:
    for message, model in unusable.items():
        with pytest.raises(RequestError, match=message):
            collect(model, samples, {Need.ROUTING})
