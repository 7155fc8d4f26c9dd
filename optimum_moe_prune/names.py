# SPDX-License-Identifier: Apache-2.0
"""Names that users and files know: of files in an output, of allocations, of precisions."""

import re

from .errors import RequestError, nearest_first

# Files in an output.

PLAN_NAME = "moe_pruning_plan.json"
CONFIG_NAME = "moe_pruner_config.json"
"""The recipe."""
STATS_NAME = "stats.json"
LIST_NAME = ".moe_pruning_files.json"
"""Which files this package wrote into a pruned checkpoint; hidden, since it is of no use elsewhere."""
GGUF_PLAN_KEY = "moe_prune.plan"
"""The key of a GGUF file that holds the plan."""
EVALUATION_NAME = "moe_evaluation.json"
CARD_NAME = "README.md"
BASE_CARD_NAME = "README.base.md"
"""Where the card of the model before pruning is kept."""
NEW_CARD_NAME = "README.new.md"
"""A new card, beside one that was edited by hand."""
REPORT_NAME = "report.html"
REPORT_PICTURES = "report_pictures"

STANDALONE_STEM = "modeling_unequal_moe"
"""The code that loads a checkpoint whose layers differ without this package; ``architectures/unequal.py`` says it too,
since it travels."""

# How a budget is spread over the layers.
UNIFORM = "uniform"
GLOBAL = "global"
BY_SENSITIVITY = "sensitivity"
ESTIMATED = "estimated"

# What is done after the cut, and with what.
REFIT = "refit"
DISTIL = "distil"
EXPERTS = "experts"
ROUTER = "router"
NORMS = "norms"

# What becomes of heads for further tokens (MTP).
PRUNE = "prune"
KEEP = "keep"
DROP = "drop"

NOTES_LOGGER = "optimum_moe_prune.notes"
"""Where what a person must know of a plan is logged, when it is made."""

# Precisions to calculate in, and what else they are called.
AUTO = "auto"
_DTYPES = {
    "float32": ("fp32", "f32", "float", "single", "full"),
    "bfloat16": ("bf16", "brain"),
    "float16": ("fp16", "f16", "half"),
}
_DTYPE_NAMES = {other: name for name, others in _DTYPES.items() for other in (name, *others)} | {AUTO: AUTO}


def dtype_name(dtype: object) -> str:
    """The name of a precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.

    Args:
        dtype: One of these or of their other names (``bf16``, ``fp16``, ``half``, ``fp32``, ``torch.bfloat16``), or a
            ``torch.dtype``.

    Raises:
        RequestError: If it is another.
    """
    name = str(dtype).strip().lower().removeprefix("torch.").replace("-", "").replace("_", "")
    if name not in _DTYPE_NAMES:
        raise RequestError(f"dtype {str(dtype)!r} is not known. Known: {nearest_first(name, [AUTO, *_DTYPES])}.")
    return _DTYPE_NAMES[name]


def dtype_text(dtype: object) -> str:
    """The name of a ``torch.dtype``, without the library's."""
    return str(dtype).removeprefix("torch.")


_DEVICES = {"gpu": "cuda", "nvidia": "cuda", "amd": "cuda", "rocm": "cuda", "apple": "mps", "metal": "mps"}
_DEVICES |= {"intel": "xpu", "processor": "cpu"}


def device_name(device: object) -> str:
    """The name of a device as torch has it, or ``auto``. Whether it is there is found out later.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``auto`` ..., or a ``torch.device``.

    Raises:
        RequestError: If it is none.
    """
    text = str(device).strip().lower()
    name, _, number = text.partition(":")
    meant = ""
    if name in _DEVICES:
        meant = _DEVICES[name] + (f":{number}" if number else "")
    elif text.isdecimal():
        meant = f"cuda:{text}"
    elif found := re.fullmatch(r"([a-z]+)(\d+)", text):
        meant = f"{found[1]}:{found[2]}"
    if meant:
        raise RequestError(f"{str(device)!r} is no device; did you mean {meant}?")
    if not re.fullmatch(r"[a-z]+(:\d+)?", text) or text.startswith(f"{AUTO}:"):
        raise RequestError(f"{str(device)!r} is no device: cpu, cuda, cuda:1, mps, auto ...")
    return text
