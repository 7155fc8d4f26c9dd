# SPDX-License-Identifier: Apache-2.0
"""A folder is this package's own only if its marker, read and understood, says so; nothing else is ever replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from optimum_moe_prune import CalibrationStats, PruningPlan, RequestError, Source
from optimum_moe_prune.names import PLAN_NAME, STATS_NAME
from optimum_moe_prune.storage.folders import written_folder
from optimum_moe_prune.storage.outputs import is_output

STATISTICS = Path(__file__).parents[1] / "data" / "statistics_mixtral"
PLAN = PruningPlan("mixtral", 2, "reap", {0: (0, 3), 1: (1, 2)}, {0: 4, 1: 4})

FOREIGN = {
    "somebody else's": '{"mean": 1}',
    "a list": "[]",
    "no JSON": "{",
    "empty": "",
    "not text": "\x00\xff",
    "a version alone": '{"format_version": 1}',
    "other layers": json.dumps({**PLAN.to_dict(), "layers": [1, 2]}),
    "another version": json.dumps({**PLAN.to_dict(), "format_version": "1"}),
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("marker", [STATS_NAME, PLAN_NAME])
@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_what_only_has_the_name_of_an_output_is_not_replaced(marker: str, text: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    (target / marker).write_text(text, encoding="latin-1")
    before = content(target)
    assert not is_output(target)
    with pytest.raises(RequestError, match=rf"is not replaced: .*{marker} .*\. Name another folder"):
        with written_folder(target, overwrite=True):
            pytest.fail("began")
    assert content(target) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("marker", [STATS_NAME, PLAN_NAME])
def test_outputs_are_replaced(marker: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if marker == STATS_NAME:
        shutil.copytree(STATISTICS, target)
    else:
        PLAN.save(target)
    assert is_output(target)
    with written_folder(target, overwrite=True) as output:
        (output / "new").touch()
    assert list(content(target)) == ["new"] and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_output_is_refused_with_the_reason(tmp_path: Path) -> None:
    target = tmp_path / "out"
    CalibrationStats.load(STATISTICS).save(target)
    whole = (target / STATS_NAME).read_text()
    for damaged, reason in (
        (whole[:-9], "cannot be read as JSON"),
        (whole.replace('"kept_tokens"', '"tokens"'), "has no kept_tokens"),
    ):
        (target / STATS_NAME).write_text(damaged)
        with pytest.raises(RequestError, match=rf"is not replaced: .*{STATS_NAME} {reason}"):
            CalibrationStats.load(STATISTICS).save(target, overwrite=True)
        assert (target / "tokens.safetensors").is_file()


def test_an_output_that_was_moved_aside_comes_back_and_nothing_else(tmp_path: Path) -> None:
    moved = tmp_path / ".out.replaced"
    moved.mkdir()
    (moved / STATS_NAME).write_text('{"mean": 1}')
    with written_folder(tmp_path / "out") as output:
        (output / "new").touch()
    assert list(content(moved)) == [STATS_NAME]
    shutil.rmtree(moved)
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(STATISTICS, moved)
    with pytest.raises(RequestError, match="exists and is not empty"), written_folder(tmp_path / "out"):
        pytest.fail("began")
    assert content(tmp_path / "out") == content(STATISTICS) and not moved.exists()


def test_earlier_outputs_inside_a_models_folder_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(STATISTICS, tmp_path / "scores")
    PLAN.save(tmp_path / "pruned")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / STATS_NAME).write_text('{"mean": 1}')
    (tmp_path / "tokenizer.json").touch()
    assert Source(str(tmp_path)).other_files() == ["notes/stats.json", "tokenizer.json"]
