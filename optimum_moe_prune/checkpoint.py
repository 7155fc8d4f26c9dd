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
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from .card import model_card
from .config import CONFIG_NAME
from .errors import RequestError, RunError
from .files import check_space, check_target, read_json, written_folder
from .layout import Layout
from .plan import PLAN_NAME, PruningPlan
from .progress import progress_bar
from .shards import INDEX_FILE, Checkpoint, find_file, other_files
from .standalone import standalone_class, write_standalone
from .surgery import check_plan_for_config, pruned_config, write_counts
from .tensor_files import TORCH_DTYPES, all_finite, header_bytes
from .unequal import FILE_STEM

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"
_OWN_FILES = (PLAN_NAME, CONFIG_NAME, "README.md", "config.json", f"{FILE_STEM}.py")
_BUFFER = 16 * 2**20
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
    checkpoint, config = layout.checkpoint, layout.config
    source = checkpoint.name_or_path
    check_target(target, overwrite, [source])
    check_plan_for_config(plan, config)
    standalone = standalone and plan.uniform_num_experts is None  # elsewhere nothing is needed
    if standalone:
        standalone_class(config)
    pieces = select(plan, layout)
    files = split_state_dict_into_shards_factory(
        pieces,
        get_storage_size=lambda piece: piece.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes(max_shard_size),
    )
    total = sum(piece.nbytes for piece in pieces.values())
    check_space(target, total)
    with written_folder(target, overwrite, [source]) as output:
        with progress_bar(total, "writing the checkpoint", "B") as bar:
            for file, names in files.filename_to_tensors.items():
                _write_file(output / file, {name: pieces[name] for name in names}, checkpoint, bar)
        if len(files.filename_to_tensors) > 1:
            metadata: dict[str, Any] = {**checkpoint.index_metadata, **files.metadata}
            if "total_parameters" in metadata:
                metadata["total_parameters"] = sum(math.prod(piece.shape) for piece in pieces.values())
            index = {"metadata": metadata, "weight_map": files.tensor_to_filename}
            _write_json(output / INDEX_FILE, index)
        carry_files(source, checkpoint.hub, output)
        _write_json(output / "config.json", _config_of(plan, layout))
        plan.save(output / PLAN_NAME)
        _write_json(output / CONFIG_NAME, plan.config if recipe is None else recipe)
        if standalone:
            write_standalone(output, config)
        model_card(plan, Path(target).resolve().name, standalone).save(output / "README.md")
    return Path(target)


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
    for index in sorted(set(layout.num_experts) | set(plan.original_num_experts)):
        expected, found = plan.original_num_experts.get(index, 0), layout.num_experts.get(index, 0)
        if expected != found:
            raise RequestError(
                f"this plan is for another model: layer {index} has {expected} experts in the plan and {found} in the "
                "checkpoint."
            )
    found_print = layout.fingerprint()
    if plan.made_for.get("fingerprint", found_print) != found_print:
        raise RequestError(
            "this plan was made for a model with other router weights "
            f"({plan.made_for.get('name_or_path') or 'unnamed'}, fingerprint {plan.made_for['fingerprint'][:12]}; "
            f"this checkpoint: {found_print[:12]})."
        )
    if layout.outside and plan.uniform_num_experts is not None:
        raise RequestError(
            f"{layout.outside[0]} and {len(layout.outside) - 1} more tensors are experts outside the model's layers, "
            "which the plan does not name and config.json would number wrongly. Remove them from the checkpoint, or "
            "prune with a global allocation, which leaves the model-wide number as it is."
        )
    _check_quantization(layout)
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
        pieces[new_name] = Piece(name, tensor.dtype, shape, nbytes, kept, checked=name in changed)
    return pieces


def carry_files(source: str | os.PathLike, hub: Mapping[str, Any], folder: Path) -> None:
    """Copy what lies beside a model's weights and is not there yet: tokenizer, generation config, code, ...

    The model card is not: the pruned model has its own.
    """
    for name in other_files(source, hub):
        if name in _OWN_FILES or (folder / name).exists():
            continue
        found = find_file(source, name, hub)
        if found is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, folder / name)


def _config_of(plan: PruningPlan, layout: Layout) -> dict[str, Any]:
    """The source's ``config.json`` with the pruning keys changed."""
    checkpoint = layout.checkpoint
    found = find_file(checkpoint.name_or_path, "config.json", checkpoint.hub)
    if found is None:
        raise RequestError(f"{checkpoint.name_or_path} has no config.json.")
    pruned = copy.deepcopy(layout.config)
    write_counts(layout.spec, pruned, plan.num_experts)
    return pruned_config(read_json(found), layout.config, pruned, layout.spec)


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
    width = {name: _row_bits(piece) for name, piece in pieces.items()}
    pieces = {name: pieces[name] for name in sorted(pieces, key=lambda name: -width[name])}
    header = header_bytes(
        {name: (piece.dtype, piece.shape, piece.nbytes) for name, piece in pieces.items()},
        {**checkpoint.metadata, "format": "pt"},
    )
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        opened: dict[str, int] = {}
        written = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        stack.callback(os.close, written)
        os.write(written, header)
        position = len(header)
        checks: list[Future[None]] = []
        buffer = bytearray(_BUFFER)
        for file, ranges in _ranges(pieces, checkpoint):
            if file not in opened:
                opened[file] = os.open(checkpoint.path(file), os.O_RDONLY)
                stack.callback(os.close, opened[file])
            begin, end = ranges[0][1].begin, ranges[-1][1].end
            checks += [pool.submit(_check_finite, opened[file], file, buffer, *r) for r in ranges if r[0].checked]
            _copy(opened[file], written, begin, end - begin, position, file, bar)
            position += end - begin
            while checks and checks[0].done():
                checks.pop(0).result()
        for check in checks:
            check.result()
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
    except SafetensorError as error:
        raise RunError(f"{path.name} was not written as it should be: {error}") from error
    if found != set(pieces):
        raise RunError(f"{path.name} was not written as it should be: it holds other tensors.")


@dataclass(frozen=True)
class _Range:
    begin: int
    end: int


def _ranges(pieces: Mapping[str, Piece], checkpoint: Checkpoint) -> Iterator[tuple[str, list[tuple[Piece, _Range]]]]:
    """The ranges of source files that the pieces are, in their order; neighbours stand together."""
    file = ""
    together: list[tuple[Piece, _Range]] = []
    for piece in pieces.values():
        entry = checkpoint.entry(piece.source)
        source = checkpoint.tensors[piece.source]
        if piece.rows is None:
            ranges = [_Range(entry.begin, entry.end)]
        else:
            row = entry.nbytes // entry.shape[0]
            ranges = [_Range(entry.begin + row * r, entry.begin + row * (r + 1)) for r in piece.rows]
        for found in ranges:
            if together and (file != source.file or together[-1][1].end != found.begin):
                yield file, together
                together = []
            file = source.file
            together.append((piece, found))
    if together:
        yield file, together


def _row_bits(piece: Piece) -> int:
    return 8 * piece.nbytes // max(1, math.prod(piece.shape))


def _copy(source: int, target: int, begin: int, count: int, position: int, file: str, bar: Any) -> None:
    """Copy bytes from file to file at given places, by the system where it can, without passing through memory."""
    by_system = hasattr(os, "copy_file_range")
    while count:
        wanted = min(count, 4 * _BUFFER)  # in portions, for the progress bar
        if by_system:
            try:
                done = os.copy_file_range(source, target, wanted, begin, position)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                by_system = False
                continue
        else:
            done = os.pwrite(target, os.pread(source, min(wanted, _BUFFER), begin), position)
        if done == 0:
            raise RunError(f"{file} became shorter while it was read.")
        begin, position, count = begin + done, position + done, count - done
        bar.update(done)


def _check_finite(source: int, file: str, buffer: bytearray, piece: Piece, place: _Range) -> None:
    """Raise if a retained weight is NaN or infinite; bytes that are no floating point are not looked at."""
    dtype = TORCH_DTYPES.get(piece.dtype)
    if dtype is None or not dtype.is_floating_point:
        return
    begin = place.begin
    while begin < place.end:
        data = memoryview(buffer)[: min(place.end - begin, len(buffer))]
        if os.preadv(source, [data], begin) < len(data):
            raise RunError(f"{file} became shorter while it was read.")
        if not all_finite(torch.frombuffer(data, dtype=dtype)):
            raise RunError(f"{file}: {piece.source} holds NaN or infinite weights; the checkpoint is damaged.")
        begin += len(data)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
