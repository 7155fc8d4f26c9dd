# SPDX-License-Identifier: Apache-2.0
"""Text and numbers as figures and page show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from ...storage.values import Values

MISSING = "\N{EN DASH}"
"""Stands where there is no number."""


def plain(text: str) -> str:
    """Text without what is no character: control codes, halves of surrogates, changes of direction."""
    if text.isprintable():  # as almost every text is, and pictures are, which have millions of characters
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def short(text: Any, most: int = 24) -> str:
    """At most ``most`` characters of a text, on one line."""
    text = " ".join(plain(str(text)).split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, and no exponent where it can be read without."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < digits:
        return f"{value:.{digits - 1 - size}f}"
    return f"{value:,.0f}" if 0 <= size < 7 else f"{value:.{digits - 1}e}"


def amount(value: float | None) -> str:
    """A number with three significant digits, infinite ones as their sign."""
    if value is not None and math.isinf(value):
        return "-" * (value < 0) + "\N{INFINITY}"
    return number(value)


def perplexity(value: float | None) -> str:
    """A perplexity, with two decimals where that can be read."""
    return f"{value:.2f}" if value is not None and abs(value) < 10_000 else amount(value)


def nats(value: float | None) -> str:
    """A loss, with three decimals."""
    return f"{value:.3f}" if value is not None and math.isfinite(value) else amount(value)


def nbytes(count: int) -> str:
    """Bytes as people read them."""
    unit, word = next(((unit, word) for unit, word in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1, "bytes"))
    return f"{count / unit:,.3g} {word}"


def domain_name(name: str) -> str:
    """A domain as people read it: the one that stands for all is no name."""
    return "all domains" if name == "all" else name


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


def extent(values: Iterable[int]) -> str:
    """The least and the largest of some numbers as text: ``4 to 6``, or ``4``."""
    values = sorted(values)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def listed(values: Iterable[Any]) -> str:
    """Values as text, or the sign for none."""
    return ", ".join(map(str, values)) or MISSING


def described(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, Mapping):
        return listed(f"{key} {described(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return listed(map(described, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return MISSING if value is None else str(value)


def model_name(facts: Values) -> str | None:
    """What a model is called: its id on the Hub, or the name of its folder, whose place means nothing to others."""
    if not facts.get("name_or_path"):
        return None
    name = str(facts["name_or_path"])
    return name if facts.get("revision") else PurePath(name).name or name
