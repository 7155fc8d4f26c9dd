# SPDX-License-Identifier: Apache-2.0
"""What differs between unfinished work and what is asked for, in words a person used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_texts

from optimum_moe_prune import CalibrationSet
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.storage.differences import differences
from optimum_moe_prune.storage.growing import Store
from optimum_moe_prune.storage.kept import Kept, kept_beside, kept_sentence

OF: dict[str, Any] = {
    "model": {"name": "/m", "fingerprint": "f0", "config.json": {"bytes": 3}, "model.safetensors": {"bytes": 9}},
    "calibration": "c0",
    "samples": "c0",
    "plans": "12 with hash p0",
    "needs": ["gram", "routing"],
    "batch_size": 8,
    "versions": {"torch": "2.8", "transformers": "5.23"},
}
SETTINGS: dict[str, Any] = {
    "calibration": {"num_samples": 10, "num_clusters": None, "seed": 0, "files": {"a.jsonl": "1", "b.txt": "2"}},
    "needs": {"method": "mosaic", "method_options": {}},
}


def changed(**values: Any) -> dict[str, Any]:
    return {**OF, **values}


def settings(**values: Any) -> dict[str, Any]:
    return {**SETTINGS, "calibration": {**SETTINGS["calibration"], **values}}


@pytest.mark.parametrize(
    ("now", "settings_now", "said"),
    [
        (OF, settings(num_samples=12), []),  # the samples are the same
        (changed(calibration="c1"), settings(num_samples=12), ["num_samples is 10 there and 12 now"]),
        (
            changed(calibration="c1", samples="c1", plans="9 with hash", batch_size=4),
            settings(num_clusters=4, seed=1),
            [
                "batch_size is 8 there and 4 now",
                "num_clusters is not set there and 4 now",
                "seed is 0 there and 1 now",
            ],
        ),
        (
            changed(calibration="c1"),
            settings(files={"a.jsonl": "1", "b.txt": "3"}),
            ["the calibration texts differ (b.txt changed)"],
        ),
        (
            changed(calibration="c1"),
            settings(files={"c.jsonl": "1"}),
            ["the calibration texts are a.jsonl, b.txt there and c.jsonl now"],
        ),
        (changed(calibration="c1"), SETTINGS, ["the calibration samples are others"]),
        (
            changed(calibration="c1", plans="9"),
            {},
            ["the calibration samples are others", "the plans to measure are others"],
        ),
        (
            changed(needs=["routing"]),
            {**SETTINGS, "needs": {"method": "reap", "method_options": {}}},
            ["method is mosaic there and reap now"],
        ),
        (
            changed(needs=["routing"]),
            {**SETTINGS, "needs": {"method": "mosaic", "method_options": {"num_generalists": 0}}},
            ["method_options is none there and num_generalists=0 now"],
        ),
        (changed(needs=["routing"]), {}, ["needs is gram, routing there and routing now"]),
        (
            changed(versions={"torch": "2.8", "transformers": "5.24"}),
            SETTINGS,
            ["transformers is 5.23 there and 5.24 now"],
        ),
        (
            changed(model={**OF["model"], "name": "/n", "fingerprint": "f1", "config.json": {"bytes": 4}}),
            SETTINGS,
            ["the model is /m there and /n now"],
        ),
        (
            changed(model={**OF["model"], "fingerprint": "f1", "model.safetensors": {"bytes": 8}}),
            SETTINGS,
            ["model.safetensors of the model was changed"],
        ),
        (
            changed(model={"name": "/m", "config.json": {"bytes": 3}, "model-1.safetensors": {"bytes": 9}}),
            SETTINGS,
            ["model-1.safetensors of the model is new", "model.safetensors of the model is gone"],
        ),
        (changed(model={**OF["model"], "fingerprint": "f1"}), SETTINGS, ["the model's weights are others"]),
    ],
)
def test_settings_are_named_and_hashes_are_not(
    now: dict[str, Any], settings_now: dict[str, Any], said: list[str]
) -> None:
    assert differences(OF, now, SETTINGS, settings_now) == said


def test_a_revision_is_named() -> None:
    of = {"model": {"name": "me/model", "commit": "abc"}}
    now = {"model": {"name": "me/model", "commit": "def"}}
    assert differences(of, now, {}, {}) == ["the model's revision is abc there and def now"]


def test_damaged_settings_are_passed_over() -> None:
    assert differences(OF, changed(calibration="c1"), {"calibration": [1]}, SETTINGS) == [
        "the calibration samples are others"
    ]


# ------------------------------------------------------------------------------------------- the folder


def begun(folder: Path, finished: int, steps: int = 24, what: str = "calibration", **values: Any) -> Store:
    store = Store(folder, {**OF, **values}, what=what, settings=SETTINGS)
    store.check_steps(steps, "layer")
    store.tensors("a", {"x": ((1,), torch.float32)})
    if finished:
        store.commit(finished)
    return store


def test_continuing_says_from_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "kept"
    begun(folder, 0)
    assert not caplog.messages
    begun(folder, 7)
    begun(folder, 24)
    begun(folder, 24)
    assert caplog.messages == [
        f"continuing the unfinished calibration in {folder}: 7 of 24 layers are done.",
        f"the calibration in {folder} is finished: none of 24 layers is done again.",
    ]


def test_other_versions_are_told_how_to_go_on(tmp_path: Path) -> None:
    begun(tmp_path / "kept", 1)
    with pytest.raises(RequestError, match=r"torch is 2\.8 there and 2\.9 now; transformers .* with the versions it"):
        begun(tmp_path / "kept", 1, versions={"torch": "2.9"})


def test_unfinished_work_without_settings(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept", OF)
    store.check_steps(24, "layer")
    store.commit(1)
    with pytest.raises(RequestError, match="else: the calibration samples are others"):
        begun(tmp_path / "kept", 1, calibration="c1")
    begun(tmp_path / "kept", 1)


def test_what_is_kept_beside_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kept_beside("out") == []
    partial = tmp_path / ".out.partial"
    begun(partial / "sensitivity" / "layers", 3, 10, "measurement")
    begun(partial / "calibration", 24)
    begun(partial / "sensitivity" / "models", 0)
    (partial / "damaged").mkdir()
    (partial / "damaged" / "progress.json").write_text("{")
    kept = kept_beside("out")
    assert kept == [Kept("calibration", 24, 24, "layer"), Kept("measurement", 3, 10, "layer")]
    assert kept_sentence(kept, "out") == (
        "the whole calibration (24 layers) and 3 of 10 layers of the measurement are kept in .out.partial"
    )
    assert kept_sentence(kept[:1], tmp_path / "out") == f"the whole calibration (24 layers) is kept in {partial}"


# ------------------------------------------------------------------------------------------- samples


def test_samples_know_what_they_follow_from(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, make_texts(6))))
    samples = CalibrationSet.build(path, tokenizer, num_samples=4, max_length=30, seed=2)
    assert samples.settings["num_samples"] == 4 and samples.settings["max_length"] == 30
    assert list(samples.settings["files"]) == ["c.jsonl"]
    path.write_text(path.read_text().replace("w1", "w2"))
    again = CalibrationSet.build(path, tokenizer, num_samples=4, max_length=30, seed=2)
    assert again.settings["files"] != samples.settings["files"]
    assert {**again.settings, "files": 0} == {**samples.settings, "files": 0}
    assert again.take(2).settings == {**again.settings, "sensitivity_samples": 2}
    assert CalibrationSet.build(["w1 w2", "w3 w4"], tokenizer).settings["files"] == {}
