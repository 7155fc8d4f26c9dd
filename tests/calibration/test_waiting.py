# SPDX-License-Identifier: Apache-2.0
"""A device is not waited for inside a layer, and what was gathered comes to the host with the batch.

Tensors of the device ``meta`` have no values: whatever asks for one, or copies one to the host, raises.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_moe_prune import CalibrationSet, Need, RunError
from optimum_moe_prune.calibration import in_memory
from optimum_moe_prune.calibration.current import Current
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.calibration.observer import LayerObserver, Routed
from optimum_moe_prune.calibration.outbox import Outbox, Take
from optimum_moe_prune.models.blocks import MoEBlock, moe_blocks
from optimum_moe_prune.statistics.needs import OF_A_FORWARD_PASS, WITHOUT_TEXT


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Held(Outbox):
    """Takes nothing; remembers the devices of what was to go."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def send(self, values: Tensor, take: Take) -> None:
        self.devices.append(values.device.type)

    hold = send


def run_on_meta(block: MoEBlock, needs: set[Need], max_tokens: int, hidden_size: int) -> tuple[Held, Operators]:
    samples = CalibrationSet.build([torch.arange(1, 1 + n) for n in (9, 20, 14)])
    batch = next(samples.batches(3))
    current = Current(samples, max_tokens, 0)
    current.set(batch)
    outbox = Held()
    before = Routed(6, torch.zeros(samples.num_tokens, 2, dtype=torch.int64, device="meta"))
    observer = LayerObserver(
        block, frozenset(needs), current, lambda layer, shapes: {"x": torch.zeros(0)}, before, outbox
    )
    hidden = torch.empty(*batch.input_ids.shape, hidden_size, device="meta")
    with torch.no_grad(), block.observed(observer.on_logits, observer.experts_forward), Operators() as operators:
        output = block.module(hidden)
    assert (output if isinstance(output, Tensor) else output[0]).shape == hidden.shape
    return outbox, operators


def on_meta(model: nn.Module) -> Any:
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # the one without a kernel of its own
    return model.to("meta")


@pytest.mark.parametrize("max_tokens", [12, 43])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "dots1"])
def test_no_value_leaves_the_device_inside_a_layer(
    model_type: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_moe_prune.calibration.observer.chunk_size", lambda *a: 5)
    model = tiny_model(model_type)
    blocks = moe_blocks(model)
    rule = blocks[-1].routing  # the biases that a rule has are read once, before
    model = on_meta(model)
    block = moe_blocks(model)[-1]
    monkeypatch.setattr(MoEBlock, "routing", property(lambda self: rule))
    outbox, _ = run_on_meta(block, set(OF_A_FORWARD_PASS - WITHOUT_TEXT), max_tokens, model.config.hidden_size)
    assert set(outbox.devices) == {"meta"} and len(outbox.devices) > 10


def test_few_operators_are_added() -> None:
    model = on_meta(make_model())
    block = moe_blocks(model)[1]
    hidden = torch.empty(3, 20, 32, device="meta")
    turns = torch.empty(1, 20, 8, device="meta")
    layer = model.model.layers[1]
    with torch.no_grad(), Operators() as plain:
        layer(hidden, position_embeddings=(turns, turns), attention_mask=None)
    with torch.no_grad(), Operators() as alone:
        block.module(hidden)
    for needs, most in (({Need.ROUTING}, 1.5), ({Need.ROUTING, Need.ROUTED_NORMS}, 2.0)):
        _, observed = run_on_meta(block, needs, 43, 32)
        added = sum(observed.seen.values()) - sum(alone.seen.values())
        assert added <= (most - 1) * sum(plain.seen.values())


class Beside(Outbox):
    """Brings values of the host as those of a device, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.gate: threading.Event | None = None

    def _is_of_host(self, values: Tensor) -> bool:
        return False

    def _copy(self, values: Tensor) -> tuple[Tensor, Any]:
        self.copies += 1
        gate = self.gate
        return values.clone(), (lambda: None) if gate is None else gate.wait


def test_a_device_gives_the_same_statistics(
    kind: str, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind)
    expected = collect(model, samples, set(Need), batch_size=5, max_tokens=60)
    monkeypatch.setattr(in_memory, "Outbox", Beside)
    found = collect(model, samples, set(Need), batch_size=5, max_tokens=60)
    for index, layer in expected.layers.items():
        for name, tensor in layer.tensors.items():
            assert torch.equal(found.layers[index].tensors[name], tensor), name


def test_a_device_in_inference_mode_gives_the_same(samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are made in it can be written to in it alone, and modes are a thread's own."""
    model, needs = make_model(), {Need.ROUTING, Need.ROUTED_NORMS}
    expected = collect(model, samples, needs, batch_size=5, max_tokens=60)
    monkeypatch.setattr(in_memory, "Outbox", Beside)
    with torch.inference_mode():
        found = collect(model, samples, needs, batch_size=5, max_tokens=60)
    for index, layer in expected.layers.items():
        for name, tensor in layer.tensors.items():
            assert torch.equal(found.layers[index].tensors[name], tensor), name


def test_what_is_small_goes_out_once_a_batch(samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Beside] = []
    monkeypatch.setattr(in_memory, "Outbox", lambda: made.append(Beside()) or made[-1])
    collect(make_model(), samples, {Need.ROUTING, Need.ROUTED_NORMS}, batch_size=5, max_tokens=1)
    of_kept = 3  # the logits of the one kept token, in each layer
    assert made[0].copies == samples.num_batches(5) + of_kept


def test_one_batch_stays_under_way_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    with Beside() as outbox:
        outbox.gate = gate = threading.Event()
        with outbox.batch():
            outbox.hold(torch.tensor(1.0), lambda v: taken.append(float(v)))
            outbox.send(torch.tensor([2.0]), lambda v: taken.append(float(v)))
        assert taken == []  # it was not waited for
        gate.set()
        with outbox.batch():
            outbox.hold(torch.ones(2, 3), lambda v: taken.append(float(v.shape[1])))
        assert taken[:2] == [2.0, 1.0]
        outbox.wait()
        assert taken == [2.0, 1.0, 3.0]
        monkeypatch.setattr("optimum_moe_prune.calibration.outbox._MOST_BYTES", 100)
        outbox.gate = None
        for number in range(9):
            outbox.send(torch.full((20,), float(number)), lambda v: taken.append(float(v[0])))
            assert len(outbox._under_way) == 1
        outbox.wait()
    assert taken[3:] == [float(number) for number in range(9)]


@pytest.mark.parametrize("needs", [{Need.ROUTING}, set(Need)], ids=["routing", "all"])
def test_the_first_that_is_not_finite_names_itself(
    samples: CalibrationSet, needs: set[Need], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later layers meet it as well, and may fail in other ways."""
    monkeypatch.setattr(in_memory, "Outbox", Beside)
    model = make_model()
    model.model.layers[1].input_layernorm.register_forward_hook(lambda _m, _i, out: out * float("inf"))
    with pytest.raises(RunError, match="layer 1: "):
        collect(model, samples, needs)
    model.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("later")))
    with pytest.raises(RunError, match="layer 1: "):
        collect(model, samples, needs)
