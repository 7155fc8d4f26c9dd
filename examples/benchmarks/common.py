# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: models of a given shape, timing in pairs, one table and one JSON line."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from optimum_moe_prune import CalibrationSet


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
    torch.set_default_dtype(getattr(torch, dtype))
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


def make_samples(tokens: int, length: int = 512) -> CalibrationSet:
    """Random token samples, all of one length, so that no time goes into padding."""
    ids = torch.randint(0, 1024, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    return CalibrationSet.build(ids, max_length=length)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratio_in_pairs(work: Callable[[], object], base: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median seconds of ``work`` and of ``base``, and of their ratios; taken in turn after one warm-up each."""
    work(), base()
    pairs = [(seconds(work), seconds(base)) for _ in range(repeats)]
    mine, other = zip(*pairs, strict=True)
    return (
        statistics.median(mine),
        statistics.median(other),
        statistics.median(a / b for a, b in pairs),
    )


def report(title: str, rows: list[dict[str, object]], settings: dict[str, object]) -> None:
    """Print one table and one JSON line."""
    settings = {**settings, "threads": torch.get_num_threads(), "machine": machine(), "torch": torch.__version__}
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [columns, *([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(json.dumps({"benchmark": title, "rows": rows, "settings": settings}))


def machine() -> str:
    """The kind of processor, as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
