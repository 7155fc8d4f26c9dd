# SPDX-License-Identifier: Apache-2.0
"""A calibration shared by several processes: each takes whole batches, and what they gathered is read as one.

The batches are those of one process, so every sample is computed beside the same others and with the same padding, and
the kept tokens are those of the whole calibration. So each row of the statistics is what one process would have had.

Shapes: S samples, N kept tokens.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..architectures.routers import rule_from_dict
from ..errors import RequestError, RunError
from ..models.batches import Batch
from ..processes import Processes
from ..statistics.files import layer_file
from ..statistics.merging import merged_tensors, rows_by_name
from ..statistics.needs import Need
from ..statistics.passages import Passages
from ..statistics.stats import CalibrationStats, LayerStats
from ..storage.files import write_text
from ..storage.growing import process_folder
from ..storage.tensor_files import MappedTensors
from ..storage.values import Json
from ..storage.workspace import Workspace
from .fisher import FOLDER, of_head
from .gradients import fisher_file
from .progressive import LayerChoice
from .samples import CalibrationSet

_SEEN_SECONDS = 10.0
"""In which a file is seen on another machine that shares the disk."""


@dataclass(frozen=True)
class Share(CalibrationSet):
    """The samples of some of the batches of a calibration.

    Attributes:
        whole: The calibration.
        own_batches: The batches, their samples by number among these.
        numbers: The number of each sample in the whole, ``(S,)`` int64, rising.
    """

    whole: CalibrationSet | None = None
    own_batches: tuple[Batch, ...] = ()
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @classmethod
    def of(cls, whole: CalibrationSet, batches: Sequence[Batch]) -> Share:
        """The samples of some of its batches."""
        numbers = numbers_of(batches).sort().values
        own = tuple(replace(batch, samples=torch.searchsorted(numbers, batch.samples)) for batch in batches)
        chosen = numbers.tolist()
        return cls(
            samples=tuple(whole.samples[number] for number in chosen),
            token_ids=tuple(whole.token_ids[number] for number in chosen),
            truncated=whole.truncated,
            duplicates=whole.duplicates,
            sources=whole.sources,
            counts=whole.counts,
            settings=whole.settings,
            whole=whole,
            own_batches=own,
            numbers=numbers,
        )

    @property
    def passages(self) -> Passages:
        """Those of the whole."""
        assert self.whole is not None
        return self.whole.passages

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The batches, whatever their size was."""
        return iter(self.own_batches)

    def kept_tokens(self, max_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Those of the whole that are of these samples."""
        assert self.whole is not None
        sample, position = self.whole.kept_tokens(max_tokens, seed)
        own = torch.isin(sample, self.numbers)
        return torch.searchsorted(self.numbers, sample[own]), position[own]


def numbers_of(batches: Sequence[Batch]) -> Tensor:
    """The numbers of the samples in some batches ``(S,)`` int64."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(batch.samples for batch in batches)])


def shares_of(calibration: CalibrationSet, batch_size: int, processes: Processes) -> list[Share]:
    """What each process takes, by rank: every count-th batch, so that long and short ones are dealt out evenly."""
    batches = list(calibration.batches(batch_size))
    ranks = (replace(processes, rank=rank) for rank in range(processes.count))
    return [Share.of(calibration, [batches[step] for step in each.share(len(batches))]) for each in ranks]


def check_same_samples(processes: Processes, samples: CalibrationSet) -> None:
    """Raise unless all processes have read the same samples.

    Raises:
        RequestError: Naming the one that has others.
    """
    found = processes.meet(samples.fingerprint)
    if others := [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]:
        raise RequestError(
            f"process {others[0]} of {processes.count} read other samples than the main process; all have to be given "
            "the same texts, in the same versions of their files."
        )


@contextlib.contextmanager
def shared_folder(processes: Processes, workspace: Workspace, temporary: bool) -> Iterator[Path]:
    """A folder that all processes see, for what they gather, inside a ``with``.

    Args:
        processes: Which of them this is.
        workspace: Where it is, and stays.
        temporary: In place of that, a folder in it, or else in the system's for temporary files, that is removed in
            the end.

    Raises:
        RequestError: If not all of them see it.
    """
    made = temporary or workspace.folder is None

    def prepare() -> Path:
        if not made and workspace.folder is not None:
            workspace.folder.mkdir(parents=True, exist_ok=True)
            return workspace.folder
        if workspace.folder is not None:
            workspace.folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="moe-prune-", dir=workspace.folder)).absolute()

    try:
        folder = processes.from_main(prepare)
    except OSError as error:
        raise RunError(f"a folder for what the processes share cannot be made: {error}.") from error
    try:
        _check_seen(processes, folder)
        yield folder
        if made:
            processes.meet(None)  # all have opened what they need
    finally:
        if made and processes.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _check_seen(processes: Processes, folder: Path) -> None:
    """Raise unless all processes see what the main one writes in a folder.

    Raises:
        RequestError: Naming the machine that does not.
    """
    path = folder / f"shared-{processes.from_main(lambda: uuid.uuid4().hex)}"
    if processes.is_main:
        write_text(path, "")
    processes.meet(None)
    until = time.monotonic() + _SEEN_SECONDS
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    found = processes.meet((seen, socket.gethostname()))
    if processes.is_main:
        path.unlink(missing_ok=True)
    for rank, (sees, machine) in enumerate(found):
        if not sees:
            raise RequestError(
                f"process {rank} of {processes.count}, on {machine}, does not see {folder}, where {found[0][1]} "
                "works; the processes have to share a disk: name an output (in Python a workspace, or TMPDIR) on it."
            )


def merged(
    whole: CalibrationSet, shares: Sequence[Share], own: CalibrationStats | None, folder: Path, processes: Processes
) -> CalibrationStats:
    """What all processes gathered, as if it were one; a tensor is put together from the files when it is asked for.

    Args:
        whole: The calibration.
        shares: What each process took.
        own: What this one gathered; None where it had nothing to do.
        folder: Where the files are, each process's in one of its own.
        processes: Which of them this is.

    Raises:
        RunError: If they ran different models.
    """
    said = processes.meet(None if own is None else (own.model["fingerprint"], own.provenance.get("dtype")))
    if others := [rank for rank, facts in enumerate(said) if facts not in (None, said[0])]:
        raise RunError(
            f"process {others[0]} of {processes.count} calibrated another model, or in another precision, than the "
            "main process."
        )
    plain = processes.from_main(lambda: None if own is None else _plain(own))
    assert plain is not None
    stats, layers = plain
    if own is None:
        of_layer = {
            index: LayerStats(count, rule_from_dict(rule), {}, torch.zeros(0), torch.zeros(0), is_head=is_head)
            for index, (count, rule, is_head) in layers.items()
        }
    else:
        of_layer = own.layers
    token_sample, token_position = whole.kept_tokens(stats.max_tokens, stats.seed)
    parts = _Parts(whole, shares, folder, token_sample, stats.needs)
    found = {index: parts.merged(index, layer) for index, layer in of_layer.items()}
    dense = {"dense_tokens": len(token_sample)} if "dense_tokens" in stats.provenance else {}
    return replace(
        stats,
        samples=whole.samples,
        layers=found,
        token_sample=token_sample,
        token_position=token_position,
        provenance={**stats.provenance, **dense},
    )


def _gathered(folder: Path, index: int) -> dict[str, Tensor]:
    """What one process gathered of a layer, of gradients as well where it did."""
    tensors = dict(MappedTensors.open(folder / layer_file(index)))
    if (path := folder / FOLDER / fisher_file(index)).is_file():
        tensors |= MappedTensors.open(path)
    return tensors


class SharedChoice:
    """A ``LayerChoice`` by what all processes gathered of a layer: the main one chooses when all have it, for all.

    Every process asks for every layer in turn, those too that it had finished before it was interrupted, so that all
    speak of the same one.

    Args:
        choice: Chooses from statistics of the whole calibration.
        whole: The calibration.
        shares: What each process takes.
        folder: Where the files are, each process's in one of its own.
        processes: Which of them this is.
    """

    def __init__(
        self,
        choice: LayerChoice,
        whole: CalibrationSet,
        shares: Sequence[Share],
        folder: Path,
        processes: Processes,
    ) -> None:
        self._choice = choice
        self._whole = whole
        self._shares = shares
        self._folder = folder
        self._processes = processes

    @property
    def provenance(self) -> Json:
        """As of the choice."""
        return self._choice.provenance

    def prunes(self, layer: int) -> bool:
        """As of the choice."""
        return self._choice.prunes(layer)

    def choose(self, layer: int, stats: CalibrationStats) -> tuple[int, ...]:
        """As of the choice, from what all have gathered."""
        tensors = stats.layers[layer].tensors
        if isinstance(tensors, MappedTensors):
            tensors.sync()  # others read them
        self._processes.meet(None)
        return self._processes.from_main(lambda: self._choice.choose(layer, self._merged(layer, stats)))

    def stand_by(self, layers: Iterable[int]) -> None:
        """Wait, with nothing to gather, for what the others choose in all layers."""
        for _ in layers:
            self._processes.meet(None)
            self._processes.meet(None)

    def _merged(self, layer: int, stats: CalibrationStats) -> CalibrationStats:
        token_sample, token_position = self._whole.kept_tokens(stats.max_tokens, stats.seed)
        parts = _Parts(self._whole, self._shares, self._folder, token_sample, stats.needs)
        return replace(
            stats,
            samples=self._whole.samples,
            layers={layer: parts.merged(layer, stats.layers[layer])},
            token_sample=token_sample,
            token_position=token_position,
        )


class _Parts:
    """The files of all processes, and where the rows of one process alone are in them.

    Args:
        whole: The calibration.
        shares: What each process takes.
        folder: Where the files are, each process's in one of its own.
        token_sample: The sample of each kept token of the whole ``(N,)``.
        needs: What was gathered.
    """

    def __init__(
        self,
        whole: CalibrationSet,
        shares: Sequence[Share],
        folder: Path,
        token_sample: Tensor,
        needs: frozenset[Need],
    ) -> None:
        busy = [rank for rank, share in enumerate(shares) if len(share)]
        self._samples = whole.samples
        self._folders = [process_folder(folder, rank) for rank in busy]
        self._token_sample = token_sample
        self._needs = needs
        self._by_sample = _inverse([shares[rank].numbers for rank in busy])
        kept = [torch.isin(token_sample, shares[rank].numbers).nonzero().flatten() for rank in busy]
        self._kept = _inverse(kept)

    def merged(self, index: int, layer: LayerStats) -> LayerStats:
        """Statistics of one layer, given what is no tensor of them."""
        files = [_gathered(folder, index) for folder in self._folders]
        rows = rows_by_name(files[0], self._needs, self._by_sample, self._kept)
        tensors = merged_tensors(files, rows, self._token_sample, self._samples)
        weights = torch.ones(len(self._samples), dtype=torch.float64)
        found = replace(layer, tensors=tensors, sample_weights=weights, token_sample=self._token_sample)
        return of_head(found) if Need.FISHER in self._needs and layer.is_head else found


def _plain(stats: CalibrationStats) -> tuple[CalibrationStats, dict[int, tuple[int, dict[str, object], bool]]]:
    """Statistics without samples and layers, and of these what is no tensor."""
    layers = {n: (layer.num_experts, layer.routing.to_dict(), layer.is_head) for n, layer in stats.layers.items()}
    none = torch.zeros(0, dtype=torch.int64)
    return replace(stats, samples=(), layers={}, token_sample=none, token_position=none), layers


def _inverse(parts: Sequence[Tensor]) -> Tensor:
    """Where each number is in what several parts hold one after another."""
    numbers = torch.cat(list(parts))
    places = torch.empty_like(numbers)
    places[numbers] = torch.arange(len(numbers))
    return places
