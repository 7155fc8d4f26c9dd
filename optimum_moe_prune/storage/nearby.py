# SPDX-License-Identifier: Apache-2.0
"""Names of files and folders that are not there: what a person probably meant."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path


def looks_like_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder; ``name`` and ``owner/name`` can be ids on the Hub too."""
    begins = name.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) is not None
    return begins or "\\" in name or name.endswith("/") or name.count("/") > 1


def absent(name: str | os.PathLike) -> str:
    """That a file or folder does not exist, in words: how far its path goes, and what it may have been meant to be."""
    name = os.fspath(name)
    path = Path(name)
    if name.startswith("~") and path.expanduser().exists():
        return f"{name} does not exist, where ~ is not the home folder; write {path.expanduser()}."
    if "\\" in name and Path(name.replace("\\", "/")).exists():
        return f"{name} does not exist; did you mean {name.replace(chr(92), '/')}?"
    if name.startswith("/") and Path(name[1:]).exists():
        return f"{name} does not exist; did you mean {name[1:]}, without the first slash?"
    missing = path
    while not _is_folder(missing.parent) and missing.parent != missing:
        missing = missing.parent
    if missing.exists():
        return f"{name} does not exist: {missing} is a file."
    where = "" if missing == path else f": there is no {missing}"
    meant = nearby(missing)
    return f"{name} does not exist{where}" + (f"; did you mean {_shown(meant, name)}?" if meant else ".")


def nearby(path: Path) -> Path | None:
    """A file or folder of nearly the same name in the same folder."""
    try:
        names = [each.name for each in path.parent.iterdir() if not each.name.startswith(".")]
    except OSError:
        return None
    by_lower = {name.lower(): name for name in names}
    stems = {Path(name).stem.lower(): name for name in names}
    wanted = path.name.lower()
    found = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=0.75)
    same_stem = stems.get(Path(wanted).stem) if Path(wanted).stem else None
    meant = by_lower[found[0]] if found else same_stem
    return None if meant is None else path.with_name(meant)


def _shown(path: Path, like: str) -> str:
    """A path written in the way of another: one in the current folder with a dot, so that it is no id on the Hub."""
    text = str(path)
    return text if "/" in text or "." in path.name else f"./{text}"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
