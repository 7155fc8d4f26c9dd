#!/usr/bin/env bash
# transformers 5.24.0: what is seen inside an expert is in another order than the tokens that went in, for some numbers
# of tokens only.
#
# Expected: where every token is sent to the same expert there is nothing to sort, so whoever watches the product with
# that expert's down projection (a hook, a function mode, a calibration that collects inputs of matrices) finds the
# tokens in their order. The eager implementation does that.
#
# What happens: the default implementation on a CPU and on a GPU (grouped_mm) sorts rows by expert with torch.sort,
# which is not stable unless it is asked to be. Up to 16 tokens, and (as seen on two cores) again for tens of
# thousands, the rows stay in their order; in between they are permuted, within the expert. The layer's output is right, since the same permutation is
# undone; only what is inside is of other tokens than it looks. A check on a few tokens, or on very many, finds nothing.
#
# Versions: torch 2.13.0, transformers 5.24.0.
#
# Why it matters: collecting the inputs of experts' matrices beside something known of each token (its routing weight,
# its residual, its label) is what quantisers, least-squares repairs and activation studies do. Paired so, the numbers
# fit the text they were made on somewhat, and nothing else: nothing fails.
#
# Exit status: 0 if this is what happens, 1 if not (any more). On Linux without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes the download small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --quiet --no-compile torch==2.13.0 transformers==5.24.0
cd "$folder"
cat > finding.py <<'PYTHON'
import sys

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
config = MixtralConfig(
    vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
)  # fmt: skip
model = MixtralForCausalLM(config).eval()
experts = model.model.layers[0].mlp.experts


class LastProduct(TorchFunctionMode):
    """Keeps the rows that the last product of a run has on its left."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("linear", "_grouped_mm", "grouped_mm") and args[0].shape[-1] == 8:
            self.rows = args[0]
        return output


def kept_in_order(tokens: int, implementation: str) -> tuple[bool, bool]:
    """Whether rows are in the order of the tokens, and whether they are the same rows in any order."""
    model.set_experts_implementation(implementation)
    x = torch.randn(tokens, 16)
    ids, weights = torch.full((tokens, 1), 2), torch.ones(tokens, 1)
    gate, up = (x @ experts.gate_up_proj[2].T).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    with torch.no_grad(), LastProduct() as seen:
        output = experts(x, ids, weights)
    right = torch.allclose(output, expected @ experts.down_proj[2].T, atol=1e-5)
    in_order = torch.allclose(seen.rows, expected, atol=1e-5)
    found = sorted(map(tuple, seen.rows.mul(1000).round().tolist())), sorted(map(tuple, expected.mul(1000).round().tolist()))
    alike = sum(a == b for a, b in zip(*found)) > 0.9 * tokens  # but for rounding
    return in_order, right and alike


print(f"torch {torch.__version__}, transformers {transformers.__version__}; rows in the order of the tokens:")
holds = True
with torch.no_grad():
    for tokens in (8, 16, 17, 100, 2000, 50000):
        (grouped, same), (eager, _) = (kept_in_order(tokens, name) for name in ("grouped_mm", "eager"))
        print(f"{tokens:6} tokens, all to one expert: grouped_mm {grouped}, eager {eager}; output and rows right: {same}")
        holds &= eager and same and (tokens == 50000 or grouped == (tokens <= 16))
print("as described" if holds else "NOT as described")
sys.exit(not holds)
PYTHON
"$folder/venv/bin/python" finding.py
