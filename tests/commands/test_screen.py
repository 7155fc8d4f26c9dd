# SPDX-License-Identifier: Apache-2.0
"""What ``run``, ``apply`` and ``plan`` print: in order, each thing once, and with ``--json`` the same as values."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import load, make_texts, make_tokenizer, save_checkpoint
from huggingface_hub import ModelCard
from oracles import call

from optimum_moe_prune import PruningPlan
from optimum_moe_prune.commands import screen
from optimum_moe_prune.names import NOTES_LOGGER


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("screen")
    save_checkpoint("mixtral", place / "model", make_tokenizer())
    (place / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in make_texts(10)))
    return place


def test_a_run_says_what_a_person_must_know(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", "--model", place / "model", "--calibration", place / "texts.jsonl", "--method", "mosaic")
    code, out, err = call(capsys, *run, "--sparsity", 0.4, tmp_path / "out")
    plan, output = PruningPlan.load(tmp_path / "out"), tmp_path / "out"
    notes = plan.provenance["notes"]
    assert code == 0 and not any(note in err for note in notes)
    assert any(note.startswith("sparsity 0.4 rounds") for note in notes) and len(set(notes)) == len(notes) > 1
    assert out.startswith("mosaic: 15 of 24 experts retained in 3 layers (38% removed)\n  layer 0  5 of 8: ")
    before, after = (model.num_parameters() for model in (load(place / "model"), load(output)))
    size = f"size: {before / 1e6:.3g} M -> {after / 1e6:.3g} M parameters, {2 * before / 1e6:.3g} MB -> "
    parts = [
        "  layer 2  5 of 8: ",
        size,
        "What to know:",
        *(f"- {note}\n" for note in notes),
        f"written: {output} (what others should know of it: {output / 'README.md'})",
        f'load it: AutoModelForCausalLM.from_pretrained({str(output)!r}, dtype="auto")',
        "next, see what it lost: optimum-cli moe-prune evaluate --model ",
    ]
    places = [out.index(part) for part in parts]
    assert places == sorted(places) and all(out.count(part) == 1 for part in parts)
    card = (output / "README.md").read_text()
    assert all(note[1:] in card for note in notes)


def test_the_same_as_values(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", "--model", place / "model", "--calibration", place / "texts.jsonl", "--method", "mosaic")
    code, out, _ = call(capsys, *run, "--num-experts", 4, "--json", tmp_path / "out")
    plan, told = PruningPlan.load(tmp_path / "out"), json.loads(out)
    assert code == 0 and told["notes"] == plan.provenance["notes"]
    assert told["findings"] == plan.provenance["findings"] and told["findings"].get("ties")
    before, after = (load(folder).num_parameters() for folder in (place / "model", tmp_path / "out"))
    assert told["parameters"] == {"original": before, "pruned": after}
    assert told["bytes"] == {"original": 2 * before, "pruned": 2 * after}
    assert told["load"] == f'AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, dtype="auto")'
    assert told["original_num_experts"] == {"0": 8, "1": 8, "2": 8} and told["output"] == str(tmp_path / "out")
    apply = ("apply", "--model", place / "model", "--plan", tmp_path / "out", "--json", tmp_path / "again")
    again = json.loads(call(capsys, *apply)[1])
    assert {**told, "output": None, "load": None} == {**again, "output": None, "load": None}


def test_a_plan_says_what_comes_next(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = ("score", "--model", place / "model", "--calibration", place / "texts.jsonl", tmp_path / "stats")
    assert call(capsys, *score)[0] == 0
    plan = ("plan", "--stats", tmp_path / "stats", "--method", "mosaic", "--num-experts", 4)
    code, out, err = call(capsys, *plan, tmp_path / "plan.json")
    notes = PruningPlan.load(tmp_path / "plan.json").provenance["notes"]
    assert (code, err) == (0, "") and [line[2:] for line in out.splitlines() if line.startswith("- ")] == notes
    assert out.splitlines()[-2:] == [
        f"plan: {tmp_path / 'plan.json'}",
        f"next: optimum-cli moe-prune apply --model MODEL --plan {tmp_path / 'plan.json'} OUTPUT",
    ]
    told = json.loads(call(capsys, *plan, "--json", tmp_path / "other.json")[1])
    assert told["notes"] == notes and "ties" in told["findings"]


def test_what_is_said_for_the_card(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", "--model", place / "model", "--method", "random", "--num-experts", 4)
    said = ("--base-model", "someone/some-moe", "--license", "mit", "--language", "en", "--language", "de")
    assert call(capsys, *run, *said, tmp_path / "out")[0] == 0
    apply = ("apply", "--model", place / "model", "--plan", tmp_path / "out", "--license", "other")
    assert call(capsys, *apply, tmp_path / "again")[0] == 0
    for name, license in (("out", "mit"), ("again", "other")):
        data = ModelCard.load(tmp_path / name / "README.md").data
        assert (data.base_model, data.license, data.language) == ("someone/some-moe", license, ["en", "de"])
    for wrong, message in (
        (("--base-model", place / "model"), "error: --base-model is '"),
        (("--license", "GPL 3"), "error: --license is 'GPL 3'; it must be one of the Hub's ids"),
        (("--language", "German"), "error: --language is 'German'; it must be a code"),
    ):
        code, out, err = call(capsys, *run, *wrong, tmp_path / "no")
        assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1
        assert not (tmp_path / "no").exists()


def made(layers: int, **provenance: Any) -> PruningPlan:
    retained = {layer: tuple(range(2 + layer % 2)) for layer in range(layers)}
    return PruningPlan("mixtral", 2, "by hand", retained, dict.fromkeys(retained, 8), provenance=provenance)


def test_many_layers_are_not_listed() -> None:
    assert screen.plan_in_words(made(26), "p.json") == made(26).summary().splitlines()
    assert screen.plan_in_words(made(27, findings={"rounds": 3, "ties": {"0": [1, 2]}}), "p.json") == [
        "by hand: 67 of 216 experts retained in 27 layers (69% removed)",
        "  each layer keeps 2 to 3 of 8; which ones stands in p.json",
    ]


def test_notes_of_whatever_kind() -> None:
    for damaged in (None, 3, "text", {}):
        assert screen.to_know(made(2, notes=damaged)) == []
    assert screen.to_know(made(2, notes=["a\nb", "a b", 7, " "]), {"7"}) == ["", "What to know:", "- a b"]


def test_each_is_printed_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody has set up logging, as in a terminal."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    note, other = logging.getLogger(NOTES_LOGGER), logging.getLogger("optimum_moe_prune.calibration.samples")
    for as_json in (False, True):
        with screen.notes_kept(as_json) as printed:
            note.warning("%s: %s", "mosaic", "a tie")
            other.warning("%d samples were cut", 3)
            other.info("no matter")
        err = capsys.readouterr().err
        assert err.count("3 samples were cut\n") == 1 and err.count("a tie") == as_json and "matter" not in err
        assert printed == {"3 samples were cut", *(["mosaic: a tie"] if as_json else [])}
    note.warning("afterwards")
    assert capsys.readouterr().err == "afterwards\n"
    assert screen.to_know(made(1, notes=["3 samples were cut", "a tie"]), printed)[2:] == ["- a tie"]
