# SPDX-License-Identifier: Apache-2.0
"""The ``README.md`` of a pruned checkpoint, made of the files beside it and of nothing else.

So it can be made anew at any time: when results are added, or under another name on the Hub. Its words are in
``card.md.jinja``.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from transformers import AutoConfig

from .. import names
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.layout import find_layout
from ..compat import auto_class
from ..config import MoEPrunerConfig
from ..errors import MoEPruneError
from ..evaluation.comparison import Comparison, markdown_table
from ..methods import get_method, list_methods
from ..plan import PruningPlan
from ..storage.files import write_text
from ..storage.values import Json

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_SEAL = "\n<!-- written by optimum-moe-prune "
_CARRIED = ("license", "license_name", "license_link", "language")
_TAGS = ["mixture-of-experts", "moe", "expert-pruning", "pruned", "optimum-moe-prune"]


def write_card(folder: str | os.PathLike, name: str) -> Path:
    """Write the model card of a pruned checkpoint into its folder.

    A card that was edited by hand since it was written is kept; the new one is then written beside it.

    Args:
        folder: The checkpoint, with its plan and recipe.
        name: What it is called: its folder or its repository.

    Raises:
        RequestError: If there is no plan in the folder.
        RunError: If the card cannot be written.
    """
    path, text = Path(folder) / names.CARD_NAME, str(model_card(folder, name))
    if path.is_file():
        there = path.read_text(encoding="utf-8", errors="replace")
        if not there.endswith(_seal(there.rpartition(_SEAL)[0])):
            path = path.with_name(names.NEW_CARD_NAME)
            logger.warning(
                "%s in %s was edited and is kept; the new card is %s.", names.CARD_NAME, folder, names.NEW_CARD_NAME
            )
    return write_text(path, text + _seal(text))


def _seal(text: str) -> str:
    """The last line of a card, by which it is known whether it was edited since."""
    return f"{_SEAL}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def model_card(folder: str | os.PathLike, name: str) -> ModelCard:
    """The model card of a pruned checkpoint.

    Args:
        folder: The checkpoint, with its plan and recipe; evaluation, report and the original's card where there are
            such.
        name: What it is called: its folder or its repository.

    Raises:
        RequestError: If there is no plan in the folder, or the evaluation there is damaged.
    """
    folder = Path(folder)
    plan = PruningPlan.load(folder)
    evaluation = folder / names.EVALUATION_NAME
    comparison = Comparison.load(evaluation) if evaluation.is_file() else None
    # What came from the Hub knows its commit; the name of a folder would mean nothing to others.
    base_model = _plain(plan.made_for.get("name_or_path")) if plan.made_for.get("revision") else None
    published = (model.get("name_or_path") for model in plan.lineage if model.get("revision"))
    first_model = next((_plain(model) for model in published), None)
    original = base_model or "ORIGINAL"
    revision = ["--revision", str(plan.made_for["revision"])] if base_model else []
    again = ["optimum-cli", "moe-prune", "apply", "--model", original, *revision, "--plan", names.PLAN_NAME, "OUTPUT"]
    return ModelCard.from_template(
        card_data=_front_matter(folder, name, first_model, comparison),
        template_path=str(_TEMPLATE),
        # The template escapes nothing: what was read from a file is made plain, but for numbers that were checked.
        plan=plan,
        method=_plain(plan.method),
        explained=get_method(plan.method) if plan.method in list_methods() else None,
        options=_pairs(plan.config.get("method_options"), "="),
        heads=_heads(plan),
        model_type=_plain(plan.model_type),
        base_model=base_model,
        first_model=first_model,
        title=_plain(name.rpartition("/")[2]),
        quoted_name=repr(name),
        loader=_loader(folder),
        sizes=_sizes(plan, folder, comparison),
        **_results(comparison),
        **_calibration(plan),
        apply_command=shlex.join(again),
        run_command=shlex.join(run_command(plan, original, revision)),
        files={path.name for path in folder.iterdir() if path.is_file()},
        **{key: value for key, value in vars(names).items() if key.isupper()},
    )


def _front_matter(folder: Path, name: str, base_model: str | None, comparison: Comparison | None) -> ModelCardData:
    results = _eval_results(comparison)
    return ModelCardData(
        **_carried(folder),
        base_model=base_model,
        # The Hub knows finetune, adapter, quantized and merge; of these a model with other weights is the first.
        base_model_relation=None if base_model is None else "finetune",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _carried(folder: Path) -> Json:
    """Licence and languages from the original's card; nothing where there is none, or one that cannot be read."""
    path = folder / names.BASE_CARD_NAME
    values = None
    try:
        values = metadata_load(path) if path.is_file() else None
    except Exception as error:  # somebody else's file: whatever its parser raises
        logger.warning("the original model's card has no sound front matter: %s", str(error).split("\n")[0])
    found = {key: value for key, value in _mapping(values).items() if key in _CARRIED}
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
        of["dataset_name"] = f"held-out text: {domain}"
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


def _loader(folder: Path) -> str:
    """The auto class that loads the checkpoint whole, with what sees or hears in it."""
    try:
        return auto_class(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, LookupError):  # a type of the user's own, or code that comes with it
        return "AutoModelForCausalLM"


def _sizes(plan: PruningPlan, folder: Path, comparison: Comparison | None) -> str:
    """Numbers of the original beside those of this model."""
    rows = [["", "original", "this model"]]
    rows.append(["routed experts in a layer", *map(_counts, (plan.original_num_experts, plan.num_experts))])
    if sizes := _parameters(plan, folder):
        rows.append(["parameters", *(_scaled(numbers, "B", "M") for numbers, _ in sizes)])
        rows.append(["weights on disk", *(_scaled(nbytes, "GB", "MB") for _, nbytes in sizes)])
    if comparison is not None and comparison.reference is not None and comparison.compared:
        models = (comparison.models[comparison.reference], next(iter(comparison.compared.values())))
        speeds = [model.generation for model in models if model.generation is not None]
        if len(speeds) == len(models):
            memory = [_scaled(speed.peak_memory_bytes, "GB", "MB") for speed in speeds]
            rows.append(["peak memory when generating, with all libraries", *memory])
            rows.append(["tokens per second", *(f"{speed.tokens_per_second:.3g}" for speed in speeds)])
    return markdown_table(rows)


def _heads(plan: PruningPlan) -> str:
    """What became of heads for further tokens."""
    done = _mapping(plan.provenance.get("heads"))
    if not done and not plan.heads:
        return ""
    layers = ", ".join(map(str, plan.heads))
    text = f"Head for further tokens (layer {layers}): pruned in the same way."
    if done:
        text = f"{_plain(done.get('note')).capitalize()}."
    if done.get("mtp") == names.KEEP and plan.uniform_num_experts is not None:
        text += (
            " It has more experts than a layer, which only transformers can be told (`mtp_per_layer_config`): `import "
            "optimum_moe_prune` before drafting with it (`generate(use_mtp=True)`)."
        )
    return text


def _counts(num_experts: Mapping[int, int]) -> str:
    low, high = min(num_experts.values()), max(num_experts.values())
    return f"{low}" if low == high else f"{low} to {high}"


def _scaled(count: int, large: str, small: str) -> str:
    return f"{count / 1e9:.3g} {large}" if count >= 1e9 else f"{count / 1e6:.3g} {small}"


def _parameters(plan: PruningPlan, folder: Path) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Parameters and bytes on disk of the original and of this model; the original's follow from this one's experts.

    None where the weights are no safetensors files.
    """
    try:
        checkpoint = Checkpoint.open(folder)
        # Code in the folder does not run for a card, and nobody is asked about it.
        layout = find_layout(checkpoint, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (MoEPruneError, OSError, ValueError) as error:
        logger.warning("the card says nothing of sizes: %s", error)
        return None
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    dropped = _mapping(plan.provenance.get("heads"))
    removed_parameters, removed_bytes = (int(dropped.get(key) or 0) for key in ("parameters", "bytes"))
    for index, layer in layout.with_heads.items():
        experts = [name for tensors in layer.experts.values() for name in tensors.values()]
        tensors = [checkpoint.tensors[name] for name in (*experts, *layer.fused.values(), *layer.router.values())]
        removed = plan.original_num_experts.get(index, layer.num_experts) - layer.num_experts  # a kept head is unnamed
        removed_parameters += removed * sum(math.prod(tensor.shape) for tensor in tensors) // layer.num_experts
        removed_bytes += removed * sum(tensor.nbytes for tensor in tensors) // layer.num_experts
    before = (parameters + removed_parameters, checkpoint.nbytes + removed_bytes)
    return before, (parameters, checkpoint.nbytes)


def _results(comparison: Comparison | None) -> Json:
    """What was measured, as tables and words."""
    if comparison is None:
        return {"measured": False}
    tables = zip(("domains", "sizes", "tasks"), comparison.parts(), strict=True)
    shown = {name: markdown_table(rows) for name, rows in tables if len(rows) > 1 and name != "sizes"}
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in comparison.settings.items())
    compared = comparison.reference is not None
    return {"measured": True, "compared": compared, "measured_with": _plain(settings), **shown}


def _calibration(plan: PruningPlan) -> Json:
    """What text they were chosen on, and with what programs."""
    calibration = _mapping(plan.provenance.get("calibration"))
    sources = calibration.get("sources")
    by_domain = _mapping(calibration.get("tokens_by_domain"))
    rows = [["calibration text", "tokens"], *([str(domain), str(tokens)] for domain, tokens in by_domain.items())]
    return {
        "texts": markdown_table(rows) if by_domain else "",
        "samples": _plain(calibration.get("samples")),
        "sources": [_plain(source) for source in sources] if isinstance(sources, (list, tuple)) else [],
        "weights": _pairs(calibration.get("domain_weights")),
        "versions": _pairs(calibration.get("versions")),
    }


def run_command(plan: PruningPlan, model: str, extra: list[str]) -> list[str]:
    """The command line that calibrates and prunes as a plan's recipe says, in words.

    Args:
        plan: The plan.
        model: What to call the original.
        extra: Further arguments.
    """
    calibration = _mapping(plan.provenance.get("calibration"))
    by_sensitivity = plan.config.get("allocation") == "sensitivity"
    command = ["optimum-cli", "moe-prune", "run", "--model", model, *extra]
    if _needs_text(plan) or by_sensitivity:
        sources = calibration.get("sources")
        if not sources and by_sensitivity:
            sources = _mapping(plan.provenance.get("sensitivity")).get("sources")
        for source in sources if isinstance(sources, list) and sources else ["CALIBRATION.jsonl"]:
            command += ["--calibration", str(source)]
        if isinstance(dtype := calibration.get("dtype"), str) and dtype:
            command += ["--dtype", dtype]
    defaults = {f.name: f.default for f in fields(MoEPrunerConfig)}
    for name, value in plan.config.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in defaults or (value == defaults[name] and name != "method") or value in ({}, [], None, False):
            continue
        if name == "method_options" and isinstance(value, dict):
            command += [part for key, option in value.items() for part in ("--option", f"{key}={option}")]
        elif name == "protect" and isinstance(value, dict):
            for layer, experts in value.items():
                command += ["--protect", f"{layer}:{','.join(map(str, experts))}"]
        elif name == "skip_layers" and isinstance(value, (list, tuple)):
            command += [flag, ",".join(map(str, value))]
        elif value is True:
            command.append(flag)
        else:
            command += [flag, str(value)]
    for domain, weight in _mapping(calibration.get("domain_weights")).items():
        command += ["--domain-weight", f"{domain}={weight}"]
    return [*command, "OUTPUT"]


def _needs_text(plan: PruningPlan) -> bool:
    """Whether a plan's method reads a calibration; one that is not known here is taken to."""
    try:
        return plan.method not in list_methods() or bool(MoEPrunerConfig.from_dict(plan.config).needs)
    except (TypeError, ValueError):
        return True


def _mapping(value: Any) -> Json:
    """A value of a plan where a mapping should be; plans are edited by hand."""
    return value if isinstance(value, dict) else {}


def _pairs(value: Any, between: str = " ") -> list[str]:
    """The entries of such a mapping, plain."""
    return [f"{_plain(key)}{between}{_plain(entry)}" for key, entry in _mapping(value).items()]


def _plain(value: Any) -> str:
    """A value from a file as text in one line that is no markup."""
    return " ".join(str(value).split()).replace("`", "'").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")
