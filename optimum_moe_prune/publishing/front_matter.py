# SPDX-License-Identifier: Apache-2.0
"""The front matter of a card: what the Hub reads."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from .. import names
from ..evaluation.comparison import Comparison
from ..storage.values import Json
from .facts import Origin
from .plain import mapping

logger = logging.getLogger(__name__)

_CARRIED = ("license", "license_name", "license_link", "language")
_TAGS = ["mixture-of-experts", "moe", "expert-pruning", "pruned", "optimum-moe-prune"]


def front_matter(folder: Path, name: str, origin: Origin, comparison: Comparison | None) -> ModelCardData:
    """The front matter of a checkpoint's card.

    Args:
        folder: The checkpoint, with the original's card where there is one.
        name: What it is called: its folder or its repository.
        origin: What is known of the original.
        comparison: Of both, where it was measured.
    """
    results = _eval_results(comparison)
    return ModelCardData(
        **_rights(folder, origin),
        base_model=origin.first_model,
        # The Hub knows finetune, adapter, quantized and merge; of these a model with other weights is the first.
        base_model_relation=None if origin.first_model is None else "finetune",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def text_kind(comparison: Comparison) -> str:
    """What to call the text that was judged on: held out only where none of it was calibrated on."""
    return str(getattr(comparison, "text_kind", "held-out text"))


def _rights(folder: Path, origin: Origin) -> Json:
    """Licence and languages: as a person said, else of the original's card."""
    found = _carried(folder)
    if origin.license is not None and origin.license != found.get("license"):
        found = {"license": origin.license, **({"language": found["language"]} if "language" in found else {})}
    return {**found, **({"language": list(origin.languages)} if origin.languages else {})}


def _carried(folder: Path) -> Json:
    """Licence and languages from the original's card; nothing where there is none, or one that cannot be read."""
    path = folder / names.BASE_CARD_NAME
    values: Any = None
    try:
        values = metadata_load(path) if path.is_file() else None
    except Exception as error:  # somebody else's file: whatever its parser raises
        logger.warning("the original model's card has no sound front matter: %s", str(error).split("\n")[0])
    found = {key: value for key, value in mapping(values).items() if key in _CARRIED}
    texts = {key: value if isinstance(value, list) else [value] for key, value in found.items()}
    return {key: found[key] for key, parts in texts.items() if all(isinstance(part, str) for part in parts)}


def _eval_results(comparison: Comparison | None) -> list[EvalResult]:
    """What the Hub shows as results: perplexity and divergence by domain, and metrics of tasks."""
    results: list[EvalResult] = []
    if comparison is None or not comparison.compared:
        return results
    result = next(iter(comparison.compared.values()))
    for domain, figures in result.evaluation.domains.items():
        # The Hub tells datasets apart by everything but their name.
        of: Json = {"task_type": "text-generation", "dataset_type": "text", "dataset_config": domain}
        of["dataset_name"] = f"{text_kind(comparison)}: {domain}"
        if math.isfinite(figures.perplexity):
            results.append(EvalResult(**of, metric_type="perplexity", metric_value=round(figures.perplexity, 4)))
        if figures.kl_divergence is not None:
            of |= {"metric_type": "kl_divergence", "metric_name": "KL(original || pruned), nats per token"}
            results.append(EvalResult(**of, metric_value=round(figures.kl_divergence, 5)))
    for task, metrics in result.tasks.items():
        of = {"task_type": "text-generation", "dataset_type": task, "dataset_name": task}
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                results.append(EvalResult(**of, metric_type=metric, metric_value=round(value, 4)))
    return results
