# SPDX-License-Identifier: Apache-2.0
"""Which folders are outputs of this package, and may be replaced: those whose marker, read, says so."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RequestError
from ..names import PLAN_NAME, STATS_NAME
from .values import read_json

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
    """Why a folder is no output of this package; None if it is one."""
    faults = [marker_fault(path) for name in MARKERS if (path := Path(folder) / name).is_file()]
    if None in faults:
        return None
    return "; ".join(map(str, faults)) or f"it has neither {' nor '.join(MARKERS)}"


def is_output(folder: str | os.PathLike) -> bool:
    """Whether a folder is an output of this package: a marker in it, read, says so."""
    return output_fault(folder) is None
