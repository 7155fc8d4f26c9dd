# SPDX-License-Identifier: Apache-2.0
"""What a result remembers of how it was made."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("optimum-moe-prune", "transformers", "torch", "scikit-learn", "scipy")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def without_folders(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a model with the name of its folder in place of the folder's path, which is nobody else's business.

    Args:
        facts: ``name_or_path`` and ``revision``, where known, and others.
    """
    name = facts.get("name_or_path")
    if not isinstance(name, str) or not is_folder(name, facts.get("revision")):
        return facts
    path = name if "\\" in name or name.startswith("~") else os.path.abspath(name)
    return {**facts, "name_or_path": PurePath(path.replace("\\", "/")).name or "."}


def is_folder(name: str, revision: Any = None) -> bool:
    """Whether what a model was read from is a folder, by its form or because it is there, and no id on the Hub."""
    as_path = name.startswith(("/", ".", "~")) or "\\" in name or ":" in name or name.count("/") > 1
    return as_path or (not revision and os.path.isdir(name))
