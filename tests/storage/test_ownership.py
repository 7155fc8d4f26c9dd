# SPDX-License-Identifier: Apache-2.0
"""Nothing of a person's is ever replaced, and whatever moment a replacement ends at, a later one goes through."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_texts, make_tokenizer, save_checkpoint
from oracles import call

from optimum_moe_prune import MoEPruner, PruningPlan, RequestError
from optimum_moe_prune.names import LIST_NAME, PLAN_NAME, STATS_NAME
from optimum_moe_prune.publishing.card import write_card
from optimum_moe_prune.storage.files import write_bytes, write_text
from optimum_moe_prune.storage.folders import written_folder
from optimum_moe_prune.storage.outputs import MARKERS, output_fault
from optimum_moe_prune.storage.targets import check_target

STATISTICS = Path(__file__).parents[1] / "data" / "statistics_mixtral"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its pruned checkpoint, ``model`` and ``out``."""
    place = tmp_path_factory.mktemp("pruned")
    save_checkpoint("mixtral", place / "model", make_tokenizer())
    (place / "texts.jsonl").write_text("\n".join(json.dumps(record) for record in make_texts(4)))
    MoEPruner.from_pretrained(place / "model", method="random", num_experts=4).prune_checkpoint(place / "out")
    return place


@pytest.fixture
def out(pruned: Path, tmp_path: Path) -> Path:
    shutil.copytree(pruned / "out", tmp_path / "out")
    return tmp_path / "out"


def replaced(out: Path) -> None:
    """Replace an output by another, without work."""
    with written_folder(out, overwrite=True) as folder:
        PruningPlan("mixtral", 2, "reap", {0: (0, 3)}, {0: 4}).save(folder)


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ADDITIONS: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda out: (out / "notes.txt").write_text("mine"),
    "optimizer.pt": lambda out: (out / "optimizer.pt").write_text("mine"),
    "sub/": lambda out: (out / "sub").mkdir(),
    ".git/": lambda out: (out / ".git" / "objects").mkdir(parents=True),
    "report_pictures/": lambda out: (out / "report_pictures").mkdir(),
    "report.html": lambda out: (out / "report.html").write_text("mine"),
    "link (a link)": lambda out: (out / "link").symlink_to(out.parent),
    "generation_config.json (a link)": lambda out: (
        (out / "generation_config.json").rename(out.parent / "kept"),
        (out / "generation_config.json").symlink_to(out.parent / "kept"),
    ),
    "README.new.md": lambda out: (out / "README.new.md").write_text("mine"),
    "README.md": lambda out: (out / "README.md").write_text((out / "README.md").read_text() + "mine"),
    "config.json": lambda out: (out / "config.json").write_text((out / "config.json").read_text() + " "),
    PLAN_NAME: lambda out: (out / PLAN_NAME).write_text((out / PLAN_NAME).read_text().replace("random", "mine")),
    "model.safetensors": lambda out: write_bytes(
        out / "model.safetensors", (out / "model.safetensors").read_bytes()[:-1] + b"x"
    ),
    "tokens.safetensors": lambda out: (out / "tokens.safetensors").touch(),
    "config.json (a pipe or device)": lambda out: ((out / "config.json").unlink(), os.mkfifo(out / "config.json")),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_what_a_person_added_or_changed_stops_the_run_by_name(name: str, out: Path) -> None:
    ADDITIONS[name](out)
    before = state(out)
    with pytest.raises(RequestError) as refused:
        replaced(out)
    assert name in str(refused.value) and "\n" not in str(refused.value) and "is not replaced" in str(refused.value)
    assert state(out) == before and not (out.parent / ".out.partial").exists()


def test_a_project_that_holds_an_output_of_ours_is_not_replaced(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for marker in (pruned / "out" / PLAN_NAME, STATISTICS / "stats.json"):
        project = tmp_path / marker.name
        project.mkdir()
        shutil.copy(marker, project)
        (project / "thesis.tex").write_text("years of work")
        line = ("run", "--model", pruned / "model", "--method", "random", "--num-experts", 4, "--overwrite", project)
        code, _, err = call(capsys, *line)
        assert code == 2 and "thesis.tex" in err and len(err.splitlines()) == 1
        assert (project / "thesis.tex").read_text() == "years of work"


def test_checkpoints_without_a_list_are_not_replaced_and_plans_alone_are(out: Path) -> None:
    (out / LIST_NAME).unlink()
    said = r"it has config.json \(and \d+ more\), and no list of what this package wrote \(\.moe_pruning_files\.json\)"
    with pytest.raises(RequestError, match=said):
        replaced(out)
    shutil.rmtree(out)
    PruningPlan("mixtral", 2, "reap", {0: (0, 3)}, {0: 4}).save(out)
    replaced(out)


@pytest.mark.parametrize("damage", ["{", "{}", '{"format_version": 9, "files": {}}', '{"format_version": 1}'])
def test_a_damaged_list_is_no_list(damage: str, out: Path) -> None:
    (out / LIST_NAME).write_text(damage)
    with pytest.raises(RequestError, match="moe_pruning_files"):
        replaced(out)


def test_what_this_package_adds_later_is_its_own(out: Path) -> None:
    """Results, report, pictures and cards, also where writing them ends before they are there."""
    write_text(out / "moe_evaluation.json", '{"format_version": 1, "models": {}}')
    write_text(out / "report.html", "first")
    write_bytes(out / "report_pictures" / "a.png", b"picture")
    write_card(out, "another name")
    assert output_fault(out) is None
    before = state(out)
    write_text(out / "report.html", "second")
    assert output_fault(out) is None
    (out / "report.html").write_bytes(before["report.html"])  # an end between its announcement and the file
    assert output_fault(out) is None
    (out / "README.md").write_text("edited")
    write_card(out, "another name")
    assert (out / "README.new.md").exists() and "README.md was changed" in str(output_fault(out))
    (out / "README.new.md").write_text("edited as well")
    with pytest.raises(RequestError, match="were both edited and are kept"):
        write_card(out, "another name")
    assert (out / "README.new.md").read_text() == "edited as well"
    write_bytes(out / "else.txt", b"not one of them")
    assert "(and 1 more), which this package did not write" in str(output_fault(out))


def test_what_appears_while_the_new_output_is_written_is_kept_beside_it(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in ("", "-2"):
        with written_folder(out, overwrite=True) as folder:
            PruningPlan("mixtral", 2, "reap", {0: (0, 3)}, {0: 4}).save(folder)
            (out / "notes.txt").write_text("mine")
        kept = out.with_name(f"out.earlier{number}")
        assert (kept / "notes.txt").read_text() == "mine" and not (out / "notes.txt").exists()
        assert f"{kept}: it has notes.txt" in caplog.text
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.earlier", "out.earlier-2"]


def test_what_was_put_in_the_place_of_an_interrupted_replacement_is_not_taken_for_the_new_one(out: Path) -> None:
    partial = out.parent / ".out.partial"
    partial.mkdir()
    (partial / "lock").touch()
    shutil.copytree(out, partial / "replaced")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="exists and is not empty"), written_folder(out.with_name("out")):
        pytest.fail("began")
    with pytest.raises(RequestError, match=r"notes\.txt"):
        replaced(out)


KILLED = """
import os, shutil, sys
from pathlib import Path
from optimum_moe_prune.storage import folders
from optimum_moe_prune.storage.outputs import list_files

place = Path(sys.argv[1])
PLAN = (place / "plan.json").read_bytes()

def write(folder, what):
    (folder / "moe_pruning_plan.json").write_bytes(PLAN)
    (folder / "deep").mkdir()
    for name in ("a", "deep/b", "config.json"):
        (folder / name).write_text(what)

def replace(target, what):
    with folders.written_folder(target, overwrite=True) as folder:
        write(folder, what)

def killed_at(number, target):
    child = os.fork()
    if child == 0:
        calls = 0
        def wrapped(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == number:
                    os._exit(9)
                return real(*args, **kwargs)
            return call
        for name in ("unlink", "rmdir", "rename", "replace", "fsync", "mkdir", "open", "close", "scandir"):
            setattr(os, name, wrapped(getattr(os, name)))
        replace(target, "new")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

moments = 0
while True:
    moments += 1
    parent = place / str(moments)
    target = parent / "out"
    parent.mkdir()
    replace(target, "old")
    code = killed_at(moments, target)
    if code == 0:
        break
    assert code == 9, code
    inside = {path.read_text() for path in target.rglob("a")} if target.exists() else set()
    assert inside in ({"old"}, {"new"}, set()), inside
    replace(target, "newest")  # whatever was left, the next one goes through
    assert (target / "a").read_text() == (target / "deep" / "b").read_text() == "newest"
    assert sorted(os.listdir(parent)) == ["out"], (moments, os.listdir(parent))
    shutil.rmtree(parent)
print(moments)
"""


def test_killed_at_any_call_the_next_replacement_goes_through(tmp_path: Path) -> None:
    PruningPlan("mixtral", 2, "reap", {0: (0, 3)}, {0: 4}).save(tmp_path / "plan.json")
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 60


def test_an_earlier_output_half_removed_by_others_is_in_nobodys_way(out: Path) -> None:
    """As versions left it that removed the marker first."""
    moved = out.with_name(".out.replaced")
    moved.mkdir()
    (moved / "config.json").write_text("{}")
    replaced(out)
    assert (moved / "config.json").exists()
    PruningPlan("mixtral", 2, "reap", {0: (0, 3)}, {0: 4}).save(out.with_name(".more.replaced"))
    replaced(out.with_name("more"))
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.replaced", "more", "out"]


# ------------------------------------------------------------------------------------------- names


PLACES = ("", " ", ".", "..", "/", "~", "~/out", "~root/out", "here", "above", "home", "a/..")
SPELLINGS = ("a\nb.json", "a\x1b[31m.html", "a\u2028b", "caf\udcff", "x" * 250 + ".json", "x" * 300, "a/" * 3000 + "b")


@pytest.mark.parametrize("name", [*PLACES, *SPELLINGS], ids=lambda name: ascii(name)[:20])
def test_places_that_are_no_output(
    name: str, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    output = {"here": here, "above": here.parent, "home": tmp_path / "home"}.get(name, name)
    model = ("--model", pruned / "model")
    calibration = ("--calibration", pruned / "texts.jsonl")
    for line in (
        ("run", *model, "--method", "random", "--num-experts", 4, "--overwrite", output),
        ("score", *model, *calibration, "--overwrite", output),
        ("apply", *model, "--plan", pruned / "out" / PLAN_NAME, "--overwrite", output),
        ("plan", "--stats", STATISTICS, "--method", "reap", "--num-experts", 2, "--overwrite", output),
        ("sensitivity", *model, *calibration, "--overwrite", output),
        ("report", "--plan", pruned / "out", "--overwrite", output),
        ("export", "--plan", pruned / "out", "--overwrite", output),
        ("evaluate", *model, "--data", pruned / "texts.jsonl", "--overwrite", "--output", output),
    ):
        code, _, err = call(capsys, *line)
        assert code == 2 and len(err.splitlines()) == 1, (line, err)
        assert err.isascii() and ("\x1b" not in err)
    with pytest.raises(RequestError):
        MoEPruner.from_pretrained(pruned / "model", method="random", num_experts=4).prune_checkpoint(output)
    assert not list(here.iterdir()) and not list((tmp_path / "home").iterdir())
    assert sorted(os.listdir(tmp_path)) == ["above", "home"]


def test_a_current_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RequestError, match="the current folder is not there any more"), written_folder("out"):
        pytest.fail("began")
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"format_version": 1}', "\xff", '{"models": {}}'])
def test_single_files_of_others_are_not_replaced(
    content: str, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "package.json"
    target.write_text(content, encoding="latin-1")
    model = ("--model", pruned / "model")
    calibration = ("--calibration", pruned / "texts.jsonl")
    for line in (
        ("plan", "--stats", STATISTICS, "--method", "reap", "--num-experts", 2, "--overwrite", target),
        ("sensitivity", *model, *calibration, "--overwrite", target),
        ("export", "--plan", pruned / "out", "--overwrite", target),
        ("evaluate", *model, "--data", pruned / "texts.jsonl", "--overwrite", "--output", target),
    ):
        code, _, err = call(capsys, *line)
        assert code == 2 and len(err.splitlines()) == 1 and "is not replaced" in err, (line, err)
    with pytest.raises(RequestError, match="is not replaced"):
        PruningPlan.load(pruned / "out").save(target)
    assert target.read_text(encoding="latin-1") == content


def test_single_files_that_are_links_are_written_where_they_lead(pruned: Path, tmp_path: Path) -> None:
    plan = PruningPlan.load(pruned / "out")
    (tmp_path / "shared").mkdir()
    (tmp_path / "plan.json").symlink_to(tmp_path / "shared" / "plan.json")
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").is_symlink() and PruningPlan.load(tmp_path / "shared" / "plan.json") == plan


def test_outputs_of_one_kind_do_not_take_the_place_of_another(tmp_path: Path) -> None:
    """Both are this package's own, and a calibration may have taken hours."""
    (tmp_path / "stats").mkdir()
    header = {name: kind() for name, kind in MARKERS[STATS_NAME].items()}
    (tmp_path / "stats" / STATS_NAME).write_text(json.dumps(header))
    assert check_target(tmp_path / "stats", overwrite=True, marker=STATS_NAME) == tmp_path / "stats"
    with pytest.raises(RequestError, match="holds statistics, which a pruned checkpoint would replace"):
        check_target(tmp_path / "stats", overwrite=True, marker=PLAN_NAME)
    with pytest.raises(RequestError, match="holds statistics"):
        with written_folder(tmp_path / "stats", True, (), PLAN_NAME):
            raise AssertionError("nothing is written")
