# SPDX-License-Identifier: Apache-2.0
"""What can be said of a request before anything heavy is imported: models and files that it names are there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from ..calibration.naming import ON_THE_HUB, not_there
from ..checkpoints.naming import check_named
from ..errors import RequestError
from ..storage.nearby import absent

_TEXTS = ("calibration", "data", "evaluate")
_FILES = ("stats", "plan", "sensitivity", "evaluation", *_TEXTS, "task_include")
"""Arguments that name files or folders that must be there."""


def check_request(args: argparse.Namespace, any_form: bool = False) -> None:
    """Raise where a model or a file that is named cannot be there.

    Args:
        args: The command's.
        any_form: Whether the model may be in another form than a transformers checkpoint (``formats``).

    Raises:
        RequestError: Naming it, and what was probably meant.
    """
    from ..formats import form_of

    for name in _named(args, "model", "reference"):
        if not (any_form and form_of(name)):
            check_named(name)
    for argument in _FILES:
        for given in _named(args, argument):
            is_file = not given.startswith(ON_THE_HUB) if argument in _TEXTS else _is_file(given)
            if not is_file or _exists(given):
                continue
            name = given
            if argument == "plan" and isinstance(args.plan, list):  # NAME=PLAN.json
                name = given.partition("=")[2] or given
                if _exists(name):
                    continue
            raise RequestError(not_there(name) if argument in _TEXTS else absent(name))


def require_calibration(args: argparse.Namespace) -> None:
    """Raise where texts are needed and none are named.

    Raises:
        RequestError: Saying how to name them.
    """
    if not args.calibration:
        raise RequestError("a calibration is needed; name a file (--calibration FILE), or a preset (list presets).")


def named_files(args: argparse.Namespace) -> tuple[str, ...]:
    """What a command names of files and folders, models among them."""
    return tuple(_named(args, "model", "reference", "config", "output", "pictures", *_FILES))


def _named(args: argparse.Namespace, *arguments: str) -> Iterator[str]:
    for argument in arguments:
        value = getattr(args, argument, None)
        yield from (value if isinstance(value, list) else [] if value is None else [value])


def _is_file(name: str) -> bool:
    """Whether a name is that of a file here: neither of texts elsewhere (``hub:...``) nor one word by itself."""
    return not re.match(r"\w{2,}:", name) and (Path(name).suffix != "" or "/" in name or "\\" in name)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError) as error:
        raise RequestError(f"{name[:80]!r} is no name of a file: {error}") from error
