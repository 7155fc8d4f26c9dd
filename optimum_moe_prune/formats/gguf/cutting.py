# SPDX-License-Identifier: Apache-2.0
"""A plan applied to a GGUF file: what is checked before, and what is written."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...architectures.tables import remapped
from ...checkpoints.cutting import Piece
from ...errors import RequestError, RunError
from ...plan import PruningPlan, with_parent
from ...progress.pace import size
from ...storage.files import check_file, sync
from ...storage.folders import check_space, working_on
from ...storage.gguf_files import read_gguf_plan
from ...storage.paths import real_path
from ...storage.values import Json
from .checks import check_belongs, check_count, check_keys, check_uniform, heads_of, with_heads_settled
from .model import PART_NAME, GgufModel, open_model
from .routers import UNKNOWN
from .tensors import COUNT, Block, moe_blocks, num_experts, renumbered
from .writing import NewTensor, Output, own_plan

logger = logging.getLogger(__name__)

_OUTPUT = "output.gguf"
_SUFFIX = ".gguf"
_DTYPES = {"F64", "F32", "F16", "BF16"}
"""Types whose numbers are looked at for NaN and infinity."""


@dataclass(frozen=True)
class GgufCutting:
    """A cut of a GGUF file that was checked and not begun.

    Attributes:
        summary: What will be read and written, in lines for people.
        facts: The same as plain values.
    """

    summary: str
    facts: Json
    _output: Output = field(repr=False)
    _target: Path = field(repr=False)
    _overwrite: bool = field(repr=False)

    def write(self) -> Path:
        """Write beside the target and rename; the target.

        Raises:
            RunError: If a retained weight is NaN or infinite, or something cannot be written.
        """
        with working_on(self._target) as partial:
            check_target(self._target, self._output.model, self._overwrite)
            output = partial / _OUTPUT
            try:
                output.unlink(missing_ok=True)
                self._output.write(output)
                sync(output)
                os.replace(output, real_path(self._target))
                with contextlib.suppress(OSError):  # not every file system can; the output is whole in any case
                    sync(self._target.parent)
            except OSError as error:
                raise RunError(f"writing {self._target} failed: {error}. Nothing was left there.") from error
            finally:
                with contextlib.suppress(OSError):
                    output.unlink(missing_ok=True)
        return self._target


def prepare(
    plan: PruningPlan,
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
) -> GgufCutting:
    """What will be done to a GGUF file; nothing is written (``formats.Prepare``).

    Raises:
        RequestError: If the plan is for another model, a file is damaged, or the target is in the way.
    """
    if max_shard_size is not None:
        raise RequestError(
            "max_shard_size is for outputs of several files, and a GGUF file is written as one; llama.cpp's "
            "llama-gguf-split makes parts of it."
        )
    model = open_model(source)
    path = check_target(target, model, overwrite)
    blocks = moe_blocks(model)
    check_keys(model)
    count = check_uniform(plan, model)
    proven = check_belongs(plan, model, blocks)
    plan, notes = with_heads_settled(plan.without_recovery, model, blocks, count)
    check_count(plan, model, count)
    if proven == UNKNOWN:
        notes.append(
            "whether the plan was made for these routers is not proven: it does not say for which it was; layers and "
            "numbers of experts fit"
        )
    for note in notes:
        logger.warning("%s", note)
    output = Output(model, _selected(plan, model, blocks), count, with_parent(plan, _parent(model)))
    check_space(path.parent, output.nbytes)
    facts = _facts(output, blocks, proven, notes)
    return GgufCutting(_summary(facts), facts, output, path, overwrite)


def check_target(target: str | os.PathLike, model: GgufModel, overwrite: bool) -> Path:
    """The file to write as a path, if it may be written.

    Raises:
        RequestError: If it is no ``.gguf`` file, is in the way, or is one that is read.
    """
    path = check_file(target, _SUFFIX, overwrite, own_plan)
    if PART_NAME.fullmatch(path.name):
        raise RequestError(
            f"{path} is the name of one of several files, and the output is one; name it without its number."
        )
    there = real_path(path)
    for part in model.parts:
        if there.exists() and os.path.samefile(there, part.path):
            raise RequestError(f"{target} is what is read; name another file.")
    return path


def _selected(plan: PruningPlan, model: GgufModel, blocks: Mapping[int, Block]) -> dict[str, NewTensor]:
    """What a plan retains of each tensor, under its new name, in the order of the source."""
    total = num_experts(model)
    changed: dict[str, tuple[str, Piece] | None] = {}
    experts = {name for block in blocks.values() for name in block.stacked}
    for index, block in blocks.items():
        retained = plan.retained[index]
        number_of = {old: new for new, old in enumerate(retained)}
        for old, own in block.numbered.items():
            for name in own.values():
                new = renumbered(name, number_of[old]) if old in number_of else None
                changed[name] = None if new is None else (new, _whole(model, name, True))
        if len(retained) == total:
            continue
        for name in block.stacked:
            changed[name] = name, _rows(model, name, retained)
        if block.table:
            changed[block.table] = block.table, _table(model, block, retained)
    tensors: dict[str, NewTensor] = {}
    for name, placed in model.tensors.items():
        found = changed.get(name, (name, _whole(model, name, name in experts)))
        if found is not None:
            tensors[found[0]] = NewTensor(placed.tensor.kind, found[1])
    return tensors


def _whole(model: GgufModel, name: str, checked: bool) -> Piece:
    placed = model.tensors[name]
    return Piece(name, _dtype(model, name), placed.shape, placed.nbytes, checked=checked)


def _rows(model: GgufModel, name: str, retained: tuple[int, ...]) -> Piece:
    """A tensor without the experts that go: blocks lie along the innermost dimension, so each has bytes of its own."""
    placed = model.tensors[name]
    if not placed.has_rows:
        raise RequestError(
            f"{model.path}: {name} ({placed.type_name}) cannot be cut between experts: they share blocks."
        )
    nbytes = placed.nbytes // placed.rows * len(retained)
    return Piece(name, _dtype(model, name), placed.with_rows(len(retained)), nbytes, retained, checked=True)


def _table(model: GgufModel, block: Block, retained: tuple[int, ...]) -> Piece:
    """A table of ids that names the retained experts."""
    placed = model.tensors[block.table]
    if not placed.type_name.startswith("I"):
        raise RequestError(f"{model.path}: {block.table} is of type {placed.type_name}, and ids are whole numbers.")
    old = model.values(block.table)
    if not bool(((old >= 0) & (old < num_experts(model))).all()):
        raise RequestError(f"{model.path}: {block.table} names experts that there are not; the file is damaged.")
    new = remapped(old, model.values(block.router), retained).numpy()
    data = new.astype(f"{model.parts[0].order}i{new.itemsize}").tobytes()
    return Piece(block.table, placed.type_name, placed.shape, len(data), data=data)


def _dtype(model: GgufModel, name: str) -> str:
    """The name of a type as safetensors has it, for the check of numbers; of what cannot be checked its own."""
    placed = model.tensors[name]
    native = model.parts[0].order == "<"
    return placed.type_name if placed.type_name in _DTYPES and native else f"GGUF {placed.type_name}"


def _parent(model: GgufModel) -> PruningPlan | None:
    """The plan that the source was made by, where it was pruned by this package."""
    try:
        return PruningPlan.from_dict(read_gguf_plan(model.parts[0].path))
    except RequestError:
        return None


def _facts(output: Output, blocks: Mapping[int, Block], proven: str, notes: list[str]) -> Json:
    model, plan = output.model, output.plan
    heads = heads_of(model, blocks)
    kinds: dict[str, int] = {}
    for block in blocks.values():
        for name in (*block.stacked, *(n for own in block.numbered.values() for n in own.values())):
            if name not in (block.router, *block.beside):
                kinds[model.tensors[name].type_name] = kinds.get(model.tensors[name].type_name, 0) + 1
    return {
        "form": "GGUF",
        "model": str(model.path),
        "files": len(model.parts),
        "architecture": model.architecture,
        "model_type": plan.model_type,
        "expert_types": sorted(kinds, key=lambda kind: -kinds[kind]),
        "layers": [index for index in blocks if index not in heads],
        "heads": heads,
        "original_num_experts": num_experts(model),
        "num_experts": output.count,
        "count_key": model.key(COUNT),
        "original_bytes": model.nbytes,
        "bytes": output.nbytes,
        "known_by": proven,
        "opened_by": "llama.cpp",
        "notes": notes,
    }


def _summary(facts: Json) -> str:
    files = "" if facts["files"] == 1 else f" in {facts['files']} files"
    heads = f" and {len(facts['heads'])} head{'s' if len(facts['heads']) > 1 else ''}" if facts["heads"] else ""
    before, after = facts["original_num_experts"], facts["num_experts"]
    one = "" if facts["files"] == 1 else ", in one file (llama-gguf-split makes parts of it)"
    lines = {
        "model": f"{facts['model']} ({facts['architecture']}; {facts['model_type']}){files}: {len(facts['layers'])} "
        f"layers{heads} with {before} experts in {', '.join(facts['expert_types'])}, {size(facts['original_bytes'])}",
        "keeps": f"{after} of {before} experts in each layer ({1 - after / before:.1%} removed)",
        "routers": f"the plan's, known {facts['known_by']}" if facts["known_by"] != UNKNOWN else "not compared",
        "writes": f"{size(facts['bytes'])}{one}, {facts['count_key']} = {after}; nothing is quantised anew",
        "opened": f"by {facts['opened_by']}, and what is built on it, as the source is",
    }
    return "\n".join(f"{name:<7} {text}" for name, text in lines.items())
