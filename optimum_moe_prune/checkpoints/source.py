# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a folder or a repository on the Hub, its files, its config and its tokenizer."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..architectures.table import architecture_for, list_architectures
from ..compat import cached_commit, cached_file, set_commit_of_config, text_config
from ..errors import RequestError, faults_of
from ..names import PLAN_NAME
from ..plan import PruningPlan
from ..storage.outputs import MARKERS, marker_fault
from ..storage.values import Json, is_integer
from .folders import no_config, not_a_model, not_downloaded
from .naming import check_named, not_found

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


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer_config.json",
)
"""Files that a tokenizer is made of, at least one of them."""


@dataclass(frozen=True)
class Source:
    """A model's folder or Hub id, and how it is reached.

    Attributes:
        name_or_path: The folder or Hub id. A folder is looked at without the network.
        revision: Branch, tag or commit, for the Hub.
        token: For private repositories.
        cache_dir: Where downloads are kept.
        trust_remote_code: Whether code that comes with the model may run.
    """

    name_or_path: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, source: Source | str | os.PathLike, **settings: Any) -> Source:
        """A source as it is, or the one of a folder or Hub id with these settings."""
        return source if isinstance(source, Source) else cls(os.fspath(source), **settings)

    def at(self, name_or_path: str | os.PathLike) -> Source:
        """Another model, reached in the same way."""
        return self if str(name_or_path) == self.name_or_path else replace(self, name_or_path=os.fspath(name_or_path))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder; then nothing touches the network."""
        return Path(self.name_or_path).is_dir()

    @property
    def for_files(self) -> Json:
        """What functions that fetch files take."""
        given = {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def for_transformers(self) -> Json:
        """What ``from_pretrained`` takes."""
        return {**self.for_files, **({"trust_remote_code": True} if self.trust_remote_code else {})}

    # -- files

    def find(self, file_name: str) -> Path | None:
        """A file of the model, or None; one on the Hub is downloaded."""
        if self.is_local:
            path = Path(self.name_or_path) / file_name
            return path if path.is_file() else None
        return cached_file(self.name_or_path, file_name, self.for_files)

    def commit(self) -> str | None:
        """The commit of a model on the Hub, by where the cache keeps it; None for a folder."""
        found = None if self.is_local else self.find("config.json")
        return None if found is None else cached_commit(self.name_or_path, found)

    def files(self) -> list[str]:
        """The names of the model's files, but hidden ones."""
        folder = Path(self.name_or_path)
        if not folder.is_dir():
            from huggingface_hub import list_repo_files

            try:
                names = list_repo_files(self.name_or_path, revision=self.revision, token=self.token)
                return [name for name in names if not _is_hidden(name)]
            except Exception as error:  # offline, or the Hub does not answer: what is in the cache was enough so far
                logger.info("the files of %s cannot be listed: %s", self.name_or_path, error)
                cached = self.find("config.json")
                if cached is None:
                    return []
                folder = cached.parent
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        return [name for name in names if not _is_hidden(name)]

    def names(self) -> list[str]:
        """The names of files and folders that lie in the folder or repository, hidden ones too."""
        if self.is_local:
            return sorted(os.listdir(self.name_or_path))
        return [] if Path(self.name_or_path).exists() else sorted({name.partition("/")[0] for name in self.files()})

    def other_files(self) -> list[str]:
        """The files beside the weights: tokenizer, configs, code. Earlier outputs of this package are left out."""
        names = self.files()
        markers = {name: self.find(name) for name in names if "/" in name and name.rpartition("/")[2] in MARKERS}
        outputs = tuple(
            f"{name.rpartition('/')[0]}/" for name, path in markers.items() if path and marker_fault(path) is None
        )
        return [
            name
            for name in names
            if not any(fnmatch(name.rpartition("/")[2], pattern) for pattern in WEIGHT_FILES)
            and not name.startswith(outputs or "/")
        ]

    def leads_out(self, file_name: str) -> Path | None:
        """Where a file really is that a link makes part of a folder; None where it lies in the folder.

        The Hub's cache is one place, in which snapshots are links to blobs.
        """
        folder = Path(self.name_or_path)
        if not folder.is_dir():
            return None
        found = Path(os.path.realpath(folder / file_name))
        is_blob = found.parent.name == "blobs" and found.parent.parent.name.startswith("models--")
        return None if is_blob or found.is_relative_to(os.path.realpath(folder)) else found

    def linked_folders(self) -> list[str]:
        """Folders in the model's folder that are links; what lies in them is not looked at."""
        root = Path(self.name_or_path)
        found = (Path(above, name) for above, folders, _ in os.walk(root) for name in folders)
        names = (path.relative_to(root).as_posix() for path in found if path.is_symlink())
        return sorted(name for name in names if not _is_hidden(name))

    # -- what they say

    @functools.cached_property
    def config(self) -> Any:
        """The config of the model, whose architecture must be known; read once.

        Raises:
            RequestError: If there is no model, or it is not a known Mixture-of-Experts model.
        """
        from transformers import AutoConfig

        check_named(self.name_or_path)
        try:
            config = AutoConfig.from_pretrained(self.name_or_path, **self.for_transformers)
        except Exception as error:  # a config can be wrong in as many ways as there are model types
            raise RequestError(self._instead(str(error).strip() or type(error).__name__)) from error
        try:
            with faults_of(f"config.json of {self.name_or_path}"):
                check_sizes(config, f"config.json of {self.name_or_path}")
                architecture_for(self, config)
        except RequestError as error:
            if another := not_a_model(self.name_or_path, self.names()):
                raise RequestError(another) from error
            raise
        set_commit_of_config(config, self.commit())  # transformers no longer says which one it was
        return config

    def _instead(self, error: str) -> str:
        """What a folder or repository is of which transformers reads no config, by its files, or what it says."""
        found = None
        if self.is_local:
            path = Path(self.name_or_path) / "config.json"
            found = not_downloaded(path) or not_a_model(self.name_or_path, self.names())
        elif "does not appear to have a file named config.json" in error:  # the Hub has answered
            found = no_config(self.name_or_path, self.names())
        else:
            found = not_found(self.name_or_path, error.splitlines()[0])
        file = " (config.json)" if self.is_local else ""
        return found or (
            f"no model can be read from {self.name_or_path!r}{file}: {error.splitlines()[0]} Known architectures: "
            f"{', '.join(list_architectures())}."
        )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None (and a log line says why); loaded once."""
        try:
            return self.require_tokenizer()
        except RequestError as error:
            logger.warning("%s", error)
            return None

    def require_tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            RequestError: If there is none, or it cannot be loaded.
        """
        from transformers import AutoTokenizer

        if loaded := self.__dict__.get("tokenizer"):
            return loaded
        what = f"no tokenizer can be loaded from {self.name_or_path}"
        way = "copy the tokenizer's files there from the model it was made of, or pass token tensors."
        if self.is_local and not any(path.name in TOKENIZER_FILES for path in Path(self.name_or_path).iterdir()):
            code = [path.name for path in Path(self.name_or_path).glob("tokenization_*.py")]
            if not (code and self.trust_remote_code):
                raise RequestError(f"{what}: it has no {', '.join(TOKENIZER_FILES[:3])} or the like; {way}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, **self.for_transformers)
        except Exception as error:  # the files of a tokenizer can be wrong in as many ways as there are kinds of it
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = " ".join(map(str.strip, lines))[:300].rstrip(".:, ")
            raise RequestError(f"{what}: {reason} (tokenizer.json, tokenizer_config.json); {way}") from error
        self.__dict__["tokenizer"] = tokenizer
        return tokenizer

    def stored_plan(self) -> PruningPlan | None:
        """The plan in a checkpoint that this package made, or None."""
        stored = self.find(PLAN_NAME)
        return None if stored is None else PruningPlan.load(stored)


_SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 10**7,
    "intermediate_size": 10**8,
    "moe_intermediate_size": 10**8,
    "vocab_size": 10**9,
    "num_attention_heads": 10**6,
    "num_key_value_heads": 10**6,
    "head_dim": 10**6,
    "num_local_experts": 10**6,
    "num_experts": 10**6,
    "n_routed_experts": 10**6,
    "num_experts_per_tok": 10**6,
}
"""What a config says in whole numbers, and the most that it can mean: beyond, a model is never done being built."""


def check_sizes(config: Any, where: str) -> None:
    """Raise unless the sizes of a model are whole numbers that a model can have.

    Raises:
        RequestError: Naming one.
    """
    text = text_config(config)
    for name, most in _SIZES.items():
        value = vars(text).get(name)  # not of each layer
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None and not (is_integer(number) and 0 <= number <= most):
                raise RequestError(f"{where} says {name} {value!r}; it must be a whole number up to {most}.")
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if name in vars(text) and not vars(text)[name]:
            raise RequestError(f"{where} says {name} {vars(text)[name]!r}; a model has at least one.")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
