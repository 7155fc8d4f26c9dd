# SPDX-License-Identifier: Apache-2.0
"""What a result remembers of how it was made."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from datetime import datetime, timezone


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
