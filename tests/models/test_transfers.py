# SPDX-License-Identifier: Apache-2.0
"""Reading ahead onto a card and carrying hidden states there and back, with a card that is played by the processor.

The card of these tests copies when somebody waits for a copy, and not before: what is used too early is not there yet.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, save_checkpoint
from oracles import assert_identical
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimum_moe_prune import CalibrationSet, CalibrationStats
from optimum_moe_prune.calibration.streamed import collect_streamed
from optimum_moe_prune.checkpoints.layout import model_dtype, open_layout
from optimum_moe_prune.errors import RequestError, RunError
from optimum_moe_prune.evaluation.divergence import divergences
from optimum_moe_prune.models import ahead as reading
from optimum_moe_prune.models import skeleton as skeletons
from optimum_moe_prune.models import transfers
from optimum_moe_prune.models.ahead import LayersAhead
from optimum_moe_prune.models.skeleton import Skeleton, Weights
from optimum_moe_prune.models.transfers import Carrier, Lane, for_each
from optimum_moe_prune.statistics.needs import Need
from optimum_moe_prune.storage.growing import Store
from optimum_moe_prune.storage.workspace import Workspace

Marks = list[tuple[Tensor, Tensor]]
PATIENCE = 60.0  # seconds after which a test that hangs fails


class Card(Lane):
    """A lane to a card that the processor plays."""

    room = True
    made: list[Card]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.asked: Marks = []
        self.followed = 0
        self.kept_aside: list[int] = []
        Card.made.append(self)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def follow(self) -> None:
        self.followed += 1

    def mark(self) -> Any:
        return list(self.asked)

    def hold(self, mark: Any) -> None:
        self.wait(mark)

    def wait(self, mark: Any) -> None:
        for pair in mark:
            if any(pair is asked for asked in self.asked):
                pair[0].copy_(pair[1])
                self.asked = [asked for asked in self.asked if asked is not pair]

    def used(self, tensor: Tensor) -> None:
        tensor.is_kept = True  # type: ignore[attr-defined]

    def used_aside(self, tensor: Tensor) -> None:
        self.kept_aside.append(tensor.data_ptr())

    def copy(self, target: Tensor, source: Tensor) -> None:
        if target.is_floating_point():
            target.fill_(torch.nan)
        self.asked.append((target, source))

    def has_room(self, nbytes: int) -> bool:
        assert nbytes > 0
        return Card.room


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> type[Card]:
    Card.room, Card.made = True, []
    monkeypatch.setattr(transfers, "copies_aside", lambda device: device.type != "meta")
    monkeypatch.setattr(skeletons, "copies_aside", lambda device: device.type != "meta")
    monkeypatch.setattr(transfers, "pinned", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(transfers, "Lane", Card)
    monkeypatch.setattr(transfers, "_PIECE_BYTES", 1000)  # tensors come in several pieces
    return Card


def opened(folder: Path) -> Skeleton:
    layout = open_layout(folder)
    return Skeleton(layout, model_dtype(layout.config, layout.checkpoint))


def gathered(folder: Path, samples: CalibrationSet, **settings: Any) -> CalibrationStats:
    return collect_streamed(opened(folder), samples, Need, batch_size=5, max_tokens=70, **settings)


def no_thread_is_left() -> bool:
    return not any(thread.name.startswith("next layer") for thread in threading.enumerate())


@pytest.fixture
def mixtral(tmp_path: Path, tokenizer: Any) -> Path:
    return save_checkpoint("mixtral", tmp_path / "model", tokenizer)


@pytest.mark.parametrize(("kind", "room"), [("mixtral", True), ("qwen2_moe", True), ("mixtral", False)])
def test_the_same_statistics_to_the_bit(
    room: bool, folder: Path, samples: CalibrationSet, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = gathered(folder, samples)
    card = request.getfixturevalue("card")
    card.room = room
    assert_identical(gathered(folder, samples), expected)
    assert_identical(gathered(folder, samples, store=Store(tmp_path / "kept")), expected)
    assert all(not lane.asked for lane in card.made), "every copy was waited for"
    assert all(lane.followed == len(lane.kept_aside) for lane in card.made), "and waits for what it copies"
    assert no_thread_is_left()


def test_plans_measured_from_disk_are_the_same(
    mixtral: Path, samples: CalibrationSet, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = mixtral
    plans = [{0: (0, 1, 2)}, {1: (0, 3)}, {1: (0, 3), 2: (1, 2, 4)}]
    expected = divergences(opened(folder), samples, plans, batch_size=5)
    request.getfixturevalue("card")
    for workspace in (Workspace(), Workspace(tmp_path / "kept")):
        assert torch.equal(divergences(opened(folder), samples, plans, batch_size=5, workspace=workspace), expected)


def test_the_next_layer_is_made_while_one_runs(
    card: type[Card], mixtral: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is given to the model as it is, marked as used; beside the layer at work there is one at most."""
    there = {1: threading.Event(), 2: threading.Event()}
    made, forward, put = Weights.made, Skeleton.forward, Weights.put
    read: list[str] = []
    held: list[bool] = []

    def making(self: Weights, parameters: Any, *check: Any) -> Iterator[tuple[str, Tensor]]:
        names = list(parameters)
        for name, value in made(self, names, *check):
            read.append(name)
            yield name, value
        for index, event in there.items():
            if names[0].startswith(f"model.layers.{index}."):
                event.set()

    def running(self: Skeleton, index: int, *given: Any) -> Tensor:
        if index + 1 in there:
            assert there[index + 1].wait(PATIENCE), "the next layer does not come while this one runs"
        real = {
            name.split(".")[2] for name, p in self.model.named_parameters() if ".layers." in name and not p.is_meta
        }
        assert real == {str(index)} and self._ahead is not None and len(self._ahead._begun) <= 1
        return forward(self, index, *given)

    def putting(self: Weights, values: dict[str, Tensor]) -> None:
        held.extend(hasattr(value, "is_kept") for value in values.values() if len(values) > 1)
        put(self, values)

    monkeypatch.setattr(Weights, "made", making)
    monkeypatch.setattr(Skeleton, "forward", running)
    monkeypatch.setattr(Weights, "put", putting)
    collect_streamed(opened(mixtral), samples, {Need.ROUTING})
    assert len(read) == len(set(read)), "every parameter is made once"
    assert held and all(held)


@pytest.mark.parametrize("end", [".2.self_attn.k_proj.weight", ".2.block_sparse_moe.experts.5.w2.weight"])
def test_what_is_wrong_with_the_next_layer_is_said_when_it_is_asked_for(
    end: str, card: type[Card], mixtral: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = mixtral / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers{end}"
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    ran: list[int] = []
    forward = Skeleton.forward
    monkeypatch.setattr(Skeleton, "forward", lambda self, index, *a: (ran.append(index), forward(self, index, *a))[1])
    with pytest.raises(RunError, match=f"model.safetensors: {name} holds NaN or infinite weights"):
        collect_streamed(opened(mixtral), samples, {Need.ROUTING})
    assert set(ran) == {0, 1}
    assert no_thread_is_left()


def test_a_file_that_becomes_shorter_or_goes_away(
    card: type[Card], tmp_path: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file, forward = make_model("mixtral"), tmp_path / "model" / "model.safetensors", Skeleton.forward
    for change, error in (
        (lambda: file.write_bytes(file.read_bytes()[:-2000]), "was changed while it was read"),
        (file.unlink, "is missing"),
    ):
        model.save_pretrained(tmp_path / "model")
        changes = iter([change])

        def running(self: Skeleton, index: int, *given: Any, changes: Any = changes) -> Tensor:
            next(changes, lambda: None)()  # while the first layer runs
            return forward(self, index, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Skeleton, "forward", running)
            with pytest.raises((RunError, RequestError), match=error):
                collect_streamed(opened(tmp_path / "model"), samples, {Need.ROUTING})
        assert no_thread_is_left()


def test_an_interrupt_ends_what_is_read_ahead(card: type[Card]) -> None:
    begun, seen = threading.Event(), []

    def make(names: Any, check: Any) -> dict[str, Tensor]:
        begun.set()
        try:
            for _ in iter(lambda: check(), 0):  # as long as nobody stops it
                pass
        except BaseException as error:
            seen.append(type(error))
            raise
        return {}

    with contextlib.suppress(KeyboardInterrupt), LayersAhead(Card(torch.device("cpu")), make) as layers:
        assert layers.begin(1, ["a"], 1)
        assert begun.wait(PATIENCE)
        raise KeyboardInterrupt
    assert seen == [reading.Stopped] and no_thread_is_left()


def test_reading_ends_between_two_pieces_of_a_tensor(card: type[Card], mixtral: Path) -> None:
    skeleton, pieces = opened(mixtral), iter(range(3))

    def check() -> None:
        if next(pieces, None) is None:
            raise reading.Stopped

    with pytest.raises(reading.Stopped):
        dict(skeleton._weights.made(["model.embed_tokens.weight"], check))
    assert next(pieces, None) is None


def test_a_layer_that_finds_no_room_after_all_is_read_when_it_is_needed(card: type[Card]) -> None:
    def make(names: Any, check: Any) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("none left")

    with LayersAhead(Card(torch.device("cpu")), make) as layers:
        assert layers.take(0) is None, "it was not begun"
        assert layers.begin(1, ["a"], 1)
        assert layers.take(1) is None
        Card.room = False
        assert not layers.begin(2, ["a"], 1) and layers.take(2) is None


def test_experts_are_made_in_threads_and_the_first_error_counts(card: type[Card]) -> None:
    done: list[int] = []
    for_each(done.append, range(9), torch.device("cpu"))
    assert sorted(done) == list(range(9))

    def make(number: int) -> None:
        if number >= 3:
            raise ValueError(number)

    with pytest.raises(ValueError, match=r"^3$"):
        for_each(make, range(8), torch.device("cpu"))


def test_one_comes_and_one_goes_while_one_is_calculated(card: type[Card]) -> None:
    lane = Card(torch.device("cpu"))
    carrier = Carrier(lane)
    held = [torch.full((4,), float(n)) for n in range(4)]
    given = [torch.zeros(4) for _ in held]
    for number, value in enumerate(carrier.each(held)):
        assert torch.equal(value, held[number]) and hasattr(value, "is_kept")
        assert len(lane.asked) >= min(1, 3 - number), "the next is under way"
        carrier.put(value + 1, given[number])
        assert not given[number].any(), "nobody waits for it"
    carrier.finish()
    assert torch.equal(torch.stack(given), torch.stack(held) + 1) and not lane.asked
    assert lane.followed == 4
