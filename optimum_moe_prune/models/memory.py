# SPDX-License-Identifier: Apache-2.0
"""Whether a model fits, and a way of running it that does."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory

from ..architectures.substitution import substituted_in
from ..checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from ..checkpoints.layout import Layout, model_dtype
from ..checkpoints.plain import Plain
from ..checkpoints.source import Source
from ..compat import build_on_meta, load_made, loader_of, quantization_of
from ..errors import RequestError, faults_of
from ..names import AUTO, device_name, dtype_name, dtype_text
from ..processes import Processes, launched
from ..storage.values import Json
from .checks import check_model
from .devices import cards, check_device, free_bytes, has_own_memory, one_device
from .layerwise import LayerByLayer
from .precision import computing_dtype
from .skeleton import Skeleton
from .substituted import answer_with_constants, with_zeros
from .widened import precision_of

logger = logging.getLogger(__name__)


_HEADROOM_BYTES = 2**30  # for activations and statistics
_OF_CARDS = 0.9
_MODELOPT = "hf_quant_config.json"  # its first versions say it there alone
_CGROUP = Path("/sys/fs/cgroup")


_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Compute:
    """How a checkpoint is run.

    Attributes:
        dtype: The precision to load and to calculate in: ``"float32"``, ``"bfloat16"`` or ``"float16"``, by one of
            their other names too (``"bf16"``, ``"half"``, ``torch.bfloat16``); ``"auto"`` loads the checkpoint's, and
            calculates in float32 where the processor multiplies that far faster (``models.precision``).
        device: Where to calculate: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a ``torch.device``. ``"auto"`` is the card
            that is there (``models.devices``), else the processor: one card for a model that fits on it and for one
            layer at a time, all of them for a model that fits on them together.
        stream: Hold one decoder layer in memory at a time; by default where the model does not fit.
        processes: Those that share the work: ``processes.ALONE`` shares it with nobody; by default all that
            ``accelerate launch`` or ``torchrun`` started, each of which has to make the same calls.
    """

    dtype: str = AUTO
    device: str = AUTO
    stream: bool | None = None
    processes: Processes | None = None
    computing: str | None = None
    """What ``dtype="auto"`` comes to for a checkpoint on a processor; :meth:`settled` decides it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "device", device_name(self.device))

    def check(self) -> None:
        """Raise unless the device is there.

        Raises:
            RequestError: Naming it.
        """
        check_device(self.device)

    def settled(
        self, layout: Layout, streamed_before: bool | None = None, computing_before: str | None = None
    ) -> Compute:
        """The same with a device that is there, and decisions about streaming and the precision to calculate in.

        Args:
            layout: What is to be run.
            streamed_before: What was decided for unfinished work that goes on: memory may be free now that was not
                when it began.
            computing_before: The precision that it was begun in, which it keeps where none is asked for.
        """
        own = self.on_own_device()
        device, needed = own.runs_on, model_bytes(layout, self.dtype) + _HEADROOM_BYTES
        stream = self.stream if self.stream is not None else streamed_before
        free = available_memory(device) // own.copies
        if not stream and needed > free and own.device == AUTO and len(cards()) > 1:
            together = available_memory(AUTO)
            if needed <= together:
                device, free = AUTO, together
        if stream is None:
            stream = needed > free
            if stream:
                logger.warning(
                    "the model takes %.1f GB and %.1f GB of memory are free, so one layer is held at a time "
                    "(stream=True).",
                    (needed - _HEADROOM_BYTES) / 1e9,
                    free / 1e9,
                )
        computing = None  # on a card that of the weights
        if torch.device(one_device(device)).type == "cpu":
            weights = model_dtype(layout.config, layout.checkpoint, self.dtype)
            begun = (computing_before or self.computing) if self.dtype == AUTO else None
            computing = dtype_text(computing_dtype(weights, "cpu", begun or self.dtype))
        return replace(self, device=device, stream=stream, computing=computing)

    def agreed(
        self, layout: Layout, streamed_before: bool | None = None, computing_before: str | None = None
    ) -> Compute:
        """As :meth:`settled`, the main process deciding for all that share the work."""

        def decided() -> tuple[bool | None, str | None]:
            found = self.settled(layout, streamed_before, computing_before)
            return found.stream, found.computing

        stream, computing = self.together.from_main(decided)
        own = replace(self, stream=stream).settled(layout, computing_before=computing)
        if own.copies > 1 and self.together.is_main and own.device_type != "cpu":
            logger.warning("%d processes share each card; start as many as there are cards.", own.copies)
        return own

    def on_own_device(self) -> Compute:
        """Of several processes each on a card of its own, where there are any and none is named."""
        processes, found = self.together, cards()
        if processes.is_alone or not found or self.device not in (AUTO, found[0].partition(":")[0]):
            return self
        return replace(self, device=found[processes.local_rank % len(found)])

    @property
    def copies(self) -> int:
        """How many processes of a machine hold a model each in the memory of the device."""
        processes = self.together
        if processes.is_alone or self.device_type == "cpu":
            return processes.local_count
        return -(-processes.local_count // max(1, len(cards())))

    @property
    def together(self) -> Processes:
        """The processes that share the work."""
        return launched() if self.processes is None else self.processes

    def computing_dtype(self, layout: Layout) -> torch.dtype:
        """The precision to calculate a checkpoint's model in; as it is held in memory where that is not settled."""
        return model_dtype(layout.config, layout.checkpoint, self.computing or self.dtype)

    def precision_of(self, model: Any) -> torch.dtype:
        """The precision to calculate a model in memory in (``widened``), which the main process decides for all."""
        return getattr(torch, self.together.from_main(lambda: dtype_text(precision_of(model, self.dtype))))

    @property
    def for_transformers(self) -> Json:
        """What ``from_pretrained`` takes; with ``auto`` it moves to memory what does not fit on the cards."""
        return {"dtype": self.dtype, "device_map": AUTO if self.device == AUTO and cards() else self.runs_on}

    @property
    def runs_on(self) -> str:
        """The device, or the one that ``auto`` stands for."""
        return one_device(self.device)

    @property
    def places(self) -> list[str]:
        """Whose memory holds models that are only run, and not changed: with ``auto`` the processor's as well."""
        return [AUTO, "cpu"] if self.device == AUTO and cards() else [self.runs_on]

    @property
    def device_type(self) -> str:
        """``cpu``, ``cuda`` ..."""
        return torch.device(self.runs_on).type


def load_model(model: Source | Layout, compute: Compute) -> Any:
    """A whole model in memory; a quantised one is dequantised where its number formats are known here.

    Its tensors are read and not mapped (``checkpoints.checkpoint``), where they are in safetensors files that
    transformers need not dequantise itself.

    Raises:
        RequestError: If a tensor of a quantised one cannot be read.
        RunError: If a file is changed while it is read.
    """
    source = model.checkpoint.source if isinstance(model, Layout) else model
    with faults_of(f"config.json of {source.name_or_path}"):
        return _loaded(model, source, compute)


def _loaded(model: Source | Layout, source: Source, compute: Compute) -> Any:
    settings = {**compute.for_transformers, **source.for_transformers}
    substituted = substituted_in(source.config)
    plain = model.plain if isinstance(model, Layout) else _plain_of(source)
    if plain is None or not (plain.formats or _is_as_it_is(plain)):
        if plain is not None and plain.method == "torchao":  # of its int8 experts no other kernel can make a product
            settings["experts_implementation"] = "eager"
        return loader_of(source.config, source.trust_remote_code).from_pretrained(source.name_or_path, **settings)
    plain.check()
    if not substituted:  # else the files hold less than the config says
        _check_embeddings(plain, source)
    dtype = model_dtype(source.config, plain.checkpoint, compute.dtype)
    read = plain.checkpoint.held_open()
    made = {
        name: functools.partial(plain.read, read, name, dtype if tensor.format else None)
        for name, tensor in plain.tensors.items()
    }
    if not substituted:
        return load_made(source.config, made, source.name_or_path, {**settings, "dtype": dtype})
    whole, constants = with_zeros(made, plain.tensors, substituted, source.name_or_path)
    return answer_with_constants(
        load_made(source.config, whole, source.name_or_path, {**settings, "dtype": dtype}), constants
    )


def _plain_of(source: Source) -> Plain | None:
    """The tensors of a model's files; None where it has none that are known here, and is not said to be quantised.

    Raises:
        RequestError: If the files are damaged.
    """
    try:
        return Plain(Checkpoint.open(source), source.config)
    except RequestError:
        is_safetensors = any(source.find(name) for name in (SINGLE_FILE, INDEX_FILE))
        if is_safetensors or quantization_of(source.config) or _MODELOPT in source.files():
            raise
        return None


def _is_as_it_is(plain: Plain) -> bool:
    """Whether nothing says that a model is quantised, neither its config nor its files."""
    quantised = plain.method or _MODELOPT in plain.checkpoint.source.files()
    return not quantised and not any(tensor.format or tensor.fault for tensor in plain.tensors.values())


def _check_embeddings(plain: Plain, source: Source) -> None:
    """Raise where a config says more than the files hold; transformers would make all of it before it compares.

    Raises:
        RequestError: With both numbers.
    """
    held = sum(math.prod(tensor.shape) for tensor in plain.tensors.values())
    said = sum(parameter.numel() for parameter in build_on_meta(source.config, None, True).parameters())
    if said > 2 * held + 2**20:  # tied weights are counted twice
        raise RequestError(
            f"config.json of {source.name_or_path} describes a model of {said} parameters, and its files hold {held}; "
            "the checkpoint is damaged, or its config is of another model."
        )


def open_skeleton(layout: Layout, compute: Compute) -> Skeleton:
    """A model of which one layer at a time is read; all tensors are checked."""
    with faults_of(f"config.json of {layout.checkpoint.name_or_path}"):
        held = model_dtype(layout.config, layout.checkpoint, compute.dtype)
        return Skeleton(layout, held, compute.runs_on, compute.computing_dtype(layout))


def open_runner(layout: Layout, compute: Compute) -> LayerByLayer:
    """A checkpoint's model as something that runs layer by layer: in memory, or from its files."""
    compute = compute.settled(layout)
    if compute.stream:
        return open_skeleton(layout, compute)
    model = load_model(layout, compute)  # of the commit whose files were looked at
    check_model(model)  # nothing may be offloaded
    runner = LayerByLayer(model, dtype=compute.computing_dtype(layout))
    runner.checkpoint_dtype = model_dtype(layout.config, layout.checkpoint)
    return runner


def begun_with(*unfinished: tuple[Json, int] | None) -> tuple[bool | None, str | None]:
    """What the first unfinished work that there is was begun with, as ``Compute.settled`` takes it.

    Args:
        unfinished: As ``storage.growing.unfinished`` gives it.
    """
    begun = next((work[0] for work in unfinished if work is not None), None)
    if begun is None:
        return None, None
    computing = begun.get("computing_dtype")
    return bool(begun.get("stream")), computing if isinstance(computing, str) else None


def model_bytes(layout: Layout, dtype: str) -> int:
    """Bytes of a whole model in memory, dequantised, in a precision or (``"auto"``) the checkpoint's."""
    size = model_dtype(layout.config, layout.checkpoint, dtype).itemsize
    return sum(math.prod(tensor.shape) for tensor in layout.plain.tensors.values()) * size


def available_memory(device: str) -> int:
    """Bytes that are free where a model would be loaded: on the device, or for this process (its container).

    Args:
        device: Of ``auto`` all cards count, where there are any, less a tenth that accelerate leaves free.
    """
    if device == AUTO and (found := cards()):
        return int(_OF_CARDS * sum(map(free_bytes, found)))
    if device != AUTO and has_own_memory(device):
        return free_bytes(device)
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        free = int(sum(get_max_memory().values()))
    try:  # a container's limit, where there is one
        limit = int((_CGROUP / "memory.max").read_text())
        held = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - int(held["anon"]))
    except (OSError, ValueError, KeyError):
        pass
    return free
