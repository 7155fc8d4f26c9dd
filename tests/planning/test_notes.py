# SPDX-License-Identifier: Apache-2.0
"""What a person must know of a plan: in words once, and as values; of the calibration only where it was read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import softmax_rule
from synthetic import random_statistics

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig, PruningPlan
from optimum_moe_prune.planning import notes
from optimum_moe_prune.planning.build import quiet_plan
from optimum_moe_prune.provenance import without_folders


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return random_statistics(softmax_rule(2), 3, 8)


def with_tokens(stats: CalibrationStats, tokens: dict[int, list[int]]) -> CalibrationStats:
    """Statistics in which so many tokens of the first of three samples reached each expert."""
    layers = dict(stats.layers)
    for index, counts in tokens.items():
        routed = torch.zeros(3, 8, dtype=torch.float64)
        routed[0] = torch.tensor(counts)
        layers[index] = replace(layers[index], tensors={**layers[index].tensors, "routed_tokens": routed})
    return replace(stats, layers=layers)


def planned(stats: CalibrationStats, method: str = "frequency", **settings: Any) -> PruningPlan:
    return quiet_plan(stats, MoEPrunerConfig(method=method, **{"num_experts": 4, **settings}))


def said(plan: PruningPlan, what: str) -> list[str]:
    return [note for note in plan.provenance["notes"] if what in note]


def test_experts_that_no_token_reached_are_named_with_what_became_of_them(stats: CalibrationStats) -> None:
    few = with_tokens(stats, {0: [0, 90, 0, 80, 0, 70, 60, 1], 1: [*range(20, 28)], 2: [50, 60, 0, 70, 80, 90, 9, 10]})
    plan = planned(few, protect={0: (2,)})
    assert plan.retained[0] == (1, 2, 3, 5) and plan.retained[2] == (1, 3, 4, 5)
    assert plan.provenance["findings"] == {
        "unreached": {"0": [0, 2, 4], "2": [2]},
        "few_tokens": {"0": {"7": 1}, "2": {"6": 9}},
    }
    assert plan.provenance["notes"] == [
        "no token of the calibration reached 4 experts (layer 0: 5 of 8 reached; layer 2: 7 of 8 reached), so what "
        "they are for did not show: 3 are removed, 1 stays; more, or more varied, text reaches more",
        "fewer than 10 tokens of the calibration reached 2 experts (layer 0: 1; layer 2: 1), so little is known of "
        "them: 2 are removed, 0 stay",
    ]
    # Shares of domains do not change what was reached.
    weighted = quiet_plan(few, MoEPrunerConfig(method="frequency", num_experts=4), {"a": 1.0, "b": 9.0})
    assert weighted.provenance["findings"]["unreached"] == {"0": [0, 2, 4], "2": [2]}


def test_only_the_worst_layers_are_named(stats: CalibrationStats) -> None:
    layers = {n: stats.layers[n % 3] for n in range(5)}
    wide = with_tokens(replace(stats, layers=layers), {n: [0] * (n + 1) + [50] * (7 - n) for n in range(5)})
    (note,) = said(planned(wide, num_experts=3), "no token")
    assert "(layer 4: 3 of 8 reached; layer 3: 4 of 8 reached; layer 2: 5 of 8 reached; and 2 more layers)" in note


def test_layers_that_stay_whole_and_methods_that_read_nothing_have_nothing_to_say(stats: CalibrationStats) -> None:
    few = with_tokens(stats, {0: [0, 90, 70, 80, 60, 50, 40, 30]})
    assert "unreached" not in planned(few, skip_layers=(0,)).provenance["findings"]
    assert planned(few, "random").provenance["findings"] == {} and not said(planned(few, "random"), "token")
    layers = {
        index: replace(layer, tensors={name: t for name, t in layer.tensors.items() if name != "routed_tokens"})
        for index, layer in few.layers.items()
    }
    assert notes.of_reach(replace(few, layers=layers), {0: (1, 2), 1: (0,), 2: (0,)}) == ({}, ())


def test_how_the_calibration_was_made_is_said(stats: CalibrationStats) -> None:
    made = {
        "calibration_notes": ["domain 'law' has no sample", "2 of 128 samples are left"],
        "dequantised": ["fp8", "int4 packed"],
        "heads_left_out": "no room",
    }
    plan = planned(replace(stats, provenance={**stats.provenance, **made}))
    assert plan.provenance["notes"][-4:] == [
        *made["calibration_notes"],
        "the weights are quantised (fp8, int4 packed): calibrated with the numbers that they stand for",
        "the heads for further tokens were not calibrated: no room",
    ]
    assert not said(planned(replace(stats, provenance=made), "random"), "128")
    for damaged in ("text", 3, None, {"a": 1}):
        assert notes.of_calibration({"calibration_notes": damaged}) == ()


@pytest.mark.parametrize(
    ("name", "revision", "shown"),
    [
        ("/home/anna/secret/mixtral", None, "mixtral"),
        ("/home/anna/secret/mixtral/", None, "mixtral"),
        ("~/models/mine", None, "mine"),
        ("../up/here", None, "here"),
        ("C:\\Users\\anna\\mine", None, "mine"),
        ("a/b/c", None, "c"),
        ("/home/anna/cache", "0123", "cache"),
        ("org/model", "0123", "org/model"),
        ("org/model", None, "org/model"),
        ("gpt", None, "gpt"),
        (None, None, None),
        (7, None, 7),
    ],
)
def test_of_a_folder_its_name_is_kept(name: Any, revision: str | None, shown: Any) -> None:
    facts = {"name_or_path": name, "revision": revision, "top_k": 2}
    assert without_folders(facts) == {**facts, "name_or_path": shown}
    assert without_folders(without_folders(facts)) == without_folders(facts)


def test_a_folder_that_is_there_is_no_id(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_folders({"name_or_path": "org/model", "revision": None})["name_or_path"] == "model"
    assert without_folders({"name_or_path": "org/model", "revision": "0123"})["name_or_path"] == "org/model"
    assert without_folders({"name_or_path": "."})["name_or_path"] == tmp_path.name
