# SPDX-License-Identifier: Apache-2.0
"""The ``README.md`` of a pruned checkpoint, made of the files beside it and of nothing else.

So it can be made anew at any time: when results are added, or under another name on the Hub.
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

from ..architectures.unequal import FILE_STEM
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.layout import find_layout
from ..config import MoEPrunerConfig
from ..errors import MoEPruneError
from ..evaluation.comparison import Comparison, markdown_table
from ..methods import get_method, list_methods
from ..names import BASE_CARD_NAME, CARD_NAME, CONFIG_NAME, EVALUATION_NAME, NEW_CARD_NAME, PLAN_NAME, REPORT_NAME
from ..plan import PruningPlan
from ..storage.files import write_text

logger = logging.getLogger(__name__)


_SEAL = "\n<!-- written by optimum-moe-prune "
_CARRIED = ("license", "license_name", "license_link", "language")
_TAGS = ["mixture-of-experts", "moe", "expert-pruning", "pruned", "optimum-moe-prune"]

_IMPORT = """\
> **The layers of this model keep different numbers of experts.** Before loading it, install and import the package
> that lets transformers build such layers:
>
> ```
> pip install optimum-moe-prune
> ```
> ```python
> import optimum_moe_prune
> from transformers import AutoModelForCausalLM
>
> model = AutoModelForCausalLM.from_pretrained({name!r})
> ```
>
> Without it transformers refuses the checkpoint (`... is a per-layer attribute and may vary across layers`)."""

_STANDALONE = """\
>
> Or load it without the package, by the code that comes with it:
> `AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code=True)`."""

_LOAD = """\
Every layer keeps the same number of experts, so plain transformers loads it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({name!r})
```"""


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
    path, text = Path(folder) / CARD_NAME, str(model_card(folder, name))
    if path.is_file():
        there = path.read_text(encoding="utf-8", errors="replace")
        if not there.endswith(_seal(there.rpartition(_SEAL)[0])):
            path = path.with_name(NEW_CARD_NAME)
            logger.warning("%s in %s was edited and is kept; the new card is %s.", CARD_NAME, folder, NEW_CARD_NAME)
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
    found = folder / EVALUATION_NAME
    comparison = Comparison.load(found) if found.is_file() else None
    standalone = (folder / f"{FILE_STEM}.py").is_file()
    base_model = _base_model(plan)
    parts = []
    if plan.uniform_num_experts is None:
        parts.append(_IMPORT.format(name=name) + ("\n" + _STANDALONE.format(name=name) if standalone else ""))
    parts.append(f"# {_plain(name.rpartition('/')[2])}")
    parts.append(_opening(plan, base_model))
    if table := _sizes(plan, folder, comparison):
        parts.append(table)
    if plan.uniform_num_experts is not None:
        parts.append(f"## How to load it\n\n{_LOAD.format(name=name)}")
    parts += _results(comparison)
    parts.append(f"## Which experts were removed, and how they were chosen\n\n{_method(plan)}")
    if told := _calibration(plan):
        parts.append(told)
    parts.append(_layers(plan))
    if (folder / REPORT_NAME).is_file():
        parts.append(
            f"[{REPORT_NAME}]({REPORT_NAME}) shows the choice in pictures: one file, which opens without a network."
        )
    parts.append(f"## Make it again\n\n{_reproduce(plan, folder, base_model)}")
    parts.append(f"## Limits\n\n{_limits(plan, comparison, folder, base_model)}")
    parts.append(f"## Versions\n\n{_versions(plan)}")
    data = _front_matter(folder, name, _first_model(plan), comparison)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


# ------------------------------------------------------------------------------------------- front matter


def _front_matter(folder: Path, name: str, base_model: str | None, comparison: Comparison | None) -> ModelCardData:
    carried = {key: value for key, value in _base_metadata(folder).items() if key in _CARRIED and _is_text(value)}
    results = _eval_results(comparison)
    return ModelCardData(
        **carried,
        base_model=base_model,
        # The Hub knows finetune, adapter, quantized and merge; of these a model with other weights is the first.
        base_model_relation=None if base_model is None else "finetune",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _base_metadata(folder: Path) -> dict[str, Any]:
    """The front matter of the original's card; nothing where there is none, or one that cannot be read."""
    path = folder / BASE_CARD_NAME
    try:
        values = metadata_load(path) if path.is_file() else None
    except Exception as error:  # somebody else's file: whatever its parser raises
        logger.warning("the original model's card has no sound front matter: %s", str(error).split("\n")[0])
        return {}
    return values if isinstance(values, dict) else {}


def _is_text(value: Any) -> bool:
    """Whether a value is text, or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def _eval_results(comparison: Comparison | None) -> list[EvalResult]:
    """What the Hub shows as results: perplexity and divergence by domain, and metrics of tasks."""
    results: list[EvalResult] = []
    if comparison is None or not comparison.compared:
        return results
    result = next(iter(comparison.compared.values()))
    for domain, figures in result.evaluation.domains.items():
        # The Hub tells datasets apart by everything but their name.
        of: dict[str, Any] = {"task_type": "text-generation", "dataset_type": "text", "dataset_config": domain}
        of["dataset_name"] = f"held-out text: {domain}"
        results.append(EvalResult(**of, metric_type="perplexity", metric_value=round(figures.perplexity, 4)))
        if figures.kl_divergence is not None:
            kl = round(figures.kl_divergence, 5)
            metric: dict[str, Any] = {"metric_type": "kl_divergence"}
            metric["metric_name"] = "KL(original || pruned), nats per token"
            results.append(EvalResult(**of, **metric, metric_value=kl))
    for task, metrics in result.tasks.items():
        of = {"task_type": "text-generation", "dataset_type": task, "dataset_name": task}
        results += [
            EvalResult(**of, metric_type=metric, metric_value=round(value, 4))
            for metric, value in metrics.items()
            if not metric.endswith("_stderr")
        ]
    return results


# ------------------------------------------------------------------------------------------- sections


def _base_model(plan: PruningPlan) -> str | None:
    """The original on the Hub. What came from there knows its commit; a folder's name would mean nothing to others."""
    return plan.made_for.get("name_or_path") if plan.made_for.get("revision") else None


def _first_model(plan: PruningPlan) -> str | None:
    """The model on the Hub that this one, or the nearest of those it was pruned from, was made of."""
    found, at = _base_model(plan), plan.provenance.get("parent")
    while found is None and isinstance(at, dict):
        provenance = at.get("provenance")
        provenance = provenance if isinstance(provenance, dict) else {}
        model = provenance.get("model")
        if isinstance(model, dict) and model.get("revision"):
            found = str(model.get("name_or_path"))
        at = provenance.get("parent")
    return found


def _opening(plan: PruningPlan, base_model: str | None) -> str:
    link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"a `{plan.model_type}` model"
    if "parent" in plan.provenance:
        first = _first_model(plan)
        link += " that had been pruned before" + (
            f" (from [{first}](https://huggingface.co/{first}))" if first and first != base_model else ""
        )
    kept, total = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
    return (
        f"Experts of {link} were removed: {kept:,} of {total:,} routed experts are retained ({plan.sparsity:.0%} "
        "removed). All other weights are those of the original; nothing was trained afterwards. "
        f"Every token still uses {plan.top_k} of a layer's experts."
    )


def _sizes(plan: PruningPlan, folder: Path, comparison: Comparison | None) -> str:
    """Numbers of the original beside those of this model."""
    rows = [["", "original", "this model"]]
    before, after = _counts(plan.original_num_experts), _counts(plan.num_experts)
    rows.append(["routed experts in a layer", before, after])
    if found := _parameters(plan, folder):
        (count_before, bytes_before), (count_after, bytes_after) = found
        rows.append(["parameters", _billions(count_before), _billions(count_after)])
        rows.append(["weights on disk", _bytes(bytes_before), _bytes(bytes_after)])
    if comparison is not None and comparison.reference is not None and comparison.compared:
        old, new = comparison.models[comparison.reference], next(iter(comparison.compared.values()))
        if old.generation is not None and new.generation is not None:
            pairs = [(g.peak_memory_bytes, g.tokens_per_second) for g in (old.generation, new.generation)]
            rows.append(["peak memory when generating, with all libraries", *(_bytes(memory) for memory, _ in pairs)])
            rows.append(["tokens per second", *(f"{speed:.3g}" for _, speed in pairs)])
    return markdown_table(rows)


def _counts(num_experts: Mapping[int, int]) -> str:
    low, high = min(num_experts.values()), max(num_experts.values())
    return f"{low}" if low == high else f"{low} to {high}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _parameters(plan: PruningPlan, folder: Path) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Parameters and bytes on disk of the original and of this model; the original's follow from this one's experts.

    None where the weights are no safetensors files.
    """
    try:
        checkpoint = Checkpoint.open(folder)
        layout = find_layout(checkpoint, AutoConfig.from_pretrained(folder))
    except (MoEPruneError, OSError, ValueError) as error:
        logger.warning("the card says nothing of sizes: %s", error)
        return None
    numbers = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    after = (numbers, checkpoint.nbytes)
    before = list(after)
    for index, layer in layout.layers.items():
        names = [name for tensors in layer.experts.values() for name in tensors.values()]
        names += [*layer.fused.values(), *layer.router.values()]
        removed = plan.original_num_experts[index] - layer.num_experts
        tensors = [checkpoint.tensors[name] for name in names]
        before[0] += removed * sum(math.prod(tensor.shape) for tensor in tensors) // layer.num_experts
        before[1] += removed * sum(tensor.nbytes for tensor in tensors) // layer.num_experts
    return (before[0], before[1]), after


def _results(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return []
    parts = ["## Results against the original" if comparison.reference is not None else "## Results"]
    tables = dict(zip(("domains", "sizes", "tasks"), comparison.parts(), strict=True))
    if len(tables["domains"]) > 1:
        parts.append(markdown_table(tables["domains"]))
        if comparison.reference is not None:
            parts.append(
                "Perplexity on held-out text; *lost* is the difference of the mean negative log-likelihoods, with a "
                "95% interval from a bootstrap paired by sample; KL is the divergence of this model's next-token "
                "distributions from the original's, per token."
            )
    if told := _plain(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in comparison.settings.items())):
        parts.append(f"Measured with: {told}.")
    if len(tables["tasks"]) > 1:
        parts.append(markdown_table(tables["tasks"]))
        parts.append("Tasks as the lm-evaluation-harness defines them, with its standard errors.")
    return parts if len(parts) > 1 else []


def _method(plan: PruningPlan) -> str:
    if plan.method not in list_methods():
        return f"Method: `{plan.method}`."
    method = get_method(plan.method)
    text = f"Method: `{plan.method}`, {method.summary} ({method.source})."
    if method.formula:
        text += f" {method.formula}"
    allocation = plan.config.get("allocation") or method.allocations[0]
    told = {
        "uniform": "The budget is the same in every layer.",
        "global": "The budget is one number for the whole model, so layers keep different numbers.",
        "sensitivity": "The budget is one number for the whole model, spread so that the measured divergences of the "
        "final output, each of one layer pruned alone, add up to the least.",
    }
    if allocation in told:
        text += f" {told[allocation]}"
    options = plan.config.get("method_options")
    if isinstance(options, dict) and options:
        text += " Options: " + ", ".join(f"`{_plain(key)}={_plain(value)}`" for key, value in options.items()) + "."
    return text


def _calibration(plan: PruningPlan) -> str:
    calibration = plan.provenance.get("calibration")
    calibration = calibration if isinstance(calibration, dict) else {}  # plans are edited by hand
    by_domain = calibration.get("tokens_by_domain")
    if not isinstance(by_domain, dict) or not by_domain:
        return ""
    rows = [["calibration text", "tokens"], *([str(domain), str(tokens)] for domain, tokens in by_domain.items())]
    sources = calibration.get("sources")
    of = (
        " of " + ", ".join(f"`{_plain(s)}`" for s in sources) if isinstance(sources, (list, tuple)) and sources else ""
    )
    weights = calibration.get("domain_weights")
    shares = ""
    if isinstance(weights, dict) and weights:
        shares = " Domains count for " + ", ".join(f"{_plain(d)} {_plain(w)}" for d, w in weights.items()) + "."
    return f"{markdown_table(rows)}\n\nCalibrated on {_plain(calibration.get('samples'))} samples{of}.{shares}"


def _layers(plan: PruningPlan) -> str:
    rows = [["layer", "retained", "experts, as numbered before"]]
    for layer, experts in sorted(plan.retained.items()):
        count = f"{len(experts)} of {plan.original_num_experts[layer]}"
        rows.append([str(layer), count, " ".join(map(str, experts))])
    return f"<details>\n<summary>Retained experts of each layer</summary>\n\n{markdown_table(rows)}\n\n</details>"


def _reproduce(plan: PruningPlan, folder: Path, base_model: str | None) -> str:
    base = base_model or "ORIGINAL"
    revision = ["--revision", str(plan.made_for["revision"])] if base_model else []
    again = ["optimum-cli", "moe-prune", "apply", "--model", base, *revision, "--plan", PLAN_NAME, "OUTPUT"]
    text = (
        "The same cut of the original, to the same tensors and without calibration:\n\n"
        f"```\n{shlex.join(again)}\n```\n\n"
        f"`{PLAN_NAME}` says everything about the choice. With the calibration text, from the beginning:\n\n"
        f"```\n{shlex.join(run_command(plan, base, revision))}\n```"
    )
    if plan.config.get("allocation") == "sensitivity":
        text += "\n\n(which measures the sensitivity as well)"
    if (folder / CONFIG_NAME).is_file():
        text += f"\n\n`{CONFIG_NAME}` is this recipe as a file (`--config`)."
    return text


def run_command(plan: PruningPlan, model: str, extra: list[str]) -> list[str]:
    """The command line that calibrates and prunes as a plan's recipe says, in words.

    Args:
        plan: The plan.
        model: What to call the original.
        extra: Further arguments.
    """
    calibration = plan.provenance.get("calibration")
    sources = calibration.get("sources") if isinstance(calibration, dict) else None
    command = ["optimum-cli", "moe-prune", "run", "--model", model, *extra]
    by_sensitivity = plan.config.get("allocation") == "sensitivity"
    measured = plan.provenance.get("sensitivity")
    if not sources and by_sensitivity and isinstance(measured, dict):
        sources = measured.get("sources")
    if _needs_text(plan) or by_sensitivity:
        for source in sources if isinstance(sources, list) and sources else ["CALIBRATION.jsonl"]:
            command += ["--calibration", str(source)]
        dtype = calibration.get("dtype") if isinstance(calibration, dict) else None
        if isinstance(dtype, str) and dtype:
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
    weights = calibration.get("domain_weights") if isinstance(calibration, dict) else None
    for domain, weight in weights.items() if isinstance(weights, dict) else ():
        command += ["--domain-weight", f"{domain}={weight}"]
    return [*command, "OUTPUT"]


def _needs_text(plan: PruningPlan) -> bool:
    """Whether a plan's method reads a calibration; one that is not known here is taken to."""
    try:
        return plan.method not in list_methods() or bool(MoEPrunerConfig.from_dict(plan.config).needs)
    except (TypeError, ValueError):
        return True


def _limits(plan: PruningPlan, comparison: Comparison | None, folder: Path, base_model: str | None) -> str:
    lines = [
        "What no calibration text needed may be lost: judge this model on text of your own before you rely on it "
        "(`optimum-cli moe-prune evaluate --model THIS --reference ORIGINAL --data YOURS.jsonl`).",
        "Removing experts is no safety tuning, and may change refusals, biases and facts; whatever the original's "
        "card warns of holds here as well.",
    ]
    if comparison is None:
        lines.append("Its losses were not measured when this card was written.")
    if (folder / BASE_CARD_NAME).is_file():
        lines.append(f"The original's own card: [{BASE_CARD_NAME}]({BASE_CARD_NAME}).")
    elif base_model:
        lines.append(f"The original's own card: https://huggingface.co/{base_model}.")
    if "parent" in plan.provenance:
        lines.append(
            "The original meant here is a pruned model itself, and numbers compare with that one; the plan holds the "
            "earlier plan as well."
        )
    return "\n".join(f"- {line}" for line in lines)


def _versions(plan: PruningPlan) -> str:
    calibration = plan.provenance.get("calibration")
    found = calibration.get("versions") if isinstance(calibration, dict) else None
    if not isinstance(found, dict) or not found:
        return "Made with optimum-moe-prune."
    return "Made with " + ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in found.items()) + "."


def _plain(value: Any) -> str:
    """A value from a file as text in one line that is no markup."""
    return " ".join(str(value).split()).replace("`", "'").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")
