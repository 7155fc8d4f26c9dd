# SPDX-License-Identifier: Apache-2.0
"""Speeds are measured in turn; what becomes of the rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from optimum_moe_prune import RequestError, Source, compare
from optimum_moe_prune.evaluation import compare as comparing
from optimum_moe_prune.evaluation import speed
from optimum_moe_prune.evaluation.speed import Generation, measure_in_turn
from optimum_moe_prune.models.memory import Compute


class Stub:
    """In place of a process: the same machine slows down from round to round, and one model takes twice the time."""

    log: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, source: Source, request: dict[str, int], compute: Compute) -> None:
        self.name = source.name_or_path

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.log.append(("load", self.name))
        yield

    def measure(self) -> speed._Round:
        self.log.append(("measure", self.name))
        number = sum(entry == ("measure", self.name) for entry in self.log)
        return speed._Round(
            8, 0.5 * number, (100.0 if self.name == "small" else 50.0) / number, number * 10, "machine"
        )


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    monkeypatch.setattr(speed, "_Worker", Stub)
    monkeypatch.setattr(Stub, "log", [])
    monkeypatch.setattr(speed, "_fit_together", lambda models, compute: True)
    return Stub.log


def test_models_take_turns_and_are_compared_round_by_round(log: list[tuple[str, str]]) -> None:
    small, original = measure_in_turn(["small", "original"], new_tokens=4, repeats=3)
    assert [name for what, name in log if what == "load"] == ["small", "original"]
    turns = [name for what, name in log if what == "measure"]
    assert turns == ["small", "original", "original", "small", "small", "original"]
    assert small == Generation(8, 4, 1.0, 50.0, 30, 3, (100 / 3, 100.0), 2.0, (2.0, 2.0), "machine")
    assert original.speedup is None and original.tokens_per_second_range == (50 / 3, 50.0) and original.has_spread


def test_models_that_do_not_fit_are_loaded_in_turn(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_fit_together", lambda models, compute: False)
    measure_in_turn(["small", "original"], repeats=2)
    assert [what for what, _ in log] == ["load", "measure"] * 4
    with pytest.raises(RequestError, match="repeats is 0"):
        measure_in_turn(["small"], repeats=0)


def test_what_fits_is_told_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import make_model

    make_model().save_pretrained(tmp_path / "a")
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    both = [Source(str(tmp_path / "a"))] * 2
    for free, fits in ((3 * size, True), (size, False)):
        monkeypatch.setattr(speed, "available_memory", lambda device, free=free: free)
        assert speed._fit_together(both, Compute()) is fits
    assert speed._fit_together(both[:1], Compute()), "one alone has no other way"


def test_each_model_takes_turns_with_the_reference(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "_check", lambda *args: None)
    monkeypatch.setattr(comparing, "_settings", lambda *args: {}, raising=False)
    models = {name: Source(name) for name in ("small", "other", "original")}
    found = comparing._speeds(models, models["original"], 4, Compute())
    assert list(found) == ["small", "original", "other"]
    assert [g.speedup is None for g in found.values()] == [False, True, False]
    log.clear()
    alone = comparing._speeds({"small": models["small"], "other": models["other"]}, None, 4, Compute())
    assert all(g.speedup is None and g.has_spread for g in alone.values())
    assert [name for what, name in log if what == "load"] == ["small", "other"]


def test_nothing_is_measured_unless_asked_for(tmp_path: Path, log: list[tuple[str, str]]) -> None:
    from conftest import make_model, make_texts, make_tokenizer

    assert (
        compare(make_model(), make_texts(), tokenizer=make_tokenizer()).models["MixtralForCausalLM"].generation is None
    )
    assert not log
