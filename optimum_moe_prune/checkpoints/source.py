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
from ..compat import cached_commit, cached_file, set_commit_of_config
from ..errors import RequestError
from ..names import PLAN_NAME
from ..plan import PruningPlan
from ..storage.outputs import MARKERS, marker_fault
from ..storage.values import Json
from .folders import no_config, not_a_model, not_downloaded

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

    # -- what they say

    @functools.cached_property
    def config(self) -> Any:
        """The config of the model, whose architecture must be known; read once.

        Raises:
            RequestError: If there is no model, or it is not a known Mixture-of-Experts model.
        """
        from transformers import AutoConfig

        path = Path(self.name_or_path)
        if path.exists() and not (path / "config.json").is_file():
            raise RequestError(
                no_config(self.name_or_path, self.names())
                or f"{self.name_or_path} is not a model's folder: it has no config.json."
            )
        try:
            config = AutoConfig.from_pretrained(self.name_or_path, **self.for_transformers)
        except Exception as error:  # a config can be wrong in as many ways as there are model types
            raise RequestError(self._instead(str(error).strip() or type(error).__name__)) from error
        try:
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
        return found or (
            f"no model can be read from {self.name_or_path!r}: {error.splitlines()[0]} Known architectures: "
            f"{', '.join(list_architectures())}."
        )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None (and a log line says why); loaded once."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.name_or_path, **self.for_transformers)
        except (OSError, ValueError) as error:
            logger.warning("no tokenizer can be loaded from %s: %s", self.name_or_path, str(error).split("\n")[0])
            return None

    def stored_plan(self) -> PruningPlan | None:
        """The plan in a checkpoint that this package made, or None."""
        stored = self.find(PLAN_NAME)
        return None if stored is None else PruningPlan.load(stored)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
