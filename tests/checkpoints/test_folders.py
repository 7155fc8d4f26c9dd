# SPDX-License-Identifier: Apache-2.0
"""Folders that are something else are named for what they are, in one line, with what to use instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_model
from safetensors.torch import load_file, save_file

from optimum_moe_prune import MoEPruner, RequestError
from optimum_moe_prune.checkpoints.layout import open_layout

MIXTRAL = {"config.json": {"model_type": "mixtral", "num_local_experts": 8}}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"

FOLDERS: dict[str, tuple[dict[str, object], str]] = {
    "adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "org/base"}, "adapter_model.safetensors": ""},
        r"PEFT \(adapter_config.json\) for org/base; merge it first \(merge_and_unload.*prune org/base",
    ),
    "adapter beside a config": ({**MIXTRAL, "adapter_config.json": {}}, "is an adapter of PEFT.*merge it first"),
    "diffusers": ({"model_index.json": {}, "unet/config.json": {}}, "a diffusers pipeline.*causal language model"),
    "part of diffusers": ({"config.json": {"_class_name": "UNet"}, "model_index.json": {}}, "a diffusers pipeline"),
    "sentence-transformers": (
        {"modules.json": [], "config.json": {"model_type": "bert"}},
        "a sentence-transformers model",
    ),
    "MLC": ({"mlc-chat-config.json": {}, "params_shard_0.bin": ""}, "a model of MLC .*prune the original checkpoint"),
    "TensorRT-LLM engine": ({"config.json": {"pretrained_config": {}}, "rank0.engine": ""}, "a TensorRT-LLM engine"),
    "TensorRT-LLM checkpoint": (
        {"config.json": {"architecture": "x"}, "rank0.safetensors": ""},
        "a TensorRT-LLM checkpoint",
    ),
    "vLLM": ({**MIXTRAL, "model-rank-0-part-0.safetensors": ""}, "a sharded state of vLLM.*that it was made of"),
    "GGUF": (
        {"Mixtral.Q4_K_M.gguf": ""},
        r"not a model's folder: it has no config.json; it is GGUF \(llama.cpp\) \(Mixtral.Q4_K_M.gguf\); make a plan",
    ),
    "GGUF and config": ({**MIXTRAL, "a.gguf": ""}, r"is GGUF \(llama.cpp\)"),
    "GPTQ": ({**MIXTRAL, "gptq_model-4bit-128g.safetensors": ""}, "a GPTQ checkpoint.*prune the original"),
    "AWQ": ({**MIXTRAL, "quant_config.json": {}, "pytorch_model.bin": ""}, "an AWQ checkpoint"),
    "HQQ": ({**MIXTRAL, "qmodel.pt": ""}, "an HQQ checkpoint"),
    "EXL2": ({**MIXTRAL, "output-00001-of-00002.safetensors": ""}, "EXL2 or EXL3"),
    "MLX before safetensors": ({**MIXTRAL, "weights.00.npz": ""}, "early MLX"),
    "ONNX": ({**MIXTRAL, "model.onnx": "", "model.onnx_data": ""}, "an ONNX export.*convert what comes out"),
    "OpenVINO": ({**MIXTRAL, "openvino_model.xml": "", "openvino_model.bin": ""}, "an OpenVINO export"),
    "Megatron": (
        {"latest_checkpointed_iteration.txt": "5", "iter_0000005/mp_rank_00/x.pt": ""},
        "a Megatron checkpoint",
    ),
    "NeMo": ({"m.nemo": ""}, "a NeMo checkpoint.*convert it"),
    "DeepSpeed": (
        {"latest": "global_step5", "zero_to_fp32.py": "", "global_step5/x.pt": ""},
        "DeepSpeed.*zero_to_fp32.py",
    ),
    "torch dcp": ({".metadata": "", "__0_0.distcp": ""}, "a distributed checkpoint of torch.*merge-weights"),
    "Meta": ({"consolidated.00.pth": "", "params.json": {}}, r"own format \(consolidated\).*transformers version"),
    "Mistral": ({**MIXTRAL, "consolidated.safetensors": "", "params.json": {}}, r"own format \(consolidated\)"),
    "Flax": ({**MIXTRAL, "flax_model.msgpack": ""}, "a Flax checkpoint.*save_pretrained"),
    "TensorFlow": ({**MIXTRAL, "tf_model.h5": ""}, "a TensorFlow checkpoint"),
    ".bin": (
        {**MIXTRAL, "pytorch_model-00001-of-00002.bin": "", "pytorch_model.bin.index.json": {}},
        r"\.bin files and has no safetensors files.*save_pretrained",
    ),
    "no index": (
        {**MIXTRAL, "model-00001-of-00002.safetensors": ""},
        "has no model.safetensors.index.json.*fetch that file",
    ),
    "other names": (
        {**MIXTRAL, "mixtral.safetensors": ""},
        r"no safetensors files that .* would load .*only mixtral.safetensors",
    ),
    "a config alone": (MIXTRAL, "no safetensors files that transformers would load .*, no weights; fetch the rest"),
    "LFS weights": (
        {**MIXTRAL, "model.safetensors": POINTER},
        "model.safetensors stands for a file that was not fetched.*git lfs pull",
    ),
    "LFS index": ({**MIXTRAL, "model.safetensors.index.json": POINTER}, "index.json stands for .*git lfs pull"),
    "LFS config": ({"config.json": POINTER}, "config.json stands for .*git lfs pull"),
    "half a snapshot": (
        {**MIXTRAL, ".cache/huggingface/download/a.incomplete": ""},
        r"was not finished \(1 file incomplete\).*hf download",
    ),
    "half of a cache": (
        {"blobs/0.incomplete": "", "blobs/1.incomplete": ""},
        r"was not finished \(2 files incomplete\)",
    ),
    "parent": (
        {"one/config.json": {}, "two/config.json": {}, "notes.txt": ""},
        r"a folder of models; name .*/one, or .*/two\.",
    ),
    "parent of many": (
        {f"checkpoint-{n}/config.json": {} for n in range(5)},
        r"a folder of models; .*checkpoint-2, and 2 more\.",
    ),
    "cache": ({"refs/main": "0", "snapshots/00/config.json": {}}, r"the folder of a model; name .*/snapshots/00\."),
    "data": ({"train.jsonl": ""}, r"a folder of data \(train.jsonl\); pass it as calibration="),
    "a data set": ({"dataset_info.json": {}, "data-00000-of-00001.arrow": "", "state.json": {}}, "a folder of data"),
    "tokenizer": ({"tokenizer.json": {}}, "a tokenizer without a model"),
    "empty": ({}, "not a model's folder: it has no config.json; it is empty"),
    "something": ({"thesis.tex": ""}, r"is not a model's folder: it has no config\.json\."),
    "whole but the config": ({"model.safetensors": ""}, r"it has no config\.json\."),
}


def made(folder: Path, files: dict[str, object]) -> Path:
    folder.mkdir()
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_named(name: str, tmp_path: Path) -> None:
    files, said = FOLDERS[name]
    with pytest.raises(RequestError, match=said) as error:
        open_layout(made(tmp_path / "a b", files))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files_are_told_from_folders(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", {**MIXTRAL, "a.gguf": ""})
    for name, said in (
        ("config.json", r"name the one it is in \(.*model\)"),
        ("a.gguf", "make a plan with the original checkpoint, and apply it to this file"),
    ):
        with pytest.raises(RequestError, match=f"{name} is a (GGUF )?file, and a model's folder is needed; {said}"):
            MoEPruner.from_pretrained(folder / name)


def test_a_shard_whose_download_broke_off(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    place = tmp_path / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    open_layout(tmp_path)
    (place / "model-00002.0af1.incomplete").touch()
    open_layout(tmp_path)  # all is there: an earlier try
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(
        RequestError, match=r"is missing; the index says.*was not finished \(1 file incomplete\); begin it again"
    ):
        open_layout(tmp_path)


def test_mlx_says_so_in_its_files(tmp_path: Path) -> None:
    """Not quantised, and of names that are nobody's."""
    make_model().save_pretrained(tmp_path)
    tensors = {
        name.replace(".experts.", ".stacked."): value
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "mlx"})
    with pytest.raises(RequestError, match=r"another format: MLX \(its files say so\)\. Prune the original"):
        open_layout(tmp_path)


def test_repositories_without_a_config_are_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("org/x does not appear to have a file named config.json. Checkout 'https://huggingface.co'")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: ["README.md", "x.Q4_K_M.gguf"])
    with pytest.raises(
        RequestError,
        match=r"org/x is not a model's repository: it has no config.json; it is GGUF .*make a plan with the original",
    ):
        MoEPruner.from_pretrained("org/x")
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: ["README.md", "config/x.json"])
    with pytest.raises(RequestError, match=r"no model can be read from 'org/x': org/x does not appear to have a file"):
        MoEPruner.from_pretrained("org/x")
