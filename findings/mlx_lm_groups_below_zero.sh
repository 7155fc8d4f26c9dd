#!/usr/bin/env bash
# mlx-lm 0.32.2: where routers choose groups of experts first, experts of groups that were ruled out are used.
#
# Expected: with n_group above 1 (DeepSeek-V3, GLM-4-MoE, dots1, Nemotron-H ...) a token's experts come from the
# topk_group best groups alone. transformers gives all others minus infinity.
#
# What happens: mlx_lm/models/deepseek_v3.py (group_expert_select; likewise in glm4_moe, dots1, exaone_moe,
# nemotron_h ...) sets the scores of the other groups to 0. Scores are sigmoid plus a correction bias, and that sum can
# be below 0: then an expert of a group that was ruled out is chosen before one of a group that was not. No word is said.
#
# Versions: mlx-lm 0.32.2, mlx 0.32.4 (CPU), on Linux.
#
# Why it matters: whoever removes experts leaves fewer in a group, and experts with such sums are chosen more often:
# the same files give other logits in mlx-lm than in transformers.
#
# Exit status: 0 if this is what happens, 1 if not (any more).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --quiet --no-compile mlx-lm==0.32.2 'mlx[cpu]==0.32.4' numpy
"$folder/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx_lm.models.deepseek_v3 import group_expert_select

logits = mx.array([[2.0, 1.0, 0.0, -1.0]])  # two groups of two experts
bias = mx.array([0.0, -0.9, -1.0, -1.0])
chosen, _ = group_expert_select(logits, bias, 2, 2, 1, 1.0, True)
chosen = sorted(chosen.tolist()[0])
print("scores plus bias:", (mx.sigmoid(logits) + bias).tolist()[0], "- group 0 wins, so experts 0 and 1 are right")
print("mlx-lm uses experts", chosen)
raise SystemExit(chosen == [0, 1])
PYTHON
