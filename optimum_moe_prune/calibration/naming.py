# SPDX-License-Identifier: Apache-2.0
"""Names of texts that are no file here: what was probably meant."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import nearest_first
from ..storage.nearby import absent
from .presets import PREFIX, PRESETS

ON_THE_HUB = ("hub:", PREFIX)
"""How names of texts begin that are no files."""
_ADDRESS = re.compile(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)")
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz", ".bz2", ".xz")


def not_there(name: str | os.PathLike) -> str:
    """That texts are not there, in words: an address, a preset, a dataset on the Hub, several files, or a slip."""
    name = os.fspath(name)
    if found := _ADDRESS.match(name):
        return f"{name} is an address; the dataset on the Hub is read as hub:{found[1]}."
    if re.match(r"\w+:/", name):
        return f"{name} is an address; download it, and name the file."
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1 and all(part and Path(part).exists() for part in parts):
        return f"the file {name} does not exist; several files are given one by one: {' and '.join(parts)}."
    plain = re.sub(r"^\w+:", "", name)
    for word in (plain, plain.rpartition("/")[2]):
        if word.lower() in PRESETS:
            return f"the file {name} does not exist; did you mean the preset {PREFIX}{word.lower()}?"
    if re.match(r"\w{2,}:", name):
        return (
            f"{name} is no file; presets are {PREFIX}NAME ({nearest_first(plain, list(PRESETS))}), datasets hub:NAME."
        )
    if any(sign in name for sign in "*?["):
        return f"no file is called {name}, or fits it."
    has_folder = Path(name).parent.is_dir()
    if _ID.fullmatch(name) and not has_folder and not name.lower().endswith(_SUFFIXES):
        return f"the file {name} does not exist; a dataset on the Hub is read as hub:{name}."
    return f"the file {absent(name)}"
