# SPDX-License-Identifier: Apache-2.0
"""Forms other than transformers checkpoints in which people hold what a plan cuts.

Which form a path has is told from names, first bytes and small files; what a form needs (and the package that reads
it) is imported when there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..plan import PruningPlan
from ..storage.gguf_files import is_gguf
from ..storage.values import Json
from .mlx.names import is_mlx_folder


class Cutting(Protocol):
    """A cut that was checked and not begun.

    Attributes:
        summary: What will be read and written, in lines for people.
        facts: The same as plain values.
    """

    @property
    def summary(self) -> str: ...

    @property
    def facts(self) -> Json: ...

    def write(self) -> Path:
        """Write beside the target and rename; the target.

        Raises:
            RunError: If something cannot be written, or a retained weight is NaN or infinite.
        """


class Prepare(Protocol):
    """Checks a cut whole."""

    def __call__(
        self,
        plan: PruningPlan,
        source: str | os.PathLike,
        target: str | os.PathLike,
        *,
        overwrite: bool = False,
        max_shard_size: str | int | None = None,
    ) -> Cutting:
        """What will be done; nothing is written.

        Args:
            plan: The plan.
            source: What is cut.
            target: What is written: a file or folder, absent, or with ``overwrite`` an earlier output.
            overwrite: Replace an earlier output of this package.
            max_shard_size: The most bytes in a file, where the form has several; by default as the form is used to.

        Raises:
            RequestError: If the plan is for another model, the source is damaged, or the target is in the way.
        """


@dataclass(frozen=True)
class Form:
    """How a model, or what was trained on one, is held.

    Attributes:
        name: With its article.
        holds: Whether a path is of this form.
        prepare: Checks a cut of it.
        options: What ``prepare`` takes beyond what it takes for every form.
    """

    name: str
    holds: Callable[[Path], bool]
    prepare: Prepare
    options: tuple[str, ...] = ()


def _prepare_gguf(plan: PruningPlan, source: str | os.PathLike, target: str | os.PathLike, **options: Any) -> Cutting:
    from .gguf.cutting import prepare

    return prepare(plan, source, target, **options)


GGUF_FILE = Form(
    "a GGUF file", lambda path: is_gguf(path) or (path.suffix == ".gguf" and path.is_file()), _prepare_gguf
)


def _prepare_mlx(plan: PruningPlan, source: str | os.PathLike, target: str | os.PathLike, **options: Any) -> Cutting:
    from .mlx.cutting import prepare

    return prepare(plan, source, target, **options)


MLX_FOLDER = Form("an MLX folder", is_mlx_folder, _prepare_mlx)


def _is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter of PEFT, and no model of its own."""
    own = ("model.safetensors", "model.safetensors.index.json")
    return (path / "adapter_config.json").is_file() and not any((path / name).exists() for name in own)


def _prepare_adapter(
    plan: PruningPlan, source: str | os.PathLike, target: str | os.PathLike, **options: Any
) -> Cutting:
    from .adapters.cutting import prepare

    return prepare(plan, source, target, **options)


ADAPTER = Form("an adapter", _is_adapter, _prepare_adapter, ("base_model", "token", "trust_remote_code"))

FORMS: tuple[Form, ...] = (GGUF_FILE, MLX_FOLDER, ADAPTER)


def form_of(path: str | os.PathLike) -> Form | None:
    """The form of what lies at a path; None for a transformers checkpoint, an id on the Hub, or nothing."""
    found = Path(path)
    try:
        if not str(path).strip() or not found.exists():
            return None
    except (OSError, ValueError):  # too long, or with a null byte: no name of a file
        return None
    return next((form for form in FORMS if form.holds(found)), None)
