# SPDX-License-Identifier: Apache-2.0
"""Which experts the names in other tools' settings are, and what they are called after pruning numbered them anew."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

WRAPPERS = frozenset(
    "model language_model text_model transformer backbone decoder base_model module thinker llm lm".split()
)
"""What stands before the decoder's layers; tools put these words there or leave them out."""
OTHER_PARTS = frozenset(
    "mtp mtp_layers nextn draft eagle visual vision vision_tower vision_model audio audio_tower audio_model talker "
    "encoder".split()
)
"""Parts of a model that have layers of their own."""


@dataclass(frozen=True)
class Cut:
    """How experts were numbered anew.

    Attributes:
        retained: By layer, of all layers with experts: the old numbers of the retained ones, sorted. Extra heads that
            are left whole need not be there.
        original: By layer: experts before.
        modules: (layer, old number) -> names of that expert's module, in the files and in the model; they end in the
            old number.
        parts: Names of the modules and tensors below an expert (``gate_proj.weight``); None if they are not known.
        others: Names of all other tensors and modules; None if they are not known.
    """

    retained: Mapping[int, tuple[int, ...]]
    original: Mapping[int, int]
    modules: Mapping[tuple[int, int], tuple[str, ...]]
    parts: Sequence[str] | None = None
    others: Collection[str] | None = None


class Reading(Enum):
    """How the tool that reads a setting takes its strings."""

    NAMES = "equal; 're:' and an expression, from the start; globs"
    TRANSFORMERS = "expressions up to a dot, from the start; or the end of a name"
    AWQ = "part of a name"
    COMPRESSED_TENSORS = "equal; 're:' and an expression, from the start"
    TORCHAO = "equal; 're:' and an expression, whole"
    AUTO_ROUND = "equal; expressions, anywhere"
    GPTQ_MODEL = "'+:' or '-:' and an expression, from the start"


class Refusal(Exception):
    """A string names experts and cannot be rewritten; the message goes on after ``which``."""


@dataclass(frozen=True)
class Place:
    """Where a layer holds its experts: ``[PREFIX]layers.3.mlp.experts.[NUMBER]``.

    Attributes:
        layer: The layer.
        before: ``layers.``
        number: ``3``, which need not be the layer (extra heads count anew).
        after: ``.mlp.experts.``
        kind: The words of the prefix that are no mere wrappers: none, or ``mtp``.
        prefixes: What does stand before it.
    """

    layer: int
    before: str
    number: str
    after: str
    kind: tuple[str, ...]
    prefixes: tuple[str, ...]


class ExpertNames:
    """The names of a model's experts.

    Attributes:
        cut: How they were numbered anew.
        places: Where they are.
        word: Finds what stands before an expert's number (``experts``) in a string of any kind.
        by_number: Finds an expert's number in one, or the beginning of an expression for it.
    """

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        prefixes: dict[tuple[int, str, str, str, tuple[str, ...]], dict[str, None]] = {}
        for (layer, number), names in cut.modules.items():
            for name in names:
                prefix, before, at, after = split(name.removesuffix(str(number)))
                prefixes.setdefault((layer, before, at, after, kind_of(prefix)), {})[prefix] = None
        self.places = [Place(*key, tuple(before)) for key, before in prefixes.items()]
        self._at = {(p.before, p.number, p.after, p.kind): p for p in self.places}
        pruned = {layer for layer, kept in cut.retained.items() if len(kept) < cut.original[layer]}
        self._numbers = {(place.kind, place.number) for place in self.places if place.layer in pruned}
        self._numbers |= {((), str(layer)) for layer in pruned}  # a model that has them fused has no names for them
        last = {"experts."} | {re.search(r"[^.]*\.?$", place.after)[0] for place in self.places}  # type: ignore[index]
        heads = "|".join(map(re.escape, sorted(last)))
        words = "|".join(sorted({re.escape(word.rstrip(".")) for word in last}))
        self._name = re.compile(rf"((?:[^.]+\.)*?(?:{heads}))(0|[1-9][0-9]*)((?:\..*)?)")
        self.word = re.compile(rf"(?<![A-Za-z0-9_])(?:{words})", re.IGNORECASE)
        self.by_number = re.compile(rf"(?<![A-Za-z0-9_])(?:{words})\W{{0,6}}[0-9]", re.IGNORECASE)
        names_elsewhere = (self._name.fullmatch(name) for name in cut.others or ())
        elsewhere = [split(match[1])[1:] for match in names_elsewhere if match]
        self._elsewhere = {*elsewhere, *((p.before, p.number, p.after) for p in self.places if p.kind)}

    def layers_of(self, part: str) -> set[int]:
        """The layers with experts of an extra part of the model."""
        return {place.layer for place in self.places if part in place.kind}

    def layer_of(self, names: Sequence[str]) -> tuple[bool, int | None]:
        """Whether dotted names, outermost first, say a layer; and which layer with experts that is, if it is one."""
        numbers = {(place.before.rstrip("."), place.number): place.layer for place in self.places if not place.kind}
        words = [word for name in names for word in name.split(".")]
        lists = {word for word, _ in numbers}
        for word, number in itertools.pairwise(words):
            if word in lists and number.isdigit():
                other = OTHER_PARTS & set(words)
                return True, None if other else numbers.get((word, number))
        return False, None

    def renamed(self, text: str, reading: Reading) -> list[str] | None:
        """What must stand in place of a name without wildcards; None: itself; nothing: the expert was pruned.

        Raises:
            Refusal: If it names an expert by number, and which one is not certain.
            LookupError: If it stands for several modules, and must be matched against all.
        """
        by_end = reading in (Reading.AWQ, Reading.TRANSFORMERS)  # or by any other piece
        match = self._name.fullmatch(text)
        if match is None or re.search(r"[^\w.-]", text):
            if self.by_number.search(text):
                raise Refusal("names experts by number in a way that is not known here")
            if by_end and re.search("[0-9]", text):
                raise LookupError
            return None
        head, digits, rest = match[1], match[2], match[3]
        prefix, before, number, after = split(head)
        if not number:
            if by_end:
                raise LookupError
            raise Refusal("names an expert by number and says no layer")
        if (
            not prefix
            and reading in (Reading.AWQ, Reading.TRANSFORMERS)
            and (before, number, after) in self._elsewhere
        ):
            raise LookupError
        kind = kind_of(prefix)
        place = self._at.get((before, number, after, kind))
        if place is None:
            known = not kind or any(kind == place.kind for place in self.places)
            if OTHER_PARTS & set(kind) or (known and (kind, number) not in self._numbers):
                return None  # another part of the model, or a layer that is not pruned
            raise Refusal("names an expert by number, and no such module is known")
        retained, count = self.cut.retained[place.layer], self.cut.original[place.layer]
        if int(digits) >= count:
            raise Refusal(f"names an expert that is not there (layer {place.layer} has {count})")
        if len(retained) == count:
            return None
        named = [int(digits)]
        open_end = reading is Reading.AWQ and not rest  # experts.1 is part of experts.12
        if open_end:
            named = [old for old in range(count) if str(old).startswith(digits)]
        new = [retained.index(old) for old in named if old in retained]
        if reading is Reading.TRANSFORMERS and rest == ".":  # the dot is any character there
            longer = [old for old in range(count) if str(old)[:-1] == digits]
            longer += [other for other in range(len(retained)) if new and str(other)[:-1] == str(new[0])]
            if longer:
                raise Refusal("names one expert for some tools and several for transformers; remove its last dot")
        if open_end and any(str(other).startswith(str(n)) for n in new for other in {*range(len(retained))} - {n}):
            rest = "."
        return [f"{head}{n}{rest}" for n in new]


def split(head: str) -> tuple[str, str, str, str]:
    """A name up to an expert's number: prefix, list of layers, layer, rest; the middle two may be empty."""
    words = head.split(".")
    at = max((index for index, word in enumerate(words) if index and re.fullmatch("[0-9]+", word)), default=0)
    if not at:
        return "", "", "", head
    prefix = ".".join(words[: at - 1])
    return f"{prefix}." if prefix else "", f"{words[at - 1]}.", words[at], "." + ".".join(words[at + 1 :])


def kind_of(prefix: str) -> tuple[str, ...]:
    """The words of a prefix that are no mere wrappers."""
    return tuple(word for word in prefix.split(".") if word and word not in WRAPPERS)
