# SPDX-License-Identifier: Apache-2.0
"""Generation speed and peak memory of a checkpoint, in a process of its own.

A process of its own, because memory is counted for a whole process and what one model had taken would be counted for
the next.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..checkpoints.source import Source
from ..compat import text_config
from ..errors import RequestError, RunError
from ..models.memory import Compute
from ..storage.values import Json


@dataclass(frozen=True)
class Generation:
    """How fast a model generates, greedily, one text at a time.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated.
        prompt_seconds: From the prompt to the first token, median.
        tokens_per_second: Of the tokens after the first one, median.
        peak_memory_bytes: The most memory of the process since it began, pages of the weights' files included; on an
            accelerator the most that was allocated there.
    """

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, float]:
        """As plain JSON values."""
        return asdict(self)


def measure_generation(
    source: Source | str | os.PathLike,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 3,
    compute: Compute = Compute(),
    seed: int = 0,
) -> Generation:
    """Load a model in a new process and let it generate.

    Args:
        source: The model.
        prompt_tokens: Tokens of the prompt, drawn at random; fewer where the model was made for less.
        new_tokens: Tokens to generate; at least 2.
        repeats: How often; one more to warm up.
        compute: Precision and device.
        seed: Of the prompt.

    Raises:
        RequestError: If there are too few tokens to generate.
        RunError: If the model cannot be loaded or run there.
    """
    if new_tokens < 2:
        raise RequestError(f"new_tokens is {new_tokens}; at least 2 tell how long one takes.")
    source = Source.of(source)
    loading = {**compute.for_transformers, **source.for_transformers}
    request = {
        "name_or_path": source.name_or_path,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "seed": seed,
        "loading": {key: value if isinstance(value, bool) else str(value) for key, value in loading.items()},
    }
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)  # a token is not shown
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"code {done.returncode}")
        raise RunError(f"the speed of {source.name_or_path} cannot be measured: {why}")
    return Generation(**json.loads(lines[-1]))


def _measure(
    name_or_path: str, prompt_tokens: int, new_tokens: int, repeats: int, seed: int, loading: Json
) -> Generation:
    import torch
    from transformers import AutoConfig

    from ..calibration.samples import sample_length
    from ..compat import loader_of

    model = loader_of(AutoConfig.from_pretrained(name_or_path)).from_pretrained(name_or_path, **loading).eval()
    text = text_config(model.config)
    prompt_tokens = max(1, min(prompt_tokens, sample_length(prompt_tokens + new_tokens, text) - new_tokens))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(text.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
    options: Json = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(2)
    first = [seconds(1) for _ in range(repeats)]
    all_of_them = [seconds(new_tokens) for _ in range(repeats)]
    prompt = statistics.median(first)
    rest = max(statistics.median(all_of_them) - prompt, 1e-9)
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else _peak_memory()
    return Generation(prompt_tokens, new_tokens, prompt, (new_tokens - 1) / rest, peak)


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
    print(json.dumps(_measure(**json.load(sys.stdin)).to_dict()))
