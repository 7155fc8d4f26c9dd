# SPDX-License-Identifier: Apache-2.0
"""What a calibration costs beside the plain forward over the same tokens, and what others' ways cost.

    python examples/benchmarks/calibration.py [--device cuda] [--kind mixtral qwen2_moe] [--repeats 3]

Three classes of cost: *routing*, *routed* (norms of the chosen experts' outputs) and *all needs*, for which every
expert runs on the kept tokens; with ``--every-token`` on all tokens, beside a forward that runs every expert on every
token. The plain forward is the decoder's, without the head, with transformers' default experts implementation, on
both sides.

Beside them, on the same model, stand the two ways in which other tools gather the same routed scores:

- *dense buffer*: after the block has run, all experts run on all tokens into one buffer, and the scores are taken from
  the rows of tokens that chose the expert (the observer of the REAP authors);
- *expert by expert*: the block's experts run one after the other, each on the tokens that chose it, and its score is
  added up on the host after each (calibration hooks of compression tools).

Ratios of pairs run in turn, medians. On a GPU peak memory is that of torch's allocator above the plain forward's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import MIB, make_model, make_samples, ratio_in_pairs, report, watching
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe_prune import CalibrationSet, Need, calibrate
from optimum_moe_prune.models.blocks import MoEBlock, moe_blocks
from optimum_moe_prune.statistics.needs import OF_A_FORWARD_PASS


@dataclass(frozen=True)
class Shape:
    """A model's shape and a calibration's, and the bars for the three classes of cost."""

    kind: str
    experts: int
    top_k: int
    hidden: int
    width: int
    layers: int
    tokens: int
    kept: int
    length: int
    batch_size: int
    bars: tuple[float, float, float]


# On a GPU the layers of Mixtral-8x7B and of Qwen3-30B-A3B; on a processor as many tokens of them are kept.
SHAPES = {
    "cpu": {
        "mixtral": Shape("mixtral", 8, 2, 1024, 2048, 2, 16384, 2048, 512, 8, (1.05, 1.05, 1.5)),
        "qwen2_moe": Shape("qwen2_moe", 64, 8, 1024, 768, 2, 16384, 1024, 512, 8, (1.05, 1.05, 1.5)),
    },
    "cuda": {
        "mixtral": Shape("mixtral", 8, 2, 4096, 14336, 4, 65536, 8192, 2048, 4, (1.05, 1.15, 1.5)),
        "qwen2_moe": Shape("qwen2_moe", 128, 8, 2048, 768, 6, 65536, 8192, 2048, 4, (1.10, 1.20, 2.0)),
    },
}
NEEDS = {
    "routing": {Need.ROUTING},
    "routed": {Need.ROUTING, Need.ROUTED_NORMS},
    "all needs": set(OF_A_FORWARD_PASS),
}


def forward(model: PreTrainedModel, samples: CalibrationSet, batch_size: int) -> None:
    with torch.no_grad():
        for batch in samples.batches(batch_size):
            ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def all_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its weights shared, every token using every expert."""
    memo = {id(p): p for p in model.parameters()}
    dense = copy.deepcopy(model, memo)
    for block in moe_blocks(dense):
        block.router.top_k = block.num_experts
    return dense


# ------------------------------------------------------------------------------------------- others' ways


@contextlib.contextmanager
def dense_buffer(model: PreTrainedModel, scores: dict[int, Tensor]) -> Iterator[None]:
    """All experts on all tokens, after the block itself has run."""
    handles = []
    for block in moe_blocks(model):

        def hook(_module: Any, inputs: tuple[Tensor, ...], _output: Any, block: MoEBlock = block) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            _, weights, chosen = block.router(x)
            buffer = torch.zeros(block.num_experts, *x.shape, dtype=x.dtype, device=x.device)
            one = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
            for expert in range(block.num_experts):
                buffer[expert] = block.experts(x, torch.full_like(chosen[:, :1], expert), one)
            for expert in range(block.num_experts):
                rows, slots = (chosen == expert).nonzero(as_tuple=True)
                if len(rows):
                    norm = torch.linalg.vector_norm(buffer[expert][rows].float(), dim=-1)
                    scores[block.layer][expert] += (norm * weights[rows, slots].float()).sum().cpu()

        handles.append(block.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def expert_by_expert(model: PreTrainedModel, scores: dict[int, Tensor]) -> Iterator[None]:
    """Each expert on its own tokens, one after the other, with its score on the host after each."""
    with contextlib.ExitStack() as stack:
        for block in moe_blocks(model):

            def stand_in(own: Any, x: Tensor, ids: Tensor, weights: Tensor, block: MoEBlock = block) -> Tensor:
                output = torch.zeros_like(x)
                for expert in range(block.num_experts):
                    rows, slots = (ids == expert).nonzero(as_tuple=True)
                    if len(rows) == 0:
                        continue
                    one = torch.ones(len(rows), 1, dtype=x.dtype, device=x.device)
                    y = own(x[rows], torch.full((len(rows), 1), expert, device=x.device), one)
                    weight = weights[rows, slots]
                    scores[block.layer][expert] += (y.float().norm(dim=-1) * weight.float()).sum().cpu()
                    output.index_add_(0, rows, (y * weight[:, None]).to(x.dtype))
                return output

            stack.enter_context(block.observed(lambda logits: None, stand_in))
        yield


WAYS = {"dense buffer": dense_buffer, "expert by expert": expert_by_expert}


def by_way(name: str, model: PreTrainedModel, samples: CalibrationSet, batch_size: int) -> dict[int, Tensor]:
    scores = {block.layer: torch.zeros(block.num_experts, dtype=torch.float64) for block in moe_blocks(model)}
    with torch.no_grad(), WAYS[name](model, scores):
        forward(model, samples, batch_size)
    return scores


# ------------------------------------------------------------------------------------------- measuring


def peak(work: Callable[[], object], device: str) -> float:
    """The most memory in MiB that something takes: of the allocator on a GPU, anonymous memory elsewhere."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with watching() as seen:
        work()
    return seen["peak MiB"]


def rows_of(name: str, shape: Shape, model: PreTrainedModel, a: argparse.Namespace) -> list[dict[str, object]]:
    samples = make_samples(shape.tokens, shape.length)
    how: dict[str, Any] = {"batch_size": shape.batch_size}

    def plain() -> None:
        forward(model, samples, shape.batch_size)

    rows: list[dict[str, object]] = []

    def row(cost: str, work: Callable[[], object], base: Callable[[], object], bar: float | str, memory: bool) -> None:
        mine, other, ratio = ratio_in_pairs(work, base, a.repeats)
        above = peak(work, a.device) - peak(base, a.device) if memory else ""
        rows.append(
            {"shape": name, "cost": cost, "s": mine, "plain s": other, "ratio": ratio, "bar": bar, "MiB above": above}
        )
        print(f"{name}, {cost}: {ratio:.3g} (bar {bar})", flush=True)

    for (cost, needs), bar in zip(NEEDS.items(), shape.bars, strict=True):
        if not a.only or cost in a.only:
            row(cost, lambda n=needs: calibrate(model, samples, n, max_tokens=shape.kept, **how), plain, bar, True)
    if a.every_token:
        dense = all_experts(model)
        row(
            "all needs, every token, beside every expert on every token",
            lambda: calibrate(model, samples, "all", max_tokens="all", **how),
            lambda: forward(dense, samples, shape.batch_size),
            1.25,
            False,
        )
    if not a.only and not a.no_others:
        ours = calibrate(model, samples, "reap", **how)
        for way in WAYS:
            theirs = by_way(way, model, samples, shape.batch_size)
            for layer, scores in theirs.items():  # it is the same that they gather
                torch.testing.assert_close(scores, ours.layers[layer].total("norm_applied"), rtol=2e-2, atol=0)
            row(way, lambda w=way: by_way(w, model, samples, shape.batch_size), plain, "", True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--kind", nargs="+", default=["mixtral", "qwen2_moe"], choices=("mixtral", "qwen2_moe"))
    for name in ("experts", "top-k", "hidden", "width", "layers", "tokens", "kept", "batch-size"):
        parser.add_argument(f"--{name}", type=int, help="in place of the shape's")
    parser.add_argument("--dtype", help="float32, and on a GPU bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=tuple(NEEDS), help="these classes of cost, without others' ways")
    parser.add_argument("--every-token", action="store_true", help="all needs of every token as well")
    parser.add_argument("--no-others", action="store_true", help="without others' ways")
    a = parser.parse_args()
    dtype = a.dtype or ("bfloat16" if a.device == "cuda" else "float32")
    rows: list[dict[str, object]] = []
    for name in a.kind:
        shape = SHAPES[a.device][name]
        given = {name: value for name in asdict(shape) if name != "kind" and (value := getattr(a, name, None))}
        shape = replace(shape, **given)
        shape = replace(shape, top_k=min(shape.top_k, max(1, shape.experts // 2)))
        of_model = (shape.kind, shape.experts, shape.top_k, shape.hidden, shape.width, shape.layers, dtype)
        with torch.device(a.device):
            model = make_model(*of_model)
        label = f"{shape.experts} x {shape.top_k}, {shape.tokens} tokens, {shape.kept} kept"
        rows += rows_of(label, shape, model, a)
        del model
        gc.collect()
    hardware = torch.cuda.get_device_name() if a.device == "cuda" else ""
    report("calibration beside the plain forward", rows, {**vars(a), "layers": shape.layers, "gpu": hardware}, "ratio")


if __name__ == "__main__":
    main()
