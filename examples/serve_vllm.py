# SPDX-License-Identifier: Apache-2.0
"""Prune a model for vLLM, and serve a prompt with it where vLLM is installed.

    python examples/serve_vllm.py [Qwen/Qwen3-30B-A3B] [--sparsity 0.3] [--devices 8] [--calibration mix.jsonl]

By default the small trained Qwen3-MoE of this repository, and text made on the spot. What vLLM takes was read in the
source of the version that is shown (`optimum-cli moe-prune list targets`): experts are rounded to a number that the
devices share evenly, and a plan that vLLM would refuse is refused before anything is written. `--for sglang` is the
same for SGLang.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from optimum_moe_prune import MoEPruner, MoEPrunerConfig
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.publishing.opened import opened_in_words

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "qwen3_moe"), help="folder or Hub id")
    parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
    parser.add_argument("--sparsity", type=float, default=0.3, help="the share of experts to remove")
    parser.add_argument("--devices", type=int, default=8, help="that share the experts")
    parser.add_argument("--for", dest="target", default="vllm", help="vllm or sglang")
    parser.add_argument("--output", default="pruned-for-vllm")
    args = parser.parse_args()

    config = MoEPrunerConfig(
        method="reap", sparsity=args.sparsity, target=args.target, parallel_size=args.devices, num_samples=40
    )
    pruner = MoEPruner.from_pretrained(args.model, config)
    pruner.prune_checkpoint(args.output, calibration=args.calibration or make_corpus({"train": 10})["train"])
    plan = pruner.pruning_plan
    print(plan.summary().splitlines()[0])
    print(*(f"- {note}" for note in plan.notes if "kept for" in note), sep="\n")
    print(f"opened by: {opened_in_words(args.output, plan)}")

    # The plan is whole: for more devices than it has experts it would have to be another one.
    try:
        plan.apply_to_checkpoint(args.model, f"{args.output}-wide", program="sglang", parallel_size=7)
    except RequestError as refusal:
        print(f"refused: {refusal}")

    if importlib.util.find_spec("vllm") is None:
        print(f"vLLM is not installed here; where it is: vllm serve {args.output} --enable-expert-parallel")
        return
    from vllm import LLM, SamplingParams

    for answer in LLM(args.output).generate(["SELECT name, city\nFROM"], SamplingParams(max_tokens=20)):
        print(answer.outputs[0].text)


if __name__ == "__main__":
    main()
