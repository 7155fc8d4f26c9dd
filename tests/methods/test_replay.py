# SPDX-License-Identifier: Apache-2.0
"""The replay against its definition, against brute force, and against layers that are really pruned."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from torch import Tensor

from optimum_moe_prune import CalibrationSet, Need, RunError
from optimum_moe_prune.architectures.routers import SoftmaxTopK
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.methods.replay import first_minimum, gram_index, reconstruction_loss, squared_errors
from optimum_moe_prune.methods.replay_search import Replay
from optimum_moe_prune.models.blocks import moe_blocks

SHAPES = [  # experts, top_k, retained
    (8, 2, 4),
    (8, 2, 2),  # every retained expert is used
    (8, 2, 1),
    (7, 3, 5),
    (9, 4, 8),
    (6, 1, 3),
    (24, 2, 3),  # tables would be too large
]


def layer_data(
    experts: int, tokens: int = 90, samples: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random logits ``(T, E)``, outputs ``(T, E, H)``, Gram triangles, token samples and sample weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, experts, generator=generator)
    outputs = torch.randn(tokens, experts, 6, generator=generator)
    rows, columns = torch.triu_indices(experts, experts)
    gram = (outputs @ outputs.transpose(1, 2))[:, rows, columns]
    sample = torch.randint(0, samples, (tokens,), generator=generator)
    return logits, outputs, gram, sample, 0.5 + torch.rand(samples, generator=generator)


def loss(
    logits: Tensor, gram: Tensor, routing: SoftmaxTopK, retained: tuple[int, ...], sample: Tensor, weights: Tensor
) -> float:
    return reconstruction_loss(squared_errors(logits, gram, routing, retained), sample, weights).item()


@pytest.mark.parametrize("renormalise", [True, False])
def test_squared_errors_are_those_of_the_outputs(renormalise: bool) -> None:
    logits, outputs, gram, _, _ = layer_data(8)
    routing = SoftmaxTopK(2, renormalise, False)
    retained = (1, 4, 6)
    change = (routing.weights(logits, retained) - routing.weights(logits)).float()
    direct = torch.einsum("te,teh->th", change, outputs).square().sum(1)
    torch.testing.assert_close(squared_errors(logits, gram, routing, retained).float(), direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("experts", "top_k", "size"), SHAPES)
def test_losses_of_many_sets_equal_the_definition(experts: int, top_k: int, size: int, renormalise: bool) -> None:
    logits, _, gram, sample, weights = layer_data(experts)
    routing = SoftmaxTopK(top_k, renormalise, False)
    sets = list(itertools.combinations(range(experts), size))[:150]
    expected = torch.tensor([loss(logits, gram, routing, s, sample, weights) for s in sets], dtype=torch.float64)
    found = Replay(logits, gram, routing, sample, weights).losses(sets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("experts", "top_k", "size"), SHAPES)
@pytest.mark.parametrize("required", [(), (0, 5)])
def test_elimination_drops_what_brute_force_drops(
    experts: int, top_k: int, size: int, renormalise: bool, required: tuple[int, ...]
) -> None:
    if len(required) > size:
        required = required[:size]
    logits, _, gram, sample, weights = layer_data(experts, seed=1)
    routing = SoftmaxTopK(top_k, renormalise, False)
    alive = list(range(experts))
    while len(alive) > size:
        alive.remove(
            min(
                (e for e in alive if e not in required),
                key=lambda e: (loss(logits, gram, routing, tuple(a for a in alive if a != e), sample, weights), -e),
            )
        )
    assert Replay(logits, gram, routing, sample, weights).eliminate(size, required) == tuple(alive)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("required", [(), (7,)])
def test_best_set_is_the_brute_force_minimum(renormalise: bool, required: tuple[int, ...]) -> None:
    logits, _, gram, sample, weights = layer_data(8, seed=2)
    routing = SoftmaxTopK(2, renormalise, False)
    sets = [s for s in itertools.combinations(range(8), 4) if set(required) <= set(s)]
    best = min(sets, key=lambda s: loss(logits, gram, routing, s, sample, weights))
    assert Replay(logits, gram, routing, sample, weights).best_set(4, required) == best


@pytest.mark.parametrize("size", [3, 5])
def test_experts_that_nobody_selects_tie_and_the_first_set_wins(size: int) -> None:
    logits, _, gram, sample, weights = layer_data(8, seed=3)
    logits[:, [1, 3, 5, 6, 7]] -= 60  # 0, 2 and 4 are always better; top_k is 2
    replay = Replay(logits, gram, SoftmaxTopK(2, True, False), sample, weights)
    expected = (0, 2, 4) if size == 3 else (0, 1, 2, 3, 4)
    assert replay.best_set(size) == expected
    assert replay.eliminate(size) == expected
    assert replay.losses([expected]).item() == 0


def test_first_minimum_takes_the_first_of_ties() -> None:
    assert first_minimum(torch.tensor([3.0, 1.0 + 5e-10, 1.0, 1.0 + 5e-9], dtype=torch.float64)) == 1


def test_a_peaked_router_loses_no_precision() -> None:
    """Weights of the second best are lost beside the best one's; without the best they are all there is."""
    logits, _, gram, sample, weights = layer_data(6, seed=4)
    logits[:, 0] += 60
    routing = SoftmaxTopK(2, True, False)
    sets = list(itertools.combinations(range(1, 6), 3))
    expected = torch.tensor([loss(logits, gram, routing, s, sample, weights) for s in sets], dtype=torch.float64)
    replay = Replay(logits, gram, routing, sample, weights)
    torch.testing.assert_close(replay.losses(sets), expected, rtol=1e-6, atol=0)
    assert 0 in replay.eliminate(4)


def test_logits_worlds_apart_do_not_break_the_search() -> None:
    logits, _, gram, sample, weights = layer_data(6, seed=5)
    logits[:, 0] += 2000
    for renormalise in (True, False):
        replay = Replay(logits, gram, SoftmaxTopK(2, renormalise, False), sample, weights)
        assert bool(torch.isfinite(replay.losses(list(itertools.combinations(range(6), 3)))).all())
        assert 0 in replay.best_set(3) and 0 in replay.eliminate(3)


def test_losses_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(RunError, match="NaN or infinite"):
        first_minimum(torch.tensor([1.0, float("nan")]))


def coarse_layer(experts: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of a bfloat16 router, rounded so that many tie at the top-k boundary."""
    logits, _, gram, sample, weights = layer_data(experts, seed=seed)
    return (logits * 2).round().div(2).bfloat16(), gram, sample, weights


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
def test_in_bfloat16_the_search_decides_as_the_model_does(renormalise: bool, cast: bool) -> None:
    for seed in range(4):
        logits, gram, sample, weights = coarse_layer(7, seed)
        routing = SoftmaxTopK(2, renormalise, cast)
        replay = Replay(logits, gram, routing, sample, weights)
        chosen, _ = routing.choose(logits)
        tied = logits.sort(descending=True).values
        assert (tied[:, 1] == tied[:, 2]).sum() > 5, "ties are what this is about"
        assert torch.equal(replay.order[:, :2].sort().values, chosen.sort().values)
        sets = list(itertools.combinations(range(7), 4))
        best = min(sets, key=lambda s, a=(logits, gram, routing), b=(sample, weights): loss(*a, s, *b))
        assert replay.best_set(4) == best


def test_gram_index_reads_the_upper_triangle() -> None:
    matrix = torch.arange(16).view(4, 4)
    matrix = matrix + matrix.T
    rows, columns = torch.triu_indices(4, 4)
    assert torch.equal(matrix[rows, columns][gram_index(4)], matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_routing_is_the_models_own(kind: str, dtype: torch.dtype) -> None:
    """What the router hands to the experts in the model equals what the replay computes from its logits."""
    model = make_model(kind).to(dtype)
    seen = {}
    for block in moe_blocks(model):
        block.router.register_forward_hook(lambda _m, _i, output, layer=block.layer: seen.__setitem__(layer, output))
    with torch.no_grad():
        model(input_ids=torch.arange(60).view(3, 20))
    assert len(seen) == len(moe_blocks(model))
    for block in moe_blocks(model):
        logits, weights, chosen = seen[block.layer]
        ids, replayed = block.routing.choose(logits)
        assert torch.equal(ids, chosen)
        torch.testing.assert_close(replayed, weights.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [3, 4])
def test_replayed_loss_is_that_of_the_really_pruned_layer(kind: str, size: int) -> None:
    """The layer is cut, run on the same inputs, and compared with the uncut one."""
    model, tokenizer = make_model(kind), make_tokenizer()
    samples = CalibrationSet.build(make_texts(10), tokenizer)
    stats = collect(model, samples, {Need.ROUTING, Need.GRAM, Need.INPUTS})
    retained = tuple(range(size)) if size == 4 else (0, 2, 5)
    for block in moe_blocks(model):
        layer = stats.layers[block.layer]
        inputs = layer.tensors["inputs"][None]
        errors = squared_errors(layer.tensors["logits"], layer.tensors["gram"], layer.routing, retained)
        replayed = reconstruction_loss(errors, layer.token_sample, layer.sample_weights)
        with torch.no_grad():
            before = block.module(inputs)[0]
            block.retain(retained)
            after = block.module(inputs)[0]
        squared = (after - before).double().square().sum(1)
        really = reconstruction_loss(squared, layer.token_sample, layer.sample_weights)
        scale = before.double().norm()
        assert really > 0.01 * scale, "the cut must matter for the comparison to mean anything"
        assert abs(replayed - really) <= 1e-5 * really + 1e-6 * scale
