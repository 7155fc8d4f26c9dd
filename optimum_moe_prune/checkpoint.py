# SPDX-License-Identifier: Apache-2.0
"""Apply a plan to a checkpoint's files: tensor by tensor, as bytes, without a model.

What is retained of a tensor is one or more ranges of bytes: all of it, or rows of its first dimension. They are copied
by the system from file to file, whatever the dtype means; no tensor is held in memory. Retained experts are looked at
for NaN and infinity beside the copying; what is pruned is not read.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from .card import BASE_CARD_NAME, CARD_NAME, REPORT_NAME, REPORT_PICTURES, write_card
from .comparison import EVALUATION_NAME
from .config import CONFIG_NAME
from .errors import RequestError, RunError
from .files import check_space, check_target, read_json, written_folder
from .layout import Layout
from .plan import PLAN_NAME, PruningPlan
from .progress import progress_bar
from .shards import INDEX_FILE, Checkpoint, find_file, other_files
from .standalone import standalone_class, write_standalone
from .surgery import check_plan_for_config, check_routers, pruned_config, write_counts
from .tensor_files import TORCH_DTYPES, all_finite, header_bytes, reserve, write_all
from .unequal import FILE_STEM

MAX_SHARD_SIZE = "5GB"
_OWN_FILES = (PLAN_NAME, CONFIG_NAME, CARD_NAME, REPORT_NAME, EVALUATION_NAME, "config.json", f"{FILE_STEM}.py")
_BUFFER = 4 * 2**20  # bytes looked at, or copied by hand, at once
_TOGETHER = 32 * 2**20  # bytes of neighbouring ranges that are copied in one piece
_AT_ONCE = 4
_SAMPLE = 4096  # bytes compared at each end of a range
_NOT_HERE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Piece:
    """What is retained of a source tensor.

    Attributes:
        source: Its name there.
        dtype: As the format names it.
        shape: The shape of what is retained.
        nbytes: Its bytes.
        rows: The retained rows of the first dimension, or None for all.
        checked: Whether NaN and infinity in it are an error.
    """

    source: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    rows: tuple[int, ...] | None = None
    checked: bool = False


def apply_to_checkpoint(
    plan: PruningPlan,
    layout: Layout,
    target: str | os.PathLike,
    *,
    recipe: Mapping[str, Any] | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    standalone: bool = False,
) -> Path:
    """Write a pruned copy of a checkpoint. Memory does not grow with the size of its tensors.

    Tensors keep the names, dtypes and layout (one per expert, or fused) of the source. All is written beside the
    target and renamed. Weights that no layer of the model holds are copied as they are.

    Args:
        plan: The plan.
        layout: The checkpoint of the model it was made for.
        target: The folder to write, absent or empty.
        recipe: To store beside the plan; by default the plan's own.
        max_shard_size: The most bytes in a file, as a number or ``"5GB"``.
        overwrite: Replace an earlier output of this package.
        standalone: Where layers keep different numbers of experts, add a modelling file, with which
            ``trust_remote_code=True`` loads the checkpoint without this package.

    Returns:
        The target.

    Raises:
        RequestError: If the plan is for another model, the source is damaged, or the target is in the way.
        RunError: If a retained weight is NaN or infinite, or something cannot be written.
    """
    checkpoint = layout.checkpoint
    source = checkpoint.name_or_path
    check_target(target, overwrite, [source])
    check_plan_for_config(plan, layout.config)
    uniform = plan.uniform_num_experts is not None
    check_request(layout, uniform, standalone)
    pieces = select(plan, layout)
    files = split_state_dict_into_shards_factory(
        pieces,
        get_storage_size=lambda piece: piece.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes(max_shard_size),
    )
    total = sum(piece.nbytes for piece in pieces.values())
    check_space(target, total)
    config = _config_of(plan, layout)
    with written_folder(target, overwrite, [source]) as output:
        with progress_bar(total, "writing the checkpoint", "B") as bar:
            for file, names in files.filename_to_tensors.items():
                _write_file(output / file, {name: pieces[name] for name in names}, checkpoint, bar)
        checkpoint.check_unchanged()
        if len(files.filename_to_tensors) > 1:
            metadata: dict[str, Any] = {**checkpoint.index_metadata, **files.metadata}
            if "total_parameters" in metadata:
                metadata["total_parameters"] = sum(math.prod(piece.shape) for piece in pieces.values())
            _write_json(output / INDEX_FILE, {"metadata": metadata, "weight_map": files.tensor_to_filename})
        carry_files(source, checkpoint.hub, output)
        _write_json(output / "config.json", config)
        plan.save(output / PLAN_NAME)
        _write_json(output / CONFIG_NAME, plan.config if recipe is None else recipe)
        standalone = standalone and not uniform  # elsewhere nothing is needed
        if standalone:
            write_standalone(output, layout.config)
        write_card(output, Path(target).resolve().name)
    return Path(target)


def check_request(layout: Layout, uniform: bool, standalone: bool) -> None:
    """Raise unless a checkpoint can be pruned, as far as can be told before it is known which experts go.

    Args:
        layout: The checkpoint.
        uniform: Whether every layer will keep the same number of experts.
        standalone: Whether a modelling file is asked for.

    Raises:
        RequestError: If it cannot.
    """
    if standalone and not uniform:
        standalone_class(layout.config)
    if layout.outside and uniform:
        more = f" and {len(layout.outside) - 1} more tensors" if len(layout.outside) > 1 else ""
        raise RequestError(
            f"{layout.outside[0]}{more} of {layout.checkpoint.name_or_path} are experts outside the model's layers, "
            "which no plan names and config.json would number wrongly. Remove them from the checkpoint, or prune with "
            "a global allocation, which leaves the model-wide number as it is."
        )
    _source_config(layout)
    _check_quantization(layout)


def shard_bytes(size: str | int) -> int:
    """The most bytes in a file, of a number or ``"500MB"``, ``"5GB"``.

    Raises:
        RequestError: If it is neither.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, factor = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    if not number.strip().isdigit() or int(number) == 0:
        raise RequestError(f"max_shard_size is {size!r}; it must be a number of bytes, or one with KB, MB, GB or TB.")
    return int(number) * factor


def select(plan: PruningPlan, layout: Layout) -> dict[str, Piece]:
    """What a plan retains of each tensor, under its new name, in the order of the source.

    Raises:
        RequestError: If the plan is for another model, or a tensor cannot be pruned.
        RunError: If a router holds NaN or infinity.
    """
    checkpoint, spec = layout.checkpoint, layout.spec
    for index in sorted(set(layout.num_experts) ^ set(plan.original_num_experts)):
        if index in layout.num_experts:
            raise RequestError(f"this plan is for another model: it does not name layer {index}, which has experts.")
        raise RequestError(
            f"the files of {checkpoint.name_or_path} hold no experts of layer {index}, which the plan names; the "
            "checkpoint is damaged."
        )
    check_routers(plan, layout.fingerprint())
    changed: dict[str, tuple[str, tuple[int, ...] | None] | None] = {}  # name -> new name and rows, or None: pruned
    for index, layer in layout.layers.items():
        retained = plan.retained[index]
        number_of = {old: new for new, old in enumerate(retained)}
        for number, tensors in layer.experts.items():
            for path, name in tensors.items():
                if number not in number_of:
                    changed[name] = None
                    continue
                start = name[: -len(f"{number}.{path}")]
                changed[name] = (f"{start}{number_of[number]}.{path}", None)
        rows = None if len(retained) == layer.num_experts else retained
        for name in layer.fused.values():
            changed[name] = (name, rows)
        for path, name in layer.router.items():
            whole = path not in spec.router_tensors and math.prod(checkpoint.tensors[name].shape) == 1
            changed[name] = (name, None if whole else rows)
    pieces = {}
    for name, tensor in checkpoint.tensors.items():
        new = changed.get(name, (name, None))
        if new is None:
            continue
        new_name, kept = new
        shape, nbytes = tensor.shape, tensor.nbytes
        if kept is not None:
            if nbytes % shape[0]:
                raise RequestError(f"{name} ({tensor.dtype}) cannot be cut between rows: they share bytes.")
            shape, nbytes = (len(kept), *shape[1:]), nbytes // shape[0] * len(kept)
        assert new_name not in pieces  # the layout holds each tensor once
        pieces[new_name] = Piece(name, tensor.dtype, shape, nbytes, kept, checked=name in changed)
    return pieces


def carry_files(source: str | os.PathLike, hub: Mapping[str, Any], folder: Path) -> None:
    """Copy what lies beside a model's weights and is not there yet: tokenizer, generation config, code, ...

    The model card is kept under another name, since the pruned model has its own. Of a model that was pruned before
    it is the card of the model before that which is kept.
    """
    names = other_files(source, hub)
    if CARD_NAME in names and BASE_CARD_NAME not in names:
        card = find_file(source, CARD_NAME, hub)
        if card is not None:
            shutil.copyfile(card, folder / BASE_CARD_NAME)
    for name in names:
        if name in _OWN_FILES or name.startswith(f"{REPORT_PICTURES}/") or (folder / name).exists():
            continue
        found = find_file(source, name, hub)
        if found is None:
            raise RunError(f"{name} of {source} is listed there and cannot be fetched.")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, folder / name)


def _source_config(layout: Layout) -> dict[str, Any]:
    """The source's ``config.json``."""
    found = find_file(layout.checkpoint.name_or_path, "config.json", layout.checkpoint.hub)
    if found is None:
        raise RequestError(f"{layout.checkpoint.name_or_path} has no config.json.")
    return read_json(found)


def _config_of(plan: PruningPlan, layout: Layout) -> dict[str, Any]:
    """The source's ``config.json`` with the pruning keys changed."""
    pruned = copy.deepcopy(layout.config)
    write_counts(layout.spec, pruned, plan.num_experts)
    return pruned_config(_source_config(layout), layout.config, pruned, layout.spec)


def _check_quantization(layout: Layout) -> None:
    """Refuse a quantised checkpoint whose settings name single experts: their numbers change."""
    settings = getattr(layout.config, "quantization_config", None)
    text = json.dumps(settings if isinstance(settings, dict) else getattr(settings, "__dict__", {}), default=str)
    for index, layer in layout.layers.items():
        for number in layer.experts:
            if f".{index}." in text and f"{layout.spec.experts}.{number}." in text:
                raise RequestError(
                    "the quantization_config of this checkpoint names single experts "
                    f"({layout.spec.experts}.{number}), which pruning numbers anew; that is not supported."
                )


# ------------------------------------------------------------------------------------------- bytes


def _write_file(path: Path, pieces: dict[str, Piece], checkpoint: Checkpoint, bar: Any) -> None:
    """Write one file, and have the library check it."""
    # Wide dtypes first: then every tensor lies at a multiple of the size of its elements, as the library writes them.
    width = {name: _element_bits(piece) for name, piece in pieces.items()}
    pieces = {name: pieces[name] for name in sorted(pieces, key=lambda name: -width[name])}
    header = header_bytes(
        {name: (piece.dtype, piece.shape, piece.nbytes) for name, piece in pieces.items()},
        {**checkpoint.metadata, "format": "pt"},
    )
    with contextlib.ExitStack() as files:
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        files.callback(os.close, target)
        size = len(header) + sum(piece.nbytes for piece in pieces.values())
        reserve(target, size)  # a full disk is met now, and what is reserved at once is written faster
        write_all(target, header)
        position = len(header)
        opened: dict[str, int] = {}
        waiting: deque[Future[int]] = deque()
        # Several at once, so that one reads while another writes. The pool ends before the files are closed.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for file, ranges in _ranges(pieces, checkpoint):
                    if file not in opened:
                        opened[file] = checkpoint.opened(file)
                        files.callback(os.close, opened[file])
                    waiting.append(pool.submit(_copied, opened[file], target, ranges, position, file))
                    position += ranges[-1].end - ranges[0].begin
                    while len(waiting) > 2 * _AT_ONCE or (waiting and waiting[0].done()):
                        bar.update(waiting.popleft().result())
                while waiting:
                    bar.update(waiting.popleft().result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    try:
        with safe_open(path, framework="pt") as written:
            found_shapes = {name: tuple(written.get_slice(name).get_shape()) for name in written.keys()}
    except SafetensorError as error:
        raise RunError(f"{path.name} was not written as it should be: {error}") from error
    if found_shapes != {name: piece.shape for name, piece in pieces.items()}:
        raise RunError(f"{path.name} was not written as it should be: it holds other tensors.")


@dataclass(frozen=True)
class _Range:
    """Neighbouring bytes of a source file, of one tensor."""

    piece: Piece
    begin: int
    end: int


def _ranges(pieces: Mapping[str, Piece], checkpoint: Checkpoint) -> Iterator[tuple[str, list[_Range]]]:
    """The ranges of source files that the pieces are, in their order; neighbours stand together, up to a bound."""
    file = ""
    together: list[_Range] = []
    for piece in pieces.values():
        entry = checkpoint.entry(piece.source)
        source = checkpoint.tensors[piece.source]
        if piece.rows is None:
            ranges = [_Range(piece, entry.begin, entry.end)]
        else:
            row = entry.nbytes // entry.shape[0]
            ranges = [_Range(piece, entry.begin + row * r, entry.begin + row * (r + 1)) for r in piece.rows]
        for found in (part for whole in ranges for part in _parts(whole)):
            apart = together and (file != source.file or together[-1].end != found.begin)
            if apart or (together and found.end - together[0].begin > _TOGETHER):
                yield file, together
                together = []
            file = source.file
            together.append(found)
    if together:
        yield file, together


def _parts(whole: _Range) -> Iterator[_Range]:
    """A range cut into parts that are copied in one piece; a multiple of any element's size."""
    for begin in range(whole.begin, whole.end, _TOGETHER):
        yield _Range(whole.piece, begin, min(begin + _TOGETHER, whole.end))


def _element_bits(piece: Piece) -> int:
    return 8 * piece.nbytes // max(1, math.prod(piece.shape))


def _copy(source: int, target: int, begin: int, count: int, position: int, file: str) -> None:
    """Copy bytes from file to file at given places, by the system where it can, without passing through memory."""
    by_system = hasattr(os, "copy_file_range")
    while count:
        done = 0
        if by_system:
            try:
                done = os.copy_file_range(source, target, count, begin, position)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
            by_system = done > 0  # some file systems say 0 for cannot
        if not by_system:
            data = os.pread(source, min(count, _BUFFER), begin)
            if not data:
                raise RunError(f"{file} became shorter while it was read.")
            done = os.pwrite(target, data, position)
        begin, position, count = begin + done, position + done, count - done


def _copied(source: int, target: int, ranges: list[_Range], position: int, file: str) -> int:
    """Copy neighbouring ranges and look at what was written while it is at hand; how many bytes it was.

    Experts and routers must be finite, and the first and last bytes of every range those of the source.
    """
    begin, end = ranges[0].begin, ranges[-1].end
    if hasattr(os, "posix_fadvise"):  # else the system reads ahead into experts that are not retained
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(source, begin, end - begin, os.POSIX_FADV_WILLNEED)
    _copy(source, target, begin, end - begin, position, file)
    for found in ranges:
        _check_ends(source, target, found, position + found.begin - begin)
        if found.piece.checked:
            _check_finite(target, found, position + found.begin - begin, file)
    return end - begin


def _check_ends(source: int, target: int, found: _Range, position: int) -> None:
    count = found.end - found.begin
    for offset in {0, max(0, count - _SAMPLE)}:
        wanted = min(_SAMPLE, count)
        if os.pread(source, wanted, found.begin + offset) != os.pread(target, wanted, position + offset):
            raise RunError(f"{found.piece.source} was not written as it should be: its bytes differ.")


def _check_finite(target: int, found: _Range, position: int, file: str) -> None:
    dtype = TORCH_DTYPES.get(found.piece.dtype)
    if dtype is None or not dtype.is_floating_point:
        return
    count = found.end - found.begin
    buffer = bytearray(min(count, _BUFFER))
    for offset in range(0, count, _BUFFER):
        data = memoryview(buffer)[: min(count - offset, _BUFFER)]
        if os.preadv(target, [data], position + offset) < len(data):
            raise RunError(f"{found.piece.source} was not written as it should be: the file is too short.")
        if not all_finite(torch.frombuffer(data, dtype=dtype)):
            raise RunError(f"{file}: {found.piece.source} holds NaN or infinite weights; the checkpoint is damaged.")


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
