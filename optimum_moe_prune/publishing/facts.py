# SPDX-License-Identifier: Apache-2.0
"""What a card says of the original beyond its files: its id on the Hub, its licence, its languages.

A model from the Hub knows its id, and its own card the rest; of a folder of one's own a person says them
(``--base-model``, ``--license``, ``--language``). They are kept in the plan, so that a card can be made anew.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import RequestError
from ..plan import PruningPlan
from ..provenance import is_folder, without_folders
from ..storage.values import Json
from .plain import mapping

logger = logging.getLogger(__name__)

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LICENSES = (
    "apache-2.0 mit bsd-3-clause gpl-2.0 gpl-3.0 agpl-3.0 lgpl-3.0 mpl-2.0 cc0-1.0 cc-by-4.0 cc-by-sa-4.0 "
    "cc-by-nc-4.0 cc-by-nc-sa-4.0 openrail bigscience-openrail-m llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma"
).split()
"""Those that a message may suggest; the Hub knows more."""
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_KEY = "card"  # in a plan's provenance


@dataclass(frozen=True)
class CardFacts:
    """What a person says of the original.

    Attributes:
        base_model: Its id on the Hub.
        license: Of the Hub's ids of licences, as ``apache-2.0``, ``other``.
        language: One or more codes, as ``en``.
    """

    base_model: str | None = None
    license: str | None = None
    language: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        languages = (self.language,) if isinstance(self.language, str) else tuple(self.language or ())
        object.__setattr__(self, "language", languages)
        if self.base_model is not None and (why := _no_hub_id(self.base_model)):
            raise RequestError(
                f"base_model is {self.base_model!r}; it must be the original's id on the Hub, as "
                f"mistralai/Mixtral-8x7B-v0.1: {why}."
            )
        if self.license is not None and not _fits(_LICENSE, self.license):
            (meant,) = difflib.get_close_matches(str(self.license).lower(), _LICENSES, 1, 0.0)
            raise RequestError(
                f"license is {self.license!r}; it must be one of the Hub's ids of licences, in lower case, as "
                f"{meant}; or other."
            )
        for code in languages:
            if not _fits(_LANGUAGE, code):
                raise RequestError(
                    f"language is {code!r}; it must be a code of two or three letters, as en, or several, each by "
                    "itself; or code, or multilingual."
                )

    @classmethod
    def taken(cls, options: dict[str, Any]) -> CardFacts:
        """Those of some options, which are taken out of these."""
        return cls(**{name: options.pop(name) for name in ("base_model", "license", "language") if name in options})

    def to_dict(self) -> Json:
        """As plain JSON values; what was not said is absent."""
        values = {"base_model": self.base_model, "license": self.license, "language": [*(self.language or ())]}
        return {name: value for name, value in values.items() if value}


def to_publish(plan: PruningPlan, facts: CardFacts | None = None) -> PruningPlan:
    """A plan as it is put into a checkpoint: with what was said of the original, and without paths of this machine."""
    said = {**mapping(plan.provenance.get(_KEY)), **(facts.to_dict() if facts else {})}
    provenance = _without_paths(plan.provenance)
    return replace(plan, provenance={**provenance, _KEY: said} if said else provenance)


def _without_paths(provenance: Json) -> Json:
    """Of earlier plans as well."""
    changed: Json = {}
    if isinstance(model := provenance.get("model"), dict):
        changed["model"] = without_folders(model)
    parent = mapping(provenance.get("parent"))
    if isinstance(before := parent.get("provenance"), dict):
        changed["parent"] = {**parent, "provenance": _without_paths(before)}
    return {**provenance, **changed}


@dataclass(frozen=True)
class Origin:
    """Where a pruned model comes from, as far as others can know it.

    Attributes:
        base_model: The id on the Hub of the model that was pruned; None where it is not known.
        revision: Its commit, where it came from there.
        first_model: The same of the nearest model that is on the Hub, where a pruned one was pruned again.
        license: That a person said.
        languages: The same.
    """

    base_model: str | None
    revision: str | None
    first_model: str | None
    license: str | None
    languages: tuple[str, ...]


def origin_of(plan: PruningPlan) -> Origin:
    """What a plan and those before it know of the original. What is damaged in them is left out, with a warning."""
    base_model: str | None = None
    revision: str | None = None
    first_model: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    for number, provenance in enumerate(_chain(plan.provenance)):
        model, said = mapping(provenance.get("model")), _said(provenance)
        commit, name = model.get("revision"), model.get("name_or_path")
        published = str(name) if commit and not _no_hub_id(name) else None
        known = said.base_model or published
        if number == 0:
            base_model, revision = known, str(commit) if published and known == published else None
        first_model, license = first_model or known, license or said.license
        languages = languages or tuple(said.language or ())
    return Origin(base_model, revision, first_model, license, languages)


def names_of(plan: PruningPlan) -> Iterator[str]:
    """What the models may be called on the Hub that a plan, and those before it, were made for."""
    for provenance in _chain(plan.provenance):
        model = mapping(provenance.get("model"))
        name, said = model.get("name_or_path"), mapping(provenance.get(_KEY)).get("base_model")
        if isinstance(name, str) and ("/" in name or model.get("revision")):  # else it is the name of a folder
            yield name
        if isinstance(said, str):
            yield said


def _chain(provenance: Any) -> Iterator[Json]:
    """The provenance of a plan, and of those before it."""
    while isinstance(provenance, dict):
        yield provenance
        provenance = mapping(provenance.get("parent")).get("provenance")


def _said(provenance: Mapping[str, Any]) -> CardFacts:
    """What a person said, of a plan; nothing where that is damaged."""
    try:
        return CardFacts.taken(dict(mapping(provenance.get(_KEY))))
    except (RequestError, TypeError) as error:
        logger.warning("what the plan says for the card is left out: %s", error)
        return CardFacts()


def _no_hub_id(name: object) -> str:
    """Why a name is no id on the Hub; empty where it can be one."""
    if not isinstance(name, str):
        return "it is no text"
    if is_folder(name, revision=True):
        return "this is a path or an address"
    if "/" not in name and os.path.isdir(name):
        return "there is a folder of that name here"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error).splitlines()[0].rstrip(".")
    return ""


def _fits(pattern: re.Pattern[str], text: object) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None
