# SPDX-License-Identifier: Apache-2.0
"""Which device ``auto`` stands for, what is said of it, and what is free on several."""

from __future__ import annotations

import argparse
import types
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from conftest import make_model

from optimum_moe_prune.calibration.calibrate import calibrate
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.commands.flags import compute_of
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.models import devices, memory
from optimum_moe_prune.models.checks import input_device
from optimum_moe_prune.models.memory import Compute, available_memory
from optimum_moe_prune.storage.workspace import Workspace

GIB = 2**30


def with_cards(monkeypatch: pytest.MonkeyPatch, *free: int, kind: str = "cuda", current: int = 0) -> None:
    """Have torch believe in cards with so many free bytes."""
    module = types.SimpleNamespace(
        current_device=lambda: current,
        get_device_name=lambda device: f"Card {device.index or 0}",
        memory_reserved=lambda device: GIB,
        memory_allocated=lambda device: GIB // 2,
        mem_get_info=lambda device: (free[device.index or 0] - GIB // 2, 80 * GIB),
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(free))
    monkeypatch.setattr(devices, "_module", lambda device: module)
    monkeypatch.setattr(devices, "has_float64", lambda device: not str(device).startswith("mps"))


def test_auto_is_the_processor_where_there_is_no_card() -> None:
    assert Compute().device == "auto"
    assert devices.cards() == []
    assert (Compute().runs_on, Compute().device_type, Compute().places) == ("cpu", "cpu", ["cpu"])
    assert Compute().for_transformers == {"dtype": "auto", "device_map": "cpu"}
    assert devices.in_words("auto") == devices.in_words("cpu") == ""
    assert abs(available_memory("auto") - available_memory("cpu")) < GIB


def test_auto_is_the_current_card(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards(monkeypatch, 40 * GIB, 20 * GIB, current=1)
    compute = Compute()
    assert (compute.runs_on, compute.device_type, compute.places) == ("cuda:1", "cuda", ["auto", "cpu"])
    assert compute.for_transformers["device_map"] == "auto"
    assert Compute(device="cuda:0").for_transformers["device_map"] == "cuda:0"
    assert Compute(device="cuda:0").places == ["cuda:0"]
    assert available_memory("cuda:1") == 20 * GIB, "what torch holds for later is free as well"
    assert available_memory("auto") == int(0.9 * 60 * GIB)
    assert devices.in_words("auto") == "cuda:1, Card 1, or spread over it and 1 more"
    assert devices.in_words("cuda:0") == "cuda:0, Card 0"


@pytest.mark.parametrize(
    ("free", "stream", "device", "streamed"),
    [
        ((40, 40), None, "cuda:0", False),  # one card is enough
        ((8, 40), None, "auto", False),  # all of them are
        ((8, 8), None, "cuda:0", True),
        ((8, 40), True, "cuda:0", True),  # a layer is on one card
        ((8,), None, "cuda:0", True),
        ((8,), False, "cuda:0", False),
    ],
)
def test_a_model_goes_where_it_fits(
    free: tuple[int, ...], stream: bool | None, device: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cards(monkeypatch, *(gib * GIB for gib in free))
    monkeypatch.setattr(memory, "model_bytes", lambda layout, dtype: 20 * GIB)
    settled = Compute(stream=stream).settled(None)  # type: ignore[arg-type]
    assert (settled.device, settled.stream) == (device, streamed)
    assert settled.settled(None) == settled, "what is settled stays so"  # type: ignore[arg-type]


def test_a_card_without_float64_is_passed_over_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards(monkeypatch, 40 * GIB, kind="mps")
    assert Compute().runs_on == "cpu"
    monkeypatch.setattr(torch, "empty", lambda *args, **named: None)
    with pytest.raises(RequestError, match=r"device='mps' cannot be used: .* float64"):
        Compute(device="mps").check()


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("Could not run 'aten::empty.memory_format' with arguments from the 'XPU' backend. It"),
        ModuleNotFoundError("No module named 'torch.xpu'"),
    ],
)
def test_a_device_that_torch_is_not_built_for(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(RequestError, match=r"device='xpu' cannot be used: this build of torch"):
        Compute(device="xpu").check()


def test_devices_are_named_as_torch_names_them() -> None:
    assert {Compute(device=device).device for device in ("cpu", "CPU ", torch.device("cpu"))} == {"cpu"}  # type: ignore[arg-type]
    assert Compute(device="cuda:1").device == "cuda:1"
    for wrong, meant in (("gpu", "did you mean cuda"), (0, "mean cuda:0"), ("cuda1", "cuda:1"), ("auto:1", "no dev")):
        with pytest.raises(RequestError, match=meant):
            Compute(device=wrong)  # type: ignore[arg-type]


def test_a_command_says_which_card_it_runs_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_cards(monkeypatch, 40 * GIB)
    monkeypatch.setattr(torch, "empty", lambda *args, **named: None)
    for asked, said in (("auto", "cuda:0, Card 0 (--device auto)."), ("cuda", "cuda, Card 0."), ("cpu", None)):
        caplog.clear()
        with caplog.at_level("INFO", logger="optimum_moe_prune.progress"):
            assert compute_of(argparse.Namespace(dtype="bf16", device=asked)).dtype == "bfloat16"
        assert caplog.messages == ([f"the model runs on {said}"] if said else [])


def test_a_model_whose_embeddings_are_offloaded_takes_its_inputs_where_it_runs() -> None:
    model = make_model("mixtral")
    assert input_device(model) == torch.device("cpu")
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    assert input_device(model) == torch.device("cpu")


def test_work_that_began_on_the_processor_goes_on(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    layout, ids = open_layout(tmp_path / "model"), [torch.arange(9), torch.arange(5)]
    for stream in (True, False):
        work = Workspace(tmp_path / f"work_{stream}")
        first = calibrate(layout, ids, "frequency", compute=Compute(device="cpu", stream=stream), workspace=work)
        again = calibrate(layout, ids, "frequency", compute=Compute(stream=stream), workspace=work)
        assert torch.equal(first.layers[0].total("routed_tokens"), again.layers[0].total("routed_tokens"))
