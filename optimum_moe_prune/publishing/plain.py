# SPDX-License-Identifier: Apache-2.0
"""Values of files as people read them: plain words and pairs. Plans are edited by hand."""

from __future__ import annotations

from typing import Any

from ..errors import one_line
from ..storage.values import Json


def mapping(value: Any) -> Json:
    """A value of a plan where a mapping should be."""
    return value if isinstance(value, dict) else {}


def texts(value: Any) -> list[str]:
    """A value of a plan where a list of texts should be."""
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def pairs(value: Any, between: str = " ") -> list[str]:
    """The entries of such a mapping, plain."""
    return [f"{plain(key)}{between}{plain(entry)}" for key, entry in mapping(value).items()]


def plain(value: Any) -> str:
    """A value from a file as text in one line that is no markup."""
    return one_line(value).replace("`", "'").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")


def sentence(text: str) -> str:
    """A note as a sentence: with a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
