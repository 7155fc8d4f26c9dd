# SPDX-License-Identifier: Apache-2.0
"""Text and numbers, for figures and for the page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

SMALL = 8.0
"""Points: the size of most text in figures."""

NOTHING = "\N{EN DASH}"
"""Stands where there is no number."""


def plain(text: Any) -> str:
    """Text on one line, without what is no character: control codes, halves of surrogates, changes of direction."""
    spaced = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def short(text: Any, most: int = 24) -> str:
    """At most so many characters of a text."""
    text = plain(text)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def text_width(texts: Sequence[str], points: float = SMALL, bold: bool = False) -> float:
    """Inches that the widest of some texts takes in a figure, on the safe side."""
    return max((sum(map(_ems, text)) for text in texts), default=0.0) * points / 72 * (_BOLD if bold else 1.0)


_BOLD = 1.12  # times as wide


def _ems(character: str) -> float:
    """The width of a character of the figures' font, near enough, in units of its size."""
    if unicodedata.east_asian_width(character) in "WF":
        return 1.0
    for characters, width in ((" .,:;|!'ijl", 0.33), ("frtI()[]-/", 0.43), ("mwMW%@…", 0.96)):
        if character in characters:
            return width
    return 0.7 if character.isupper() else 0.635


def fitting(text: Any, inches: float, points: float = SMALL, bold: bool = False) -> str:
    """As much of a text as fits into so many inches."""
    text = plain(text)
    room = inches * 72 / points / (_BOLD if bold else 1.0)
    if sum(map(_ems, text)) <= room:
        return text
    room -= _ems("…")
    kept = ""
    for character in text:
        room -= _ems(character)
        if room < 0:
            break
        kept += character
    return kept.rstrip() + "…"


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, and no exponent where it can be read without."""
    if not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < digits:
        return f"{value:.{digits - 1 - size}f}"
    return f"{value:,.0f}" if 0 <= size < 7 else f"{value:.{digits - 1}e}"


def spans(numbers: Iterable[int]) -> str:
    """Rising numbers as text: ``0-3, 5``, with hyphens at which lines are not broken."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(
        str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}\N{NON-BREAKING HYPHEN}{b}" for a, b in parts
    )


def span(values: Iterable[int]) -> str:
    """The least and the largest of some numbers as text: ``4 to 6``, or ``4``."""
    values = sorted(values)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def model_name(facts: Any) -> str | None:
    """What a model is called: its id on the Hub, or the name of its folder, whose place means nothing to others."""
    if not isinstance(facts, Mapping) or not facts.get("name_or_path"):
        return None
    name = plain(facts["name_or_path"])
    return name if facts.get("revision") else PurePath(name).name or name
