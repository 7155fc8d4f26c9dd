# SPDX-License-Identifier: Apache-2.0
"""A method of your own: one function of the statistics.

    python examples/own_method.py [MODEL] [--sparsity 0.25]

By default the small trained Mixtral of this repository. In a package of yours the entry-point group
``optimum_moe_prune.methods`` brings such a module to the command line as well (``--method loyal``).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, Need, register_method

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Options become ``MoEPrunerConfig(method_options={...})`` and ``--option NAME=VALUE``."""

    power: float = 1.0


@register_method(
    "loyal",
    kind="scores",  # one number per expert, higher = keep; a "set" method returns the experts itself
    summary="how sure the router is of the expert when it chooses it, times how often it does",
    source="an example",
    needs={Need.ROUTING},
    options=Options,
)
def loyal(stats, options):
    scores = {}
    for index, layer in stats.layers.items():
        tokens, probability = layer.total("routed_tokens"), layer.total("routed_probability")
        scores[index] = (tokens * (probability / tokens.clamp(min=1)) ** options.power).numpy()
    return scores


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "mixtral"), help="folder or Hub id")
parser.add_argument("--sparsity", type=float, default=0.25)
args = parser.parse_args()
config = MoEPrunerConfig(method="loyal", sparsity=args.sparsity, allocation="global", method_options={"power": 2.0})
pruner = MoEPruner.from_pretrained(args.model, config=config)
pruner.prune(AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"), make_corpus({"train": 10})["train"])
print(pruner.pruning_plan.summary())
