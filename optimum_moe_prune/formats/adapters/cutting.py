# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter of PEFT, trained on the original, cut by the plan that prunes the original.

What it adds to experts and routers that are left is what it added before, number by number. That it loads is asked of
PEFT before anything is written, in the original and in the pruned model, both without weights.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoints.source import Source
from ...errors import RequestError, RunError, faults_of
from ...names import CARD_NAME, CONFIG_NAME, LIST_NAME, PLAN_NAME
from ...plan import PruningPlan, with_parent
from ...progress import working
from ...progress.pace import size
from ...storage.files import write_json
from ...storage.folders import check_space, check_target, written_folder
from ...storage.tensor_files import (
    TensorEntry,
    all_finite,
    dtype_of,
    header_bytes,
    read_header,
    read_tensor,
    write_all,
)
from ...storage.values import Json, read_json
from ...surgery.carried import carried_from
from .injected import peft_version
from .original import Original, doubt, original_of
from .settings import SETTINGS, WEIGHTS, read_settings
from .tried import AdapterCut, adapter_cut

logger = logging.getLogger(__name__)


def prepare(
    plan: PruningPlan,
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
    base_model: str | os.PathLike | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> AdapterCutting:
    """Check the cut of an adapter whole; nothing is written (``formats.Prepare``).

    Args:
        plan: The plan.
        source: The adapter's folder.
        target: The folder to write.
        overwrite: Replace an earlier output of this package.
        max_shard_size: Not for an adapter, which PEFT keeps in one file.
        base_model: The model that it was trained on, or the pruned one; by default what the adapter names, or the
            plan.
        token: For a private repository of that.
        trust_remote_code: Whether code that comes with that may run.

    Raises:
        RequestError: If it is no LoRA, of another model or rank, or its original cannot be read.
    """
    if max_shard_size is not None:
        raise RequestError("max_shard_size is for checkpoints; PEFT keeps an adapter in one file.")
    folder = Path(source)
    check_target(target, overwrite, [source], PLAN_NAME)
    peft_version()
    settings = read_settings(folder)
    tensors, metadata = read_header(_weights_of(folder))
    original = original_of(plan, settings, base_model, {"token": token, "trust_remote_code": trust_remote_code})
    if said := doubt(plan, settings, original):
        logger.warning("%s", said)
    with faults_of(f"the adapter in {folder}"):
        cut = adapter_cut(plan, settings, tensors, original)
    check_space(target, total_bytes(cut.written))
    return AdapterCutting(plan, folder, Path(target), overwrite, original, cut, metadata)


def _weights_of(folder: Path) -> Path:
    """The file with an adapter's tensors.

    Raises:
        RequestError: If it is not there, or a pickle.
    """
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        raise RequestError(
            f"{folder} holds an adapter as a pickle (adapter_model.bin), which may run code when it is read; load it "
            "with PEFT and save it anew (save_pretrained writes safetensors)."
        )
    raise RequestError(f"{folder} has no {WEIGHTS}; it is not an adapter that PEFT saved whole.")


@dataclass(frozen=True)
class AdapterCutting:
    """The cut of an adapter that was checked and not begun (``formats.Cutting``)."""

    plan: PruningPlan
    folder: Path
    target: Path
    overwrite: bool
    original: Original
    cut: AdapterCut
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def facts(self) -> Json:
        """What is read and written, as plain values."""
        return {
            "form": "adapter",
            "adapter": str(self.folder),
            "original": self.original.name,
            "known_by": self.original.proof or None,
            "tensors": len(self.cut.tensors),
            "cut": self.cut.changed,
            "left_aside": len(self.cut.aside),
            "original_bytes": total_bytes(self.cut.tensors),
            "bytes": total_bytes(self.cut.written),
        }

    @property
    def summary(self) -> str:
        """The same in lines."""
        facts = self.facts
        lines = [
            f"an adapter of {self.original.name}"
            + (f" ({self.original.proof})" if self.original.proof else "")
            + f": {facts['cut']} of {facts['tensors']} tensors are about experts that go, "
            f"{size(facts['original_bytes'])} become {size(facts['bytes'])}."
        ]
        if not self.cut.changed:
            lines.append("Nothing in it is about experts that go; it is copied as it is.")
        if self.cut.aside:
            lines.append(
                f"PEFT {peft_version()} leaves {len(self.cut.aside)} tensors aside, in the original as well "
                f"({self.cut.aside[0]} ...)."
            )
        pruned = self.original.pruned or "the model that this plan prunes"
        lines.append(f"It will load with PeftModel.from_pretrained(model, {str(self.target)!r}) on {pruned}.")
        return "\n".join(lines)

    def write(self) -> Path:
        """Write the adapter beside the target and rename it.

        Raises:
            RunError: If something cannot be written, or what is kept is NaN or infinite.
        """
        source = Source(str(self.folder))
        with written_folder(self.target, self.overwrite, [self.folder], PLAN_NAME) as output:
            if self.cut.changed:
                self._write_tensors(output / WEIGHTS)
            else:
                shutil.copyfile(self.folder / WEIGHTS, output / WEIGHTS)
            settings = self.cut.settings
            if self.original.pruned is not None:
                settings = {**settings, "base_model_name_or_path": self.original.pruned, "revision": None}
            if settings == read_json(self.folder / SETTINGS):
                shutil.copyfile(self.folder / SETTINGS, output / SETTINGS)
            else:
                write_json(output / SETTINGS, settings, indent=2)
            for name in carried_from(source)[0]:
                if name not in (PLAN_NAME, CONFIG_NAME, LIST_NAME) and (path := source.find(name)) is not None:
                    (output / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, output / name)
            if (output / CARD_NAME).is_file():
                with open(output / CARD_NAME, "a", encoding="utf-8") as card:
                    card.write(self._said_in_card())
            with_parent(self.plan.without_recovery, source.stored_plan()).save(output / PLAN_NAME)
        return self.target

    def _write_tensors(self, path: Path) -> None:
        written, sources = self.cut.written, self.cut.sources
        order = sorted(written, key=lambda name: -dtype_of(written[name]).itemsize)  # each begins at a multiple of it
        total = sum(entry.nbytes for entry in written.values())
        with (
            open(self.folder / WEIGHTS, "rb", buffering=0) as source,
            open(path, "xb", buffering=0) as file,
            working("writing the adapter", total, "B", "wrote") as work,
        ):
            header = {name: (written[name].dtype, written[name].shape, written[name].nbytes) for name in order}
            write_all(file.fileno(), header_bytes(header, {"format": "pt", **self.metadata}))
            for name in order:
                value = self._kept(source.fileno(), sources[name])
                write_all(file.fileno(), value.flatten().view(torch.uint8).numpy().tobytes())
                work.update(written[name].nbytes)

    def _kept(self, file: int, name: str) -> Tensor:
        kept, entries = self.cut.kept[name], self.cut.tensors
        assert kept is not None
        try:
            value = read_tensor(file, entries[name])
            router = None if kept.table is None else read_tensor(file, entries[kept.table[0]])
        except (OSError, EOFError) as error:
            raise RunError(f"{self.folder / WEIGHTS} cannot be read, or has become shorter: {error}.") from error
        value = kept.of(value, router)
        if value.is_floating_point() and not all_finite(value):
            raise RunError(f"{name} of {self.folder} holds NaN or infinite values; the adapter is damaged.")
        return value

    def _said_in_card(self) -> str:
        plan = self.plan
        removed = sum(plan.original_num_experts.values()) - sum(plan.num_experts.values())
        return (
            f"\n## Cut for a pruned model\n\n{removed} of {sum(plan.original_num_experts.values())} experts of the "
            f"base model were removed (`{PLAN_NAME}`), and what this adapter added to them: it is for that pruned "
            "model, and does not fit the base model any more.\n"
        )


def total_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Bytes of all tensors."""
    return sum(entry.nbytes for entry in entries.values())
