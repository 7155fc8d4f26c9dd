#!/usr/bin/env bash
# transformers 5.24.0 with optimum 2.3.0: a GPTQ checkpoint without gptqmodel ends in a NameError about optimum's inside.
#
# Expected: transformers has a sentence for a missing package: "Loading a GPTQ quantized model requires gptqmodel (`pip
# install gptqmodel`) library." Whoever lacks optimum is told to install it, and then should be told of gptqmodel.
#
# What happens: the sentence is never reached. Before transformers looks which packages are there, its quantizer makes
# optimum's GPTQQuantizer; optimum imports QuantizeConfig from gptqmodel only where that is installed, and uses the name
# in any case. So from_pretrained ends in "NameError: name 'QuantizeConfig' is not defined", on a valid checkpoint, for
# everybody who followed the first advice. The last call below shows that transformers would have said it well.
#
# Versions: torch 2.13.0, transformers 5.24.0, optimum 2.3.0, no gptqmodel.
#
# Why it matters: most GPTQ files of Mixture-of-Experts models are loaded by people who have neither package yet. A
# NameError looks like a broken installation, names nothing that can be installed, and is no ImportError, so programs
# that offer "install X" on ImportError do not catch it.
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
import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GPTQConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
if not Path("model").exists():
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained("model")
    values = json.loads(Path("model/config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    Path("model/config.json").write_text(json.dumps(values))


def said(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0]
    return "nothing", ""


has = {name: importlib.util.find_spec(name) is not None for name in ("optimum", "gptqmodel")}
print(f"torch {torch.__version__}, transformers {transformers.__version__}, installed: {has}")
kind, text = said(lambda: AutoModelForCausalLM.from_pretrained("model"))
print(f"from_pretrained: {kind}: {text}")
if not has["optimum"]:
    holds = kind == "ImportError" and "pip install optimum" in text
else:
    from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

    made = object.__new__(GptqHfQuantizer)  # without optimum's object, for what transformers itself would say
    made.quantization_config = GPTQConfig(bits=4)
    torch.cuda.is_available = lambda: True  # as on a machine with a GPU, for this question alone
    own_kind, own = said(made.validate_environment)
    print(f"what transformers has for this case: {own_kind}: {own}")
    holds = (
        not has["gptqmodel"]
        and (kind, text) == ("NameError", "name 'QuantizeConfig' is not defined")
        and own_kind == "ImportError"
        and "gptqmodel" in own
    )
sys.exit(not holds)
PYTHON
status=0
"$folder/venv/bin/python" finding.py || status=1
echo "... which says what to install:"
"$folder/venv/bin/pip" install --quiet --quiet --no-compile optimum==2.3.0 transformers==5.24.0
"$folder/venv/bin/python" finding.py || status=1
[ "$status" = 0 ] && printf '\nAs stated.\n' || printf '\nNOT as stated (any more).\n'
exit "$status"
