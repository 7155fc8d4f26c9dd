# SPDX-License-Identifier: Apache-2.0
"""Text that was calibrated on is known again: cut elsewhere, packed, through statistics, plans and parents."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPruner, MoEPrunerConfig, PruningPlan, compare
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.evaluation.comparison import Comparison, ModelResult
from optimum_moe_prune.evaluation.losses import Evaluation
from optimum_moe_prune.evaluation.overlap import CALIBRATED_ON, HELD_OUT, PARTLY, UNKNOWN, Overlap, overlap_of
from optimum_moe_prune.statistics.passages import KEY, Passages
from optimum_moe_prune.statistics.stats import Need

RECIPE = MoEPrunerConfig(method="frequency", num_experts=6)


def texts(count: int, seed: int = 0, words: int = 50, domain: str = "d") -> list[dict[str, str]]:
    rng = random.Random(seed)
    every = [" ".join(f"w{rng.randrange(93)}" for _ in range(words)) for _ in range(count)]
    return [{"text": text, "domain": domain} for text in every]


def built(records: list[dict[str, str]], **settings: Any) -> CalibrationSet:
    return CalibrationSet.build(records, make_tokenizer(), **settings)


def plan_of(samples: CalibrationSet, recipe: MoEPrunerConfig = RECIPE) -> PruningPlan:
    stats = collect(make_model(), samples, {Need.ROUTING})
    return MoEPruner(recipe).plan(stats)


@pytest.mark.parametrize("cut", [8, 20, 2048])
@pytest.mark.parametrize("judged", [30, 2048])
def test_cut_elsewhere_it_is_known(cut: int, judged: int) -> None:
    seen, other = texts(8), texts(12, seed=1)
    found = overlap_of(plan_of(built(seen, max_length=cut)), built(seen[:5] + other, max_length=judged))
    assert (found.calibrated_on, found.samples, found.is_complete, found.kind) == (5, 17, True, PARTLY)
    every = overlap_of(plan_of(built(seen, max_length=cut)), built(seen, max_length=judged))
    assert every.kind == CALIBRATED_ON and every.sentence().startswith("8 of 8 evaluation samples were calibrated on")
    none = overlap_of(plan_of(built(seen, max_length=cut)), built(other, max_length=judged))
    assert (none.calibrated_on, none.kind, none.sentence()) == (0, HELD_OUT, "")


def test_packed_it_is_known() -> None:
    seen = texts(10)
    packed = built(seen, max_length=30, pack=True)
    assert overlap_of(plan_of(packed), built(seen + texts(10, seed=1))).calibrated_on == 10


def test_in_another_domain_and_after_json_it_is_known() -> None:
    plan = PruningPlan.from_dict(json.loads(json.dumps(plan_of(built(texts(6))).to_dict())))
    moved = [{**record, "domain": name} for record, name in zip(texts(6), "aabbbb", strict=True)]
    found = overlap_of(plan, built([*moved, *texts(3, seed=1)]))
    assert found.domains == {"a": 2, "b": 4}
    assert "6 of 9 evaluation samples were calibrated on (a 2, b 4): on other text" in found.sentence()
    assert Overlap.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_stands_everywhere_is_no_sign() -> None:
    """A system prompt longer than what follows it."""
    prompt = texts(1, seed=5, words=40)[0]["text"]
    seen, other = ([{"text": f"{prompt} {t['text']}"} for t in texts(10, seed, words=20)] for seed in (1, 2))
    assert overlap_of(plan_of(built(seen)), built(other)).calibrated_on == 0
    assert overlap_of(plan_of(built(seen)), built([*other, seen[3]], max_length=55)).calibrated_on == 1


def test_merged_statistics_and_earlier_plans_count() -> None:
    first, second, parent, measured, other = (built(texts(4, seed)) for seed in range(5))
    parts = [collect(make_model(), samples, {Need.ROUTING}) for samples in (first, second)]
    plan = MoEPruner(RECIPE).plan(parts[0].merge(parts[1]))
    earlier = plan_of(parent).to_dict()
    sensitivity = {KEY: measured.passages.to_dict()}
    plan = replace(plan, provenance={**plan.provenance, "parent": earlier, "sensitivity": sensitivity})
    judged = [record for seed in range(5) for record in texts(4, seed)]
    assert overlap_of(plan, built(judged)).calibrated_on == 16
    assert overlap_of(plan, other).kind == HELD_OUT


def test_earlier_versions_and_damage_leave_it_unknown(tmp_path: Path) -> None:
    samples, other = built(texts(6)), built(texts(6, seed=1))
    stats = collect(make_model(), samples, {Need.ROUTING})
    before = {key: value for key, value in stats.provenance.items() if key != KEY}
    old = MoEPruner(RECIPE).plan(replace(stats, provenance=before))  # hashes of whole samples are all there is
    assert overlap_of(old, samples).calibrated_on == 6 and overlap_of(old, other).kind == HELD_OUT
    calibration = {key: value for key, value in old.provenance["calibration"].items() if key != KEY}
    older = replace(old, provenance={**old.provenance, "calibration": calibration})
    found = overlap_of(older, samples)
    assert (found.kind, found.calibrated_on) == (UNKNOWN, 0) and "is not known: its plan" in found.sentence()
    child = replace(plan_of(other), provenance={**plan_of(other).provenance, "parent": older.to_dict()})
    assert overlap_of(child, samples).kind == UNKNOWN and overlap_of(child, other).kind == CALIBRATED_ON
    good = samples.passages.to_dict()
    for damaged in (None, [], "x", {}, {**good, "hashes": "?"}, {**good, "hashes": "AAA="}, {**good, "one_in": 0}):
        broken = {**old.provenance, "calibration": {**calibration, KEY: damaged}}
        assert overlap_of(replace(old, provenance=broken), samples).kind == UNKNOWN, damaged
    nothing = MoEPruner(MoEPrunerConfig(method="random", num_experts=6)).plan(stats)
    assert overlap_of(None, samples) is None
    empty = {"calibration": {"samples": 0}}
    assert overlap_of(replace(nothing, provenance=empty), samples).kind == HELD_OUT


def test_little_is_remembered_of_much() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5000, (300, 512), generator=generator)
    seen = CalibrationSet.build(ids)
    kept = seen.passages
    assert 4096 <= len(kept.hashes) <= 8192 and len(json.dumps(kept.to_dict())) < 48_000
    again = Passages.from_dict(json.loads(json.dumps(kept.to_dict())))
    cut = CalibrationSet.build([*ids[:50, :400], *torch.randint(5000, (50, 400), generator=generator)])
    assert sum(again.known(cut.token_ids)) == 50


def test_folders_say_what_they_were_calibrated_on(tmp_path: Path) -> None:
    base = tmp_path / "model"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    seen, second, fresh = texts(9), texts(9, seed=1), texts(9, seed=2)
    MoEPruner.from_pretrained(base, RECIPE).prune_checkpoint(tmp_path / "a", calibration=seen)
    smaller = MoEPrunerConfig(method="frequency", num_experts=4)
    MoEPruner.from_pretrained(tmp_path / "a", smaller).prune_checkpoint(tmp_path / "b", calibration=second)
    found = compare([tmp_path / "a", tmp_path / "b"], seen[:4] + fresh, reference=base)
    assert [found.models[name].overlap.calibrated_on for name in "ab"] == [4, 4]
    assert found.models["model"].overlap is None and found.text_kind == PARTLY
    assert found.summary().count("4 of 13 evaluation samples were calibrated on") == 1
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    mixed = compare([tmp_path / "a", tmp_path / "b"], second, reference=base)
    assert [mixed.models[name].overlap.kind for name in "ab"] == [HELD_OUT, CALIBRATED_ON]
    assert (
        mixed.text_kind == CALIBRATED_ON and "9 of 9 evaluation samples were calibrated on for b:" in mixed.verdict()
    )
    held = compare(tmp_path / "b", fresh, reference=base)
    assert held.text_kind == HELD_OUT and "calibrated on" not in held.summary()
    assert compare(base, seen).text_kind == HELD_OUT, "of a model that was not pruned"


def test_a_plan_from_saved_statistics_knows_as_well(tmp_path: Path) -> None:
    samples = built(texts(6))
    collect(make_model(), samples, {Need.ROUTING}).save(tmp_path / "stats")
    plan = MoEPruner(RECIPE).plan(CalibrationStats.load(tmp_path / "stats"))
    assert overlap_of(plan, built(texts(6), max_length=30)).calibrated_on == 6


def test_results_of_the_text_are_kept_with_it() -> None:
    overlap = Overlap(4, 2, {"d": 2})
    old = Comparison({"m": ModelResult(Evaluation({}), overlap=overlap)})
    assert old.updated(copy.deepcopy(Comparison({"m": ModelResult(parameters=3)}))).models["m"].overlap == overlap
