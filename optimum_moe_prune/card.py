# SPDX-License-Identifier: Apache-2.0
"""The ``README.md`` of a pruned checkpoint: how to load it, what was removed, and how."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from .methods import get_method, list_methods
from .plan import PruningPlan

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


def model_card(plan: PruningPlan, name: str, standalone: bool = False) -> ModelCard:
    """The model card of a pruned checkpoint.

    Args:
        plan: The plan that was applied.
        name: What the checkpoint is called: its folder or repository.
        standalone: Whether the checkpoint has its own modelling file.
    """
    # What came from the Hub knows its commit; a folder's name would mean nothing to others.
    base_model = plan.made_for.get("name_or_path") if plan.made_for.get("revision") else None
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        tags=["mixture-of-experts", "expert-pruning", "optimum-moe-prune"],
    )
    unequal = plan.uniform_num_experts is None
    parts = []
    if unequal:
        parts.append(_IMPORT.format(name=name) + ("\n" + _STANDALONE.format(name=name) if standalone else ""))
    parts.append(f"# {name}")
    of = f"`{base_model}`" if base_model else f"a `{plan.model_type}` model"
    kept, total = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
    parts.append(
        f"Experts of {of} were removed: {kept} of {total} routed experts are retained ({plan.sparsity:.0%} removed); "
        "everything else is unchanged."
    )
    if not unequal:
        parts.append("Every layer keeps the same number of experts, so plain transformers loads it.")
    parts.append(f"Method: {_method(plan)}")
    calibration = plan.provenance.get("calibration")
    calibration = calibration if isinstance(calibration, dict) else {}  # plans are edited by hand
    by_domain = calibration.get("tokens_by_domain")
    if isinstance(by_domain, dict) and by_domain:
        domains = ", ".join(f"{' '.join(str(domain).split())} {tokens}" for domain, tokens in by_domain.items())
        parts.append(f"Calibration: {calibration.get('samples')} samples; tokens by domain: {domains}.")
    rows = "\n".join(
        f"| {layer} | {len(experts)} of {plan.original_num_experts[layer]} | {' '.join(map(str, experts))} |"
        for layer, experts in sorted(plan.retained.items())
    )
    parts.append(f"| layer | retained | experts, as numbered before |\n|---|---|---|\n{rows}")
    parts.append(
        "Made with optimum-moe-prune. `moe_pruning_plan.json` says everything about the choice, and "
        "`MoEPruner.from_pretrained` on this checkpoint repeats it on the original model."
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _method(plan: PruningPlan) -> str:
    if plan.method not in list_methods():
        return f"`{plan.method}`."
    method = get_method(plan.method)
    return f"`{plan.method}`, {method.summary} ({method.source})."
