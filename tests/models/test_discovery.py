# SPDX-License-Identifier: Apache-2.0
"""Model types without a row: found out by trying, proven, pruned; or refused by what was not found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import own_model
import pytest
import torch
from architectures.tiny import tiny_model
from conftest import aligned, assert_equal_states, make_model, make_texts, make_tokenizer
from own_model import OwnConfig, OwnForCausalLM
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_moe_prune import (
    CalibrationStats,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    MoESpec,
    RequestError,
    calibrate,
    register_architecture,
)
from optimum_moe_prune.architectures import table
from optimum_moe_prune.architectures.forms import Form, Softmax
from optimum_moe_prune.architectures.own_code import Own, OwnCode
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.checkpoints.source import Source
from optimum_moe_prune.models import discovery, reload
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.discovery import discover
from optimum_moe_prune.planning.build import build_plan

SETTINGS: dict[str, dict[str, object]] = {
    "softmax": {"dense_layers": [1]},
    "sigmoid": {"routed_scaling_factor": 2.5},
    "groups": {"num_experts": 12, "n_group": 2, "routed_scaling_factor": 1.7},
    "linear": {"as_modules": True},
    "infer": {"as_modules": True, "routed_scaling_factor": 2.5},
    "cubed": {},
}
KNOWN = [kind for kind in SETTINGS if kind != "cubed"]
SIGMOID = Form("sigmoid", scale="routed_scaling_factor", bias="e_score_correction_bias")
IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))


def own(kind: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return OwnForCausalLM(OwnConfig(**{"routing": kind, **SETTINGS[kind], **settings})).eval()


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is found is forgotten afterwards, and what was done to its classes undone."""
    monkeypatch.setattr(table, "_ROWS", dict(table._ROWS))
    yield
    reload.disable()
    monkeypatch.undo()
    reload.enable()


@pytest.fixture
def registered() -> Iterator[None]:
    """The classes are known to transformers, as the user's own are."""
    AutoConfig.register("own_moe", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
    yield
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content.pop("own_moe", None)
    AutoModelForCausalLM._model_mapping._extra_content.pop(OwnConfig, None)


def saved(kind: str, folder: Path, **settings: object) -> Path:
    own(kind, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def remote(kind: str, folder: Path, model_type: str = "remote_moe") -> Path:
    """A checkpoint with its code beside it, by default of a type that nothing here knows."""
    saved(kind, folder)
    code = Path(own_model.__file__).read_text().replace('"own_moe"', f'"{model_type}"')
    (folder / "modeling_remote.py").write_text(code)
    values = json.loads((folder / "config.json").read_text()) | {
        "model_type": model_type,
        "auto_map": {
            "AutoConfig": "modeling_remote.OwnConfig",
            "AutoModelForCausalLM": "modeling_remote.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def load_remote(folder: Path) -> PreTrainedModel:
    return aligned(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel, retained: dict[int, tuple[int, ...]], patch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The original's answer with pruned experts at minus infinity, whatever its router does with its matrix."""
    gone = {}
    for layer, experts in retained.items():
        gate = model.model.layers[layer].mlp.gate
        out = [e for e in range(len(gate.weight)) if e not in experts]
        gone[id(gate.weight)] = out
        if hasattr(gate, "e_score_correction_bias"):  # sigmoid of minus infinity and a bias is above nothing
            gate.e_score_correction_bias[out] = float("-inf")
    linear, view = functional.linear, {}

    def masking(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = linear(x, weight, bias)
        if (found := gone.get(id(weight), view.get(weight.data_ptr()))) is not None:
            out[:, found] = float("-inf")
        return out

    with patch.context() as inside:
        inside.setattr(functional, "linear", masking)
        return model(input_ids=IDS).logits


# ------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("softmax", Softmax()),
        ("linear", Softmax()),
        ("sigmoid", SIGMOID),
        ("infer", SIGMOID),
        ("groups", Form("sigmoid", scale="routed_scaling_factor", groups=True, bias="e_score_correction_bias")),
    ],
)
def test_the_rule_is_found_and_the_model_left_as_it_is(
    kind: str, form: object, caplog: pytest.LogCaptureFixture
) -> None:
    model = own(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = discover(model)
    assert spec.form == form and spec.found[0].startswith("routing rule found by trial: ")
    assert "architecture 'own_moe' is not known: it is found out" in caplog.text and spec.found[0] in caplog.text
    assert discover(model) is spec and discover(own(kind, num_experts=16)) is spec
    assert_equal_states_of(before, model)
    blocks = moe_blocks(model)
    assert [block.layer for block in blocks] == [i for i in range(3) if i not in model.config.dense_layers]
    assert all(block.num_experts == model.config.num_experts for block in blocks)


def assert_equal_states_of(before: dict[str, torch.Tensor], model: PreTrainedModel) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_biases_of_zeros_are_seen() -> None:
    model = own("sigmoid")
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.zero_()
    assert discover(model).form == SIGMOID
    assert not any(layer.mlp.gate.e_score_correction_bias.any() for layer in model.model.layers)


@pytest.mark.parametrize("kind", KNOWN)
def test_in_lower_precision(kind: str, tokenizer: object) -> None:
    expected = discover(own(kind))
    table._ROWS.pop("own_moe")
    model = own(kind).to(torch.bfloat16)
    assert discover(model).form == expected.form
    calibrate(model, make_texts(), tokenizer=tokenizer)  # compares the rule with what the model does


@pytest.mark.parametrize("kind", ["linear", "infer"])
def test_more_experts_than_their_outputs_are_wide(kind: str, tokenizer: object) -> None:
    model = own(kind, num_experts=72, num_experts_per_tok=5)
    assert not isinstance(discover(model).form, Own)
    stats = calibrate(model, make_texts(), tokenizer=tokenizer)
    assert stats.layers[0].num_experts == 72


def test_other_settings_are_tried_anew() -> None:
    assert discover(own("softmax")).form == Softmax()
    assert discover(own("sigmoid")).form == SIGMOID
    assert discover(own("softmax")).form == Softmax()


# ------------------------------------------------------------------------------------------- pruning


@torch.no_grad()
@pytest.mark.parametrize("method", ["reap", "enumeration", "mosaic"])
@pytest.mark.parametrize("kind", KNOWN)
def test_pruned_in_memory_is_the_masked_model(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own(kind)
    count = model.config.num_experts // 2
    pruner = MoEPruner(MoEPrunerConfig(method=method, num_experts=count), tokenizer=make_tokenizer())
    pruned = pruner.prune(model, calibration=make_texts())
    plan = pruner.pruning_plan
    assert any(note.startswith("routing rule found by trial: ") for note in plan.provenance["notes"])
    assert set(plan.num_experts.values()) == {count} and pruned.config.num_experts == count
    torch.testing.assert_close(
        pruned(input_ids=IDS).logits, masked_logits(own(kind), plan.retained, monkeypatch), rtol=1e-4, atol=1e-4
    )
    built = OwnForCausalLM(pruned.config)
    built.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(built.eval()(input_ids=IDS).logits, pruned(input_ids=IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_pruned_files_of_registered_classes(kind: str, stream: bool, registered: None, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "base")
    count = SETTINGS[kind].get("num_experts", 8) // 2
    pruner = MoEPruner.from_pretrained(folder, MoEPrunerConfig(method="enumeration", num_experts=count))
    pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts(), stream=stream)
    again = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    expected = pruner.pruning_plan.apply(own(kind))
    assert_equal_states(again, expected)
    assert torch.equal(again(input_ids=IDS).logits, aligned(expected)(input_ids=IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "linear", "infer"])
def test_remote_code(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = remote(kind, tmp_path / "base")
    config = MoEPrunerConfig(method="reap", num_experts=4)
    pruner = MoEPruner.from_pretrained(folder, config, trust_remote_code=True)
    pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts())
    assert (tmp_path / "out" / "modeling_remote.py").read_bytes() == (folder / "modeling_remote.py").read_bytes()
    in_memory = pruner.pruning_plan.apply(load_remote(folder))
    pruner.save_pretrained(tmp_path / "saved", model=in_memory)
    expected = aligned(in_memory)(input_ids=IDS).logits
    for name in ("out", "saved"):
        again = load_remote(tmp_path / name)
        assert_equal_states(again, in_memory)
        assert torch.equal(again(input_ids=IDS).logits, expected)
    masked = masked_logits(load_remote(folder), pruner.pruning_plan.retained, monkeypatch)
    torch.testing.assert_close(expected, masked, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_own_code_of_a_known_type_goes_by_its_row(tmp_path: Path) -> None:
    folder = remote("linear", tmp_path / "base", "mixtral")
    config = MoEPrunerConfig(method="enumeration", num_experts=4)
    pruner = MoEPruner.from_pretrained(folder, config, trust_remote_code=True)
    pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts())
    assert not any("by trial" in note for note in pruner.pruning_plan.provenance["notes"])
    expected = pruner.pruning_plan.apply(load_remote(folder))
    again = load_remote(tmp_path / "out")
    assert_equal_states(again, expected)
    assert torch.equal(again(input_ids=IDS).logits, aligned(expected)(input_ids=IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["groups", "infer", "cubed"])
def test_three_layers_are_tried_where_the_model_does_not_fit(
    kind: str, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = discover(own(kind))
    table._ROWS.pop("own_moe")
    folder = saved(kind, tmp_path / "base", num_hidden_layers=5)
    monkeypatch.setattr("optimum_moe_prune.models.memory.available_memory", lambda device: 0)
    tried = []
    monkeypatch.setattr(discovery, "prove", lambda call, *rest: tried.append(call.block.layer))
    found = discover(folder)
    assert tried == [0, 2, 4] and type(found.form) is type(expected.form)
    assert kind == "cubed" or found.form == expected.form


def test_streamed_and_in_memory_statistics_are_the_same(registered: None, tmp_path: Path) -> None:
    folder = saved("infer", tmp_path / "base")
    both = [calibrate(folder, make_texts(), compute=Compute(stream=stream)) for stream in (False, True)]
    for index, layer in both[0].layers.items():
        for name, tensor in layer.tensors.items():
            torch.testing.assert_close(tensor, both[1].layers[index].tensors[name], rtol=1e-4, atol=1e-4)


def test_experts_as_modules_are_observed_as_they_are(tokenizer: object) -> None:
    """Statistics against a loop over tokens and experts."""
    model = own("linear")
    stats = calibrate(model, make_texts(4), ["reap", "frequency"], tokenizer=tokenizer)
    count, norm = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    block = model.model.layers[0].mlp

    def see(_: object, given: tuple[torch.Tensor, ...]) -> None:
        for x in given[0].reshape(-1, 32):
            p, chosen = block.gate(x).softmax(-1).topk(2)
            for weight, expert in zip((p / p.sum()).tolist(), chosen.tolist(), strict=True):
                count[expert] += 1
                norm[expert] += weight * block.experts[expert](x).norm().item()

    block.register_forward_pre_hook(see)
    with torch.no_grad():
        for text in make_texts(4):
            model(input_ids=tokenizer(text["text"], return_tensors="pt").input_ids)  # type: ignore[operator]
    assert torch.equal(stats.layers[0].total("routed_tokens"), count)
    torch.testing.assert_close(stats.layers[0].total("norm_applied"), norm, rtol=1e-5, atol=1e-5)


def test_layers_of_different_widths_are_not_written(registered: None, tmp_path: Path) -> None:
    folder = saved("linear", tmp_path / "base")
    config = MoEPrunerConfig(method="reap", sparsity=0.3, allocation="global")
    with pytest.raises(RequestError, match=r"cannot keep different numbers .* Use a uniform allocation"):
        MoEPruner.from_pretrained(folder, config).prune_checkpoint(tmp_path / "out", calibration=make_texts())
    pruner = MoEPruner.from_pretrained(folder, config)
    model = pruner.prune(own("linear"), calibration=make_texts())
    assert torch.isfinite(model(input_ids=IDS).logits).all()
    with pytest.raises(RequestError, match="cannot keep different numbers of experts"):
        pruner.save_pretrained(tmp_path / "saved")


# ------------------------------------------------------------------------------------------- no rule


def test_without_a_rule_what_was_observed_can_be_scored(tmp_path: Path, tokenizer: object) -> None:
    model = own("cubed")
    spec = discover(model)
    assert isinstance(spec.form, Own) and "no known rule gives the routing of layer 0: nearest was" in spec.found[0]
    stats = calibrate(model, make_texts(), tokenizer=tokenizer)
    assert sorted(map(str, stats.needs)) == ["dense_norms", "inputs", "routed_norms", "routing", "weights"]
    stats.save(tmp_path / "stats")
    stats = CalibrationStats.load(tmp_path / "stats")
    assert isinstance(stats.routing, OwnCode)
    for method in ("reap", "frequency", "ean"):
        plan = build_plan(stats, MoEPrunerConfig(method=method, num_experts=4))
        pruned = plan.apply(own("cubed"))
        assert pruned.config.num_experts == 4 and torch.isfinite(pruned(input_ids=IDS).logits).all()
    nearest = r"needs the rule of the routers, and no known rule .* \d+ of 128 tokens elsewhere\. Use a method that"
    for method in ("enumeration", "mosaic", "soft_frequency"):
        with pytest.raises(RequestError, match=nearest):
            build_plan(stats, MoEPrunerConfig(method=method, num_experts=4))
    with pytest.raises(RequestError, match=f"gathering gram {nearest}"):
        calibrate(model, make_texts(), "enumeration", tokenizer=tokenizer)


# ------------------------------------------------------------------------------------------- refused


def test_what_was_not_found_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Called(own_model.OwnBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _, ids, weights = self.gate(x)
            return self.experts(x.view(-1, x.shape[-1]), weights=weights, ids=ids).view(x.shape)

    class Varying(own_model.OwnRouter):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits, ids, weights = super().forward(x)
            return logits, ids[:, :1], weights[:, :1]

    class Remembering(own_model.OwnRouter):
        def __init__(self, config: OwnConfig) -> None:
            super().__init__(config)
            self.half = config.num_experts // 2

    refused = "architecture 'own_moe' is not known, and could not be found out: "
    with (
        monkeypatch.context() as patch,
        pytest.raises(RequestError, match=f"{refused}the experts of layer 0 are called wi"),
    ):
        patch.setattr(own_model, "OwnBlock", Called)
        discover(own("softmax"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(RequestError, match="sent to 1 experts, and num_experts_per_tok "),
    ):
        patch.setattr(own_model, "OwnRouter", Varying)
        discover(own("softmax"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(RequestError, match=r"gate\.half is 1 in a model built with 2 expe"),
    ):
        patch.setattr(own_model, "OwnRouter", Remembering)
        discover(own("softmax", intermediate_size=20))  # structures are remembered by class and config
    with pytest.raises(RequestError, match="no tensor of this 'own_moe' model grows with num_experts"):
        discover(own("softmax", dense_layers=[0, 1, 2]))
    assert "own_moe" not in table._ROWS


def test_a_model_without_weights_is_not_tried(registered: None) -> None:
    with torch.device("meta"):
        model = OwnForCausalLM(OwnConfig())
    with pytest.raises(RequestError, match="it has no weights to be tried with"):
        discover(model)


def test_types_that_are_refused_stay_refused() -> None:
    register_architecture(MoESpec("own_moe", refused="it is of nobody"))
    with pytest.raises(RequestError, match="a 'own_moe' model cannot be pruned: it is of nobody"):
        discover(own("softmax"))


# ------------------------------------------------------------------------------------------- known rows, hidden


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen2_moe_norm"])
def test_a_known_row_is_found_again(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    row = table._ROWS.pop(model.config.model_type)
    found = discover(model)
    assert found.routing(model.config) == row.routing(model.config)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    del table._ROWS[model.config.model_type]
    layout = open_layout(Source(str(tmp_path)))
    assert layout.spec.routing(layout.config) == row.routing(model.config)


@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_moe",
        "olmoe",
        "gpt_oss",
        "deepseek_v3",
        "glm4_moe",
        "minimax_m2",
        "ernie4_5_moe",
        "lfm2_moe",
        "gemma4_text",
        "mistral4",
        "nemotron_h",
        "granitemoe",
        "phimoe",
    ],
)
def test_a_row_of_another_architecture_is_found_again(model_type: str) -> None:
    model = tiny_model(model_type)
    blocks = moe_blocks(model)
    row = table._ROWS.pop(model.config.model_type)
    found = discover(model)
    logits = torch.randn(256, blocks[0].num_experts, generator=torch.Generator().manual_seed(0)) * 2
    for block in blocks:
        expected = row.routing(model.config).of_router(block.router_tensors)
        rule = found.routing(model.config).of_router(block.router_tensors)
        for retained in (None, [0, 2, 3, 7, 8, 11]):
            torch.testing.assert_close(
                rule.weights(logits, retained), expected.weights(logits, retained), rtol=1e-4, atol=1e-5
            )


def test_unknown_code_stays_where_it_was(tmp_path: Path) -> None:
    """Without trust_remote_code nothing of a folder runs."""
    folder = remote("linear", tmp_path / "base")
    with pytest.raises(RequestError, match="no model can be read from"):
        MoEPruner.from_pretrained(folder)
    shutil.rmtree(folder)
