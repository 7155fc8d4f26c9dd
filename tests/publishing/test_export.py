# SPDX-License-Identifier: Apache-2.0
"""Exported plans: the exact files, and that they tell a program enough to prune a checkpoint by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from optimum_moe_prune import PruningPlan, RequestError
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.publishing.export import EXPORT_FORMATS, export_plan, import_plan

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def plan_of(model: Any, unequal: bool = False) -> PruningPlan:
    blocks = moe_blocks(model)
    retained = {b.layer: tuple(range(b.layer % 2, b.num_experts, 2)) for b in blocks}
    if unequal:
        retained[blocks[0].layer] = tuple(range(blocks[0].num_experts - 1))
    counts = {b.layer: b.num_experts for b in blocks}
    return PruningPlan(model.config.model_type, blocks[0].routing.top_k, "by hand", retained, counts)


def by_hand(model: dict[str, Any] | None = None, model_type: str = "mixtral") -> PruningPlan:
    return PruningPlan(
        model_type,
        2,
        "reap",
        {10: (0, 1, 2), 2: (0, 3, 4)},
        {10: 3, 2: 5},
        provenance={} if model is None else {"model": model},
    )


def test_the_generic_file() -> None:
    model = {"name_or_path": "org/model", "revision": "0123", "fingerprint": "abcd", "top_k": 2}
    assert json.loads(export_plan(by_hand(model), "json")) == {
        "format": "optimum-moe-prune/experts",
        "format_version": 1,
        "model": {"name_or_path": "org/model", "revision": "0123", "fingerprint": "abcd"},
        "model_type": "mixtral",
        "top_k": 2,
        "method": "reap",
        "num_experts_key": "num_local_experts",
        "tensors": {
            "router": [
                "model.layers.{layer}.block_sparse_moe.gate.weight",
                "model.layers.{layer}.mlp.gate.weight",
            ],
            "expert": [
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.",
                "model.layers.{layer}.mlp.experts.{expert}.",
            ],
            "fused_experts": [
                "model.layers.{layer}.block_sparse_moe.experts.gate_up_proj",
                "model.layers.{layer}.block_sparse_moe.experts.down_proj",
                "model.layers.{layer}.mlp.experts.gate_up_proj",
                "model.layers.{layer}.mlp.experts.down_proj",
            ],
        },
        "layers": {
            "2": {
                "original_num_experts": 5,
                "num_experts": 3,
                "retained": [0, 3, 4],
                "removed": [1, 2],
                "new_ids": [0, -1, -1, 1, 2],
                "keep": [True, False, False, True, True],
            },
            "10": {
                "original_num_experts": 3,
                "num_experts": 3,
                "retained": [0, 1, 2],
                "removed": [],
                "new_ids": [0, 1, 2],
                "keep": [True, True, True],
            },
        },
    }
    text = export_plan(by_hand(model))
    assert text == export_plan(by_hand(model), "json") and text.endswith("  }\n}\n")
    layers = [line for line in text.splitlines() if '"retained"' in line]
    assert [line.strip()[:5] for line in layers] == ['"2": ', '"10":']  # a line for each layer, in order


def test_the_generic_file_of_little_known_models() -> None:
    values = json.loads(export_plan(by_hand(model_type="of_another_package")))
    assert values["num_experts_key"] is values["tensors"] is None
    assert values["model"] == {"name_or_path": None, "revision": None, "fingerprint": None}
    strange = {"name_or_path": 7, "revision": ["a"], "fingerprint": "é\ud800\n"}
    text = export_plan(by_hand(strange))
    assert text.isascii() and json.loads(text)["model"] == strange | {"name_or_path": None, "revision": None}


@torch.no_grad()
@pytest.mark.parametrize("unequal", [False, True])
def test_a_server_that_masks_has_the_pruned_model(kind: str, unequal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the format says: minus infinity on the router's logits, before top-k."""
    model = make_model(kind)
    plan = plan_of(model, unequal)
    layers = json.loads(export_plan(plan))["layers"]
    routers = {id(model.model.layers[layer].mlp.gate.weight): layer for layer in plan.retained}
    linear = functional.linear

    def masking(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        if (layer := routers.get(id(weight))) is not None:
            out[:, ~torch.tensor(layers[str(layer)]["keep"])] = float("-inf")
        return out

    whole = model(input_ids=IDS).logits
    with monkeypatch.context() as patch:
        patch.setattr(functional, "linear", masking)
        masked = model(input_ids=IDS).logits
    assert not torch.allclose(masked, whole, atol=1e-2)
    torch.testing.assert_close(plan.apply(model)(input_ids=IDS).logits, masked, rtol=1e-5, atol=1e-5)


def load_leaving_out(files: Path, exported: dict[str, Any]) -> dict[str, Tensor]:
    """A loader that knows nothing but the exported file."""

    def matches(pattern: str, name: str, rest: str = "") -> re.Match[str] | None:
        numbers = re.escape(pattern).replace(r"\{layer\}", "(?P<layer>[0-9]+)")
        return re.fullmatch(numbers.replace(r"\{expert\}", "(?P<expert>[0-9]+)") + rest, name)

    loaded, used = {}, set()
    for name, tensor in load_file(files / "model.safetensors").items():
        found = [
            (kind, match)
            for kind, patterns in exported["tensors"].items()
            for pattern in patterns
            if (match := matches(pattern, name, "(?P<rest>.+)" if kind == "expert" else ""))
        ]
        assert len(found) <= 1
        for kind, match in found:
            used.add(kind)
            layer = exported["layers"][match["layer"]]
            if kind == "expert":
                new = layer["new_ids"][int(match["expert"])]
                assert (new >= 0) == layer["keep"][int(match["expert"])]
                name = None if new < 0 else f"{name[: match.start('expert')]}{new}{name[match.end('expert') :]}"
            else:
                assert tensor.shape[0] == layer["original_num_experts"]
                tensor = tensor[torch.tensor(layer["keep"])]
        if name is not None:
            loaded[name] = tensor
    assert used == {"router", "fused_experts"} or used == {"router", "expert"}
    return loaded


@pytest.mark.parametrize("fused", [False, True], ids=["numbered", "fused"])
@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
def test_a_program_can_prune_a_checkpoint_by_the_file(kind: str, fused: bool, unequal: bool, tmp_path: Path) -> None:
    model = make_model(kind)
    plan = plan_of(model, unequal)
    model.save_pretrained(tmp_path / "whole", save_original_format=not fused)
    loaded = load_leaving_out(tmp_path / "whole", json.loads(export_plan(plan)))
    plan.apply(model).save_pretrained(tmp_path / "pruned", save_original_format=not fused)
    expected = load_file(tmp_path / "pruned" / "model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_there_and_back() -> None:
    for plan in (by_hand(), by_hand(model_type="of_another_package"), plan_of(make_model(), unequal=True)):
        assert import_plan(export_plan(plan)) == dict(sorted(plan.retained.items()))
    assert list(import_plan(export_plan(by_hand()))) == [2, 10]


def test_unknown_formats() -> None:
    with pytest.raises(RequestError, match="export format 'riy' is not known: json"):
        export_plan(by_hand(), "riy")
    with pytest.raises(RequestError, match="export format None is not known"):
        export_plan(by_hand(), None)  # type: ignore[arg-type]
    for name in EXPORT_FORMATS:
        assert json.loads(export_plan(by_hand(), name))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "gguf", "format is 'gguf'"),
        (("format_version",), 2, "format version 2; this package reads up to 1"),
        (("format_version",), True, "format version True"),
        (("format_version",), None, "format version None"),
        (("top_k",), 4, "3 experts are retained, and every token uses 4"),
        (("top_k",), None, "top_k is None"),
        (("layers",), [], "damaged"),
        (("layers",), {}, "names retained experts"),
        (("layers", "2", "retained"), [0, 3], "layer 2: the entries"),
        (("layers", "2", "retained"), [0, 3, 5], "layer 2: retained names expert 5"),
        (("layers", "2", "retained"), [3, 0, 4], "rising order"),
        (("layers", "2", "retained"), 7, "damaged"),
        (("layers", "2", "removed"), [1], "layer 2: the entries"),
        (("layers", "2", "new_ids"), [0, -1, -1, 2, 1], "layer 2: the entries"),
        (("layers", "2", "keep"), [1, 0, 0, 1, 1], "layer 2: the entries"),
        (("layers", "2", "num_experts"), 4, "layer 2: the entries"),
        (("layers", "2", "original_num_experts"), 10**12, "original_num_experts is 1000000000000"),
        (("layers", "2", "more"), 1, "layer 2: the entries"),
        (("layers", "02"), {"retained": [0, 1], "original_num_experts": 2}, "layer 0?2: the entries"),
        (("layers", "-1"), {"retained": [0, 1], "original_num_experts": 2}, "layers are numbered from 0"),
        (("layers", "x"), {"retained": [0, 1], "original_num_experts": 2}, "damaged"),
    ],
)
def test_a_changed_file_is_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    values = json.loads(export_plan(by_hand()))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(RequestError, match=message):
        import_plan(json.dumps(values))


def test_a_damaged_file_is_refused() -> None:
    text = export_plan(by_hand())
    for damaged in (
        "",
        "null",
        "[]",
        "{}",
        text[:-10],
        text.replace('"top_k": 2', '"top_k": NaN'),
        text.replace('"top_k": 2', '"top_k": ' + "1" * 5000),
        text.replace('"10":', '"2":'),
        "[" * 100_000,
        '{"format": "optimum-moe-prune/experts", "format_version": 1}',
    ):
        assert damaged != text
        with pytest.raises(RequestError, match="damaged"):
            import_plan(damaged)
