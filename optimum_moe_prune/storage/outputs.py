# SPDX-License-Identifier: Apache-2.0
"""Which folders are outputs of this package, and may be replaced: those in which nothing is anybody else's.

An output has a marker, ``moe_pruning_plan.json`` or ``stats.json``. Which files statistics consist of, ``stats.json``
says. A checkpoint has a list of its files, with a digest of each (``storage.contents``); cards have their own in their
last line. Only what is listed, and still as it was written, is this package's own; a file, folder or link beyond that,
or a card, plan or model that was changed since, is the work of a person.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import RequestError, RunError
from ..names import (
    CARD_NAME,
    CONFIG_NAME,
    EVALUATION_NAME,
    LIST_NAME,
    NEW_CARD_NAME,
    PLAN_NAME,
    REPORT_NAME,
    REPORT_PICTURES,
    STATS_NAME,
)
from .atomic import replace_file
from .contents import bytes_digest, content_digests
from .values import Json, check_version, read_json

FORMAT_VERSION = 1
"""Of the list of files."""

MARKERS: dict[str, dict[str, type]] = {
    PLAN_NAME: {"format_version": int, "model_type": str, "top_k": int, "method": str, "layers": dict},
    STATS_NAME: {
        "format_version": int,
        "model": dict,
        "needs": list,
        "max_tokens": int,
        "seed": int,
        "kept_tokens": int,
        "layers": dict,
        "samples": list,
    },
}
"""Files that show a folder to be an output, and what every version of them holds (``FORMATS.md``)."""

_ADDED = (EVALUATION_NAME, REPORT_NAME)
"""What is written into a finished output later, as well as pictures of the report, and cards."""
_CARDS = (CARD_NAME, NEW_CARD_NAME)
_BY_SEAL = "seal"
"""In place of a digest of a card."""
_SEAL = re.compile(rb"\n<!-- written by optimum-moe-prune ([0-9a-f]{16}) -->\n")


def marker_fault(path: str | os.PathLike) -> str | None:
    """Why a file with the name of a marker was not written by this package: it is damaged, or somebody else's."""
    path = Path(path)
    try:
        values = read_json(path)
    except RequestError as error:
        return str(error).rstrip(".")
    wrong = (key for key, kind in MARKERS[path.name].items() if type(values.get(key)) is not kind)
    return next((f"{path} has no {key}, or a wrong one" for key in wrong), None)


def output_fault(folder: str | os.PathLike) -> str | None:
    """Why a folder is no output of this package, or holds something else as well; None if it is one, and only that."""
    folder = Path(folder)
    faults = {name: marker_fault(path) for name in MARKERS if (path := folder / name).is_file()}
    marker = next((name for name, fault in faults.items() if fault is None), None)
    if marker is None:
        return "; ".join(map(str, faults.values())) or f"it has neither {' nor '.join(MARKERS)}"
    try:
        known = _statistics_files(read_json(folder / STATS_NAME)) if marker == STATS_NAME else _listed(folder)
        there = sorted(name for name in _entries(folder, known) if not _is_sealed(folder, name))
        if foreign := [name for name in there if name not in known]:
            if marker == PLAN_NAME and not (folder / LIST_NAME).is_file():
                return f"it has {_several(foreign)}, and no list of what this package wrote ({LIST_NAME})"
            return f"it has {_several(foreign)}, which this package did not write"
        found = content_digests(folder / name for name in there if known[name])
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    except RequestError as error:
        return str(error).rstrip(".")
    changed = [name for name in there if known[name] and found[folder / name] not in known[name]]
    return f"{_several(changed)} was changed since this package wrote it" if changed else None


def is_output(folder: str | os.PathLike) -> bool:
    """Whether a folder is an output of this package and nothing else: a marker in it, read, says so."""
    return output_fault(folder) is None


def list_files(folder: Path) -> None:
    """Write which files a pruned checkpoint holds now; the last thing that is written into it.

    Raises:
        RunError: If it cannot be written.
    """
    if not (folder / PLAN_NAME).is_file():
        return
    try:
        paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / LIST_NAME]
        names = {path: path.relative_to(folder).as_posix() for path in paths}
        found = content_digests(path for path, name in names.items() if not _is_sealed(folder, name))
    except OSError as error:
        raise RunError(f"{folder} cannot be read: {error}.") from error
    _write_list(folder, {name: [found.get(path, _BY_SEAL)] for path, name in names.items()})


def announce(path: Path, content: bytes) -> None:
    """Say in the list of a finished output that a file is to be written into it, where it is one that may be added.

    What is there until then stays right as well, so that an end at any moment leaves an output.

    Raises:
        RequestError: If the list is damaged.
        RunError: If it cannot be written.
    """
    folder = path.parent.parent if path.parent.name == REPORT_PICTURES else path.parent
    name = path.relative_to(folder).as_posix()
    if (name not in _ADDED and folder == path.parent) or not (folder / LIST_NAME).is_file():
        return
    files = _listed(folder)
    before = content_digests([path])[path] if path.is_file() and not path.is_symlink() else ""
    still = [before] if before in files.get(name, ()) else []
    _write_list(folder, {**files, name: list(dict.fromkeys([*still, bytes_digest(content)]))})


def _listed(folder: Path) -> dict[str, list[str]]:
    """The digests of each file of a pruned checkpoint; without a list, only what a plan alone consists of.

    Raises:
        RequestError: If the list is damaged.
    """
    path = folder / LIST_NAME
    if not path.is_file():
        return {PLAN_NAME: [], CONFIG_NAME: []}
    values = read_json(path)
    check_version(values, FORMAT_VERSION, str(path))
    files = values.get("files")
    if not isinstance(files, dict) or not all(isinstance(digests, str) and digests for digests in files.values()):
        raise RequestError(f"{path} is damaged: it does not say the digests of files by name.")
    return {**{name: digests.split() for name, digests in files.items()}, LIST_NAME: []}


def _write_list(folder: Path, files: Mapping[str, list[str]]) -> None:
    digests = {name: " ".join(digests) for name, digests in sorted(files.items()) if digests}
    text = json.dumps({"format_version": FORMAT_VERSION, "files": digests}, indent=1)
    replace_file(folder / LIST_NAME, (text + "\n").encode())


def _statistics_files(values: Json) -> dict[str, list[str]]:
    """The files of statistics, as their header says; their digests are not known."""
    layers = [f"layer_{int(layer):05d}.safetensors" for layer in values["layers"] if re.fullmatch(r"\d{1,5}", layer)]
    return {name: [] for name in (STATS_NAME, "tokens.safetensors", *layers)}


def _is_sealed(folder: Path, name: str) -> bool:
    """Whether a file is a card that is as this package wrote it: it ends with the hash of what stands before."""
    if name not in _CARDS or not (folder / name).is_file():
        return False
    content = (folder / name).read_bytes()
    seal = _SEAL.fullmatch(content[content.rfind(b"\n<!--") :])
    return (
        seal is not None and hashlib.sha256(content[: content.rfind(b"\n<!--")]).hexdigest()[:16].encode() == seal[1]
    )


def _entries(folder: Path, known: Mapping[str, object]) -> Iterator[str]:
    """What a folder holds: files, whatever is neither file nor folder, links, and folders that no known file is in.

    Raises:
        OSError: If a folder in it cannot be read.
    """
    inside = {above.as_posix() for name in known for above in Path(name).parents}
    with os.scandir(folder) as found:
        waiting = [Path(entry.name) for entry in found]
    while waiting:
        name = waiting.pop()
        path = folder / name
        if path.is_symlink():
            yield f"{name.as_posix()} (a link)"
        elif path.is_file():
            yield name.as_posix()
        elif not path.is_dir():
            yield f"{name.as_posix()} (a pipe or device)"  # to open one may wait for ever
        elif name.as_posix() not in inside:
            yield f"{name.as_posix()}/"
        else:
            with os.scandir(path) as found:
                waiting += [name / entry.name for entry in found]


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
