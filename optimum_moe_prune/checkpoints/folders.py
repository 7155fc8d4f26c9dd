# SPDX-License-Identifier: Apache-2.0
"""Folders and repositories that hold something else than a transformers checkpoint: what it is, and what to use."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..storage.kinds import kind_of

_CONVERT = "prune the original checkpoint, and convert what comes out"
_PLAN_FIRST = "make a plan with the original checkpoint, and apply it to"
_SAVE = "load the model with transformers and save it again (save_pretrained), which writes safetensors"
_ANOTHER = "name the folder or Hub id of a causal language model"
_OF_MODELS = (".safetensors", ".bin", ".pt", ".pth")  # files that lie in a model's folder
_MANY = 200  # entries of a folder that are looked at for models below it
_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class _Kind:
    """What a folder is that holds one of these files or folders (patterns of names), and the way that works."""

    names: tuple[str, ...]
    what: str
    way: str


_ADAPTER = "adapter_config.json"
_NO_MODELS = (
    _Kind(("model_index.json",), "a diffusers pipeline", _ANOTHER),
    _Kind(("modules.json", "config_sentence_transformers.json"), "a sentence-transformers model", _ANOTHER),
    _Kind(("mlc-chat-config.json", "ndarray-cache.json", "tensor-cache.json"), "a model of MLC", _CONVERT),
    _Kind(("*.engine",), "a TensorRT-LLM engine", _CONVERT),
    _Kind(("rank[0-9]*.safetensors",), "a TensorRT-LLM checkpoint", _CONVERT),
)
"""With a ``config.json`` or without one."""
_FORMATS = (
    _Kind(("model-rank-*-part-*.safetensors",), "a sharded state of vLLM", "use the checkpoint that it was made of"),
    _Kind(("*.gguf",), "GGUF (llama.cpp)", f"{_PLAN_FIRST} the file"),
    _Kind(("gptq_model*.safetensors", "quantize_config.json"), "a GPTQ checkpoint of AutoGPTQ", _CONVERT),
    _Kind(("quant_config.json",), "an AWQ checkpoint of an early AutoAWQ", _CONVERT),
    _Kind(("qmodel.pt",), "an HQQ checkpoint", _CONVERT),
    _Kind(("output.safetensors", "output-*-of-*.safetensors"), "an EXL2 or EXL3 checkpoint (ExLlama)", _CONVERT),
    _Kind(("weights.*.npz", "weights.npz"), "a checkpoint of an early MLX", _CONVERT),
    _Kind(("*.onnx",), "an ONNX export", _CONVERT),
    _Kind(("openvino*.xml",), "an OpenVINO export", _CONVERT),
    _Kind(("*.mlpackage", "*.mlmodelc", "*.pte", "*.tflite"), "an export for devices", _CONVERT),
    _Kind(
        ("latest_checkpointed_iteration.txt", "iter_[0-9]*", "common.pt", "mp_rank_[0-9]*"),
        "a Megatron checkpoint",
        "convert it to transformers' format first (Megatron Bridge)",
    ),
    _Kind(
        ("*.nemo", "model_weights"), "a NeMo checkpoint", "convert it to transformers' format first (NeMo's export)"
    ),
    _Kind(
        ("zero_to_fp32.py", "global_step[0-9]*", "*_optim_states.pt", "*_model_states.pt"),
        "a DeepSpeed checkpoint",
        "gather its weights first (python zero_to_fp32.py . OUT --safe_serialization) beside the model's config.json",
    ),
    _Kind(
        (".metadata", "*.distcp", "pytorch_model_fsdp_[0-9]*"),
        "a distributed checkpoint of torch (FSDP)",
        "gather its weights first (accelerate merge-weights) beside the model's config.json",
    ),
    _Kind(
        ("consolidated*.pth", "consolidated*.safetensors", "params.json"),
        "in Meta's or Mistral's own format (consolidated)",
        "use the transformers version of the model, or convert it with the script that transformers has for it",
    ),
    _Kind(("flax_model*.msgpack", "_CHECKPOINT_METADATA"), "a Flax checkpoint", _SAVE),
    _Kind(("tf_model*.h5", "saved_model.pb"), "a TensorFlow checkpoint", _SAVE),
    _Kind(("pytorch_model*.bin", "*.bin.index.json"), "of torch's .bin files and has no safetensors files", _SAVE),
    _Kind(
        ("model-[0-9]*-of-[0-9]*.safetensors",),
        "in several files and has no model.safetensors.index.json, which says what is where",
        "fetch that file from where the model is from",
    ),
    _Kind(("*.pt", "*.pth", "*.ckpt", "*.bin"), "a state of torch without safetensors files", _SAVE),
)
"""Where nothing was found that transformers would load."""
_DATA = (
    _Kind(
        ("dataset_info.json", "dataset_dict.json", "*.parquet", "*.arrow", "*.jsonl", "*.jsonl.gz", "*.csv"),
        "a folder of data",
        "pass it as calibration=, and a model as the model",
    ),
    _Kind(("tokenizer.json", "tokenizer_config.json", "tokenizer.model"), "a tokenizer without a model", _ANOTHER),
)


def not_a_model(name_or_path: str, names: Iterable[str]) -> str | None:
    """What a folder is whose config names no model that is known, in one sentence; None where nothing tells."""
    return _named(f"{name_or_path} is", name_or_path, list(names), _NO_MODELS)


def no_config(name_or_path: str, names: Iterable[str]) -> str | None:
    """What a folder without a ``config.json`` is, in one sentence; None where nothing tells.

    Args:
        name_or_path: The folder, or Hub id.
        names: Of what lies in it.
    """
    names, folder = list(names), Path(name_or_path)
    if folder.is_file():
        if folder.suffix == ".gguf":
            return f"{name_or_path} is a GGUF file, and a model's folder is needed; {_PLAN_FIRST} this file."
        if (folder.parent / "config.json").is_file() or folder.suffix in _OF_MODELS:
            way = f"; name the one it is in ({folder.parent})"
        else:
            way = ""
        kind = kind_of(folder) if not way else None
        return f"{name_or_path} is {kind or 'a file'}, and a model's folder is needed{way}."
    if unfinished := _unfinished(folder):
        return unfinished
    kind = "folder" if folder.is_dir() else "repository"
    start = f"{name_or_path} is not a model's {kind}: it has no config.json; it is"
    complete = {"model.safetensors", "model.safetensors.index.json"} & set(names)
    if found := _named(start, name_or_path, names, _NO_MODELS if complete else _NO_MODELS + _FORMATS):
        return found
    if models := sorted(_models_below(folder)):
        more = f", and {len(models) - 3} more" if len(models) > 3 else ""
        said = "the folder of a model" if len(models) == 1 else "a folder of models"
        return f"{start} {said}; name {', or '.join(map(str, models[:3]))}{more}."
    if not names and folder.is_dir():
        return f"{start} empty; {_ANOTHER}."
    if kind := kind_of(folder):
        return f"{start} {kind}."
    return None if complete else _named(start, name_or_path, names, _DATA)


def no_weights(name_or_path: str, names: Iterable[str]) -> str:
    """What a folder with a ``config.json`` is that lacks the files of a model, in one sentence."""
    names = list(names)
    found = _unfinished(Path(name_or_path)) or _named(f"{name_or_path} is", name_or_path, names, _NO_MODELS + _FORMATS)
    if found:
        return found
    others = sorted(name for name in names if name.endswith(".safetensors"))
    held = f"only {others[0]}" if others else "no weights"
    return (
        f"{name_or_path} has no safetensors files that transformers would load (model.safetensors or "
        f"model.safetensors.index.json), {held}; fetch the rest, or load the model with transformers and save it."
    )


def not_downloaded(path: Path) -> str | None:
    """What a file is that stands for one in Git LFS, in one sentence; None of any other."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(_LFS)) == _LFS
    except OSError:
        return None
    said = "stands for a file that was not fetched (a Git LFS pointer); run git lfs pull there, or use hf download."
    return f"{path} {said}" if is_pointer else None


def unfinished_download(folder: str | os.PathLike) -> str | None:
    """Of a local folder that the Hub's client did not finish, what to do, in one sentence."""
    return _unfinished(Path(folder))


def _named(start: str, name_or_path: str, names: list[str], kinds: Iterable[_Kind]) -> str | None:
    if _ADAPTER in names:
        base = _base_of(Path(name_or_path) / _ADAPTER)
        return (
            f"{start} an adapter of PEFT ({_ADAPTER}){f' for {base}' if base else ''}; merge it first "
            f"(merge_and_unload, save_pretrained), or prune {base or 'the model it is for'} and cut the adapter by "
            "that plan (apply, with the adapter's folder as the model)."
        )
    for kind in kinds:
        found = next((name for name in names if any(fnmatch(name, pattern) for pattern in kind.names)), None)
        if found is not None:
            return f"{start} {kind.what} ({found}); {kind.way}."
    return None


def _base_of(path: Path) -> str | None:
    """The model that an adapter is for, where its folder is at hand and says it."""
    try:
        base = json.loads(path.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) and base.isprintable() else None


def _unfinished(folder: Path) -> str | None:
    """Whether a download into a folder, or into the Hub's cache that it is of, was broken off."""
    places = [folder / ".cache" / "huggingface" / "download", folder / "blobs"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    for place in places:
        number = sum(1 for _ in itertools.islice(place.rglob("*.incomplete"), _MANY))
        if number:
            return (
                f"the download of {folder} was not finished ({number} file{'s' if number > 1 else ''} incomplete); "
                "begin it again (hf download), which goes on where it stopped."
            )
    return None


def _models_below(folder: Path) -> Iterator[Path]:
    """Models in folders of a folder, and one below those, as in the Hub's cache."""
    for child in _folders(folder):
        if (child / "config.json").is_file():
            yield child
        else:
            yield from (inner for inner in _folders(child) if (inner / "config.json").is_file())


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            some = list(itertools.islice(entries, _MANY))
    except OSError:
        return []
    return [Path(entry.path) for entry in some if entry.is_dir() and not entry.name.startswith(".")]
