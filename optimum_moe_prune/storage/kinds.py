# SPDX-License-Identifier: Apache-2.0
"""What a file or folder is that was named where another kind is read: a plan for statistics, weights for texts."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import RequestError
from ..names import PLAN_NAME, STATS_NAME

PLAN = "a plan"
STATS = "a folder of statistics"
SENSITIVITY = "a result of sensitivity"
EVALUATION = "a result of evaluate"
RECIPE = "a recipe"
_EXPORTED = "an exported plan"
_CHECKPOINT = "a pruned checkpoint"
_MODEL = "a model's folder"
_ALSO_READ = {PLAN: (_CHECKPOINT, _EXPORTED), RECIPE: (_CHECKPOINT, _MODEL)}
"""Other kinds that one is read from."""

_BY_KEYS = (
    ({"format", "layers", "model_type"}, _EXPORTED),
    ({"layers", "model_type", "top_k"}, PLAN),
    ({"needs", "kept_tokens", "samples"}, f"a part of {STATS}"),
    ({"methods", "samples", "format_version"}, SENSITIVITY),
    ({"models", "settings", "format_version"}, EVALUATION),
    ({"method", "method_options"}, RECIPE),
    ({"method", "num_experts"}, RECIPE),
    ({"method", "sparsity"}, RECIPE),
    ({"weight_map"}, "an index of weights"),
    ({"model_type"}, "a model's config"),
    ({"architectures"}, "a model's config"),
    ({"tokenizer_class"}, "a tokenizer's config"),
    ({"model", "added_tokens"}, "a tokenizer"),
)
"""JSON objects by keys that they have; the first that fits."""
_BY_NAME = (
    (STATS_NAME, STATS),
    (PLAN_NAME, _CHECKPOINT),
    ("config.json", _MODEL),
)
"""Folders by a file in them."""
_BY_START = (
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF", "a PDF"),
    (b"PAR1", "a Parquet file"),
    (b"\x1f\x8b", "a gzip file"),
)
_BY_SUFFIX = {".safetensors": "a file of weights", ".bin": "a binary file", ".pt": "a file of torch"}
_MOST_BYTES = 64 * 2**20  # of a JSON file that is looked into


def kind_of(path: str | os.PathLike) -> str | None:
    """What a file or folder is, with its article; None where nothing tells, or nothing is there."""
    path = Path(path)
    try:
        if path.is_dir():
            if (path / "plans").is_dir() and (path / "results.json").is_file():
                return "a result of compare"
            return next((kind for name, kind in _BY_NAME if (path / name).is_file()), None)
        with path.open("rb") as file:
            start = file.read(8)
        known = next((kind for begin, kind in _BY_START if start.startswith(begin)), None)
        if known is not None or path.suffix in _BY_SUFFIX:
            return known or _BY_SUFFIX[path.suffix]
        if path.suffix != ".json" or path.stat().st_size > _MOST_BYTES:
            return None
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    keys = set(values) if isinstance(values, dict) else set()
    return next((kind for needed, kind in _BY_KEYS if needed <= keys), None)


@contextlib.contextmanager
def reading(path: str | os.PathLike, wanted: str) -> Iterator[None]:
    """Say what a file or folder is, where it is refused inside a ``with`` since it is of another kind.

    Args:
        path: What is read.
        wanted: What it has to be: one of the kinds above.

    Raises:
        RequestError: As it was raised, where nothing tells.
    """
    try:
        yield
    except RequestError as error:
        found = kind_of(path)
        if found in (None, wanted, *_ALSO_READ.get(wanted, ())):
            raise
        said = f"is {found}, and {wanted} is needed{_instead(Path(path), wanted)}."
        begin = f"{error} This" if "format version" in str(error) else str(path)
        lacking = str(error) if Path(path).is_dir() and re.search("does not exist|is missing", str(error)) else ""
        raise RequestError(f"{begin} {said} {lacking}".rstrip()) from error


def _instead(path: Path, wanted: str) -> str:
    """What was probably meant, as the end of a sentence: beside a file, or in a folder."""
    if wanted == STATS and path.name == STATS_NAME and path.is_file():
        return f"; name the folder ({path.parent})"
    if wanted == STATS and path.is_file() and (path.parent / STATS_NAME).is_file():
        return f"; name the folder that it is in ({path.parent})"
    if wanted == EVALUATION and path.is_dir():
        inside = next((name for name in ("moe_evaluation.json", "results.json") if (path / name).is_file()), None)
        return f"; name {path / inside}" if inside else ""
    if wanted == PLAN and (path / "plans").is_dir():
        plans = sorted((path / "plans").glob("*.json"))
        return f"; name a file in {path / 'plans'}, as {plans[0].name}" if plans else ""
    return ""
