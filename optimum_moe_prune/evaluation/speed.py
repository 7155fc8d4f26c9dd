# SPDX-License-Identifier: Apache-2.0
"""Generation speed and peak memory of checkpoints, each in a process of its own, measured in turn.

A process of its own, because memory is counted for a whole process and what one model had taken would be counted for
the next. In turn, because a machine is not as fast now as a minute ago: a model is compared with what the other one
did right before or after it, round by round, and how much the rounds differ is part of the result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.source import Source
from ..compat import text_config
from ..errors import MoEPruneError, RequestError, RunError
from ..models.devices import card_name
from ..models.memory import Compute, available_memory
from ..progress import progress
from ..storage.values import Json, Values

logger = logging.getLogger(__name__)

ROUNDS = 5
"""In each of which every model generates once."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Generation:
    """How fast a model generates, greedily, one text at a time: medians over rounds, with the least and the most.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated.
        prompt_seconds: From the prompt to the first token.
        tokens_per_second: Of the tokens after the first one.
        peak_memory_bytes: The most memory of the process since it began, pages of the weights' files included; on an
            accelerator the most that was allocated there.
        rounds: How often; None in results of earlier versions, whose speeds are not comparable.
        tokens_per_second_range: Least and most of a round.
        speedup: ``tokens_per_second`` as a multiple of the reference's, the median of the rounds' own ratios.
        speedup_range: Least and most of these.
        hardware: The processor or accelerator, and threads.
    """

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    rounds: int | None = None
    tokens_per_second_range: Range | None = None
    speedup: float | None = None
    speedup_range: Range | None = None
    hardware: str | None = None

    @property
    def has_spread(self) -> bool:
        """Whether the speed is worth showing: with a spread, and the machine it was measured on."""
        return bool(self.rounds and self.rounds > 1 and self.tokens_per_second_range and self.hardware)

    def to_dict(self) -> Json:
        """As plain JSON values; what was not measured is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Values) -> Generation:
        """From plain values.

        Raises:
            ValueError: If a range is none.
            TypeError: If something is missing.
        """
        known: dict[str, Any] = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("tokens_per_second_range", "speedup_range"):
            if known.get(name) is not None:
                low, high = known[name]
                known[name] = (float(low), float(high))
        return cls(**known)


def speed_in_words(generation: Generation) -> str:
    """Tokens per second, with the least and the most, and as a multiple of the reference's."""
    words = with_range(generation.tokens_per_second, generation.tokens_per_second_range)
    times = with_range(generation.speedup, generation.speedup_range)
    return f"{words}; x {times}" if times else words


def with_range(value: float | None, spread: Range | None) -> str:
    """A figure with its least and most; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.3g}" if spread is None else f"{value:.3g} ({spread[0]:.3g} to {spread[1]:.3g})"


@dataclass(frozen=True)
class _Round:
    """What a process said of one round."""

    prompt_tokens: int
    prompt_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    hardware: str


def measure_generation(
    source: Source | str | os.PathLike,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = ROUNDS,
    compute: Compute = Compute(),
    seed: int = 0,
) -> Generation:
    """One model alone, as :func:`measure_in_turn` measures several."""
    settings: Json = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    return measure_in_turn([source], compute=compute, seed=seed, **settings)[0]


def measure_in_turn(
    sources: Sequence[Source | str | os.PathLike],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = ROUNDS,
    compute: Compute = Compute(),
    seed: int = 0,
) -> list[Generation]:
    """Load models in new processes and let them generate in turn, the order reversed from round to round.

    Where they do not fit in memory beside each other, each is loaded anew in every round.

    Args:
        sources: The models; the last one is what the others are compared with.
        prompt_tokens: Tokens of the prompt, drawn at random; fewer where a model was made for less.
        new_tokens: Tokens to generate; at least 2.
        repeats: How often each generates, beside warming up: the number of rounds.
        compute: Precision and device.
        seed: Of the prompt.

    Raises:
        RequestError: If there are too few tokens to generate, or no rounds.
        RunError: If a model cannot be loaded or run there.
    """
    if new_tokens < 2:
        raise RequestError(f"new_tokens is {new_tokens}; at least 2 tell how long one takes.")
    if repeats < 1:
        raise RequestError(f"repeats is {repeats}; it must be at least 1.")
    models = [Source.of(source) for source in sources]
    request = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "seed": seed}
    workers = [_Worker(model, request, compute) for model in models]
    together = _fit_together(models, compute)
    measured: list[list[_Round]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        if together:
            for worker in workers:
                stack.enter_context(worker.running())
        for number in progress(range(repeats), "measuring speed", repeats, unit="round"):
            order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
            for place in order:
                with contextlib.nullcontext() if together else workers[place].running():
                    measured[place].append(workers[place].measure())
    reference = measured[-1] if len(models) > 1 else None
    last = len(models) - 1
    return [_summed(r, new_tokens, None if place == last else reference) for place, r in enumerate(measured)]


def _summed(rounds: Sequence[_Round], new_tokens: int, reference: Sequence[_Round] | None) -> Generation:
    """Rounds of one model as one result."""
    speeds = [r.tokens_per_second for r in rounds]
    result = Generation(
        rounds[0].prompt_tokens,
        new_tokens,
        statistics.median(r.prompt_seconds for r in rounds),
        statistics.median(speeds),
        max(r.peak_memory_bytes for r in rounds),
        len(rounds),
        (min(speeds), max(speeds)),
        hardware=rounds[0].hardware,
    )
    if reference is None:
        return result
    ratios = [speed / other.tokens_per_second for speed, other in zip(speeds, reference, strict=True)]
    return replace(result, speedup=statistics.median(ratios), speedup_range=(min(ratios), max(ratios)))


def _fit_together(models: Sequence[Source], compute: Compute) -> bool:
    """Whether the models fit in memory beside each other, as far as their files tell."""
    try:
        needed = sum(Checkpoint.open(model).nbytes for model in models)
    except MoEPruneError:  # no safetensors files
        return True
    free = sum(map(available_memory, compute.places))
    if len(models) == 1 or needed <= free:
        return True
    logger.warning(
        "the models take %.1f GB beside each other and %.1f GB are free: for their speed each is loaded anew in every "
        "round.",
        needed / 1e9,
        free / 1e9,
    )
    return False


class _Worker:
    """A process that holds a model and lets it generate when it is asked to."""

    def __init__(self, source: Source, request: Json, compute: Compute) -> None:
        loading = {**compute.for_transformers, **source.for_transformers}
        self._name = source.name_or_path
        self._request = {
            **request,
            "name_or_path": self._name,
            "loading": {key: value if isinstance(value, bool) else str(value) for key, value in loading.items()},
        }
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The process, its model loaded, inside a ``with``."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as self._errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            try:
                self._ask(json.dumps(self._request))  # a token is not shown among arguments
                yield
            finally:
                with contextlib.suppress(OSError):  # it may be gone
                    self._process.communicate()

    def measure(self) -> _Round:
        """Let the model generate."""
        return _Round(**json.loads(self._ask("measure")))

    def _ask(self, line: str) -> str:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        with contextlib.suppress(OSError):  # it is gone
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if answer:
            return answer
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().splitlines()
        why = next((line for line in reversed(lines) if line.strip()), f"code {code}")
        raise RunError(f"the speed of {self._name} cannot be measured: {why}")


# ------------------------------------------------------------------------------------------- in the process


def _answer() -> None:
    """Load the model that the first line asks for, and let it generate for each line after it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    measure = _loaded(**json.loads(sys.stdin.readline()))
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(measure())), file=answers, flush=True)


def _loaded(name_or_path: str, prompt_tokens: int, new_tokens: int, seed: int, loading: Json) -> Any:
    import torch
    from transformers import AutoConfig

    from ..calibration.samples import sample_length
    from ..compat import loader_of
    from ..models.devices import finish, peak_bytes

    model = loader_of(AutoConfig.from_pretrained(name_or_path)).from_pretrained(name_or_path, **loading).eval()
    text = text_config(model.config)
    prompt_tokens = max(1, min(prompt_tokens, sample_length(prompt_tokens + new_tokens, text) - new_tokens))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(text.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
    options: Json = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    used = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    counts = bool(used) and all(hasattr(torch.get_device_module(device), "max_memory_allocated") for device in used)

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)
        finish(used)
        return time.perf_counter() - began

    def measure() -> _Round:
        seconds(2)  # the other model has had the machine
        first = seconds(1)
        rest = max(seconds(new_tokens) - first, 1e-9)
        peak = peak_bytes(used) if counts else _peak_memory()
        return _Round(prompt_tokens, first, (new_tokens - 1) / rest, peak, hardware(model.device))

    return measure


def hardware(device: Any) -> str:
    """The name of the accelerator, or of the processor with its threads."""
    import torch

    if device.type != "cpu" and hasattr(torch.get_device_module(device), "get_device_name"):
        return card_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def _peak_memory() -> int:
    """The most resident memory of this process, in bytes."""
    try:  # on Linux ru_maxrss starts with what the parent process had
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    _answer()
