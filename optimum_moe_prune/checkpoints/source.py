# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a folder or a repository on the Hub, its files and its config."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..architectures.table import architecture_of, list_architectures
from ..errors import RequestError
from ..names import PLAN_NAME
from ..plan import PruningPlan
from ..storage.outputs import MARKERS, marker_fault

logger = logging.getLogger(__name__)


WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*.tflite",
    "*.ot",
    "*.npz",
    "*.mlmodel",
)
"""Files with weights, in this format or another."""


def without_code(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is said about the Hub, what concerns files and not code."""
    return {key: value for key, value in hub.items() if key != "trust_remote_code"}


def find_file(name_or_path: str | os.PathLike, file_name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a model's folder or Hub repository, or None; a folder is looked at without the network."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file_name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(str(name_or_path), file_name, _raise_exceptions_for_missing_entries=False, **without_code(hub))
    return None if found is None else Path(found)


def commit_of(name_or_path: str | os.PathLike, hub: Mapping[str, Any]) -> str | None:
    """The commit of a model on the Hub, by where the cache keeps it; None for a folder."""
    if Path(name_or_path).is_dir():
        return None
    found = find_file(name_or_path, "config.json", hub)
    parts = () if found is None else found.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


def list_files(name_or_path: str | os.PathLike, hub: Mapping[str, Any]) -> list[str]:
    """The files of a model's folder or Hub repository, but hidden ones."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import list_repo_files

        try:
            names = list_repo_files(str(name_or_path), revision=hub.get("revision"), token=hub.get("token"))
            return [name for name in names if not _is_hidden(name)]
        except Exception as error:  # offline, or the Hub does not answer: what is in the cache was enough so far
            logger.info("the files of %s cannot be listed: %s", name_or_path, error)
            cached = find_file(name_or_path, "config.json", hub)
            if cached is None:
                return []
            folder = cached.parent
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if not _is_hidden(name)]


def other_files(name_or_path: str | os.PathLike, hub: Mapping[str, Any]) -> list[str]:
    """The files beside a model's weights: tokenizer, configs, code. Hidden ones are left out, and earlier outputs."""
    names = list_files(name_or_path, hub)
    markers = [name for name in names if "/" in name and name.rpartition("/")[2] in MARKERS]
    found = {name: find_file(name_or_path, name, hub) for name in markers}
    outputs = tuple(
        f"{name.rpartition('/')[0]}/" for name, path in found.items() if path and marker_fault(path) is None
    )
    return [
        name
        for name in names
        if not any(fnmatch(name.rpartition("/")[2], pattern) for pattern in WEIGHT_FILES)
        and not name.startswith(outputs or "/")
    ]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def load_model_config(name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """The config of a model whose architecture is known.

    Args:
        name_or_path: Its folder or Hub id.
        kwargs: Passed to ``AutoConfig.from_pretrained``.

    Raises:
        RequestError: If there is no model, or it is not a known Mixture-of-Experts model.
    """
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise RequestError(f"{name_or_path} is not a model's folder: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    except Exception as error:  # a config can be wrong in as many ways as there are model types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"no model can be read from {str(name_or_path)!r}: {first} Known architectures: "
            f"{', '.join(list_architectures())}."
        ) from error
    architecture_of(config)
    config._commit_hash = commit_of(name_or_path, kwargs)  # transformers no longer says which one it was
    return config


def stored_plan(name_or_path: str | os.PathLike, hub: Mapping[str, Any]) -> PruningPlan | None:
    """The plan in a checkpoint that this package made, or None."""
    stored = find_file(name_or_path, PLAN_NAME, hub)
    return None if stored is None else PruningPlan.load(stored)
