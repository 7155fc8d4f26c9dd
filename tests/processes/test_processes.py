# SPDX-License-Identifier: Apache-2.0
"""Which of several processes this is, and how they agree: threads in place of processes, and no launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import environment
from oracles import call
from torch.distributed import HashStore

from optimum_moe_prune.compat.distributed import default_store
from optimum_moe_prune.errors import MoEPruneError, RequestError, RunError
from optimum_moe_prune.models.memory import Compute
from optimum_moe_prune.processes import ALONE, Processes, launch_note, launched, meeting, shared
from optimum_moe_prune.processes.folders import own_workspace
from optimum_moe_prune.storage.growing import Store
from optimum_moe_prune.storage.kept import kept_beside
from optimum_moe_prune.storage.workspace import Workspace

Work = Callable[[Processes], Any]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    """A store that threads share, in place of the one that a launcher makes."""
    made = HashStore()
    monkeypatch.setattr(meeting, "_store", lambda processes: made)
    monkeypatch.setattr(meeting, "_is_connected", lambda: True)
    return made


def at_once(*works: Work) -> list[Any]:
    """What each returns or raises, all at the same time."""
    found: list[Any] = [None] * len(works)

    def run(rank: int) -> None:
        try:
            found[rank] = works[rank](Processes(rank, len(works), rank, len(works)))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, ALONE),
        (environment(1, 2), Processes(1, 2, 1, 2)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Processes(3, 4, 1, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Processes(1, 2, 1, 2)),
        ({"WORLD_SIZE": "2"}, "2 processes share the work, and RANK is not set; .* unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "and RANK is 2"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two' in the environment, and has to be a number"),
    ],
)
def test_what_the_environment_says(
    values: dict[str, str], expected: Processes | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, Processes):
        assert launched() == expected and Compute().together == expected
        assert Compute(processes=ALONE).together is ALONE
    else:
        with pytest.raises(RequestError, match=expected):
            launched()


def test_accelerate_that_started_one_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_note() is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert launch_note() is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "this is one process" in (launch_note() or "")
    monkeypatch.setenv("WORLD_SIZE", "1")  # by MPI, or by torchrun
    assert launch_note() is None


def test_one_process_pays_nothing() -> None:
    code = """
import sys
from optimum_moe_prune.processes import launched
alone = launched()
with alone.together():
    assert alone.meet(3) == [3] and alone.from_main(lambda: 4) == 4 and alone.once(lambda: 5) == 5
    alone.look()
assert list(alone.share(3)) == [0, 1, 2]
assert not {"torch", "accelerate"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_meet_and_the_main_one_decides(store: HashStore) -> None:
    def work(processes: Processes) -> Any:
        with processes.together():
            first = processes.meet({"rank": processes.rank})
            large = processes.from_main(lambda: bytes(3 * 2**20))
            second = processes.from_main(lambda: f"made by {processes.rank}") if len(large) == 3 * 2**20 else ""
            third = processes.once(lambda: processes.rank)
            return [value["rank"] for value in first], second, third, list(processes.share(7))

    expected = [([0, 1, 2], "made by 0", 0, steps) for steps in ([0, 3, 6], [1, 4], [2, 5])]
    assert at_once(work, work, work) == expected
    left = [f"{number}/{rank}" for number in range(1, 7) for rank in range(3) if store.check([f"{number}/{rank}"])]
    assert left and all(key.startswith("6/") for key in left)  # what was read is gone
    assert not store.check(["3/0/1"])


@pytest.mark.parametrize("kind", [RequestError, RunError, ValueError, KeyboardInterrupt])
def test_a_failure_ends_the_work_of_all(kind: type[BaseException], store: HashStore) -> None:
    def fails(processes: Processes) -> None:
        with processes.together(), processes.together():  # told once
            processes.meet(None)
            raise RunError("made of it") from kind("no")

    def waits(processes: Processes) -> None:
        with processes.together(), processes.together():
            processes.meet(None)
            processes.meet(None)

    def looks(processes: Processes) -> None:
        with processes.together(), processes.together():
            processes.meet(None)
            while True:
                processes.look()

    def raises(processes: Processes) -> None:
        with processes.together(), processes.together():
            processes.meet(None)
            raise kind("no")

    _, *others = at_once(raises, waits, looks)
    said = {ValueError: "ValueError: no", KeyboardInterrupt: "it was interrupted"}.get(kind, "no")
    assert [str(other) for other in others] == [f"process 0 of 3: {said}"] * 2
    assert all(type(other) is (RequestError if kind is RequestError else RunError) for other in others)
    again = at_once(fails, waits, looks)  # they are as before, and can begin again
    assert [str(found) for found in again] == ["made of it", *["process 0 of 3: made of it"] * 2]


def test_who_does_not_come_or_is_gone_is_missed(store: HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(meeting, "_MISSED_SECONDS", 0.01)
    alone = Processes(0, 2).together()
    with pytest.raises(RunError, match=r"process 1 of 2 has not come .*works alone .processes=ALONE"), alone:
        pytest.fail("went on")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    while os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT) is None:  # dead, and not buried
        pass
    meeting._put(store, "1/where", (meeting._machine(), gone.pid))
    assert "process 1 of 2 ended before its work was done" in (meeting.missed(Processes(0, 2)) or "")
    with pytest.raises(RunError, match="process 1 of 2 ended before its work was done"):
        Processes(0, 2).meet(None)
    assert gone.wait() == 0
    assert meeting.missed(Processes(0, 2)) is not None  # buried
    meeting._put(store, "1/where", (("elsewhere", ""), gone.pid))
    assert meeting.missed(Processes(0, 2)) is None


def test_one_of_them_says_it(store: HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert at_once(meeting.says, meeting.says) == [True, False]
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.01)
    store.delete_key("said")
    assert meeting.says(Processes(1, 2)) and not meeting.says(Processes(0, 2))  # the main one came too late


def test_a_function_is_shared_by_those_that_compute_names(store: HashStore) -> None:
    @shared
    def work(*, compute: Compute) -> list[int]:
        return compute.together.meet(compute.together.rank)

    assert at_once(*[lambda processes: work(compute=Compute(processes=processes))] * 2) == [[0, 1]] * 2
    assert work(compute=Compute(processes=ALONE)) == [0]


def test_unfinished_work_of_another_number_is_refused(tmp_path: Path) -> None:
    alone = Store(tmp_path / "a", {"processes": 1})
    alone.commit(1)
    with pytest.raises(RequestError, match="processes is 1 there and 2 now"):
        own_workspace(Processes(0, 2), Workspace(tmp_path / "a"), "calibration")
    for rank in range(2):
        part = Store(tmp_path / "b" / f"process-{rank}", {"processes": 2})
        part.check_steps(4, "batch")
        part.commit(1 + rank)
    with pytest.raises(RequestError, match="processes is 2 there and 1 now"):
        Store(tmp_path / "b")
    with pytest.raises(RequestError, match="processes is 2 there and 3 now"):
        Store(tmp_path / "b" / "process-0", {"processes": 3})
    assert Store(tmp_path / "b", restart=True).finished == 0
    assert not (tmp_path / "b" / "process-0").exists()


def test_steps_that_are_finished_are_kept_before_others_are_looked_at(tmp_path: Path) -> None:
    def look() -> None:
        raise RunError("another has failed")

    for folder in (None, tmp_path / "kept"):
        with pytest.raises(RunError, match="another has failed"):
            Store(folder, look=look).commit(2)
    assert Store(tmp_path / "kept").finished == 2


@pytest.mark.parametrize(("unit", "said"), [("batch", "3 of 8 batches of the"), ("layer", "1 of 4 layers of the")])
def test_what_several_keep_is_told_as_one(unit: str, said: str, tmp_path: Path) -> None:
    for rank in range(2):
        part = Store(tmp_path / ".out.partial" / "calibration" / f"process-{rank}")
        part.check_steps(4, unit)
        part.commit(1 + rank)
    assert [str(kept) for kept in kept_beside(tmp_path / "out")] == [f"{said} calibration"]


@pytest.mark.parametrize("arguments", [["list", "methods"], ["--help"], ["score", "--nothing"], ["plan"]])
def test_one_process_speaks(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *arguments)
    for rank in range(2):
        for name, value in environment(rank, 2).items():
            monkeypatch.setenv(name, value)
        note = "list works in one process; the other process ends at once.\n" if arguments[0] == "list" else ""
        assert call(capsys, *arguments) == ((code, out, note + err) if rank == 0 else (code, "", ""))


def test_torch_has_the_store() -> None:
    with pytest.raises(ValueError, match="process group"):  # there is none; the name is there
        default_store()
    assert issubclass(RunError, MoEPruneError)
