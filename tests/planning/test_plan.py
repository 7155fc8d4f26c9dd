# SPDX-License-Identifier: Apache-2.0
"""Plans as files, as text, compared, and damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from optimum_moe_prune import PruningPlan, RequestError

PLAN = PruningPlan(
    model_type="mixtral",
    top_k=2,
    method="reap",
    retained={0: (0, 3, 5), 10: (1, 2)},
    original_num_experts={0: 8, 10: 4},
    scores={0: (0.5,) * 8},
    config={"method": "reap"},
    provenance={"model": {"fingerprint": "abc"}},
)


def test_a_saved_plan_comes_back(tmp_path: Path) -> None:
    assert PruningPlan.load(PLAN.save(tmp_path / "plan.json")) == PLAN
    assert PLAN.save(tmp_path / "folder").name == "moe_pruning_plan.json"
    assert PruningPlan.load(tmp_path / "folder") == PLAN
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["format_version"] == 1
    assert values["layers"]["10"] == {"original_num_experts": 4, "num_experts": 2, "retained": [1, 2], "scores": None}


def test_what_a_plan_says_of_itself() -> None:
    assert PLAN.num_experts == {0: 3, 10: 2}
    assert PLAN.sparsity == pytest.approx(7 / 12)
    assert PLAN.uniform_num_experts is None
    assert PLAN.summary() == (
        "reap: 5 of 12 experts retained in 2 layers (58% removed)\n  layer  0  3 of 8: 0 3 5\n  layer 10  2 of 4: 1 2"
    )


def test_diff_names_what_only_one_retains() -> None:
    other = PruningPlan.from_dict(edited(layers={"0": {"retained": [0, 4, 5]}}))
    assert PLAN.diff(PLAN) == {}
    assert PLAN.diff(other) == {0: ((3,), (4,))}


def edited(**changes: object) -> dict[str, object]:
    values = copy.deepcopy(PLAN.to_dict())
    for key, change in changes.items():
        if key == "layers" and isinstance(change, dict):
            for layer, entry in change.items():
                values["layers"].setdefault(layer, {}).update(entry)
        else:
            values[key] = change
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2; this package reads up to 1"),
        ({"format_version": "x"}, "format version 'x'"),
        (
            {"layers": {"0": {"retained": [0, 3]}}},
            "layer 0: num_experts is 3, and 2 experts are retained; change both",
        ),
        (
            {"layers": {"0": {"retained": [3, 0, 5]}}},
            "layer 0: retained experts must be distinct integers in rising order",
        ),
        ({"layers": {"0": {"retained": [0, 0, 5]}}}, "distinct integers in rising order"),
        ({"layers": {"0": {"retained": [0, 3, 8]}}}, "layer 0: retained names expert 8, and its experts are 0 to 7"),
        ({"layers": {"0": {"retained": [-1, 3, 5]}}}, "its experts are 0 to 7"),
        ({"layers": {"0": {"retained": ["0", 3, 5]}}}, "rising order|damaged"),
        (
            {"layers": {"0": {"retained": [], "num_experts": 0}}},
            "layer 0: 0 experts are retained, and every token uses 2",
        ),
        (
            {"layers": {"0": {"original_num_experts": 10**15}}},
            "layer 0: the plan's original_num_experts is 1000000000000000",
        ),
        ({"layers": {"-1": {"original_num_experts": 4, "num_experts": 2, "retained": [0, 1]}}}, "names layer -1"),
        ({"layers": {"../x": {"retained": []}}}, "the plan is damaged"),
        ({"layers": {"0": {"scores": [1.0]}}}, "layer 0: scores must be 8 finite numbers"),
        ({"layers": {"0": {"scores": ["a"] * 8}}}, "damaged"),
        ({"layers": []}, "the plan is damaged: it has no layers, as an object"),
        ({"layers": {"00": {"retained": [0, 1]}}}, "'00' is no number of a layer"),
        ({"layers": {"x": {"retained": [0, 1]}}}, "'x' is no number of a layer"),
        ({"layers": {"0": {"retained": None}}}, "layer 0: the plan is damaged: it has no list of retained experts"),
        ({"layers": {"0": {"retained": [-1, 0, 1], "num_experts": 3}}}, "layer 0: retained names expert -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": None}, "top_k is None"),
        ({"format_version": -3}, "format version -3"),
        ({"format_version": True}, "format version True"),
        ({"provenance": {"model": "x"}}, "provenance of the model is damaged"),
        ({"provenance": {"model": {"fingerprint": 5}}}, "provenance of the model is damaged"),
        ({"provenance": {"model": {"router_sketch": [1.0]}}}, "provenance of the model is damaged"),
        ({"provenance": {"model": {"router_sketch": {"0": ["x"]}}}}, "provenance of the model is damaged"),
        ({"provenance": 5}, "the plan is damaged"),
    ],
)
def test_damaged_plans_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PruningPlan.from_dict(edited(**changes))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"format_version": NaN}', "\x00\xff"])
def test_files_that_hold_no_plan_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content, encoding="latin-1")
    with pytest.raises(RequestError, match=r"plan.json (cannot be read as JSON|must hold a JSON object)"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(RequestError, match="does not exist"):
        PruningPlan.load(tmp_path / "none.json")
