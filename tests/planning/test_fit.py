# SPDX-License-Identifier: Apache-2.0
"""Sizes before and after a cut, what a context takes, and the budget that makes a model fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from architectures.published import LAYOUTS
from architectures.tiny import tiny_model
from conftest import make_model, make_texts, make_tokenizer, save_checkpoint

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan, RequestError
from optimum_moe_prune.calibration.calibrate import no_calibration
from optimum_moe_prune.checkpoints.checkpoint import Checkpoint
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.checkpoints.sizes import Size, sizes_of
from optimum_moe_prune.models.context import context_bytes
from optimum_moe_prune.models.sizes import sizes_of_model
from optimum_moe_prune.planning.fit import fitted, gigabytes
from optimum_moe_prune.storage.values import size_bytes


def first_experts(folder: Path, count: int) -> PruningPlan:
    """A plan that retains the first experts of each layer."""
    pruner = MoEPruner.from_pretrained(folder, MoEPrunerConfig(method="random", num_experts=count))
    return pruner.plan(no_calibration(folder))


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("layout", ["mixtral", "qwen2_moe", "gpt_oss_mxfp4", "deepseek_v3_fp8", "kimi_k25_int4"])
def test_sizes_are_those_of_the_pruned_files(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if layout in LAYOUTS:
        LAYOUTS[layout](folder)
    else:
        save_checkpoint(layout, folder, make_tokenizer())
    found = open_layout(folder)
    sizes = sizes_of(found)
    assert sizes.whole.nbytes == found.checkpoint.nbytes
    plan = first_experts(folder, found.spec.routing(found.config).top_k * 2)
    plan.apply_to_checkpoint(folder, tmp_path / "out")
    after = Checkpoint.open(tmp_path / "out")
    left = sizes.after(PruningPlan.from_pretrained(tmp_path / "out").num_experts)  # heads among them
    assert left.nbytes == after.nbytes
    plain = open_layout(tmp_path / "out").plain
    assert left.parameters == sum(math.prod(tensor.shape) for tensor in plain.tensors.values())


def test_sizes_of_a_model_in_memory(kind: str) -> None:
    model = make_model(kind)
    sizes = sizes_of_model(model)
    assert sizes.whole.parameters == model.num_parameters()
    counts = {layer: 4 for layer in sizes.num_experts}
    plan_of = MoEPruner(MoEPrunerConfig(method="random", num_experts=4))
    left = sizes.after(counts)
    pruned = plan_of.prune(model)
    assert left.parameters == pruned.num_parameters()
    assert left.nbytes == sum(p.numel() * p.element_size() for p in pruned.parameters())
    router = next(p for name, p in pruned.named_parameters() if name.endswith("mlp.gate.weight"))
    matrices = [p for p in pruned.parameters() if p.ndim >= 2 and p.shape != router.shape]
    words = 2 * pruned.get_input_embeddings().weight.numel()
    assert left.quantisable <= sum(p.numel() for p in matrices) - words


def test_bytes_after_quantisation() -> None:
    size = Size(parameters=1000, quantisable=960, nbytes=4000)
    assert size.at(None) == 4000
    assert size.at(16) == 2000
    assert size.at(8) == 960 * 8.5 / 8 + 80
    assert size.at(4) == 960 * 4.5 / 8 + 80
    assert size.at(32) == 4000


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24 * 10**9), ("1.5 gb", 15 * 10**8), ("2GiB", 2**31), ("7", 7), (7, 7), ("3M", 3000000), (".5kB", 500)],
)
def test_sizes_in_words(text: str | int, nbytes: int) -> None:
    assert size_bytes(text, "fit") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "24 XB", "1e9", True, None, "24GB32", "nan", "0.1"])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(RequestError, match="fit is"):
        size_bytes(text, "fit")  # type: ignore[arg-type]


def test_bytes_in_words() -> None:
    assert [gigabytes(n) for n in (0, 940, 24 * 10**9, 3214 * 10**6, 94 * 10**7)] == [
        "0 kB",
        "0.94 kB",
        "24 GB",
        "3.21 GB",
        "940 MB",
    ]
    assert gigabytes(3214 * 10**6, up=True) == "3.22 GB"


# ------------------------------------------------------------------------------------------- contexts


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "gemma4_text", "lfm2_moe", "qwen3_next"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_context_takes_what_a_real_cache_holds(model_type: str, tokens: int) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16)
    cache = model(input_ids=torch.arange(tokens)[None] % 50, use_cache=True).past_key_values
    held = [value for layer in cache.layers for value in vars(layer).values()]
    held += [inner for value in held if isinstance(value, (list, tuple, dict)) for inner in _inside(value)]
    expected = sum(value.nbytes for value in held if isinstance(value, torch.Tensor) and value.ndim)
    assert context_bytes(model.config, tokens) == expected


def _inside(value: object) -> list[object]:
    return list(value.values() if isinstance(value, dict) else value)  # type: ignore[call-overload]


def test_no_context_takes_nothing() -> None:
    assert context_bytes(make_model().config, 0) == 0


# ------------------------------------------------------------------------------------------- fitting


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("mixtral", tmp_path_factory.mktemp("fit") / "model", make_tokenizer())


@pytest.mark.parametrize("bits", [None, 4, 8, 16])
@pytest.mark.parametrize("context", [0, 50])
def test_the_fewest_experts_are_removed(bits: int | None, context: int, folder: Path) -> None:
    layout = open_layout(folder)
    sizes, cache = sizes_of(layout), context_bytes(layout.config, context)
    takes = {n: sizes.after(dict.fromkeys(layout.num_experts, n)).at(bits) + cache for n in range(2, 9)}
    for asked in (takes[2], takes[4] - 1, takes[4], takes[4] + 1, takes[7], takes[8] - 1):
        recipe, fit = fitted(MoEPrunerConfig(method="reap", fit=asked, bits=bits, context=context), layout)
        assert recipe.num_experts == max(n for n in range(2, 8) if takes[n] <= asked)
        assert fit is not None and fit.weights + fit.cache == takes[recipe.num_experts]
        left = recipe.num_experts * sum(size.quantisable for size in sizes.experts.values())
        kept = None if bits is None or bits == 16 else fit.weights + left * (16 - bits - 0.5) / 8
        assert fit.experts_kept == kept and ("where experts stay in 16 bits" in fit.note) is (kept is not None)
        assert recipe.fit is None and recipe.bits is None and recipe.context == 0
    for asked, words in ((takes[8], "as it is"), (takes[2] - 1, "cannot be made to fit")):
        with pytest.raises(RequestError, match=words):
            fitted(MoEPrunerConfig(method="reap", fit=asked, bits=bits, context=context), layout)


def test_a_budget_for_the_whole_model(folder: Path) -> None:
    layout = open_layout(folder)
    sizes = sizes_of(layout)
    one = sizes.experts[0].nbytes
    for removed in (1, 5, 18):
        for more in (0, one - 1):
            asked = sizes.whole.nbytes - removed * one + more
            recipe, fit = fitted(MoEPrunerConfig(method="reap", allocation="global", fit=asked), layout)
            assert recipe.total_experts == 24 - removed
            assert fit is not None and fit.weights == sizes.whole.nbytes - removed * one
    with pytest.raises(RequestError, match=r"6 of 24 experts.*What would fit: [\d.]+ kB"):
        fitted(MoEPrunerConfig(method="reap", allocation="global", fit=sizes.whole.nbytes - 19 * one), layout)


def test_skipped_layers_keep_all(folder: Path) -> None:
    layout = open_layout(folder)
    sizes = sizes_of(layout)
    asked = sizes.after({1: 4, 2: 4}).nbytes
    recipe, _ = fitted(MoEPrunerConfig(method="reap", fit=asked, skip_layers=(0,)), layout)
    assert recipe.num_experts == 4
    recipe, _ = fitted(MoEPrunerConfig(method="reap", fit=asked, skip_layers=(0,), allocation="global"), layout)
    assert recipe.total_experts == 8  # of the layers that are not skipped


def test_what_would_fit_is_said(folder: Path) -> None:
    layout = open_layout(folder)
    sizes = sizes_of(layout)
    asked = sizes.after(dict.fromkeys(layout.num_experts, 3)).at(4)
    with pytest.raises(RequestError, match=r"What would fit: [\d.]+ kB; bits=4, with 9 of 24 experts\."):
        fitted(MoEPrunerConfig(method="reap", fit=asked, bits=16), layout)
    with pytest.raises(RequestError, match="a shorter context"):
        fitted(MoEPrunerConfig(method="reap", fit=sizes.whole.nbytes - 1, context=5000), layout)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_pruned_checkpoint_fits(allocation: str, folder: Path, tmp_path: Path) -> None:
    asked = sizes_of(open_layout(folder)).whole.nbytes * 7 // 10
    config = MoEPrunerConfig(method="frequency", fit=asked, allocation=allocation, max_length=32)
    pruner = MoEPruner.from_pretrained(folder, config)
    pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts())
    plan = pruner.pruning_plan
    assert plan is not None and Checkpoint.open(tmp_path / "out").nbytes <= asked
    assert plan.provenance["fit"]["asked"] == asked and any("fits" in note for note in plan.provenance["notes"])
    stored = MoEPrunerConfig.from_pretrained(tmp_path / "out")
    assert stored.fit is None and (stored.num_experts or stored.total_experts)
    again = MoEPruner.from_pretrained(folder, config).plan(pruner.stats)
    assert again.retained == plan.retained


def test_a_model_in_memory_is_made_to_fit() -> None:
    model = make_model()
    asked = sizes_of_model(model).after({0: 5, 1: 5, 2: 5}).nbytes
    pruner = MoEPruner(MoEPrunerConfig(method="random", fit=asked))
    pruner.prune(model)
    assert pruner.pruning_plan is not None and pruner.pruning_plan.uniform_num_experts == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fit": "24GB", "num_experts": 4}, "exactly one of"),
        ({"bits": 4, "num_experts": 4}, "bits is for fit"),
        ({"context": 4, "num_experts": 4}, "context is for fit"),
        ({"fit": "24GB", "bits": 7}, "bits is 7"),
        ({"fit": "24GB", "context": -1}, "context is -1"),
        ({"fit": "24 potatoes"}, "fit is '24 potatoes'"),
    ],
)
def test_wrong_requests(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        MoEPrunerConfig(method="reap", **settings)  # type: ignore[arg-type]


def test_a_recipe_with_a_number_replaces_the_memory() -> None:
    recipe = MoEPrunerConfig(method="reap", fit="24GB", bits=4, context=8)
    assert MoEPrunerConfig.from_dict(recipe.to_dict()) == recipe
    changed = MoEPrunerConfig.from_dict(recipe.to_dict(), num_experts=4)
    assert (changed.num_experts, changed.fit, changed.bits, changed.context) == (4, None, None, 0)
