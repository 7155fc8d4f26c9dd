# SPDX-License-Identifier: Apache-2.0
"""Messages of the library, which speak of arguments, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_ARGUMENTS = {
    "domain_weights": "domain_weight",
    "limit": "task_limit",
    "include": "task_include",
    "widths": "bit_widths",
}
"""Arguments of other names than the flags' destinations."""
_VERBS = r"(?= (?:is|are|must|names|has|lies|takes|needs no)\b| \(|\.$| and [\w-]+\.$)"
_NOT_ARGUMENTS = (
    r"(?<!\w)'[^']*'(?!\w)",  # what somebody wrote
    r'(?<!\w)"[^"]*"(?!\w)',
    r"`[^`]*`",
    r"\S*[/\\]\S*",  # paths
    r"config(?:\.json)?(?:'s)? (?:says )?\w+",  # keys of a model's config have the same names
    r"\S*\.(?:json|ya?ml): .*",  # what is wrong in a file, with the file's own words
    r"(?:[Kk]nown|[Ss]ettings|[Oo]ptions|[Kk]eys): [^;.]+",  # lists of names, whatever they are of
)


def with_flags(message: str, flags: Mapping[str, Sequence[str]], given: Iterable[str] = ()) -> str:
    """A message with the flags of a command in place of the arguments they stand for.

    File names, and what is quoted, stay as they are. Arguments of one common word (``seed``, ``device``) are told from
    words by where they stand: before ``=``, or as what a sentence is about.

    Args:
        message: Of the library.
        flags: The names of each flag, by the argument it stands for.
        given: Names of files and folders that the person gave, which may be called as arguments are.
    """
    known = {**{name: flags[other] for name, other in _ARGUMENTS.items() if other in flags}, **flags}
    if not known:
        return message
    every = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    long = "|".join(sorted((re.escape(name) for name in known if "_" in name), key=len, reverse=True)) or r"(?!)"
    own = "|".join(re.escape(name) for name in given if name in known) or r"(?!)"
    begin = r"(?:(?<=^)|(?<=[;:.(,] )|(?<=\band )|(?<=\bor ))"
    pattern = "|".join(
        (
            rf"(?<![\w./\\-])(?P<set>{every})=(?P<value>'[^']*'|\"[^\"]*\"|\.\.\.|[^\s,;.)/]+(?:\.\d+)?(?![/\w]))",
            *_NOT_ARGUMENTS,
            rf"(?<![\w-])(?:{own})(?![\w-])",
            rf"(?<![\w./\\-])(?P<quoted>{long}) '(?P<text>[\w.:-]+)'",
            rf"(?<![\w./\\-])(?P<long>{long})(?![\w(/\\-]|\.\w|=)",
            rf"{begin}(?P<word>{every}){_VERBS}",
        )
    )

    def flag(found: re.Match[str]) -> str:
        if found["set"]:
            return _given(known[found["set"]], found["value"])
        if found["quoted"]:
            return f"{known[found['quoted']][0]} {found['text']}"
        name = found["long"] or found["word"]
        return known[name][0] if name else found[0]

    return re.sub(pattern, flag, message)


def _given(names: Sequence[str], value: str) -> str:
    """A flag with the value of an argument; truth values are switches."""
    if value == "True":
        return names[0]
    if value == "False":
        return next((name for name in names if name.startswith("--no-")), f"without {names[0]}")
    return f"{names[0]} {value.strip(chr(39) + chr(34))}"
