# SPDX-License-Identifier: Apache-2.0
"""Routing rules of other kinds, defined here as another package would define them.

Losses, searches and weights against loops over tokens and experts that are written without the package; then a small
model with such a router, from calibration to surgery, with nothing but a row and a rule.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, make_model, make_tokenizer
from oracles import assert_identical, layout_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.mixtral import modeling_mixtral

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPrunerConfig,
    Need,
    RequestError,
    RunError,
    register_architecture,
)
from optimum_moe_prune.architectures import table
from optimum_moe_prune.architectures.forms import Softmax
from optimum_moe_prune.architectures.routers import Normalisation, RoutingRule, SoftmaxTopK, rule_from_dict
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.calibration.streamed import collect_streamed
from optimum_moe_prune.methods import list_methods
from optimum_moe_prune.methods.replay import reconstruction_loss, squared_errors
from optimum_moe_prune.methods.replay_search import _CHUNK_SETS, Replay
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.skeleton import Skeleton
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.storage.growing import Store

# ------------------------------------------------------------------------------------------- rules of other kinds


def alone(values: Tensor, retained: Sequence[int] | None) -> Tensor:
    """The values of the experts that are left, minus infinity elsewhere."""
    if retained is None:
        return values
    others = [e for e in range(values.shape[1]) if e not in retained]
    return values.index_fill(1, torch.tensor(others, dtype=torch.int64), -math.inf)


@dataclasses.dataclass(frozen=True)
class SigmoidTopK(RoutingRule, kind="test_sigmoid"):
    """DeepSeek-V3: sigmoid scores; a bias for choosing only; perhaps the best groups alone; weights over their sum."""

    reads_router = True
    top_k: int
    normalise: bool = True
    epsilon: float = 1e-20
    scale: float = 1.0
    bias: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    groups: int = 1
    top_groups: int = 1

    @property
    def normalised_over(self) -> Normalisation:
        return "chosen" if self.normalise else "none"

    @property
    def ranked(self) -> bool:
        return self.groups == 1

    def of_router(self, tensors: Mapping[str, Tensor]) -> RoutingRule:
        return dataclasses.replace(self, bias=tuple(tensors["gate.e_score_correction_bias"].tolist()))

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        scores = logits.float().sigmoid()
        keys = alone(self.ranking(logits), retained)
        if self.groups > 1:
            by_group = keys.view(len(keys), self.groups, -1)
            best = by_group.topk(2).values.sum(-1).topk(self.top_groups).indices
            taken = torch.zeros(len(keys), self.groups, dtype=torch.bool).scatter_(1, best, True)
            keys = by_group.masked_fill(~taken[..., None], -math.inf).flatten(1)
        chosen = keys.topk(min(self.top_k, keys.shape[1] if retained is None else len(retained))).indices
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(dim=1, keepdim=True) + self.epsilon)
        return chosen, weights * self.scale

    def ranking(self, logits: Tensor) -> Tensor:
        scores = logits.float().sigmoid()
        return scores + torch.tensor(self.bias) if self.bias else scores

    def numerators(self, logits: Tensor) -> Tensor:
        return logits.double().clamp(min=-300).sigmoid()


@dataclasses.dataclass(frozen=True)
class SoftmaxOfChosen(RoutingRule, kind="test_softmax_of_chosen"):
    """GPT-OSS: the K largest logits, a softmax of them alone; times a number of each expert, as in Gemma 4."""

    top_k: int
    scale: float | tuple[float, ...] = 1.0
    normalised_over = "chosen"

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        count = min(self.top_k, logits.shape[1] if retained is None else len(retained))
        values, chosen = alone(logits.float(), retained).topk(count)
        scale = torch.tensor(self.scale)
        return chosen, values.softmax(dim=1) * (scale[chosen] if scale.ndim else scale)

    def ranking(self, logits: Tensor) -> Tensor:
        return logits

    def numerators(self, logits: Tensor) -> Tensor:
        return (logits.double() - logits.double().amax(dim=1, keepdim=True)).exp()


@dataclasses.dataclass(frozen=True)
class SoftmaxWithBias(RoutingRule, kind="test_softmax_with_bias"):
    """LongCat: by softmax plus bias, weights are probabilities. Which expert is ahead depends on who else is left."""

    top_k: int
    bias: tuple[float, ...]
    scale: float = 1.0
    normalised_over = "retained"
    ranked = False

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        p = alone(logits.float(), retained).softmax(dim=1)
        count = min(self.top_k, logits.shape[1] if retained is None else len(retained))
        chosen = alone(p + torch.tensor(self.bias), retained).topk(count).indices
        return chosen, p.gather(1, chosen) * self.scale

    def ranking(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(dim=1) + torch.tensor(self.bias)

    def numerators(self, logits: Tensor) -> Tensor:
        return logits.double().softmax(dim=1)


# ------------------------------------------------------------------------------------------- the same as loops


def by_loops(rule: RoutingRule, logits: list[float], retained: Sequence[int]) -> dict[int, float]:
    """The weights of one token's chosen experts, in plain numbers."""
    left = list(retained)
    if isinstance(rule, SigmoidTopK):
        score = {e: 1 / (1 + math.exp(-logits[e])) for e in left}
    else:
        total = sum(math.exp(logits[e]) for e in left)
        score = {e: math.exp(logits[e]) / total for e in left}
    bias = getattr(rule, "bias", ()) or [0.0] * len(logits)
    key = {e: score[e] + bias[e] for e in left}
    if getattr(rule, "groups", 1) > 1:
        width = len(logits) // rule.groups
        worth = {}
        for group in range(rule.groups):
            members = sorted((key[e] for e in left if e // width == group), reverse=True)
            worth[group] = members[0] + members[1]
        best = sorted(worth, key=lambda group: -worth[group])[: rule.top_groups]
        left = [e for e in left if e // width in best]
    chosen = sorted(left, key=lambda e: -key[e])[: rule.top_k]
    if isinstance(rule, SigmoidTopK):
        below = sum(score[e] for e in chosen) + rule.epsilon if rule.normalise else 1.0
    elif isinstance(rule, SoftmaxWithBias) or (isinstance(rule, SoftmaxTopK) and not rule.renormalise):
        below = 1.0
    else:
        below = sum(score[e] for e in chosen)
    scale = rule.scale if isinstance(rule.scale, tuple) else [rule.scale] * len(logits)
    return {e: scale[e] * score[e] / below for e in chosen}


class Layer:
    """Random logits and outputs of a layer, its Gram matrices, and losses by loops."""

    def __init__(self, experts: int, tokens: int = 40, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(tokens, experts, generator=generator)
        self.outputs = torch.randn(tokens, experts, 5, generator=generator, dtype=torch.float64)
        rows, columns = torch.triu_indices(experts, experts)
        self.gram = (self.outputs @ self.outputs.transpose(1, 2))[:, rows, columns]
        self.sample = torch.arange(tokens) % 3
        self.weights = torch.tensor([1.0, 0.5, 2.0])

    def replay(self, rule: RoutingRule) -> Replay:
        return Replay(self.logits, self.gram, rule, self.sample, self.weights)

    def output(self, rule: RoutingRule, token: int, retained: Sequence[int]) -> Tensor:
        weights = by_loops(rule, self.logits[token].tolist(), retained)
        return sum((w * self.outputs[token, e] for e, w in weights.items()), torch.zeros(5, dtype=torch.float64))

    def errors(self, rule: RoutingRule, retained: Sequence[int]) -> list[float]:
        everyone = range(self.logits.shape[1])
        return [
            float((self.output(rule, t, retained) - self.output(rule, t, everyone)).square().sum())
            for t in range(len(self.logits))
        ]

    def loss(self, rule: RoutingRule, retained: Sequence[int]) -> float:
        totals = [0.0, 0.0, 0.0]
        for token, error in enumerate(self.errors(rule, retained)):
            totals[token % 3] += error
        return sum(w * math.sqrt(total) for w, total in zip(self.weights.tolist(), totals, strict=True))


def bias(experts: int) -> tuple[float, ...]:
    return tuple((0.6 * torch.randn(experts, generator=torch.Generator().manual_seed(9))).tolist())


BIAS = bias(8)
SCALES = tuple(0.5 + 0.25 * e for e in range(8))
RULES = {
    "sigmoid": SigmoidTopK(2),
    "sigmoid, unnormalised": SigmoidTopK(2, normalise=False),
    "sigmoid, bias, epsilon, scale": SigmoidTopK(2, epsilon=1e-20, scale=2.5, bias=BIAS),
    "sigmoid, bias, a large epsilon": SigmoidTopK(2, epsilon=0.3, scale=0.7, bias=BIAS),
    "sigmoid, bias, unnormalised, scale": SigmoidTopK(2, normalise=False, scale=2.5, bias=BIAS),
    "sigmoid, bias, one expert": SigmoidTopK(1, epsilon=0.1, bias=BIAS),
    "softmax of the chosen": SoftmaxOfChosen(2),
    "softmax of the chosen, a scale each": SoftmaxOfChosen(2, scale=SCALES),
    "softmax, bias": SoftmaxWithBias(2, bias=tuple(b / 5 for b in BIAS), scale=1.5),
    "softmax over the retained": SoftmaxTopK(2, False, False),
    "softmax, renormalised": SoftmaxTopK(2, True, False),
}
GROUPED = SigmoidTopK(3, epsilon=1e-20, scale=2.5, bias=bias(12), groups=3, top_groups=2)


def precision(rule: RoutingRule) -> float:
    """Searches sum in float64; the definition chooses and weighs as the model does, in float32."""
    return 1e-9 if rule.ranked else 2e-5


def admitted(rule: RoutingRule, experts: int, size: int) -> list[tuple[int, ...]]:
    sets = list(itertools.combinations(range(experts), size))
    if rule is GROUPED:
        return [s for s in sets if all(sum(e // 4 == group for e in s) == size // 3 for group in range(3))]
    return sets


# ------------------------------------------------------------------------------------------- losses and searches


@pytest.mark.parametrize("retained", [(0, 1, 2, 3, 4, 5, 6, 7), (1, 4, 6), (2, 7), (5,)])
@pytest.mark.parametrize("name", RULES)
def test_weights_and_errors(name: str, retained: tuple[int, ...]) -> None:
    rule, layer = RULES[name], Layer(8)
    weights = rule.weights(layer.logits, retained)
    for token, row in enumerate(layer.logits.tolist()):
        expected = by_loops(rule, row, retained)
        assert {e: w for e, w in enumerate(weights[token].tolist()) if w} == pytest.approx(expected, rel=1e-5)
        for e in retained if len(retained) == 1 else ():
            assert float(rule.lone_weights(layer.logits)[token, e]) == pytest.approx(expected[e], rel=1e-5)
    errors = squared_errors(layer.logits, layer.gram, rule, retained)
    assert errors.tolist() == pytest.approx(layer.errors(rule, retained), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("name", RULES)
def test_losses_of_all_sets(name: str, size: int) -> None:
    rule, layer = RULES[name], Layer(8)
    sets = list(itertools.combinations(range(8), size))
    expected = [layer.loss(rule, retained) for retained in sets]
    assert layer.replay(rule).losses(sets).tolist() == pytest.approx(expected, rel=precision(rule), abs=1e-6)


@pytest.mark.parametrize("rule", [SigmoidTopK(2, epsilon=0.2, scale=2.5, bias=bias(24)), SigmoidTopK(2, False)])
def test_losses_where_tables_would_be_too_large(rule: RoutingRule) -> None:
    layer = Layer(24)
    sets = list(itertools.combinations(range(24), 3))[::150]
    expected = [layer.loss(rule, retained) for retained in sets]
    assert layer.replay(rule).losses(sets).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("required", [(), (6,)])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", RULES)
def test_the_best_set(name: str, size: int, required: tuple[int, ...]) -> None:
    rule, layer = RULES[name], Layer(8, seed=1)
    sets = [s for s in itertools.combinations(range(8), size) if set(required) <= set(s)]
    assert layer.replay(rule).best_set(size, required) == min(sets, key=lambda s: layer.loss(rule, s))


def eliminated(layer: Layer, rule: RoutingRule, experts: int, size: int, required: tuple[int, ...]) -> tuple[int, ...]:
    left = list(range(experts))
    while len(left) > size:
        candidates = [e for e in left if e not in required]
        if rule is GROUPED:
            candidates = [e for e in candidates if sum(o // 4 == e // 4 for o in left) > size // 3]
        left.remove(min(candidates, key=lambda e: (layer.loss(rule, [o for o in left if o != e]), -e)))
    return tuple(left)


@pytest.mark.parametrize("required", [(), (6,)])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_elimination(name: str, size: int, required: tuple[int, ...]) -> None:
    rule, layer = RULES[name], Layer(8, seed=2)
    assert layer.replay(rule).eliminate(size, required) == eliminated(layer, rule, 8, size, required)


def test_groups_limit_the_choice() -> None:
    layer = Layer(12, tokens=24)
    replay = layer.replay(GROUPED)
    sets = admitted(GROUPED, 12, 6)
    expected = [layer.loss(GROUPED, retained) for retained in sets]
    free = dataclasses.replace(GROUPED, groups=1)
    assert max(abs(layer.loss(free, s) - e) for s, e in zip(sets, expected, strict=True)) > 1, "groups must matter"
    assert replay.losses(sets).tolist() == pytest.approx(expected, rel=2e-5)
    assert replay.best_set(6) == sets[expected.index(min(expected))]
    assert set(replay.best_set(6, (1, 2))) >= {1, 2}
    assert replay.eliminate(6) == eliminated(layer, GROUPED, 12, 6, ())
    assert replay.eliminate(6, (9,)) == eliminated(layer, GROUPED, 12, 6, (9,))
    for search in (replay.best_set, replay.eliminate):
        with pytest.raises(RequestError, match="protect fewer"):
            search(6, (0, 1, 2))


def test_in_bfloat16_the_best_are_decided_by_the_rule_itself() -> None:
    for seed in range(3):
        layer = Layer(7, seed=seed)
        layer.logits = (layer.logits * 2).round().div(2).bfloat16()
        rule = SigmoidTopK(2, scale=2.5, bias=(0.5, 0, 0, 0.25, 0, 0, 0))
        replay = layer.replay(rule)
        sets = list(itertools.combinations(range(7), 4))
        assert replay.best_set(4) == min(sets, key=replay.loss_by_definition)


# ------------------------------------------------------------------------------------------- all sets, some at a time


def cheap_losses(sets: Sequence[tuple[int, ...]]) -> Tensor:
    """Losses with many ties, some of them within the tolerance only."""
    ids = torch.tensor(sets, dtype=torch.float64)
    value = ((ids * 7 + 3) ** 2 @ torch.arange(1.0, ids.shape[1] + 1, dtype=torch.float64)) % 97
    return 1 + (value - 50).abs() // 5 + 1e-10 * (value % 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("required", [(), (3, 20)])
def test_all_sets_are_never_in_memory(
    required: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(24, tokens=6)
    layer.logits = layer.logits.to(dtype)
    replay = layer.replay(SoftmaxTopK(2, True, False))
    chunks = []

    def losses(sets: Sequence[tuple[int, ...]]) -> Tensor:
        chunks.append(len(sets))
        return cheap_losses(sets)

    monkeypatch.setattr(replay, "losses", losses)
    monkeypatch.setattr(replay, "loss_by_definition", lambda retained: cheap_losses([retained])[0])
    measured = not required and dtype == torch.float32  # which takes as long again
    if measured:
        tracemalloc.start()
    found = replay.best_set(8, required)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sets = [s for s in itertools.combinations(range(24), 8) if set(required) <= set(s)]
    assert sum(chunks) == len(sets) == math.comb(24 - len(required), 8 - len(required))
    assert max(chunks) < _CHUNK_SETS + 512
    if not required:
        assert len(sets) == 735_471
    if measured:
        assert 0 < peak < 40e6, "all tuples together take 88 MB"
    every = cheap_losses(sets)
    if dtype == torch.float32:
        expected = sets[int((every <= every.min() * (1 + 1e-9)).nonzero()[0])]
    else:  # of the eight smallest, the first of equals before, the first within the tolerance
        smallest = sorted(torch.sort(every, stable=True).indices[:8].tolist())
        expected = sets[next(i for i in smallest if every[i] <= every.min() * (1 + 1e-9))]
    assert found == expected


def test_chunks_change_no_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_moe_prune.methods import replay_search

    for rule in (SoftmaxTopK(3, True, False), SoftmaxTopK(3, False, False), SigmoidTopK(3, False)):
        for dtype in (torch.float32, torch.bfloat16):
            layer = Layer(14, tokens=60)
            layer.logits = layer.logits.to(dtype)
            layer.logits[:, [2, 9, 11]] -= 90  # ties: nobody chooses them
            monkeypatch.setattr(replay_search, "_CHUNK_SETS", 65_536)
            whole = layer.replay(rule).best_set(8), layer.replay(rule).best_set(8, (2, 13))
            monkeypatch.setattr(replay_search, "_CHUNK_SETS", 512)
            assert (layer.replay(rule).best_set(8), layer.replay(rule).best_set(8, (2, 13))) == whole


# ------------------------------------------------------------------------------------------- rules as values


@pytest.mark.parametrize("rule", [*RULES.values(), GROUPED], ids=str)
def test_a_rule_goes_through_json(rule: RoutingRule) -> None:
    assert rule_from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_a_softmax_is_written_as_it_was() -> None:
    assert SoftmaxTopK(2, True, False).to_dict() == {"top_k": 2, "renormalise": True, "cast_weights": False}


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(RequestError, match=r"'hash' are not known here.*softmax"):
        rule_from_dict({"kind": "hash", "top_k": 2})


def test_disagreement() -> None:
    layer = Layer(8)
    rule = SigmoidTopK(2, scale=2.5, bias=BIAS)
    chosen, weights = rule.choose(layer.logits)
    assert rule.disagreement(layer.logits, chosen.flip(1), weights.flip(1)) == ""
    assert "40 tokens" in dataclasses.replace(rule, bias=()).disagreement(layer.logits, chosen, weights)
    assert "weights up to" in dataclasses.replace(rule, scale=2.4999).disagreement(layer.logits, chosen, weights)
    assert "weights up to" in rule.disagreement(layer.logits, chosen, weights * torch.nan)
    assert "sent to 2 experts, and by the rule to 3" in dataclasses.replace(rule, top_k=3).disagreement(
        layer.logits, chosen, weights
    )
    rounded = weights.bfloat16()
    assert rule.disagreement(layer.logits, chosen, rounded) == ""
    tied = layer.logits.clone()
    tied[:, 1:] = tied[:, :1]
    plain = SigmoidTopK(2)
    chosen, weights = plain.choose(tied)
    assert plain.disagreement(tied, (chosen + 3) % 8, weights) == "", "where experts tie the model may take another"


# ------------------------------------------------------------------------------------------- a model of that kind


class SigmoidRouter(modeling_mixtral.MixtralTopKRouter):
    """Mixtral's router, but for scores, bias, epsilon and scale."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores = logits.float().sigmoid()
        chosen = torch.topk(scores + self.e_score_correction_bias.float(), self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * 2.5, chosen


MIXTRAL = table._ROWS["mixtral"]
ROW = dataclasses.replace(MIXTRAL, rule=lambda config: SigmoidTopK(config.num_experts_per_tok, scale=2.5))


@pytest.fixture
def sigmoid(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], PreTrainedModel]]:
    """Mixtral is a model with sigmoid routers inside the test, and its row says so; the function makes a small one."""
    monkeypatch.setattr(modeling_mixtral, "MixtralTopKRouter", SigmoidRouter)
    monkeypatch.setattr(table, "_ROWS", {name: row for name, row in table._ROWS.items() if name != "mixtral"})
    register_architecture(ROW)

    def made() -> PreTrainedModel:
        model = make_model("mixtral")
        for number, block in enumerate(moe_blocks(model)):
            generator = torch.Generator().manual_seed(number)
            block.router.e_score_correction_bias.copy_(0.3 * torch.randn(block.num_experts, generator=generator))
        return model

    yield made


def forward(model: PreTrainedModel, samples: CalibrationSet) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids[None]).logits[0] for ids in samples.token_ids]


def test_the_rule_has_the_bias_of_its_layer(sigmoid: Callable[[], PreTrainedModel], samples: CalibrationSet) -> None:
    model = sigmoid()
    stats = collect(model, samples, set(Need))
    rules = [stats.layers[block.layer].routing for block in moe_blocks(model)]
    assert [rule.bias for rule in rules] == [
        tuple(block.router.e_score_correction_bias.tolist()) for block in moe_blocks(model)
    ]
    assert len({rule.bias for rule in rules}) == len(rules)


def test_statistics_keep_the_rules(
    sigmoid: Callable[[], PreTrainedModel], samples: CalibrationSet, tmp_path: Path
) -> None:
    stats = collect(sigmoid(), samples, {Need.ROUTING})
    stats.save(tmp_path / "stats")
    assert_identical(CalibrationStats.load(tmp_path / "stats"), stats)


def test_what_is_gathered(sigmoid: Callable[[], PreTrainedModel], samples: CalibrationSet) -> None:
    """Probabilities are scores divided by their sum, and a lone expert has the weight of the rule."""
    model = sigmoid()
    stats = collect(model, samples, set(Need))
    for block in moe_blocks(model):
        tensors = stats.layers[block.layer].tensors
        x = tensors["inputs"]
        with torch.no_grad():
            logits, weights, chosen = block.router(x)
            one = torch.ones(len(x), 1)
            y = torch.stack([block.experts(x, torch.full((len(x), 1), e), one) for e in range(8)], dim=1)
            full = (y.gather(1, chosen[..., None].expand(-1, -1, x.shape[1])) * weights[..., None]).sum(1)
        scores = logits.sigmoid()
        sums = (scores / scores.sum(1, keepdim=True)).sum(0)
        torch.testing.assert_close(tensors["probability"].sum(0).float(), sums, rtol=1e-4, atol=0)
        lone = (2.5 * y - full[:, None]).square().sum(-1)
        torch.testing.assert_close(tensors["token_single_error"], lone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [3, 4])
def test_replayed_losses_are_those_of_really_pruned_layers(
    sigmoid: Callable[[], PreTrainedModel], samples: CalibrationSet, size: int
) -> None:
    model = sigmoid()
    stats = collect(model, samples, {Need.ROUTING, Need.GRAM, Need.INPUTS})
    retained = (0, 2, 5, 7)[:size]
    for block in moe_blocks(model):
        layer = stats.layers[block.layer]
        tensors = layer.tensors
        replay = Replay(tensors["logits"], tensors["gram"], layer.routing, layer.token_sample, layer.sample_weights)
        with torch.no_grad():
            before = block.module(tensors["inputs"][None])[0]
            block.retain(retained)
            after = block.module(tensors["inputs"][None])[0]
        really = reconstruction_loss(
            (after - before).double().square().sum(1), layer.token_sample, layer.sample_weights
        )
        assert replay.losses([retained]).item() == pytest.approx(really.item(), rel=1e-4)
        assert replay.loss_by_definition(retained).item() == pytest.approx(really.item(), rel=1e-4)


@pytest.mark.parametrize("method", [name for name in list_methods() if name != "auto"])
def test_every_method_plans_and_pruned_is_masked(
    sigmoid: Callable[[], PreTrainedModel], samples: CalibrationSet, method: str
) -> None:
    model = sigmoid()
    stats = collect(model, samples, set(Need))
    plan = build_plan(stats, MoEPrunerConfig(method=method, sparsity=0.5))
    masked = sigmoid()
    for block in moe_blocks(masked):
        pruned = [e for e in range(block.num_experts) if e not in plan.retained[block.layer]]
        block.router.e_score_correction_bias[pruned] = -math.inf
    plan.apply(model)
    for mine, theirs in zip(forward(model, samples), forward(masked, samples), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_enumeration_is_the_minimum_over_masked_layers(
    sigmoid: Callable[[], PreTrainedModel], samples: CalibrationSet
) -> None:
    model = sigmoid()
    stats = collect(model, samples, {Need.ROUTING, Need.GRAM, Need.INPUTS})
    plan = build_plan(stats, MoEPrunerConfig(method="enumeration", num_experts=4))
    for block in moe_blocks(model):
        layer = stats.layers[block.layer]
        own = block.router.e_score_correction_bias.clone()
        losses = {}
        with torch.no_grad():
            whole = block.module(layer.tensors["inputs"][None])[0]
            for retained in itertools.combinations(range(8), 4):
                block.router.e_score_correction_bias.fill_(-math.inf)[list(retained)] = own[list(retained)]
                errors = (block.module(layer.tensors["inputs"][None])[0] - whole).double().square().sum(1)
                losses[retained] = float(reconstruction_loss(errors, layer.token_sample, layer.sample_weights))
        assert plan.retained[block.layer] == min(losses, key=lambda retained: losses[retained])


def test_layer_by_layer_and_continued(
    sigmoid: Callable[[], PreTrainedModel], samples: CalibrationSet, tmp_path: Path
) -> None:
    """From files, and where an interrupted calibration had finished some layers: their rules are read again."""
    sigmoid().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    expected = collect(load(tmp_path / "model"), samples, set(Need))
    layout = layout_of(tmp_path / "model")
    store = Store(tmp_path / "kept")

    class Stopped(Exception):
        pass

    own = store.commit

    def commit(finished: int, *written: Any) -> None:
        own(finished, *written)
        if finished == 2:
            raise Stopped

    store.commit = commit  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        collect_streamed(Skeleton(layout, torch.float32), samples, set(Need), store=store)
    found = collect_streamed(Skeleton(layout, torch.float32), samples, set(Need), store=Store(tmp_path / "kept"))
    assert_identical(found, expected)


# ------------------------------------------------------------------------------------------- a row that says otherwise


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": None},
        {"rule": lambda config: SigmoidTopK(2, scale=2.0)},
        {"rule": lambda config: SigmoidTopK(3, scale=2.5)},
        {"rule": lambda config: SigmoidWithoutBias(2, scale=2.5)},
    ],
    ids=["softmax", "scale", "top_k", "bias"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_rule_is_refused(
    sigmoid: Callable[[], PreTrainedModel],
    samples: CalibrationSet,
    dtype: torch.dtype,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sigmoid().to(dtype)
    collect(model, samples, {Need.ROUTING})
    wrong = dataclasses.replace(ROW, **changes)
    monkeypatch.setitem(table._ROWS, "mixtral", wrong)
    with pytest.raises(RunError, match=rf"layer 0: .*'mixtral'.*{type(wrong.routing(model.config)).__name__}"):
        collect(model, samples, {Need.ROUTING})


class SigmoidWithoutBias(SigmoidTopK, kind="test_sigmoid_without_bias"):
    reads_router = False

    def of_router(self, tensors: Mapping[str, Tensor]) -> RoutingRule:
        return self


@pytest.mark.parametrize("changes", [{"form": Softmax(False)}, {"top_k_key": "num_hidden_layers"}])
def test_a_wrong_softmax_is_refused(
    samples: CalibrationSet, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mixtral")
    monkeypatch.setattr(table, "_ROWS", {**table._ROWS, "mixtral": dataclasses.replace(MIXTRAL, **changes)})
    with pytest.raises(RunError, match=r"layer 0: .*SoftmaxTopK"):
        collect(model, samples, {Need.ROUTED_NORMS})
