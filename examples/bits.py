# SPDX-License-Identifier: Apache-2.0
"""Give experts bits by what they add, for packers of mixed precision, and rank them for servers.

    python examples/bits.py [MODEL] [--output OUT]

By default the small trained Qwen3-MoE of this repository. Writes OUT-bits.json (everything), OUT-auto-round.json and
OUT-gptqmodel.json (what these packers read), and OUT-order.json. The last lines say how they are used.
"""

import argparse
import sys
from pathlib import Path

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, export_statistics

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "small_models"))
from corpus import make_corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(HERE / "small_models" / "qwen3_moe"), help="folder or Hub id")
parser.add_argument("--calibration", type=Path, help=".jsonl with text and domain")
parser.add_argument("--bits", type=float, default=3, help="of an expert's weights, on average")
parser.add_argument("--output", default="experts")
args = parser.parse_args()

# REAP needs what the ranking reads: tokens and norms of outputs, by the weights they are used with.
pruner = MoEPruner.from_pretrained(args.model, config=MoEPrunerConfig(method="reap", max_length=256))
stats = pruner.calibrate(calibration=args.calibration or make_corpus({"train": 2})["train"])

for format in ("bits", "auto-round", "gptqmodel"):
    text = export_statistics(stats, format, bits=args.bits, widths=(2, 3, 4))
    Path(f"{args.output}-{format}.json").write_text(text)
Path(f"{args.output}-order.json").write_text(export_statistics(stats, "order"))
print(f"AutoRound(model, tokenizer, layer_config=json.load(open('{args.output}-auto-round.json')))")
print(f"QuantizeConfig(bits=4, dynamic=json.load(open('{args.output}-gptqmodel.json')))")
