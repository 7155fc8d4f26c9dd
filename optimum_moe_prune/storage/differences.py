# SPDX-License-Identifier: Apache-2.0
"""What differs between unfinished work and what is asked for now, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .values import Json, Values

VERSIONS = "versions"
_FILES = "files"
_MODEL = "model"
_HASHES = {"calibration": "calibration samples", "samples": "samples", "plans": "plans to measure"}
"""What is known by a hash alone, and is called so where no setting tells why it is another."""


def differences(there: Values, now: Values, settings_there: Values, settings: Values) -> list[str]:
    """What differs, settings that a person gave first; hashes only where nothing else says it.

    Args:
        there: What the unfinished work is of, as nested plain values.
        now: What is asked for.
        settings_there: By name of such a value, the settings it follows from.
        settings: The same, of what is asked for.
    """
    plain: list[str] = []
    hashes: list[str] = []
    for name in sorted(set(there) | set(now)):
        old, new = there.get(name), now.get(name)
        if old == new:
            continue
        causes = list(_causes(_mapping(settings_there.get(name)), _mapping(settings.get(name))))
        if causes:
            plain += causes
        elif name == _MODEL and isinstance(old, dict) and isinstance(new, dict):
            plain += _of_model(old, new)
        elif isinstance(old, dict) and isinstance(new, dict):
            plain += _of_values(old, new)
        elif name in _HASHES:
            hashes.append(f"the {_HASHES[name]} are others")
        elif name in ("batches", "passes"):  # which follow from the rest
            hashes.append(f"the {name} are others")
        else:
            plain.append(_differs(name, old, new))
    return list(dict.fromkeys(plain or hashes))


def _causes(there: Values, now: Values) -> Iterator[str]:
    """Settings that differ, and files."""
    if not there or not now:  # of one nothing is known
        return
    for name in (name for name in dict.fromkeys([*there, *now]) if name != _FILES):
        if there.get(name) != now.get(name):
            yield _differs(name, there.get(name), now.get(name))
    old, new = _mapping(there.get(_FILES)), _mapping(now.get(_FILES))
    if list(old) != list(new):
        before, after = (_short(list(names)) or "no files" for names in (old, new))
        yield f"the calibration texts are {before} there and {after} now"
    elif changed := [name for name in old if old[name] != new[name]]:
        yield f"the calibration texts differ ({' and '.join(changed)} changed)"


def _mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _of_model(there: Json, now: Json) -> Iterator[str]:
    """Of two models: which they are, else which revision, else which files."""
    for name, called in (("name", "the model"), ("commit", "the model's revision")):
        if there.get(name) != now.get(name):
            yield _differs(called, there.get(name), now.get(name))
            return
    files = [name for name in sorted(set(there) | set(now)) if "." in name and there.get(name) != now.get(name)]
    for name in files:
        happened = "is new" if name not in there else "is gone" if name not in now else "was changed"
        yield f"{name} of the model {happened}"
    if not files:
        yield "the model's weights are others"


def _of_values(there: Json, now: Json) -> Iterator[str]:
    for name in sorted(set(there) | set(now)):
        if there.get(name) != now.get(name):
            yield _differs(name, there.get(name), now.get(name))


def _differs(name: str, old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list) and len(str(old)) + len(str(new)) > 100:
        more = [f"{_short([v for v in a if v not in b])} {where}" for a, b, where in
                ((old, new, "there alone"), (new, old, "now alone")) if any(v not in b for v in a)]  # fmt: skip
        if more:
            return f"{name} has {' and '.join(more)}"
    return f"{name} is {_short(old)} there and {_short(new)} now"


def _short(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, dict):
        value = [f"{key}={entry}" for key, entry in value.items()] or "none"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
