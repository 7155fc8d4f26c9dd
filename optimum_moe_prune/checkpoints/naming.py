# SPDX-License-Identifier: Apache-2.0
"""Names of models that cannot be right, found out without torch, transformers or the network."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import RequestError
from ..storage.nearby import absent, looks_like_path, nearby
from .folders import no_config

_HUB = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/\s]+/[^/\s?#]+)|hf://([^/\s]+/[^/\s?#@]+)")
_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]{1,96}")


def check_named(name: str) -> None:
    """Raise where a name can be neither a model's folder nor an id on the Hub.

    Args:
        name: As it was given.

    Raises:
        RequestError: What it is, and what was probably meant.
    """
    if not name.strip():
        raise RequestError("the model's name is empty; give its folder, or its id on the Hub.")
    if found := _HUB.match(name):
        raise RequestError(f"{name} is an address; the model's id on the Hub is {found[1] or found[2]}.")
    path = Path(name)
    try:
        there, is_file = path.exists(), path.is_file()
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise RequestError(f"{name[:80]!r} is no name of a folder: {error}") from error
    if is_file or (there and not (path / "config.json").is_file()):
        names = [] if is_file else sorted(each.name for each in path.iterdir())
        said = no_config(name, names) or f"{name} is not a model's folder: it has no config.json."
        raise RequestError(said)
    if not there and looks_like_path(name):
        raise RequestError(f"no model can be read from {absent(name)}")
    if not there and not _ID.fullmatch(name):
        raise RequestError(f"{name!r} is neither a folder here nor an id on the Hub (owner/name).")


def not_found(name: str, reason: str) -> str:
    """Why a name that may be an id on the Hub leads nowhere, in words.

    Args:
        name: As it was given.
        reason: What transformers says, in one line.
    """
    meant = nearby(Path(name)) if "/" not in name or Path(name).parent.is_dir() else None
    hint = "" if meant is None else f" Did you mean {meant if '/' in str(meant) else f'./{meant}'}?"
    if "not a valid model identifier" in reason or "404" in reason or "Repository Not Found" in reason:
        return (
            f"no model can be read from {name!r}, which is neither a folder here nor a model on the Hub that can be "
            f"seen from here (private ones need an access token).{hint}"
        )
    if re.search(r"couldn't connect|[Oo]ffline|cannot find the requested files|[Cc]onnection", reason):
        return (
            f"no model can be read from {name!r}: there is no such folder here, and the Hub cannot be reached to look "
            f"there.{hint}"
        )
    return f"no model can be read from {name!r}: {reason}"
