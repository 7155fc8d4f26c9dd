# SPDX-License-Identifier: Apache-2.0
"""Where other libraries read, write or load something else than one expects, and what this package does there.

Each test first shows the trap, so that it fails when the other library changes (``targets/LIBRARIES.md``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, make_model, make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from optimum_moe_prune import CalibrationSet, MoEPruner, MoEPrunerConfig, RequestError
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.storage.tensor_files import header_bytes, read_header, read_tensor

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of eight experts, one tensor for each of their three matrices."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    make_model().save_pretrained(folder)
    return folder


def expert_of(name: str) -> int | None:
    return int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else None


def without_parts_of_three(tensors: Tensors) -> Tensors:
    """One matrix of each of three experts is absent, and a row of each router."""
    gone = (".experts.1.w1.", ".experts.2.w2.", ".experts.3.w3.")
    left = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in gone)}
    return {name: tensor[:7].clone() if name.endswith("gate.weight") else tensor for name, tensor in left.items()}


def with_gaps(tensors: Tensors) -> Tensors:
    """Experts 1, 3, 4, 6 under their old numbers."""
    kept = [1, 3, 4, 6]
    left = {name: tensor for name, tensor in tensors.items() if expert_of(name) in (None, *kept)}
    return {name: tensor[kept].clone() if name.endswith("gate.weight") else tensor for name, tensor in left.items()}


@pytest.mark.parametrize(
    "edit, experts, loads",
    [
        (dict, 4, False),
        (lambda tensors: {n: t for n, t in tensors.items() if (expert_of(n) or 0) < 4}, 8, False),
        (without_parts_of_three, 7, True),
        (with_gaps, 4, True),
    ],
    ids=["more in files", "more in config", "parts of different experts", "gaps"],
)
def test_experts_that_do_not_fit_together(
    edit: Callable[[Tensors], Tensors], experts: int, loads: bool, whole: Path, tmp_path: Path
) -> None:
    """transformers pairs tensors of different experts by their rank without a word; here it is refused by name."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    save_file(edit(load_file(file)), file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_local_experts": experts}))
    if loads:
        AutoModelForCausalLM.from_pretrained(folder)
    else:
        with pytest.raises(RuntimeError):
            AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(RequestError) as refused:
        open_layout(folder)
    assert "expert" in str(refused.value)


def test_every_name_of_a_count_is_rewritten(tmp_path: Path) -> None:
    """Of two keys that count experts transformers reads one, whatever the other says; both have to say the same."""
    settings = {**SHAPE, "num_hidden_layers": 1, "moe_intermediate_size": 16, "head_dim": 8, "num_experts_per_tok": 2}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, num_experts=8)).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    assert "num_experts" not in values and values["num_local_experts"] == 8
    config.write_text(json.dumps({**values, "num_experts": 8}))
    pruner = MoEPruner.from_pretrained(tmp_path / "model", config=MoEPrunerConfig(method="aimer", num_experts=4))
    pruner.prune_checkpoint(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["num_experts"], written["num_local_experts"]) == (4, 4)
    config.write_text(json.dumps({**written, "num_experts": 3}))
    assert AutoConfig.from_pretrained(tmp_path / "model").num_experts == 4


def test_slices_of_four_bit_numbers(tmp_path: Path) -> None:
    """safetensors slices none of them: it takes their shape for doubled. Here they are refused where they are read."""
    path = tmp_path / "four.safetensors"
    data = bytes(range(16))
    path.write_bytes(header_bytes({"a": ("F4", (4, 8), len(data))}, {}) + data)
    with safe_open(path, framework="pt") as file:
        assert tuple(file.get_tensor("a").shape) == (4, 4)
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            file.get_slice("a")[0:2]
    entries, _ = read_header(path)
    with path.open("rb") as opened, pytest.raises(RequestError, match="tensors of dtype F4 cannot be read"):
        read_tensor(opened.fileno(), entries["a"])


def test_numbers_among_texts_are_named(tmp_path: Path) -> None:
    """datasets makes such a column one of JSON values, and numbers stay numbers."""
    import datasets

    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "w1 w2"}\n{"text": 5}\n{"text": "w3"}\n')
    found = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert found[:]["text"] == ["w1 w2", 5, "w3"]
    for source in (path, found):
        with pytest.raises(RequestError, match="its 'text' is 5"):
            CalibrationSet.build(source, make_tokenizer())
