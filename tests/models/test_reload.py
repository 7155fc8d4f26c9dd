# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose layers have different numbers of experts, through stock transformers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import KINDS, aligned, load, make_model, make_texts, make_tokenizer, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from optimum_moe_prune import (
    MoEPruner,
    MoEPrunerConfig,
    MoESpec,
    PruningPlan,
    RequestError,
    RunError,
    register_architecture,
)
from optimum_moe_prune.architectures import table
from optimum_moe_prune.architectures.forms import Softmax
from optimum_moe_prune.models import reload
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.names import PLAN_NAME

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def unequal_plan(model: PreTrainedModel) -> PruningPlan:
    """Another number in every layer: all but one, all but three, ..."""
    blocks = moe_blocks(model)
    retained = {b.layer: tuple(range(1 + 2 * n, b.num_experts)) for n, b in enumerate(blocks)}
    return PruningPlan(
        model.config.model_type, blocks[0].rule.top_k, "by hand", retained, {b.layer: b.num_experts for b in blocks}
    )


def counts(model: PreTrainedModel) -> dict[int, int]:
    return {block.layer: block.num_experts for block in moe_blocks(model)}


def pruned_folder(kind: str, path: Path, dtype: torch.dtype = torch.float32, **how: object) -> Path:
    """A checkpoint with unequal layers in ``path / "pruned"``, its original in ``path / "base"``."""
    save_checkpoint(kind, path / "base", make_tokenizer(), dtype)
    model = load(path / "base")
    unequal_plan(model).apply(model).save_pretrained(path / "pruned", **how)
    make_tokenizer().save_pretrained(path / "pruned")
    return path / "pruned"


@pytest.fixture
def pruned(kind: str, tmp_path: Path) -> Path:
    return pruned_folder(kind, tmp_path)


def expected_model(pruned: Path) -> PreTrainedModel:
    """What should be loaded: the original, pruned in memory."""
    model = load(pruned.parent / "base")
    return aligned(unequal_plan(model).apply(model))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_checkpoint_comes_back_as_it_was(kind: str, dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    folder = pruned_folder(kind, tmp_path, dtype, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model, expected = load(folder), expected_model(folder)
    assert model.dtype == dtype and counts(model) == unequal_plan(load(tmp_path / "base")).num_experts
    assert len(set(counts(model).values())) == len(counts(model))
    state = expected.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert all(part.config is model.config for part in model.modules() if hasattr(part, "config"))
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    for path in folder.glob("*model*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    first, second = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert first == second and set(first["per_layer_config"]) == {str(layer) for layer in counts(model)}


@torch.no_grad()
def test_generation_uses_the_cache_and_left_padding(pruned: Path) -> None:
    model, tokenizer = load(pruned), AutoTokenizer.from_pretrained(pruned, padding_side="left")
    how = {"max_new_tokens": 6, "do_sample": False}
    alone = [model.generate(row[None], **how)[0, 12:] for row in (IDS[0], IDS[1])]
    uncached = model.generate(IDS[:1], use_cache=False, **how)[0, 12:]
    assert torch.equal(alone[0], uncached)
    assert torch.equal(model.generate(IDS, **how)[:, 12:], torch.stack(alone))
    batch = tokenizer(["w5 w6 w7 w8 w9", "w50 w60"], padding=True, return_tensors="pt", return_token_type_ids=False)
    assert (batch["attention_mask"][1, 0], batch["attention_mask"][0, 0]) == (0, 1)
    together = model.generate(**batch, **how)
    short = tokenizer("w50 w60", return_tensors="pt", return_token_type_ids=False)
    assert torch.equal(together[1, 6:], model.generate(**short, **how)[0, 3:])


@torch.no_grad()
def test_devices_and_offload(pruned: Path, tmp_path: Path) -> None:
    expected = expected_model(pruned)(input_ids=IDS).logits
    automatic = load(pruned, device_map="auto")
    assert torch.equal(automatic(input_ids=IDS).logits, expected)
    spread = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    spread |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(pruned, device_map=spread, offload_folder=tmp_path / "offload")
    assert offloaded.model.layers[2].mlp.experts.down_proj.device.type == "meta"
    torch.testing.assert_close(offloaded(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_doors_of_transformers(pruned: Path) -> None:
    expected = expected_model(pruned)
    backbone = aligned(AutoModel.from_pretrained(pruned))
    hidden = expected.model(input_ids=IDS).last_hidden_state
    assert torch.equal(backbone(input_ids=IDS).last_hidden_state, hidden)
    classifier = AutoModelForSequenceClassification.from_pretrained(pruned)
    assert torch.equal(aligned(classifier.model)(input_ids=IDS).last_hidden_state, hidden)
    ask = pipeline("text-generation", model=str(pruned), device="cpu")
    told = ask("w5 w6 w7", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ids = torch.tensor([[1, 8, 9, 10]])
    assert told == expected.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()


@torch.no_grad()
def test_models_made_from_the_config_have_the_layers(pruned: Path) -> None:
    model = load(pruned)
    config = AutoConfig.from_pretrained(pruned)
    for built in (AutoModelForCausalLM.from_config(config), type(model)(config), type(model)(copy.deepcopy(config))):
        assert counts(built) == counts(model)
        assert torch.isfinite(built(input_ids=IDS).logits).all()
    twin = copy.deepcopy(model)
    assert torch.equal(aligned(twin)(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model.set_experts_implementation("eager")
    assert {block.experts.config._experts_implementation for block in moe_blocks(model)} == {"eager"}


def balance(logits: tuple[torch.Tensor, ...], top_k: int, mask: torch.Tensor) -> torch.Tensor:
    """Mean over layers of: experts x sum over experts of (share of tokens routed to it) x (its mean probability)."""
    per_layer = []
    for layer in logits:
        p = torch.softmax(layer.float(), -1)[mask.flatten().bool()]
        chosen = torch.zeros_like(p).scatter_(1, p.topk(top_k, -1).indices, 1.0)
        per_layer.append(p.shape[1] * (chosen.mean(0) * p.mean(0)).sum())
    return torch.stack(per_layer).mean()


def test_a_training_step_and_its_auxiliary_loss(pruned: Path) -> None:
    model = load(pruned).train()
    top_k = moe_blocks(model)[0].routing.top_k
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    for attention_mask in (None, mask):
        out = model(input_ids=IDS, labels=IDS, attention_mask=attention_mask, output_router_logits=True)
        expected = balance(out.router_logits, top_k, torch.ones_like(IDS) if attention_mask is None else mask)
        torch.testing.assert_close(out.aux_loss, expected)
        plain = model(input_ids=IDS, labels=IDS, attention_mask=attention_mask).loss
        torch.testing.assert_close(out.loss, plain + model.router_aux_loss_coef * expected)
    out.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert all(grads[f"model.layers.{layer}.mlp.gate.weight"].abs().sum() > 0 for layer in counts(model))
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # one name or the other
    assert model.model.layers[0].gradient_checkpointing
    model(input_ids=IDS, labels=IDS, attention_mask=mask, output_router_logits=True).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


def test_balanced_layers_of_any_width_have_the_same_loss() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rows = [torch.eye(width) * 1e-3 + torch.eye(width).roll(1, 0) * 1e-3 for width in (8, 4, 3)]
    loss = load_balancing_loss_func(tuple(rows), 8, 2)
    assert loss == pytest.approx(2.0, abs=1e-3)
    one_width = load_balancing_loss_func((rows[1], rows[1]), 8, 2)  # narrower than the model's number, but all alike
    assert one_width == pytest.approx(2.0, abs=1e-3)


@pytest.fixture
def own_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registered architectures are forgotten afterwards."""
    monkeypatch.setattr(table, "_ROWS", dict(table._ROWS))
    yield
    reload.disable()
    monkeypatch.undo()
    reload.enable()


# ------------------------------------------------------------------------------------------- stock models


@torch.no_grad()
def test_stock_models_are_as_if_we_were_not_there(kind: str, tmp_path: Path) -> None:
    def look(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        model.eval()
        out = model(input_ids=IDS, labels=IDS, output_router_logits=True, output_hidden_states=True)
        state = {f"state {name}": tensor for name, tensor in model.state_dict().items()}
        return {**state, "logits": out.logits, "aux": out.aux_loss, "loss": out.loss} | {
            f"{name} {i}": t for name in ("router_logits", "hidden_states") for i, t in enumerate(out[name])
        }

    reload.disable()
    try:
        make_model(kind).save_pretrained(tmp_path / "stock")
        expected = look(make_model(kind)), look(load(tmp_path / "stock"))
    finally:
        reload.enable()
    earlier = make_model(kind)
    for moment in range(2):
        found = look(make_model(kind)), look(load(tmp_path / "stock"))
        for a, b in zip(found, expected, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        if moment == 0:
            load(pruned_folder(kind, tmp_path))  # and afterwards
    assert torch.equal(look(earlier)["logits"], expected[0]["logits"])


def test_modelling_code_of_other_packages_is_reached(
    own_rows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module outside transformers that is imported after its architecture was registered."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "from torch import nn\nclass OwnLayer(nn.Module):\n    def __init__(self, config, layer_idx): pass\n"
    (tmp_path / "own_modelling.py").write_text(code)
    register_architecture(MoESpec("own", Softmax(), modelling="own_modelling"))
    import own_modelling

    assert own_modelling.OwnLayer.__init__.moe_prune
    reload.disable()
    assert not hasattr(own_modelling.OwnLayer.__init__, "moe_prune")
    sys.modules.pop("own_modelling")


def test_switching_off_and_on(pruned: Path) -> None:
    reload.disable()
    reload.disable()
    try:
        assert reload._finder not in sys.meta_path
        with pytest.raises(
            AmbiguousGlobalPerLayerAttributeError, match="is a per-layer attribute and may vary across layers"
        ):
            load(pruned)
    finally:
        reload.enable()
    reload.enable()
    assert sys.meta_path.count(reload._finder) == 1
    assert len(set(counts(load(pruned)).values())) == len(counts(load(pruned)))


# ------------------------------------------------------------------------------------------- processes

LOAD = """
import sys, torch
{first}
from transformers import AutoModelForCausalLM
{second}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
{third}
print([len(layer.mlp.experts.down_proj) for layer in model.model.layers if hasattr(layer.mlp, "experts")])
"""


def in_a_process(folder: Path, first: str = "", second: str = "", third: str = "") -> subprocess.CompletedProcess:
    code = LOAD.format(first=first, second=second, third=third)
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "order",
    [
        {"first": "import optimum_moe_prune.commands"},
        {
            "first": "import transformers.models.mixtral.modeling_mixtral, transformers.models.qwen2_moe."
            "modeling_qwen2_moe",
            "second": "import optimum_moe_prune",
        },
        pytest.param({"first": "import optimum_moe_prune"}, marks=pytest.mark.slow),  # as other tests here do
        pytest.param({"second": "import optimum_moe_prune"}, marks=pytest.mark.slow),
    ],
    ids=["by the command line", "after the modelling code", "before", "after"],
)
def test_the_order_of_imports_does_not_matter(order: dict[str, str], tmp_path: Path) -> None:
    folder = pruned_folder("qwen2_moe", tmp_path)
    result = in_a_process(folder, **order)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == list(counts(load(folder)).values())
    assert "Reading global config value" not in result.stderr and "MISMATCH" not in result.stderr


REFUSED = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    for options in ({}, {"ignore_mismatched_sizes": True}):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **options)
        except Exception as error:
            print(str(error).replace(chr(10), " "))
assert "optimum_moe_prune" not in sys.modules
"""


def test_without_the_package_loading_fails_loudly(tmp_path: Path) -> None:
    """Before a model is built, so that no option can fill it with random experts."""
    folders = [str(pruned_folder(kind, tmp_path / kind)) for kind in KINDS[:2]]
    result = subprocess.run([sys.executable, "-c", REFUSED, *folders], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4 and all("is a per-layer attribute and may vary across layers" in line for line in lines)


INT8 = """
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig
ids = torch.arange(3, 15)[None]
plain = model(input_ids=ids).logits
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ != "Parameter"
error = (model(input_ids=ids).logits - plain).norm() / plain.norm()
assert 0 < error < 0.2, error
"""


@pytest.mark.parametrize("kind", ["qwen2_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_int8_weights_on_load(kind: str, tmp_path: Path) -> None:
    folder = pruned_folder(kind, tmp_path)
    result = in_a_process(folder, first="import optimum_moe_prune", third=INT8)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == list(counts(load(folder)).values())


# ------------------------------------------------------------------------------------------- damaged checkpoints


def edit_config(folder: Path, layer: str, count: int, key: str | None = None) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    entry = values["per_layer_config"][layer]
    (old,) = entry
    del entry[old]
    entry[key or old] = count
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("count", [3, 5])
def test_a_config_that_disagrees_with_the_tensors_is_refused_by_layer(pruned: Path, count: int, loose: bool) -> None:
    truth = counts(load(pruned))[2]
    count = count if count != truth else 4
    edit_config(pruned, "2", count)
    message = rf"layer 2: config.json says {count} experts, and the checkpoint holds {truth} \(.*layers\.2\.mlp"
    for door in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(RunError, match=message):
            door.from_pretrained(pruned, ignore_mismatched_sizes=loose)


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("layers", [{}, {"0": {}}])
def test_numbers_that_were_taken_out_of_the_config_are_missed(
    pruned: Path, layers: dict[str, object], loose: bool
) -> None:
    path = pruned / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"per_layer_config": layers}))
    with pytest.raises(RunError, match=r"layer 0: config.json says . experts, and the checkpoint holds ."):
        AutoModelForCausalLM.from_pretrained(pruned, ignore_mismatched_sizes=loose)


def test_other_shapes_that_disagree_are_not_called_numbers_of_experts(pruned: Path) -> None:
    path = pruned / "config.json"
    values = json.loads(path.read_text())
    key = "intermediate_size" if values["model_type"] == "mixtral" else "shared_expert_intermediate_size"
    path.write_text(json.dumps(values | {key: 36}))
    with pytest.raises(RunError, match=r"layer 0: the checkpoint disagrees with config.json: .* has shape"):
        load(pruned)


def test_experts_that_are_missing_are_named(pruned: Path) -> None:
    tensors = load_file(pruned / "model.safetensors")
    gone = [name for name in tensors if "layers.2." in name and ".experts." in name]
    save_file(
        {name: t for name, t in tensors.items() if name not in gone}, pruned / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RunError, match=r"layer 2: model\.layers\.2\.mlp\.experts\.down_proj is missing"):
        load(pruned)


def test_an_alias_of_the_key_is_understood(tmp_path: Path) -> None:
    folder = pruned_folder("mixtral", tmp_path)
    expected = counts(load(folder))
    for layer, count in expected.items():
        edit_config(folder, str(layer), count, key="num_experts")
    assert counts(load(folder)) == expected


# ------------------------------------------------------------------------------------------- pruning again


@torch.no_grad()
def test_the_cut_is_repeated_on_the_base_model(kind: str, tmp_path: Path) -> None:
    save_checkpoint(kind, tmp_path / "base", make_tokenizer())
    pruner = MoEPruner.from_pretrained(
        tmp_path / "base", MoEPrunerConfig(method="pathfinder", sparsity=0.3, method_options={"tau": 0.2})
    )
    model = pruner.prune(load(tmp_path / "base"), calibration=make_texts())
    assert pruner.pruning_plan.uniform_num_experts is None
    pruner.save_pretrained(tmp_path / "out")
    again = MoEPruner.from_pretrained(tmp_path / "out").prune(load(tmp_path / "base"))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())
    source, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out"))
    changed = {key for key in source.keys() | written.keys() if source.get(key) != written.get(key)}
    assert changed == {"per_layer_config"}
    # A plan edited by hand.
    plan = PruningPlan.load(tmp_path / "out" / PLAN_NAME)
    layer = max(plan.num_experts, key=plan.num_experts.get)
    edited = replace(plan, retained=plan.retained | {layer: plan.retained[layer][:-1]})
    assert counts(edited.apply(load(tmp_path / "base"))) == edited.num_experts
    assert edited.num_experts[layer] == plan.num_experts[layer] - 1


def test_an_unequal_model_is_pruned_again(kind: str, pruned: Path, tmp_path: Path) -> None:
    before = counts(load(pruned))
    top_k = moe_blocks(load(pruned))[0].routing.top_k
    pruner = MoEPruner.from_pretrained(pruned, MoEPrunerConfig(method="random", num_experts=top_k))
    assert pruner.prune(load(pruned)).config.per_layer_attributes is None
    pruner.save_pretrained(tmp_path / "equal")
    written = json.loads((tmp_path / "equal" / "config.json").read_text())
    assert not {"per_layer_config", "allow_global_per_layer_attribute_access"} & set(written)
    if kind == "qwen2_moe":  # of no other count than those that plain transformers reloads elsewhere
        result = in_a_process(tmp_path / "equal")
        assert json.loads(result.stdout) == [top_k] * len(before), result.stderr
    fewer = MoEPruner.from_pretrained(
        pruned, MoEPrunerConfig(method="random", allocation="global", sparsity=0.2)
    ).prune(load(pruned))
    fewer.save_pretrained(tmp_path / "fewer")
    assert counts(load(tmp_path / "fewer")) == counts(fewer) != before
    assert sum(counts(fewer).values()) < sum(before.values())


def test_layers_at_their_floor_become_equal_with_the_others(tmp_path: Path) -> None:
    folder = pruned_folder("mixtral", tmp_path)
    model = load(folder)
    retained = {0: (0, 3), 1: tuple(range(5)), 2: (0, 1)}
    PruningPlan("mixtral", 2, "by hand", retained, counts(model)).apply(model)
    config = MoEPrunerConfig(method="random", num_experts=2)
    assert counts(MoEPruner(config).prune(model)) == {0: 2, 1: 2, 2: 2}
    for settings in ({"num_experts": 3}, {"sparsity": 0.3}):
        unequal = PruningPlan("mixtral", 2, "by hand", retained, counts(load(folder))).apply(load(folder))
        with pytest.raises(RequestError, match=r"or leave layer 0 as it is \(skip_layers\)"):
            MoEPruner(MoEPrunerConfig(method="random", **settings)).prune(unequal)


def test_layers_with_their_own_top_k_are_refused(tmp_path: Path) -> None:
    folder = pruned_folder("mixtral", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["per_layer_config"]["1"]["num_experts_per_tok"] = 1
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(RequestError, match="layers of this model differ in num_experts_per_tok; that is not support"):
        moe_blocks(load(folder))


def test_modules_that_are_imported_again_are_extended_again(tmp_path: Path) -> None:
    folder = pruned_folder("qwen2_moe", tmp_path)
    again = "import importlib, transformers.models.qwen2_moe.modeling_qwen2_moe as m; importlib.reload(m)"
    result = in_a_process(folder, first=f"import optimum_moe_prune\n{again}")
    assert result.returncode == 0, result.stderr


@torch.no_grad()
def test_any_registered_architecture_reloads(own_rows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    monkeypatch.delitem(table._ROWS, "olmoe")
    register_architecture(MoESpec("olmoe", Softmax("norm_topk_prob")))
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_experts=8,
        num_experts_per_tok=2, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).eval()
    unequal_plan(model).apply(model).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert counts(again) == {0: 7, 1: 5, 2: 3}
    assert torch.equal(again(input_ids=IDS).logits, aligned(model)(input_ids=IDS).logits)
    assert torch.isfinite(again(input_ids=IDS, output_router_logits=True).aux_loss)
