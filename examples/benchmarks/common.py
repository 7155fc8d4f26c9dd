# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: models, timing in pairs, peaks of memory in a process of their own, tables."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from optimum_moe_prune import CalibrationSet
from optimum_moe_prune.models.devices import finish
from optimum_moe_prune.names import dtype_name
from optimum_moe_prune.storage.files import sync

MIB = 2**20
GIB = 2**30
_CHILD = "--child"
_SAMPLE_SECONDS = 0.02


def make_model(
    kind: str, experts: int, top_k: int, hidden: int, width: int, layers: int, dtype: str
) -> PreTrainedModel:
    """A random model with a small vocabulary and routers that spread their tokens."""
    torch.manual_seed(0)
    shared = {
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "num_experts_per_tok": top_k,
        "max_position_embeddings": 4096,
    }
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype_name(dtype)))
    try:
        if kind == "mixtral":
            model: PreTrainedModel = MixtralForCausalLM(MixtralConfig(**shared, num_local_experts=experts))
        else:
            model = Qwen2MoeForCausalLM(
                Qwen2MoeConfig(
                    **shared, num_experts=experts, moe_intermediate_size=width, shared_expert_intermediate_size=width
                )
            )
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(0, 0.05)
    return model.eval()


def make_samples(tokens: int, length: int = 512, vocabulary: int = 1024) -> CalibrationSet:
    """Random token samples, all of one length, so that no time goes into padding."""
    ids = torch.randint(0, vocabulary, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    return CalibrationSet.build(ids, max_length=length)


# ------------------------------------------------------------------------------------------- time


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratio_in_pairs(
    work: Callable[[], object],
    base: Callable[[], object],
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> tuple[float, float, float]:
    """Median seconds of ``work`` and of ``base``, and of their ratios; taken in turn after one warm-up each.

    ``before`` runs before each of them and is not counted.
    """

    def timed(what: Callable[[], object]) -> float:
        before()
        return seconds(what)

    timed(work), timed(base)
    pairs = [(timed(work), timed(base)) for _ in range(repeats)]
    mine, other = zip(*pairs, strict=True)
    return (
        statistics.median(mine),
        statistics.median(other),
        statistics.median(a / b for a, b in pairs),
    )


def tflops(tokens: int, rows: int, columns: int, dtype: torch.dtype, device: str, most: float = 4.0) -> float:
    """The best of several times of multiplying matrices ``(tokens, rows) x (rows, columns)``, in TFLOP/s.

    A processor without units for a dtype may take a second for one product: it ends after about ``most`` seconds.
    """
    x = torch.randn(tokens, rows, device=device).to(dtype)
    weight = torch.randn(columns, rows, device=device).to(dtype)

    def multiply(times: int = 1) -> None:
        for _ in range(times):
            torch.nn.functional.linear(x, weight)
        finish({x.device})

    multiply()  # what is done once is not counted
    alone = max(seconds(multiply), 1e-6)
    times = max(1, min(10, round(most / 6 / alone)))
    rounds = max(1, min(6, round(most / (times * alone))))
    taken = min([alone, *(seconds(lambda: multiply(times)) / times for _ in range(rounds))])
    return 2 * tokens * rows * columns / taken / 1e12


# ------------------------------------------------------------------------------------------- files


def drop_cache(files: Iterable[str | os.PathLike]) -> None:
    """Put files on disk and out of the system's cache, so that they are really read next time."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_through(files: Iterable[str | os.PathLike], most: int = sys.maxsize) -> int:
    """Read files one after another, in large pieces, up to so many bytes in all; how many it was."""
    buffer, done = memoryview(bytearray(8 * MIB)), 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while done < most and (count := file.readinto(buffer)):
                done += count
    return done


def copy_with_cp(files: Iterable[str | os.PathLike], folder: Path) -> None:
    """Copy files into an existing folder with ``cp``, and wait until they are on disk."""
    subprocess.run(["cp", *map(str, files), str(folder)], check=True)
    for path in (*folder.iterdir(), folder):
        sync(path)


def fresh(*folders: Path) -> None:
    """Remove folders and what is in them, on disk as well."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def watching() -> Iterator[dict[str, float]]:
    """Time, memory and disk traffic of what runs inside a ``with``, known when it ends (Linux).

    ``seconds``; ``GB read`` and ``GB written``, from and to disks as the system counts them for this process;
    ``peak MiB``, the most anonymous memory (``RssAnon``, sampled every 20 ms), and ``max RSS MiB`` (``VmHWM``: as
    ``ru_maxrss``, with touched pages of files), both above what they were at the beginning.
    """
    seen: dict[str, float] = {}
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what was freed and is still held would hide a peak
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    anonymous, resident = _proc("status", "RssAnon"), _proc("status", "VmRSS")
    peak, over = anonymous, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(_SAMPLE_SECONDS):
            peak = max(peak, _proc("status", "RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    read, written = _proc("io", "read_bytes"), _proc("io", "write_bytes")
    thread.start()
    began = time.perf_counter()
    try:
        yield seen
    finally:
        seen["seconds"] = time.perf_counter() - began
        over.set()
        thread.join()
        peak = max(peak, _proc("status", "RssAnon"))
        seen["GB read"] = (_proc("io", "read_bytes") - read) / 1e9
        seen["GB written"] = (_proc("io", "write_bytes") - written) / 1e9
        seen["peak MiB"] = (peak - anonymous) / MIB
        seen["max RSS MiB"] = max(0, _proc("status", "VmHWM") - resident) / MIB


def _proc(file: str, name: str) -> int:
    """A number the system keeps about this process, in bytes."""
    with open(f"/proc/self/{file}", encoding="utf-8") as lines:
        value = next(line.split(":", 1)[1] for line in lines if line.startswith(f"{name}:"))
    return int(value.removesuffix("kB\n")) * (1024 if "kB" in value else 1)


def in_child(script: str, phase: str, most: float | None = None, **values: Any) -> dict[str, Any]:
    """What a phase of a script answers, run in a process of its own; ``serve`` is the other side.

    Args:
        script: The script.
        phase: The phase.
        most: Seconds after which it is ended.
        values: What the phase is called with.

    Raises:
        TimeoutError: If it took longer.
    """
    command = [sys.executable, script, _CHILD, phase, json.dumps(values, default=str)]
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=most)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{phase} did not end within {most:.0f} s") from error
    if ran.returncode:
        raise SystemExit(f"{Path(script).name}: {phase} failed with exit code {ran.returncode}.")
    return json.loads(ran.stdout.splitlines()[-1])


class Phases:
    """Phases of a script one after another, as long as the budget lasts; each is told of as it ends.

    Args:
        script: The script.
        phases: Those that are asked for.
        budget: Seconds for all; None for as many as they take.
    """

    def __init__(self, script: str, phases: Collection[str], budget: float | None) -> None:
        self._script = script
        self._end = None if budget is None else time.perf_counter() + budget
        self._phases = phases

    def phase(self, name: str, **values: Any) -> dict[str, Any] | None:
        """What a phase answers; None where it was not asked for, or there was no time for it."""
        if name not in self._phases:
            return None
        left = None if self._end is None else self._end - time.perf_counter()
        began = time.perf_counter()
        try:
            if left is not None and left <= 0:
                raise TimeoutError(f"{name} was not begun: the budget is spent")
            answer = in_child(self._script, name, left, **values)
        except TimeoutError as error:
            print(f"{error} (--budget).", flush=True)
            return None
        more = "".join(f"; {key} {answer[key]:.1f}" for key in answer if key.startswith("seconds "))
        traffic = ", ".join(f"{answer[key]:.2f} {key}" for key in ("GB read", "GB written"))
        print(
            f"{name}: {answer['seconds']:.1f} s, {time.perf_counter() - began:.1f} s with its process; "
            f"{traffic}{more}.",
            flush=True,
        )
        return answer


def serve(phases: Mapping[str, Callable[..., dict[str, Any]]]) -> bool:
    """In a process that ``in_child`` began: run the phase and print what it answers. False in any other."""
    if sys.argv[1:2] != [_CHILD]:
        return False
    print(json.dumps(phases[sys.argv[2]](**json.loads(sys.argv[3]))))
    return True


# ------------------------------------------------------------------------------------------- reports


def report(
    title: str,
    rows: list[dict[str, object]],
    settings: dict[str, object],
    measured: str,
    bar: str = "bar",
    at_least: bool = False,
) -> None:
    """Print one table and one JSON line.

    Args:
        title: What was measured.
        rows: Cells by column. A column ``met`` is added, empty where there is no bar.
        settings: What it was measured with.
        measured: The column that is held against the bar.
        bar: The column with the bars.
        at_least: Whether the bar is the least it must be, and not the most.
    """
    for row in rows:
        value, limit = row[measured], row[bar]
        row.setdefault("met", "" if limit == "" else value >= limit if at_least else value <= limit)
    settings = {**settings, "threads": torch.get_num_threads(), "machine": machine(), "torch": torch.__version__}
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [columns, *([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    told = {"benchmark": title, "measured": measured, "bar": bar, "rows": rows, "settings": settings}
    print(json.dumps(told, default=str), flush=True)


def machine() -> str:
    """The kind of processor, as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
