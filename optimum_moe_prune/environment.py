# SPDX-License-Identifier: Apache-2.0
"""What this package runs on: systems, and the packages it needs. Nothing heavy is imported to find out."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys

from .errors import RequestError

PACKAGE = "optimum-moe-prune"
_SHOWN = ("transformers", "torch", "optimum", "huggingface-hub", "safetensors")


def check_platform() -> None:
    """Raise on systems on which checkpoints cannot be read and written.

    Raises:
        RequestError: On Windows.
    """
    if sys.platform == "win32":
        raise RequestError(
            f"{PACKAGE} runs on Linux and macOS, and this is Windows; use it in WSL (wsl --install). Checkpoints that "
            "it made can be loaded here."
        )


def check_packages() -> None:
    """Raise unless the packages that this one needs are installed, in versions that fit.

    Raises:
        RequestError: Naming the first that is missing or does not fit, and how to install it.
    """
    from packaging.requirements import Requirement

    try:
        requirements = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        needed = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError as error:
            raise RequestError(f"{requirement.name} is not installed; install it: pip install '{needed}'.") from error
        if not requirement.specifier.contains(version, prereleases=True):
            raise RequestError(
                f"{requirement.name} {version} is installed, and {PACKAGE} needs {requirement.specifier}; "
                f"install it: pip install '{needed}'."
            )


def package_version() -> str:
    """The version of this package."""
    return _version(PACKAGE)


def is_newer(version: object) -> bool:
    """Whether something was written by a newer version of this package."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(str(version)) > Version(package_version())
    except InvalidVersion:
        return False


def versions_line() -> str:
    """This package's version and those of what it stands on, as ``--version`` shows them."""
    others = ", ".join(f"{name} {_version(name)}" for name in _SHOWN)
    return f"{PACKAGE} {_version(PACKAGE)} ({others}, Python {platform.python_version()})"


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown" if name == PACKAGE else "not installed"
