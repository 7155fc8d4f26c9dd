# SPDX-License-Identifier: Apache-2.0
"""The two ways things go wrong: a request that cannot be carried out, a run that failed; and text to be shown."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator


class MoEPruneError(Exception):
    """Anything this package refuses or fails at, with a message in one line for the person who asked."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class RequestError(MoEPruneError, ValueError):
    """The request is wrong: what was asked, what is true, what to change. Nothing was changed or written."""


class RunError(MoEPruneError, RuntimeError):
    """The request was fine, and carrying it out found something that only the run could find."""


_INVISIBLE = frozenset(
    "\u061c\u200b\u200e\u200f\u2060\ufeff" + "".join(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
)
"""Characters that turn the direction of text, or cannot be seen; not joiners, which some scripts need."""


def printable(text: object) -> str:
    """Text as it may be shown: what controls a terminal or turns text around is written out, as ``\\x1b``.

    Names of domains, files and models come from others. Line ends and tabs stay.
    """
    return "".join(map(_shown, str(text)))


def one_line(text: object) -> str:
    """The same in one line, every run of white space a space."""
    return printable(" ".join(str(text).split()))


def _shown(character: str) -> str:
    hidden = character in _INVISIBLE or "\U000e0000" <= character <= "\U000e007f"
    if character in "\n\t" or not (hidden or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


_FAULTS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
    NameError,  # of a package that is missing, as transformers has it
)


@contextlib.contextmanager
def faults_of(what: str, kind: type[MoEPruneError] = RequestError) -> Iterator[None]:
    """Say of what fails inside a ``with`` that it is a fault of what was read.

    Settings can be wrong in as many ways as there are model types, and libraries that use them say what they stumble
    over and not where it stands.

    Args:
        what: The file.
        kind: Of the error that is raised.

    Raises:
        MoEPruneError: Of that kind, or as it was raised.
    """
    try:
        yield
    except MoEPruneError:
        raise
    except _FAULTS as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
            raise
        said = str(error).strip().splitlines() or [""]
        raise kind(f"{what} is wrong, or of another model: {type(error).__name__}: {said[0]}") from error


def check_type(value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Refuse an argument of another type.

    Args:
        value: The argument.
        kind: What it has to be.
        wanted: That in words, with how to get one.

    Raises:
        RequestError: If it is something else.
    """
    if not isinstance(value, kind):
        raise RequestError(f"{wanted} is needed, and this is a {type(value).__name__}.")


def nearest_first(name: str, known: list[str]) -> str:
    """The known names as one string, the one most like ``name`` first."""
    import difflib

    ratio = {candidate: difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio() for candidate in known}
    return ", ".join(sorted(known, key=lambda candidate: (-ratio[candidate], candidate)))
