# SPDX-License-Identifier: Apache-2.0
"""What a calibration costs beside the plain forward over the same tokens.

    python examples/benchmarks/calibration.py [--experts 64 --top-k 8 --tokens 1024] [--dtype bfloat16]

Three classes of cost: *routing* and *routed* against the plain forward with transformers' default experts
implementation, *dense* against the plain forward with every expert evaluated once on every token. The forward is the
decoder's, without the head, on both sides. Ratios of pairs run in turn, medians; the bars are 1.10, 1.10 and 1.25.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import make_model, make_samples, ratio_in_pairs, report
from transformers import PreTrainedModel

from optimum_moe_prune import CalibrationSet, Need, calibrate
from optimum_moe_prune.models.blocks import moe_blocks

ROWS = {
    "routing": ({Need.ROUTING}, False, 1.10),
    "routed": ({Need.ROUTING, Need.ROUTED_NORMS}, False, 1.10),
    "dense": ({Need.ROUTING, Need.ROUTED_NORMS, Need.SINGLE_ERROR, Need.GRAM, Need.INPUTS}, True, 1.25),
}


def forward(model: PreTrainedModel, samples: CalibrationSet, batch_size: int) -> None:
    with torch.no_grad():
        for batch in samples.batches(batch_size):
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def all_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its weights shared, every token using every expert."""
    memo = {id(p): p for p in model.parameters()}
    dense = copy.deepcopy(model, memo)
    for block in moe_blocks(dense):
        block.router.top_k = block.num_experts
    return dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="mixtral", choices=("mixtral", "qwen2_moe"))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=tuple(ROWS), help="one class of cost")
    a = parser.parse_args()
    model = make_model(a.kind, a.experts, a.top_k, a.hidden, a.width, a.layers, a.dtype)
    samples = make_samples(a.tokens)
    bases = {False: model, True: all_experts(model)}
    rows: list[dict[str, object]] = []
    for name, (needs, dense, bar) in ROWS.items():
        if a.only and name != a.only:
            continue
        mine, plain, ratio = ratio_in_pairs(
            lambda needs=needs: calibrate(model, samples, needs, batch_size=a.batch_size),
            lambda dense=dense: forward(bases[dense], samples, a.batch_size),
            a.repeats,
        )
        rows.append({"cost class": name, "calibration s": mine, "plain s": plain, "ratio": ratio, "bar": bar})
    report("calibration beside the plain forward", rows, vars(a), "ratio")


if __name__ == "__main__":
    main()
