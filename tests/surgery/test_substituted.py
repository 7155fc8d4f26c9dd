# SPDX-License-Identifier: Apache-2.0
"""Experts that are left out and answer with a constant: the files, what they calculate, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heads
import pytest
import torch
from architectures.tiny import tiny_model
from conftest import make_model, make_texts, save_checkpoint
from oracles import call, plan_for, straight_loop
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    PruningPlan,
    RequestError,
    RunError,
    calibrate,
    compare,
    compare_methods,
)
from optimum_moe_prune.architectures.substitution import substituted_in
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.checkpoints.source import Source
from optimum_moe_prune.models import reload
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.memory import load_model
from optimum_moe_prune.publishing.sizes import sizes_of
from optimum_moe_prune.surgery.substitutable import check_substitution

IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
MEANS = [Need.ROUTING, Need.MEAN_OUTPUTS]

Constants = dict[tuple[int, int], Tensor]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def constants_of(folder: Path) -> Constants:
    """The vectors by layer and expert, as the reader parses their names."""
    found = {}
    for name, tensor in tensors_of(folder).items():
        if name.endswith(".approx_value"):
            experts, _, number = name.removesuffix(".approx_value").rpartition(".")
            (layer,) = [int(part) for part in experts.split(".") if part.isdigit()]
            assert experts.rpartition(".")[2] == "experts"
            found[layer, int(number)] = tensor
    return found


def put_in(model: PreTrainedModel, constants: Constants) -> PreTrainedModel:
    """The original, token by token and choice by choice: a constant where the expert has one."""
    for block in moe_blocks(model):
        own, layer = block.experts.forward, block.layer

        def forward(x: Tensor, ids: Tensor, w: Tensor, own: Callable[..., Tensor] = own, layer: int = layer) -> Tensor:
            output = torch.zeros_like(x)
            for t, row in enumerate(ids.tolist()):
                for k, expert in enumerate(row):
                    at, slot = slice(t, t + 1), slice(k, k + 1)
                    constant = constants.get((layer, expert))
                    output[t] += own(x[at], ids[at, slot], w[at, slot])[0] if constant is None else w[t, k] * constant
            return output

        block.experts.forward = forward
    return model


@pytest.fixture
def source(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_checkpoint(kind, tmp_path / "model", tokenizer, torch.float32)


@pytest.fixture
def mixtral(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_checkpoint("mixtral", tmp_path / "model", tokenizer)


def loaded(folder: Path) -> PreTrainedModel:
    return load_model(Source(str(folder)), Compute())


def written(folder: Path, samples: CalibrationSet, output: Path, **settings: Any) -> tuple[PruningPlan, Path]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    plan = plan_for(model, **settings)
    plan.apply_to_checkpoint(folder, output, substitute=calibrate(model, samples, MEANS))
    return plan, output


@torch.no_grad()
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_it_answers_with_constants_where_experts_are_left_out(
    source: Path, samples: CalibrationSet, allocation: str, tmp_path: Path
) -> None:
    plan, output = written(source, samples, tmp_path / "out", allocation=allocation)
    constants, original = constants_of(output), AutoModelForCausalLM.from_pretrained(source)
    assert constants.keys() == {
        (layer, expert)
        for layer, count in plan.original_num_experts.items()
        for expert in {*range(count)} - {*plan.retained[layer]}
    }
    whole, found = original(IDS).logits, loaded(output)(IDS).logits
    expected = put_in(original, constants)(IDS).logits
    assert (whole - expected).abs().max() > 0.01 * expected.abs().max(), "it must matter"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_constants_are_means_over_the_tokens_of_each_expert(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = save_checkpoint("qwen2_moe", tmp_path / "model", tokenizer, torch.float32)
    model, samples = AutoModelForCausalLM.from_pretrained(source), CalibrationSet.build(make_texts(4), tokenizer)
    _, output = written(source, samples, tmp_path / "out")
    expected = straight_loop(model, samples)
    for (layer, expert), vector in constants_of(output).items():
        tokens = expected[layer]["routed_tokens"][:, expert].sum()
        mean = expected[layer]["output_sum"][:, expert].sum(0) / tokens.clamp(min=1)
        torch.testing.assert_close(vector, mean.float(), rtol=1e-4, atol=1e-6)


def test_shares_of_domains_weigh_means(mixtral: Path, samples: CalibrationSet, tmp_path: Path) -> None:
    model, weights = AutoModelForCausalLM.from_pretrained(mixtral), {"low": 3.0, "high": 1.0}
    stats = calibrate(model, samples, MEANS).with_domain_weights(weights)
    layer = stats.layers[0]
    plan_for(model).apply_to_checkpoint(mixtral, tmp_path / "out", substitute=stats)
    for (index, expert), vector in constants_of(tmp_path / "out").items():
        if index == 0:
            sums, tokens = (layer.tensors[name][:, expert] for name in ("output_sum", "routed_tokens"))
            w = layer.sample_weights
            mean = (w[:, None] * sums).sum(0) / max(float((w * tokens).sum()), 1e-9)
            torch.testing.assert_close(vector, mean.bfloat16(), rtol=1e-2, atol=1e-6)
    said = PruningPlan.load(tmp_path / "out").provenance["substitution"]
    assert said["domain_weights"] == weights and said["calibration"] == stats.fingerprint


def test_all_else_is_the_source_to_the_byte(source: Path, samples: CalibrationSet, tmp_path: Path) -> None:
    plan, output = written(source, samples, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(output)
    gone = {
        f".{layer}.{where}.experts.{expert}."
        for layer, expert in constants_of(output)
        for where in ("block_sparse_moe", "mlp")
    }
    kept = {name: tensor for name, tensor in before.items() if not any(part in name for part in gone)}
    left = {name: tensor for name, tensor in after.items() if not name.endswith(".approx_value")}
    assert kept.keys() == left.keys() and all(torch.equal(tensor, left[name]) for name, tensor in kept.items())
    assert len(before) - len(kept) == 3 * len(constants_of(output))
    config = config_of(output)
    listed = config.pop("approximate_experts")
    assert config == config_of(source), "every count stays"
    assert {int(layer): tuple(ids) for layer, ids in listed.items()} == {
        layer: tuple(e for e in range(count) if e not in plan.retained[layer])
        for layer, count in plan.original_num_experts.items()
    }
    assert all(v.dtype == torch.float32 for v in constants_of(output).values())


def test_an_expert_that_no_token_reached_answers_with_zeros(mixtral: Path, tmp_path: Path) -> None:
    few = CalibrationSet.build([torch.tensor([5, 6])])
    _, output = written(mixtral, few, tmp_path / "out", num_experts=2)
    provenance = PruningPlan.load(output).provenance["substitution"]
    constants = constants_of(output)
    never = {(int(layer), e) for layer, experts in provenance["unreached"].items() for e in experts}
    assert never and {key for key, vector in constants.items() if not vector.any()} == never
    assert f"{len(never)} of them answer with 0" in provenance["notes"][1]


def test_heads_for_further_tokens_stay_whole(tmp_path: Path) -> None:
    folder = heads.checkpoint("deepseek_v3", tmp_path / "model")
    samples = CalibrationSet.build([torch.arange(3, 40)])
    stats = calibrate(folder, samples, MEANS)
    plan = MoEPruner(MoEPrunerConfig(method="random", sparsity=0.5)).plan(stats)
    assert plan.heads, "without constants it would be pruned"
    plan.apply_to_checkpoint(folder, tmp_path / "out", substitute=stats)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    head = [name for name in before if name.startswith(heads.HEAD["deepseek_v3"])]
    assert head and all(torch.equal(before[name], after[name]) for name in head)
    assert PruningPlan.load(tmp_path / "out").heads == ()
    with pytest.raises(RequestError, match="stay whole"):
        plan.apply_to_checkpoint(folder, tmp_path / "other", substitute=stats, mtp="prune")


def test_the_config_has_the_keys_for_routers_that_its_reader_needs(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "model")
    keys = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    assert not keys.keys() & config_of(tmp_path / "model").keys()
    _, output = written(
        tmp_path / "model", CalibrationSet.build([torch.arange(3, 40)]), tmp_path / "out", num_experts=6
    )
    assert keys.items() <= config_of(output).items()


@pytest.mark.parametrize("lenient", [False, True])
def test_transformers_refuses_it(mixtral: Path, samples: CalibrationSet, lenient: bool, tmp_path: Path) -> None:
    _, output = written(mixtral, samples, tmp_path / "out")
    with pytest.raises(RunError, match="leaves experts out that answer with a constant"):
        AutoModelForCausalLM.from_pretrained(output, ignore_mismatched_sizes=lenient)
    if lenient:
        return
    reload.disable()  # as without this package
    try:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(output)
    finally:
        reload.enable()


def test_it_is_no_model_to_prune_again(
    mixtral: Path, samples: CalibrationSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, output = written(mixtral, samples, tmp_path / "out")
    with pytest.raises(RequestError, match=r"answer with a constant.*Prune the original"):
        open_layout(output)
    stored = PruningPlan.load(output)
    assert stored.retained == plan.retained and stored.config["substitute"]
    stored.apply_to_checkpoint(mixtral, tmp_path / "removed")
    assert "made for experts that answer with a constant (substitute), and here they are removed" in caplog.text
    removed = PruningPlan.load(tmp_path / "removed")
    assert "substitution" not in removed.provenance and not removed.config["substitute"]
    assert not [note for note in removed.notes if "answer" in note]
    assert config_of(tmp_path / "removed")["num_local_experts"] == 4


def test_damage_is_named(mixtral: Path, samples: CalibrationSet, tmp_path: Path) -> None:
    _, output = written(mixtral, samples, tmp_path / "out")
    tensors = load_file(output / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(".approx_value"))
    save_file({n: t for n, t in tensors.items() if n != lost}, output / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match="lacks the constant of expert"):
        loaded(output)
    for wrong in ([1], {"0": 3}, {"0": [1, 1]}, {"0": [-1]}, {"x": [1]}):
        (output / "config.json").write_text(json.dumps({**config_of(mixtral), "approximate_experts": wrong}))
        with pytest.raises(RequestError, match=r"approximate_experts in config\.json is damaged"):
            substituted_in(Source(str(output)).config)


def test_what_its_reader_does_not_take_is_refused(mixtral: Path, samples: CalibrationSet, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    plan, output = plan_for(model), tmp_path / "out"
    stats = calibrate(model, samples, MEANS)
    recipe = MoEPrunerConfig(method="frequency", substitute=True)
    with pytest.raises(RequestError, match="compared by removing experts, and with substitute=True"):
        compare_methods(model, stats, samples, methods=[recipe], sparsities=0.5)
    refusals: list[tuple[str, Callable[[], object]]] = [
        ("standalone", lambda: plan.apply_to_checkpoint(mixtral, output, substitute=stats, standalone=True)),
        ("score --mean-outputs", lambda: plan.apply_to_checkpoint(
            mixtral, output, substitute=calibrate(model, samples, [Need.ROUTING]))),
        ("substitute=True is for vLLM, and the target is 'sglang'", lambda: plan.apply_to_checkpoint(
            mixtral, output, substitute=stats, program="sglang")),
        ("parallel_size is 2; vLLM takes", lambda: plan.apply_to_checkpoint(
            mixtral, output, substitute=stats, program="vllm", parallel_size=2)),
        ("CalibrationStats", lambda: plan.apply_to_checkpoint(mixtral, output, substitute="stats")),
        ("recover", lambda: MoEPrunerConfig(num_experts=4, substitute=True, recover="refit")),  # type: ignore[arg-type]
        ("progressive", lambda: MoEPrunerConfig(method="reap", num_experts=4, substitute=True, progressive=True)),
        ("substitute", lambda: MoEPrunerConfig(num_experts=4, substitute="yes")),  # type: ignore[arg-type]
        ("prune_checkpoint", lambda: MoEPruner(MoEPrunerConfig(method="random", num_experts=4, substitute=True)).prune(
            model, samples)),
        ("no statistics", lambda: MoEPruner(
            MoEPrunerConfig(method="random", num_experts=4, substitute=True), plan=plan, source=mixtral
        ).prune_checkpoint(output)),
    ]  # fmt: skip
    for said, attempt in refusals:
        with pytest.raises(RequestError, match=said):
            attempt()
    other = calibrate(make_model(seed=1), samples, MEANS)
    with pytest.raises(RequestError, match="of another model"):
        plan.apply_to_checkpoint(mixtral, output, substitute=other)
    assert not output.exists()


@pytest.mark.parametrize(
    ("model_type", "said"),
    [("gpt_oss", "reads no constant experts"), ("fused", "holds all experts of layer 0"), ("quantised", "quantised")],
)
def test_layouts_that_its_reader_does_not_take(model_type: str, said: str, mixtral: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if model_type == "gpt_oss":
        shutil.rmtree(folder)
        tiny_model("gpt_oss").save_pretrained(folder)
    else:
        tensors = load_file(folder / "model.safetensors")
        if model_type == "quantised":
            tensors = {n: t.to(torch.float8_e4m3fn) if ".experts." in n else t for n, t in tensors.items()}
        else:
            for layer in range(3):
                experts = f"model.layers.{layer}.block_sparse_moe.experts"
                parts = {w: [tensors.pop(f"{experts}.{e}.{w}.weight") for e in range(8)] for w in ("w1", "w2", "w3")}
                tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(
                    [torch.cat(pair) for pair in zip(parts["w1"], parts["w3"], strict=True)]
                )
                tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(parts["w2"])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    layout = open_layout(folder)
    with pytest.raises(RequestError, match=said):
        check_substitution(layout)


@torch.no_grad()
def test_from_the_command_line(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out"
    texts.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))
    recipe = ["--method", "random", "--num-experts", "4"]
    run = ["run", "--model", mixtral, "--calibration", texts, *recipe]
    code, printed, _ = call(capsys, *run, "--substitute", "--evaluate", texts, out)
    assert code == 0 and f"load it: vllm serve {out}" in printed and "not by transformers" in printed
    card = (out / "README.md").read_text()
    assert "answer with a constant" in card and "vllm serve" in card and "from_pretrained" not in card
    assert "--substitute --stats STATS_DIR" in card
    assert re.search(r"moe-prune run --model ORIGINAL .*--substitute OUTPUT", card)
    sizes = sizes_of(PruningPlan.load(out), out)
    assert sizes is not None and sizes.parameters[0] == sum(t.numel() for t in tensors_of(mixtral).values())
    assert sizes.nbytes[1] == sum(t.nbytes for t in tensors_of(out).values())
    evaluated = json.loads((out / "moe_evaluation.json").read_text())["models"]["out"]
    assert evaluated["parameters"] == sizes.parameters[1] and evaluated["bytes"] == sizes.nbytes[1]

    stats, again = tmp_path / "stats", tmp_path / "again"
    score = ["score", "--model", mixtral, "--calibration", texts, "--method", "reap"]
    assert call(capsys, *score, "--mean-outputs", stats)[0] == 0
    assert CalibrationStats.load(stats).needs == {Need.ROUTING, Need.ROUTED_NORMS, Need.MEAN_OUTPUTS}
    (tmp_path / "recipe.json").write_text(json.dumps({"method": "random", "num_experts": 4, "substitute": True}))
    plan = ["plan", "--stats", stats, "--config", tmp_path / "recipe.json", tmp_path / "plan.json"]
    assert "--substitute --stats STATS_DIR OUTPUT" in call(capsys, *plan)[1]
    apply = ["apply", "--model", mixtral, "--plan", out]
    assert call(capsys, *apply, "--substitute", "--stats", stats, again)[0] == 0
    for name, tensor in tensors_of(out).items():
        assert torch.equal(tensor, tensors_of(again)[name]), name
    for arguments, said in (
        ([*apply, "--substitute"], "--stats STATS_DIR"),
        ([*apply, "--stats", stats], "--stats is for --substitute"),
        ([*apply, "--substitute", "--stats", stats, "--speed"], "--speed is that of transformers"),
        ([*apply, "--substitute", "--stats", stats, "--recover", "refit", "--calibration", texts], "--recover"),
        ([*run, "--substitute", "--speed"], "--speed is that of transformers"),
        ([*run, "--substitute", "--for", "sglang"], "--substitute is for vLLM, and the target is"),
        ([*apply, "--substitute", "--stats", stats, "--for", "mlx"], "--substitute is for vLLM, and the target is"),
        ([*run, "--substitute", "--mtp", "drop", "--standalone"], "standalone"),
    ):
        code, _, err = call(capsys, *arguments, tmp_path / "none")
        assert code == 2 and said in err and not (tmp_path / "none").exists(), err
    with pytest.raises(RequestError, match="measure it there"):
        compare(out, speed=True)
