# SPDX-License-Identifier: Apache-2.0
"""Calibrations on the Hub by name: what people prune and quantise with, each with its source and its licence.

Each dataset of a preset is a domain, and samples are taken in equal shares of the domains. Licences are those that the
datasets' cards gave when this was written; look at the card before you publish.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError, nearest_first

PREFIX = "preset:"


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture.

    Attributes:
        name: Its id on the Hub.
        config: Its configuration, where it has several.
        split: The split.
        count: Among how many of its first rows samples are chosen.
        domain: The domain of its rows where they do not say one; by default its id.
        licence: Its licence, where it is known.
    """

    name: str
    config: str | None = None
    split: str = "train"
    count: int | None = None
    domain: str = ""
    licence: str = ""

    @property
    def spec(self) -> str:
        """As a mixture writes it: ``name[config](split)``."""
        return f"{self.name}{f'[{self.config}]' if self.config else ''}({self.split})"


@dataclass(frozen=True)
class Preset:
    """A calibration by name.

    Attributes:
        summary: What it is for.
        parts: Its datasets, in equal shares.
    """

    summary: str
    parts: tuple[Part, ...]


def _part(domain: str, name: str, licence: str, config: str | None = None, split: str = "train") -> Part:
    return Part(name, config, split, domain=domain, licence=licence)


_C4 = _part("web", "allenai/c4", "ODC-BY", "en")
_TULU = _part("instructions", "allenai/tulu-3-sft-mixture", "ODC-BY; parts have their own")
_CODE = _part("code", "theblackcat102/evol-codealpaca-v1", "Apache-2.0")
_MATH = _part("math", "open-r1/OpenR1-Math-220k", "Apache-2.0")
_CALLS = _part("tools", "Salesforce/xlam-function-calling-60k", "CC-BY-4.0; to be accepted on the Hub first")
_AGENTS = _part("agents", "SWE-bench/SWE-smith-trajectories", "MIT", split="tool")
_LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "ja", "pt", "ru", "zh")

PRESETS: dict[str, Preset] = {
    "general": Preset(
        "web text, instructions, code, mathematics and other languages",
        (
            _C4,
            _TULU,
            _CODE,
            _MATH,
            _part("languages", "CohereLabs/aya_dataset", "Apache-2.0"),
        ),
    ),
    "agentic": Preset("code, mathematics, calls of tools and work on repositories", (_CODE, _MATH, _CALLS, _AGENTS)),
    "reap": Preset(
        "the mixture that REAP (arXiv 2510.13999) is used with: code, reasoning, calls of tools, work on repositories",
        (
            _CODE,
            *(_part(f"reasoning-{c}", "open-r1/Mixture-of-Thoughts", "see its card", c) for c in ("code", "math")),
            _part("reasoning-science", "open-r1/Mixture-of-Thoughts", "see its card", "science"),
            _CALLS,
            _AGENTS,
        ),
    ),
    "c4": Preset("English web text, as in most papers on pruning and quantisation", (_C4,)),
    "wikitext": Preset(
        "English Wikipedia, as GPTQ uses it; many short lines, so pack it",
        (_part("wikitext", "Salesforce/wikitext", "CC-BY-SA-3.0 and GFDL", "wikitext-2-raw-v1"),),
    ),
    "multilingual": Preset(
        "Wikipedia in ten languages, each a domain",
        tuple(_part(code, "wikimedia/wikipedia", "CC-BY-SA-3.0 and GFDL", f"20231101.{code}") for code in _LANGUAGES),
    ),
    "tulu": Preset("instructions of many kinds, as chats", (_TULU,)),
    "ultrachat": Preset(
        "chats, as llm-compressor uses them",
        (_part("chat", "HuggingFaceH4/ultrachat_200k", "MIT", split="train_sft"),),
    ),
    "platypus": Preset(
        "questions of science and logic, with answers",
        (_part("reasoning", "garage-bAInd/Open-Platypus", "parts have their own; see its card"),),
    ),
    "code": Preset("instructions about code, as REAP uses them", (_CODE,)),
    "math": Preset("mathematics with long reasoning", (_MATH,)),
    "tools": Preset("calls of tools", (_CALLS,)),
    "agents": Preset("software agents at work on repositories", (_AGENTS,)),
}


def preset_parts(text: str) -> list[Part]:
    """The datasets of ``preset:NAME``, or of ``preset:NAME:ROWS``, which says how many rows to read of each.

    Raises:
        RequestError: If there is none of this name.
    """
    name, colon, count = text.removeprefix(PREFIX).partition(":")
    if name not in PRESETS:
        raise RequestError(f"there is no preset {name!r}. Known: {nearest_first(name, [*PRESETS])}.")
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise RequestError(f"{text!r} is not of the form preset:NAME or preset:NAME:ROWS.")
    return [
        Part(p.name, p.config, p.split, int(count) if colon else None, p.domain, p.licence)
        for p in PRESETS[name].parts
    ]
