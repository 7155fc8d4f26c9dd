# SPDX-License-Identifier: Apache-2.0
"""The ``README.md`` of a pruned MLX folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from ...names import BASE_CARD_NAME, CONFIG_NAME, PLAN_NAME
from ...plan import PruningPlan

logger = logging.getLogger(__name__)

_CARRIED = ("license", "license_name", "license_link", "language", "base_model")
_TAGS = ["mlx", "mixture-of-experts", "moe", "expert-pruning", "pruned", "optimum-moe-prune"]
_TEXT = """# {title}

{before} experts of every MoE layer were cut to {after} by a plan of optimum-moe-prune (method `{method}`). The tensors
that remain are those of the MLX folder it was made of, byte for byte: nothing was quantised anew.

[mlx-lm](https://github.com/ml-explore/mlx-lm) opens it; transformers does not.

```python
from mlx_lm import generate, load

model, tokenizer = load("{title}")
print(generate(model, tokenizer, prompt="Once upon a time"))
```

- `{plan}`: which experts of which layer were retained, and what is known of the calibration.
- `{recipe}`: the recipe of the plan.
{base}"""


def card_of(plan: PruningPlan, folder: Path, name: str) -> str:
    """The card of a pruned MLX folder, made of the files in it.

    Args:
        plan: The plan.
        folder: The folder, with the card of the source where there was one.
        name: What it will be called.
    """
    base = folder / BASE_CARD_NAME
    text = _TEXT.format(
        title=name,
        before=max(plan.original_num_experts.values()),
        after=plan.uniform_num_experts,
        method=plan.method,
        plan=PLAN_NAME,
        recipe=CONFIG_NAME,
        base=f"- `{BASE_CARD_NAME}`: the card of the folder it was made of.\n" if base.is_file() else "",
    )
    data = ModelCardData(library_name="mlx", pipeline_tag="text-generation", tags=_TAGS, **_carried(base))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _carried(base: Path) -> dict[str, Any]:
    """Rights and origin from the card of the source; nothing where there is none, or one that cannot be read."""
    try:
        values = metadata_load(base) if base.is_file() else None
    except Exception as error:  # somebody else's file: whatever its parser raises
        logger.warning("the card of the source has no sound front matter: %s", str(error).split("\n")[0])
        return {}
    return {key: values[key] for key in _CARRIED if key in values} if isinstance(values, dict) else {}
