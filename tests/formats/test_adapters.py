# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters follow the cut: pruned and merged is merged and pruned, to the bit; what cannot be cut is refused."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import assert_equal_states, make_model
from oracles import call, plan_for
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from optimum_moe_prune import PruningPlan, RequestError, RunError
from optimum_moe_prune.formats import form_of
from optimum_moe_prune.formats.adapters.settings import cut_settings

START = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """A model, its folder, a plan for it, and the folder of an adapter of it."""

    model: PreTrainedModel
    base: Path
    plan: PruningPlan
    adapter: Path

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.adapter / "adapter_config.json").read_text())

    def change(self, **values: object) -> None:
        (self.adapter / "adapter_config.json").write_text(json.dumps({**self.settings, **values}))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.adapter / "adapter_model.safetensors")

    def hold(self, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    def pruned(self) -> PreTrainedModel:
        return replace(self.plan, provenance={}).apply(copy.deepcopy(self.model))


def trained(
    folder: Path, model: PreTrainedModel, config: object, num: int = 6, allocation: str = "uniform"
) -> Trained:
    """An adapter with random numbers, as PEFT saves it."""
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.3
        adapted.save_pretrained(folder / "adapter")
    return Trained(model, folder / "base", plan_for(model, num, allocation=allocation), folder / "adapter")


def merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """A model with an adapter merged in, every tensor of which was read."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    assert not [str(s.message) for s in said if "missing" in str(s.message) or "unexpected" in str(s.message)]
    return result.requires_grad_(False)


def check(it: Trained, output: Path, **options: object) -> None:
    """Base pruned and merged equals base merged and pruned."""
    it.plan.apply_to_checkpoint(it.adapter, output, **options)
    both = replace(it.plan, provenance={}).apply(merged(copy.deepcopy(it.model), it.adapter))
    assert_equal_states(merged(it.pruned(), output), both)
    with pytest.raises(AssertionError):  # the adapter does something
        assert_equal_states(it.pruned(), both)


def experts_of(block: str, *more: str) -> list[str]:
    return [f"{block}.experts.{name}" for name in ("gate_up_proj", "down_proj", *more)]


CASES: dict[str, tuple[str, dict[str, object], str]] = {
    # experts, nested, with twice the rank on gate_up, and router
    "mixtral": ("mixtral", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, "uniform"),
    "mixtral unequal": ("mixtral", {"target_modules": [], "target_parameters": experts_of("mlp")}, "global"),
    "deepseek": ("deepseek_v3", {"target_modules": "all-linear", "bias": "all"}, "global"),
    # neither experts nor router: nothing to cut
    "qwen2": ("qwen2_moe", {"target_modules": "all-linear", "use_dora": True}, "uniform"),
    "qwen2 by name": (
        "qwen2_moe",
        {"target_modules": ["o_proj"], "target_parameters": [*experts_of("mlp"), "gate.weight"], "use_rslora": True},
        "global",
    ),
    "whole blocks": ("qwen3_moe", {"target_modules": ["o_proj"], "modules_to_save": ["mlp"]}, "global"),
    "a router": ("olmoe", {"target_modules": ["o_proj"], "modules_to_save": ["gate"]}, "uniform"),
    # inputs before outputs, biases by expert and of the router
    "gpt-oss": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": [*experts_of("mlp", "gate_up_proj_bias"), "router.weight"],
            "bias": "lora_only",
        },
        "global",
    ),
    # a router that is a Linear, with magnitudes and a bias of lora_B's own
    "llama4": ("llama4_text", {"target_modules": ["router"], "use_dora": True}, "global"),
    "llama4 experts": (
        "llama4_text",
        {
            "target_modules": ["router", "q_proj"],
            "target_parameters": experts_of("feed_forward"),
            "rank_pattern": {"router": 5, r".*gate_up_proj": 4},
        },
        "uniform",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pruned_and_merged_is_merged_and_pruned(case: str, tmp_path: Path) -> None:
    kind, settings, allocation = CASES[case]
    fewer = {"num_hidden_layers": 3, **({"moe_layers": [1, 2]} if kind == "llama4_text" else {})}
    model = tiny_model(kind, **fewer)
    it = trained(tmp_path, model, LoraConfig(r=3, **settings), allocation=allocation)  # type: ignore[arg-type]
    check(it, tmp_path / "cut")
    names = ("adapter_config.json", "adapter_model.safetensors")
    before, after = ([(folder / name).read_bytes() for name in names] for folder in (it.adapter, tmp_path / "cut"))
    assert after[0] == before[0]
    assert (after[1] == before[1]) is (case == "qwen2")
    assert PruningPlan.load(tmp_path / "cut").retained == it.plan.retained


def older(it: Trained) -> None:
    """The adapter as transformers 4 named its parts: each expert has its own."""
    torch.manual_seed(2)
    tensors, layers = {}, it.model.config.num_hidden_layers
    width, inner = it.model.config.hidden_size, it.model.config.intermediate_size
    for layer in range(layers):
        block = f"{START}model.layers.{layer}.block_sparse_moe"
        shapes = {f"experts.{e}.{w}": (width, inner) for e in range(8) for w in ("w1", "w3")}
        shapes |= {f"experts.{e}.w2": (inner, width) for e in range(8)} | {"gate": (width, 8)}
        for name, (inputs, outputs) in shapes.items():
            tensors[f"{block}.{name}.lora_A.weight"] = torch.randn(3, inputs)
            tensors[f"{block}.{name}.lora_B.weight"] = torch.randn(outputs, 3)
    it.hold(tensors)
    it.change(target_modules=["gate", "w1", "w2", "w3"], target_parameters=None, rank_pattern={}, alpha_pattern={})


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("mixtral")
    return trained(folder, make_model(), LoraConfig(r=3, target_modules="all-linear"), num=4)


@pytest.fixture
def mixtral(once: Trained, tmp_path: Path) -> Trained:
    """The same one, in folders that may be changed."""
    for name in ("base", "adapter"):
        shutil.copytree(once.base.parent / name, tmp_path / name)
    it = replace(once, base=tmp_path / "base", adapter=tmp_path / "adapter")
    it.change(base_model_name_or_path=str(it.base))
    return it


def test_experts_by_number_are_numbered_anew(mixtral: Trained, tmp_path: Path) -> None:
    older(mixtral)
    check(mixtral, tmp_path / "cut")
    assert (tmp_path / "cut" / "adapter_config.json").read_text() == json.dumps(mixtral.settings)
    held = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert len(held) == 3 * 2 * (4 * 3 + 1)
    old = mixtral.plan.retained[1][2]
    name = START + "model.layers.1.block_sparse_moe.experts.{}.w3.lora_B.weight"
    assert torch.equal(held[name.format(2)], mixtral.tensors[name.format(old)])


def test_patterns_that_name_experts_by_number() -> None:
    names = {
        f"model.layers.1.mlp.experts.{old}.up": f"model.layers.1.mlp.experts.{new}.up"
        for new, old in enumerate((1, 3, 6))
    }
    others = {"model.layers.1.mlp.shared.up": "model.layers.1.mlp.shared.up"}
    by_number = {r"experts\.[3-6]\.up": 5, "layers.1.mlp.shared.up": 7, "up": 3}
    assert cut_settings({"rank_pattern": by_number, "r": 2}, names | others) == {
        "rank_pattern": {
            r"model\.layers\.1\.mlp\.experts\.1\.up": 5,
            r"model\.layers\.1\.mlp\.experts\.2\.up": 5,
            "layers.1.mlp.shared.up": 7,
            "up": 3,
        },
        "r": 2,
    }
    unchanged = {"alpha_pattern": {"up": 3, ".*experts.*": 4}, "rank_pattern": None}
    assert cut_settings(unchanged, names | others) == unchanged


@pytest.fixture
def modules(tmp_path: Path) -> Iterator[Callable[[LoraConfig], Trained]]:
    """Adapters of a model whose experts are modules of their own."""
    import sys

    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from optimum_moe_prune import MoESpec
    from optimum_moe_prune.architectures.forms import Softmax
    from optimum_moe_prune.architectures.table import supposing

    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    from own_model import OwnConfig, OwnForCausalLM

    AutoConfig.register("own_moe", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
    spec = MoESpec("own_moe", Softmax(), count_key="num_experts", modelling="own_model")
    with supposing(spec):
        torch.manual_seed(0)
        model = OwnForCausalLM(OwnConfig(routing="linear", as_modules=True)).eval()
        yield lambda config: trained(tmp_path, model, config, num=4)
    sys.path.pop(0)
    CONFIG_MAPPING._extra_content.pop("own_moe", None)
    AutoModelForCausalLM._model_mapping._extra_content.pop(OwnConfig, None)


def test_modules_of_experts(modules: Callable[[LoraConfig], Trained], tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        target_modules=r".*experts\.[0-4]\.up_proj|.*\.gate",
        rank_pattern={"experts.3.up_proj": 5},
        alpha_pattern={r"layers\.1\..*\.up_proj": 32},
        use_dora=True,
    )
    it = modules(config)
    check(it, tmp_path / "cut")
    settings = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    left = {layer: [new for new, old in enumerate(kept) if old <= 4] for layer, kept in it.plan.retained.items()}
    assert settings["target_modules"] == sorted(
        [f"model.layers.{layer}.mlp.experts.{new}.up_proj" for layer, kept in left.items() for new in kept]
        + [f"model.layers.{layer}.mlp.gate" for layer in left]
    )
    assert settings["alpha_pattern"] == it.settings["alpha_pattern"]
    assert settings["rank_pattern"] == {
        rf"model\.layers\.{layer}\.mlp\.experts\.{kept.index(3)}\.up_proj": 5
        for layer, kept in it.plan.retained.items()
        if 3 in kept
    }


# -- whose adapter it is


def test_the_original_is_found_and_proven(mixtral: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By what the adapter names, by what the plan names, by the pruned model; else it is said."""
    plan, cut = mixtral.plan, tmp_path / "cut"
    form = form_of(mixtral.adapter)
    assert form is not None and form.name == "an adapter"
    assert form.prepare(plan, mixtral.adapter, cut).facts["known_by"] == "its routers are those of the plan"
    plan.apply_to_checkpoint(mixtral.base, tmp_path / "pruned")
    mixtral.change(base_model_name_or_path=None)
    with pytest.raises(RequestError, match=r"original cannot be read here \(none is named\), .*base_model"):
        replace(plan, provenance={}).apply_to_checkpoint(mixtral.adapter, cut)
    moved = {**plan.provenance, "model": {**plan.made_for, "name_or_path": "moved"}}  # a folder's name is no id
    with pytest.raises(RequestError, match=r"cannot be read here \(none is named\)"):
        replace(plan, provenance=moved).apply_to_checkpoint(mixtral.adapter, cut)
    assert not caplog.messages
    mixtral.change(base_model_name_or_path="org/original")
    plan.apply_to_checkpoint(mixtral.adapter, tmp_path / "named", base_model=mixtral.base)
    assert "trained on org/original; it is not proven that that is" in caplog.text
    caplog.clear()
    (mixtral.base / "model.safetensors").unlink()
    plan.apply_to_checkpoint(mixtral.adapter, tmp_path / "unproven", base_model=mixtral.base)
    assert "it is not proven that the adapter's original (org/original)" in caplog.text
    plan.apply_to_checkpoint(mixtral.adapter, cut, base_model=tmp_path / "pruned")
    settings = json.loads((cut / "adapter_config.json").read_text())
    assert settings == {**mixtral.settings, "base_model_name_or_path": str(tmp_path / "pruned"), "revision": None}
    for folder in ("named", "unproven"):
        assert (tmp_path / folder / "adapter_model.safetensors").read_bytes() == (
            cut / "adapter_model.safetensors"
        ).read_bytes()
    merged(replace(plan, provenance={}).apply(copy.deepcopy(mixtral.model)), cut)
    config = tmp_path / "pruned" / "config.json"  # as if constants stood in for the experts: no model with fewer
    config.write_text(json.dumps({**json.loads(config.read_text()), "approximate_experts": {"0": [1]}}))
    with pytest.raises(RequestError, match="leaves experts out that answer with a constant"):
        plan.apply_to_checkpoint(mixtral.adapter, tmp_path / "other", base_model=tmp_path / "pruned")


def other_rank(it: Trained) -> None:
    it.change(r=4)


def other_pattern(it: Trained) -> None:
    it.change(rank_pattern={})


def other_layers(it: Trained) -> None:
    it.hold(
        {
            **it.tensors,
            **{name.replace("layers.0", "layers.7"): t for name, t in it.tensors.items() if "layers.0" in name},
        }
    )


def lacking(it: Trained) -> None:
    it.hold({name: t for name, t in it.tensors.items() if not ("layers.2" in name and "experts" in name)})


def fewer_experts(it: Trained) -> None:
    it.hold({name: t[:, :12].clone() if "experts.lora_B" in name else t for name, t in it.tensors.items()})


def beyond(it: Trained) -> None:
    older(it)
    it.hold({name.replace("experts.7.", "experts.8."): t for name, t in it.tensors.items()})


def other_routers(it: Trained) -> None:
    make_model(seed=1).save_pretrained(it.base)


def of_another_type(it: Trained) -> None:
    make_model("qwen2_moe").save_pretrained(it.base)


def pickled(it: Trained) -> None:
    (it.adapter / "adapter_model.safetensors").rename(it.adapter / "adapter_model.bin")


def truncated(it: Trained) -> None:
    path = it.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


WRONG: dict[str, tuple[Callable[[Trained], object], str]] = {
    "rank": (other_rank, r"has shape \[.*\], and one for the original \(.*\) has \[.*another rank"),
    "pattern of ranks": (other_pattern, "another rank"),
    "layers": (other_layers, "another model"),
    "missing": (lacking, r"lacks model.layers.2.mlp.experts.*adapter_config.json asks for.*another model"),
    "shape": (fewer_experts, "experts.lora_B.* has shape.*another model"),
    "expert": (beyond, "cannot be read|of expert 8, and layer . of the original has 8"),
    "routers": (other_routers, "other router weights"),
    "type": (of_another_type, "which the adapter is for: this plan is for a 'mixtral' model"),
    "pickle": (pickled, r"pickle \(adapter_model.bin\).*save_pretrained"),
    "truncated": (truncated, "damaged"),
    "gone": (lambda it: (it.adapter / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "layers repeated": (lambda it: it.change(layer_replication=[[0, 2], [1, 3]]), "layer_replication.*merge"),
    "no rank": (lambda it: it.change(r="8"), "damaged: r is '8'"),
    "no pattern": (lambda it: it.change(rank_pattern={"(": 3}), "."),
    "no settings": (lambda it: (it.adapter / "adapter_config.json").write_text("[]"), "adapter_config.json"),
    "begun from weights": (lambda it: it.change(init_lora_weights="pissa"), "init_lora_weights='pissa'.*plain LoRA"),
    "a prompt": (lambda it: it.change(peft_type="PROMPT_TUNING"), "PROMPT_TUNING .*LoRA is what can be cut"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_this_models_is_refused(what: str, mixtral: Trained, tmp_path: Path) -> None:
    spoil, said = WRONG[what]
    spoil(mixtral)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match=said) as error:
        mixtral.plan.apply_to_checkpoint(mixtral.adapter, tmp_path / "cut")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert sorted(tmp_path.rglob("*")) == before


def test_other_kinds_of_adapters_are_refused_by_name(tmp_path: Path) -> None:
    it = trained(tmp_path, make_model(), LoHaConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(RequestError, match=r"of the kind LOHA.*LoRA is what can be cut; merge it into the original"):
        it.plan.apply_to_checkpoint(it.adapter, tmp_path / "cut")


def test_one_expert_that_is_multiplied_the_other_way_round(tmp_path: Path) -> None:
    """PEFT takes the adapter of a single expert for that of a matrix, which it does not turn round."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=experts_of("mlp"))
    it = trained(tmp_path, tiny_model("gpt_oss", num_experts_per_tok=1), config, num=1)
    with pytest.raises(RequestError, match=r"left with one expert.*retain two"):
        it.plan.apply_to_checkpoint(it.adapter, tmp_path / "cut")


def test_damaged_numbers_stop_the_writing(mixtral: Trained, tmp_path: Path) -> None:
    tensors = mixtral.tensors
    name = next(name for name in tensors if "gate.lora_A" in name)
    mixtral.hold({**tensors, name: tensors[name] * float("nan")})
    with pytest.raises(RunError, match="NaN"):
        mixtral.plan.apply_to_checkpoint(mixtral.adapter, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_without_peft(mixtral: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata as metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(RequestError, match=r'peft, which is not installed; pip install "optimum-moe-prune\[peft\]"'):
        mixtral.plan.apply_to_checkpoint(mixtral.adapter, tmp_path / "cut")


# -- as a user has it


def test_the_command(mixtral: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, cut = mixtral.plan.save(tmp_path / "plan.json"), tmp_path / "cut"
    (mixtral.adapter / "optimizer.pt").write_bytes(b"of a training")
    given = ("apply", "--model", mixtral.adapter, "--plan", plan, cut)
    code, out, err = call(capsys, *given, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["cut"] == 15 and not cut.exists()
    code, out, err = call(capsys, *given)
    assert (code, out.strip()) == (0, str(cut))
    assert "15 of 42 tensors are about experts that go" in err and "PeftModel.from_pretrained" in err
    assert not (cut / "optimizer.pt").exists()
    assert "does not fit the base model any more" in (cut / "README.md").read_text()
    code, _, err = call(capsys, *given)
    assert code == 2 and "--overwrite" in err
    assert call(capsys, *given, "--overwrite", "--base-model", mixtral.base)[0] == 0
    for flags in (("--mtp", "keep"), ("--standalone",), ("--max-shard-size", "1GB"), ("--license", "mit")):
        code, _, err = call(capsys, *given, "--overwrite", *flags)
        assert code == 2 and err.count("\n") <= 2 and (flags[0] in err)


def test_an_adapter_as_the_model_of_other_commands(
    mixtral: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from optimum_moe_prune import MoEPruner

    caplog.set_level(logging.ERROR)
    with pytest.raises(RequestError, match=r"cut the adapter by that plan \(apply, with the adapter's folder"):
        MoEPruner.from_pretrained(mixtral.adapter).layout()
