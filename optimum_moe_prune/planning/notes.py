# SPDX-License-Identifier: Apache-2.0
"""What a person must know of a choice of experts: one sentence each, and the same as values (``findings``).

Ties, experts that the calibration never reached, and what was done otherwise than asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..methods.limits import spans
from ..methods.selection import Retained, Ties
from ..statistics.stats import CalibrationStats
from ..storage.values import Json

FEW_TOKENS = 10
"""An expert that fewer tokens of the calibration reached is as good as unknown."""

_NAMED = 3  # layers that a sentence names

Found = tuple[Json, tuple[str, ...]]
"""Findings, and notes."""


def of_ties(ties: Ties, num_layers: int, advice: str) -> Found:
    """Where the choice was among equals.

    Args:
        ties: Tied experts, by layer.
        num_layers: Layers in which was chosen.
        advice: What would tell them apart, in words.
    """
    if not ties:
        return {}, ()
    experts = sum(map(len, ties.values()))
    note = (
        f"the choice was among equals in {len(ties)} of {num_layers} layers ({spans(ties)}): {experts} experts are "
        f"equally good there by this method, and only the order of their numbers decided which of them stay; {advice}"
    )
    return {"ties": by_layer(ties)}, (note,)


def of_reach(stats: CalibrationStats, retained: Retained) -> Found:
    """Experts that no token of the calibration reached, or hardly any; of layers that are pruned.

    Args:
        stats: Of the calibration; where they do not hold how many tokens reached an expert, nothing is said.
        retained: What was chosen.
    """
    tokens: dict[int, list[int]] = {}
    for index, layer in stats.layers.items():
        if len(retained.get(index, ())) in (0, layer.num_experts) or "routed_tokens" not in set(layer.tensors):
            continue
        tokens[index] = layer.tensors["routed_tokens"].sum(dim=0).long().tolist()
    never = {index: [e for e, n in enumerate(counts) if n == 0] for index, counts in tokens.items()}
    hardly = {index: {e: n for e, n in enumerate(counts) if 0 < n < FEW_TOKENS} for index, counts in tokens.items()}
    never = {index: experts for index, experts in never.items() if experts}
    hardly = {index: experts for index, experts in hardly.items() if experts}
    findings: Json = {}
    notes = []
    if never:
        findings["unreached"] = by_layer(never)
        named = "; ".join(
            f"layer {index}: {len(tokens[index]) - len(never[index])} of {len(tokens[index])} reached"
            for index in _worst(never)
        )
        notes.append(
            f"no token of the calibration reached {_number(never)} ({named}{_others(never)}), so what they are for "
            f"did not show: {_became(never, retained)}; more, or more varied, text reaches more"
        )
    if hardly:
        findings["few_tokens"] = {str(index): {str(e): n for e, n in found.items()} for index, found in hardly.items()}
        named = "; ".join(f"layer {index}: {len(hardly[index])}" for index in _worst(hardly))
        notes.append(
            f"fewer than {FEW_TOKENS} tokens of the calibration reached {_number(hardly)} ({named}{_others(hardly)}), "
            f"so little is known of them: {_became(hardly, retained)}"
        )
    return findings, tuple(notes)


def of_calibration(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """What is to be said of how a calibration was made: of its texts, its weights, its heads.

    Args:
        provenance: Of the statistics.
    """
    said = provenance.get("calibration_notes")
    notes = [str(note) for note in said] if isinstance(said, (list, tuple)) else []
    if formats := provenance.get("dequantised"):
        named = ", ".join(map(str, formats)) if isinstance(formats, (list, tuple)) else str(formats)
        notes.append(f"the weights are quantised ({named}): calibrated with the numbers that they stand for")
    if why := provenance.get("heads_left_out"):
        notes.append(f"the heads for further tokens were not calibrated: {why}")
    return tuple(notes)


def by_layer(found: Mapping[int, Iterable[int]]) -> Json:
    """Experts by layer as plain JSON values."""
    return {str(index): list(experts) for index, experts in found.items()}


def _worst(found: Mapping[int, Any]) -> list[int]:
    """The layers with the most experts of those found, most first."""
    return sorted(found, key=lambda index: (-len(found[index]), index))[:_NAMED]


def _others(found: Mapping[int, Any]) -> str:
    more = len(found) - _NAMED
    return f"; and {more} more layer{'s' if more > 1 else ''}" if more > 0 else ""


def _number(found: Mapping[int, Any]) -> str:
    count = sum(map(len, found.values()))
    return f"{count} expert{'s' if count > 1 else ''}"


def _became(found: Mapping[int, Iterable[int]], retained: Retained) -> str:
    """How many of some experts are removed, and how many stay."""
    kept = sum(expert in retained[index] for index, experts in found.items() for expert in experts)
    removed = sum(len(list(experts)) for experts in found.values()) - kept
    return f"{removed} {'are' if removed != 1 else 'is'} removed, {kept} {'stay' if kept != 1 else 'stays'}"
