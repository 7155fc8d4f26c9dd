# SPDX-License-Identifier: Apache-2.0
"""The model that an adapter was trained on: its config, and whether it is the one that a plan was made for."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ...architectures.fingerprint import same_routers
from ...architectures.substitution import check_whole
from ...architectures.table import architecture_of
from ...checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE
from ...checkpoints.layout import open_layout
from ...checkpoints.source import Source
from ...compat import ModelConfig
from ...errors import RequestError
from ...plan import PruningPlan
from ...storage.values import Json
from ...surgery.checks import check_found, check_plan_for_config, check_routers, check_unequal
from ...surgery.config_json import write_counts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Original:
    """The model that an adapter was trained on.

    Attributes:
        name: Its folder or Hub id.
        config: Its config.
        pruned_config: That of the model that the plan makes of it.
        pruned: The folder or Hub id of that one, where it was named.
        trust_remote_code: Whether code that comes with it may run.
        proof: How it is known to be the plan's; empty where it is not.
    """

    name: str
    config: ModelConfig
    pruned_config: ModelConfig
    pruned: str | None
    trust_remote_code: bool
    proof: str


def original_of(plan: PruningPlan, settings: Json, given: Source | str | os.PathLike | None, hub: Json) -> Original:
    """The model that an adapter was trained on: the one that is named, else that of its settings, else the plan's.

    Whoever has only the pruned model names that: its config and the plan say what the original's was.

    Args:
        plan: The plan.
        settings: ``adapter_config.json``.
        given: The model's folder or Hub id, or that of the pruned one.
        hub: How others are reached (``Source``).

    Raises:
        RequestError: If none can be reached, or it is not the one that the plan was made for.
    """
    own = settings.get("base_model_name_or_path")
    if given is not None:
        found = _opened(plan, Source.of(given, **hub))
        if found.pruned and own and Path(own).is_dir() and _proof(plan, Source.of(own)):
            return replace(found, name=own)
        return found
    said = [Source.of(str(own), **{**hub, "revision": settings.get("revision")})] if own else []
    planned = plan.made_for.get("name_or_path")
    if planned and "/" not in str(planned) and not Path(planned).is_dir():  # a folder's name, which is no id
        planned = None
    said += [Source.of(str(planned), **{**hub, "revision": plan.made_for.get("revision")})] if planned else []
    for source in said:
        if _is_there(source):
            return _opened(plan, source)
    named = " and ".join(dict.fromkeys(source.name_or_path for source in said)) or "none is named"
    raise RequestError(
        f"the adapter's original cannot be read here ({named}), whose config says which tensors hold experts; name "
        "it, or the pruned model (base_model=...)."
    )


def _is_there(source: Source) -> bool:
    """Whether a model's config can be had."""
    try:
        return source.find("config.json") is not None
    except Exception as error:  # what the Hub says of a name that is none, or is not reached
        logger.info("%s cannot be read: %s", source.name_or_path, error)
        return False


def _opened(plan: PruningPlan, source: Source) -> Original:
    config, name, pruned = source.config, source.name_or_path, None
    check_whole(config, name)
    spec = architecture_of(config)
    stored = source.stored_plan()
    if stored is not None and stored.without_heads.retained == plan.without_heads.retained:
        pruned, proof = name, "its pruned model was named"
        if not same_routers(stored.made_for, plan.made_for):
            raise RequestError(f"{name} was pruned by another plan: one made for a model with other router weights.")
        config = copy.deepcopy(config)
        write_counts(spec, config, plan.without_heads.original_num_experts)
    try:
        check_plan_for_config(plan, config)
    except RequestError as error:
        raise RequestError(f"{name}, which the adapter is for: {error}") from error
    uniform = plan.uniform_num_experts is not None
    check_found(spec, uniform)
    if not uniform:
        check_unequal(spec, config, plan.without_heads.original_num_experts)
    if pruned is None:
        proof = _proof(plan, source)
    after = copy.deepcopy(config)
    write_counts(spec, after, plan.without_heads.num_experts)
    return Original(name, config, after, pruned, source.trust_remote_code, proof)


def _proof(plan: PruningPlan, source: Source) -> str:
    """How it is known that an original is the one a plan was made for; empty where it is not.

    Raises:
        RequestError: If its routers are others.
    """
    if source.is_local and any(source.find(file) for file in (SINGLE_FILE, INDEX_FILE)):
        if "fingerprint" not in plan.made_for:
            return ""
        check_routers(plan, open_layout(source).fingerprints())
        return "its routers are those of the plan"
    planned, revision = plan.made_for.get("name_or_path"), plan.made_for.get("revision")
    same = source.name_or_path == planned and (None in (revision, commit := source.commit()) or revision == commit)
    return "the plan names it" if same else ""


def doubt(plan: PruningPlan, settings: Json, original: Original) -> str | None:
    """What a person must know where it is not proven that an adapter and a plan are for the same model."""
    own, planned = settings.get("base_model_name_or_path"), plan.made_for.get("name_or_path")
    if not original.proof:
        return (
            f"it is not proven that the adapter's original ({own or original.name}) is the plan's model "
            f"({planned or 'unnamed'}): only counts and shapes are compared. Name its folder (base_model=...), and "
            "its routers are."
        )
    if own is None or own in (original.name, original.pruned, planned):
        return None
    meant = f"{original.name} was made of that" if original.pruned else f"that is {original.name}, the plan's model"
    return (
        f"the adapter says that it was trained on {own}; it is not proven that {meant}: only counts and shapes are "
        "compared."
    )
