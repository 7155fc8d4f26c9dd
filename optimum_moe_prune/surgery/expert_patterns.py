# SPDX-License-Identifier: Apache-2.0
"""Globs and regular expressions that name experts: what must stand in their place after pruning.

What a pattern names is found by matching it, as the tool does that reads it, against every expert of the original.
Where the experts that remain would be matched by it under their new numbers as well, nothing changes. Else it is
replaced by what matches exactly those.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .expert_names import OTHER_PARTS, ExpertNames, Place, Reading, Refusal

PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "backbone.")
"""Before the decoder's layers in one tool or another. A pattern that matches alike under all of these ignores it."""
PARTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Below an expert, where nothing is known of it."""

Test = Callable[[str], object]
Masks = tuple[int, ...]
"""By old number: which of the names at and below an expert are matched, as bits."""


@dataclass(frozen=True)
class Pattern:
    """A string as its tool reads it.

    Attributes:
        test: Whether it names a module or tensor.
        mark: What stands before the expression: ``re:``, ``+:``.
        regex: The expression; None for globs and parts of names.
        anywhere: Whether it is looked for anywhere in a name.
    """

    test: Test
    mark: str = ""
    regex: str | None = None
    anywhere: bool = False


def pattern_of(text: str, reading: Reading) -> Pattern:
    """A string as its tool reads it.

    Raises:
        re.error: If it is an expression that is none.
    """
    if reading is Reading.GPTQ_MODEL:
        mark = text[:2] if text.startswith(("+:", "-:")) else ""
        return Pattern(_compiled(text[len(mark) :]).match, mark, text[len(mark) :])
    if text.startswith("re:"):
        compiled = _compiled(text[3:])
        return Pattern(compiled.fullmatch if reading is Reading.TORCHAO else compiled.match, "re:", text[3:])
    if reading is Reading.AUTO_ROUND:
        return Pattern(_compiled(text).search, regex=text, anywhere=True)
    if reading is Reading.AWQ:
        return Pattern(lambda name: text in name)
    if reading is Reading.TRANSFORMERS:
        from_start = _compiled(rf"(?:{text})(?:(?<=\.)|(?=\.|$))")
        regex = text if SPECIAL.search(text) else rf"(?:.*{re.escape(text)}$|{text})"
        return Pattern(lambda name: from_start.match(name) or name.endswith(text), regex=regex)
    return Pattern(lambda name: fnmatch.fnmatchcase(name, text), mark="*")


def _compiled(regex: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what may mean something else in a later Python
        return re.compile(regex)


SPECIAL = re.compile(r"[\\*?\[\]^$+(){}|]")


def is_glob(text: str) -> bool:
    """Whether a string with special characters, and no mark, is no regular expression."""
    return not text.startswith((".*", "^")) and not re.search(r"[\\$+(){}|]|\[\^", text)


class ExpertPatterns:
    """What strings that name experts must say after pruning."""

    def __init__(self, names: ExpertNames) -> None:
        self.names, self.cut = names, names.cut
        self.suffixes = Suffixes(names.cut.parts)

    def replaced(self, text: str, reading: Reading, in_settings: bool = True) -> list[str] | None:
        """What must stand in place of a string; None: itself; nothing: it only named experts that were pruned.

        Args:
            text: The string.
            reading: How its tool reads it.
            in_settings: Whether every pattern where it stands is one of modules.

        Raises:
            Refusal: If it names experts by number, and which ones, or how to name them anew, is not certain.
        """
        if re.search(r"\s", text):
            if re.search(r"\w\.[0-9]+\.\w", text) and self.names.by_number.search(text):
                raise Refusal("names experts by number inside a longer text")
            return None
        if text.startswith(("+:", "-:")):
            reading = Reading.GPTQ_MODEL
        plain = not text.startswith("re:") and reading is not Reading.GPTQ_MODEL
        try:
            if plain and (reading is Reading.AWQ or not SPECIAL.search(text)):
                try:
                    return self.names.renamed(text, reading)
                except LookupError:
                    return self._matching(text, pattern_of(text, reading))
            if plain and reading in (Reading.COMPRESSED_TENSORS, Reading.TORCHAO):
                return None  # a name there, which no module has
            if plain and reading is Reading.NAMES:
                if not in_settings and not self.names.word.search(text):
                    return None  # any text may hold an asterisk
                if not is_glob(text):
                    self._check_unmoved(text)
                    return None
            return self._matching(text, pattern_of(text, reading))
        except re.error as error:
            if self.names.by_number.search(text):
                raise Refusal(f"names experts by number and is no regular expression ({error})") from error
            return None

    def both(self, one: str, other: str, reading: Reading) -> bool:
        """Whether an expert or a part of one is matched by two expressions."""
        masks = [self._own(self._found(text, pattern_of(text, reading).test)) for text in (one, other)]
        return any(a & b for place in masks[0] for a, b in zip(masks[0][place], masks[1][place], strict=True))

    def _check_unmoved(self, text: str) -> None:
        """Raise if the cut makes a difference to an expression that some tools read as a name."""
        for reading in (Reading.GPTQ_MODEL, Reading.AUTO_ROUND):
            if self._matching(text, pattern_of(text, reading)) is not None:
                raise Refusal("is an expression for some tools and a plain name for others; write it after 're:'")

    def _found(self, text: str, test: Test) -> _Matches:
        return _Matches(self.names, self.suffixes, test, text)

    def _own(self, found: _Matches) -> dict[tuple[Place, str], Masks]:
        return {(place, p): found.masks(place, p) for place in self.names.places for p in place.prefixes}

    def _matching(self, text: str, pattern: Pattern) -> list[str] | None:
        found = self._found(text, pattern.test)
        named = self._own(found)
        own = any(map(any, named.values()))
        if own and all(self._unmoved(place, masks) for (place, _), masks in named.items()):
            return None
        spellings = found.spellings()
        if not spellings:
            if self.names.by_number.search(text) and not self._names_others(found):
                raise Refusal("names experts by number, and no such module is known")
            return None
        if all(self._unmoved(place, masks) for spelling in spellings for place, masks in spelling.named.items()):
            return None
        if pattern.regex is not None:
            return self._as_regex(pattern, spellings)
        if not own:
            named = {(place, p): masks for s in spellings for p in s.prefixes for place, masks in s.named.items()}
        return self._as_names(text, pattern, named)

    def _unmoved(self, place: Place, masks: Masks) -> bool:
        return all(masks[new] == masks[old] for new, old in enumerate(self.cut.retained[place.layer]))

    def _names_others(self, found: _Matches) -> bool:
        """Whether a pattern names experts of layers that are not pruned, or of other parts of the model."""
        if self.cut.others is not None:
            return any(map(found.test, self._others))
        known = {place.number for place in self.names.places if not place.kind}
        free = [str(n) for n in range(max(map(int, known), default=0) + 100) if str(n) not in known]
        for place in {(place.before, place.after): place for place in self.names.places}.values():
            heads = [(before, number) for before in PREFIXES for number in free]
            heads += [(f"{part}.{m}", n) for part in OTHER_PARTS for m in ("", "model.") for n in (*known, *free)]
            if any(any(found.masks(place, before, number)) for before, number in heads):
                return True
        return False

    @functools.cached_property
    def _others(self) -> list[str]:
        """Names of all other tensors, and the modules they lie in."""
        names: dict[str, None] = {}
        for name in self.cut.others or ():
            while name and name not in names:
                names[name] = None
                name = name.rpartition(".")[0]
        return list(names)

    @functools.cached_property
    def _any_prefix(self) -> str:
        own = [before for place in self.names.places if not place.kind for before in place.prefixes]
        words = {word for before in (*own, *PREFIXES) for word in before.split(".") if word}
        return rf"(?:{_either(sorted(words))}\.)*"

    def _as_regex(self, pattern: Pattern, spellings: list[_Spelling]) -> list[str]:
        """Expressions for exactly the retained experts; one for all that differ by layer and number alone.

        Modules that are no experts go on being matched by the original expression.
        """
        start = "^" if pattern.anywhere else ""
        bodies = []
        for spelling in spellings:
            prefix = self._any_prefix if spelling.whole else _either([re.escape(p) for p in spelling.prefixes])
            alike: dict[tuple[str, str, tuple[str, ...], int], list[str]] = {}
            for place, masks in spelling.named.items():
                numbers: dict[int, list[str]] = {}
                for new, old in enumerate(self.cut.retained[place.layer]):
                    if masks[old]:
                        numbers.setdefault(masks[old], []).append(str(new))
                for mask, new_numbers in numbers.items():
                    alike.setdefault((place.before, place.after, tuple(new_numbers), mask), []).append(place.number)
            for (before, after, new_numbers_, mask), layers in alike.items():
                where = f"{re.escape(before)}{_either(layers)}{re.escape(after)}{_either(new_numbers_)}"
                bodies.append(f"{start}{prefix}{where}{self.suffixes.regex(mask)}")
        if self.cut.others is None or any(map(pattern.test, self._others)):
            regex = pattern.regex or ""
            flags = re.match(r"(?:\(\?[aiLmsux]+\))?", regex)[0]  # type: ignore[index]
            if "x" in flags:
                raise Refusal("names experts in an expression with comments")
            regex = regex.removeprefix(flags)
            anything = ".*" if pattern.anywhere else ""
            bodies.insert(0, f"{flags}{start}(?!{self._any_expert}){anything}(?:{regex})")
        return [pattern.mark + body for body in bodies]

    @functools.cached_property
    def _any_expert(self) -> str:
        heads: dict[tuple[str, str, str], list[str]] = {}
        for place in self.names.places:
            prefix = _either([re.escape(before) for before in place.prefixes]) if place.kind else self._any_prefix
            heads.setdefault((prefix, place.before, place.after), []).append(place.number)
        either = [f"{p}{re.escape(b)}{_either(layers)}{re.escape(a)}" for (p, b, a), layers in heads.items()]
        return rf"{_either(either)}[0-9]+(?:\.|$)"

    def _as_names(self, text: str, pattern: Pattern, named: Mapping[tuple[Place, str], Masks]) -> list[str]:
        """The retained experts one by one, for globs and parts of names, which know no exceptions."""
        if self.cut.others is None and not self.names.word.search(text):
            raise Refusal("names experts and perhaps other modules as well; name them one by one")
        glob = pattern.mark == "*"
        escape = (lambda name: re.sub(r"([*?\[])", r"[\1]", name)) if glob else str
        names = [
            f"{escape(before + place.before + place.number + place.after)}{new}{suffix}"
            for (place, before), masks in named.items()
            for new, old in enumerate(self.cut.retained[place.layer])
            if masks[old]
            for suffix in (self.suffixes.globs(masks[old]) if glob else self.suffixes.beginnings(masks[old]))
        ]
        return [*names, *(escape(name) for name in self._others if pattern.test(name))]


@dataclass(frozen=True)
class _Spelling:
    """What a pattern matches behind some prefixes.

    Attributes:
        prefixes: These.
        whole: Whether they are all that are known, so that what stands there makes no difference.
        named: What is matched.
    """

    prefixes: list[str]
    whole: bool
    named: dict[Place, Masks]


class _Matches:
    """What one pattern matches.

    Digits that an expression does not hold are all the same to it, so that few of a model's many thousand names have
    to be tried.
    """

    def __init__(self, names: ExpertNames, suffixes: Suffixes, test: Test, text: str) -> None:
        self.names, self.suffixes, self.test = names, suffixes, test
        held = set(re.findall("[0-9]", text))
        for first, last in re.findall(r"([^\\])-([^\]])", text):
            if first.isdigit() and last.isdigit():
                held |= {str(digit) for digit in range(int(first), int(last) + 1)}
            elif first.isdigit() or last.isdigit():
                held |= set("0123456789")
        if re.search(r"\\[0-9xuUN]|\(\?P=|\(\?\(", text):  # characters by code, and what was matched before
            held |= set("0123456789")
        free = [digit for digit in "0123456789" if digit not in held]
        self._alike = str.maketrans({digit: free[0] for digit in free})
        self._seen: dict[str, int] = {}

    def masks(self, place: Place, prefix: str, number: str | None = None) -> Masks:
        """What is matched of the experts of a layer, which may be another one by its number in names."""
        number = (place.number if number is None else number).translate(self._alike)
        head = f"{prefix}{place.before}{number}{place.after}"
        masks = []
        for old in range(self.names.cut.original[place.layer]):
            name = head + str(old).translate(self._alike)
            if name not in self._seen:
                self._seen[name] = self.suffixes.mask(name, self.test)
            masks.append(self._seen[name])
        return tuple(masks)

    def spellings(self) -> list[_Spelling]:
        """What is matched, by what stands before the layers."""
        found = []
        for kind in dict.fromkeys(place.kind for place in self.names.places):
            places = [place for place in self.names.places if place.kind == kind]
            prefixes = dict.fromkeys(p for place in places for p in place.prefixes)
            prefixes |= {} if kind else dict.fromkeys(PREFIXES)
            groups: dict[tuple[Masks, ...], list[str]] = {}
            for prefix in prefixes:
                groups.setdefault(tuple(self.masks(place, prefix) for place in places), []).append(prefix)
            found += [
                _Spelling(alike, not kind and len(groups) == 1, dict(zip(places, masks, strict=True)))
                for masks, alike in groups.items()
                if any(map(any, masks))
            ]
        return found


class Suffixes:
    """The names at and below an expert, as bits.

    Args:
        parts: What there is below it; None if that is not known.
    """

    def __init__(self, parts: Sequence[str] | None) -> None:
        self.known = parts is not None
        deep: dict[str, dict[str, None]] = {}
        for part in [f"{part}.weight" for part in PARTS] if parts is None else parts:
            top, _, rest = part.partition(".")
            deep.setdefault(top, {})
            if rest:
                deep[top][rest] = None
        self.texts = ["", ".another"]  # it stands for all that could be there
        self.tops: dict[str, tuple[int, ...]] = {}
        for top, rests in deep.items():
            first = len(self.texts)
            self.texts += [f".{top}", f".{top}.another", *(f".{top}.{rest}" for rest in rests)]
            self.tops[f".{top}"] = tuple(range(first, len(self.texts)))

    def mask(self, name: str, test: Test) -> int:
        """Which names are matched."""
        return sum(1 << bit for bit, text in enumerate(self.texts) if test(name + text))

    def regex(self, mask: int) -> str:
        """An expression for what follows an expert's number, up to the end of the name."""
        ends = {(True, True): r"(?:\..*)?", (False, True): r"\..*", (True, False): ""}
        return _either([re.escape(text) + ends[itself, below] for text, itself, below in self._pieces(mask)]) + "$"

    def globs(self, mask: int) -> list[str]:
        """The same as globs."""
        return [text + end for text, itself, below in self._pieces(mask) for end in [""] * itself + [".*"] * below]

    def beginnings(self, mask: int) -> list[str]:
        """The same as beginnings of what follows the number, for modules that have weights."""
        found = [text or "." for text, _, _ in self._pieces(mask)]
        if self.mask("", lambda name: any(text in name for text in found)) | 1 != mask | 1:
            raise Refusal("names parts of experts by the beginnings of their names; name them one by one")
        return found

    def _pieces(self, mask: int) -> list[tuple[str, bool, bool]]:
        """Names below an expert: whether they are meant themselves, and all that is below them."""
        has = [bool(mask >> bit & 1) for bit in range(len(self.texts))]
        if all(has[1:]) or mask == 1:
            return [("", has[0], all(has[1:]))]
        if has[1] and not self.known:
            raise Refusal("names parts of experts; write an expression that names them one by one")
        pieces = [("", True, False)] * has[0]
        for top, (itself, another, *rest) in self.tops.items():
            if all(has[bit] for bit in (another, *rest)):
                pieces.append((top, has[itself], True))
            elif has[another] and not self.known:
                raise Refusal("names tensors of experts; write an expression that names them one by one")
            else:
                pieces += [(self.texts[bit], True, False) for bit in (itself, *rest) if has[bit]]
        return pieces


def _either(texts: Sequence[str]) -> str:
    """An expression for one of several."""
    return texts[0] if len(texts) == 1 else f"(?:{'|'.join(texts)})"
