# SPDX-License-Identifier: Apache-2.0
"""The parts of a card: sizes, what was measured, what a person must know, calibration, pictures; as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .. import names
from ..checkpoints.sizes import bytes_in_words, parameters_in_words
from ..evaluation.comparison import Comparison, markdown_table
from ..evaluation.speed import speed_in_words
from ..plan import PruningPlan
from ..planning import choice as of_choice
from ..recovery.verdict import recovery_of, sentence_of, table_of
from ..statistics.progressive import PROGRESSIVE
from ..storage.values import Json
from .front_matter import text_kind
from .plain import mapping, pairs, plain, sentence, texts
from .sizes import sizes_of

_RETAINED = "Map of the experts of each layer, with those that were kept marked"
_LOST = "Chart of the perplexity of the original and of this model, for each domain of the text"
_COVERAGE = "Map of how much of each domain's routing goes to experts that were kept, for each layer"
_PICTURES = {"retained": _RETAINED, "coverage": _COVERAGE, "perplexity": _LOST, "lost": _LOST}
"""Beginnings of the names of pictures that a card shows, and what is to be seen there."""


def sizes_table(plan: PruningPlan, folder: Path, comparison: Comparison | None) -> str:
    """Numbers of the original beside those of this model."""
    rows = [["", "original", "this model"]]
    rows.append(["routed experts in a layer", *map(_counts, (plan.original_num_experts, plan.num_experts))])
    if sizes := sizes_of(plan, folder):
        rows.append(["parameters", *map(parameters_in_words, sizes.parameters)])
        rows.append(["weights on disk", *map(bytes_in_words, sizes.nbytes)])
    if comparison is not None and comparison.reference is not None and comparison.compared:
        models = (comparison.models[comparison.reference], next(iter(comparison.compared.values())))
        speeds = [model.generation for model in models if model.generation is not None]
        if len(speeds) == len(models):
            memory = [bytes_in_words(speed.peak_memory_bytes) for speed in speeds]
            rows.append(["peak memory when generating, with all libraries", *memory])
            if all(speed.has_spread for speed in speeds):
                rows.append([f"tokens per second on {plain(speeds[-1].hardware)}", *map(speed_in_words, speeds)])
    return markdown_table(rows)


def _counts(num_experts: Mapping[int, int]) -> str:
    low, high = min(num_experts.values()), max(num_experts.values())
    return f"{low}" if low == high else f"{low} to {high}"


def heads(plan: PruningPlan) -> str:
    """What became of heads for further tokens."""
    done = mapping(plan.provenance.get("heads"))
    if not done and not plan.heads:
        return ""
    layers = ", ".join(map(str, plan.heads))
    text = f"Head for further tokens (layer {layers}): pruned in the same way."
    if done:
        text = sentence(plain(done.get("note") or "heads for further tokens were not pruned as layers are"))
    if done.get("mtp") == names.KEEP and plan.uniform_num_experts is not None:
        text += (
            " It has more experts than a layer, which only transformers can be told (`mtp_per_layer_config`): `import "
            "optimum_moe_prune` before drafting with it (`generate(use_mtp=True)`)."
        )
    return text


def choice(plan: PruningPlan) -> Json:
    """What was measured when it was chosen, and whose sets the layers retain."""
    rows = of_choice.rows(plan)
    by_layer = mapping(of_choice.choice_of(plan).get("by_layer"))
    given = Counter(plain(name) for name in by_layer.values())
    return {
        "choice": markdown_table([[plain(cell) for cell in row] for row in rows]) if rows else "",
        "choice_judged_on": of_choice.judged_on(plan),
        "choice_by": [f"{name} ({count})" for name, count in given.most_common()],
    }


def results(comparison: Comparison | None) -> Json:
    """What was measured, as tables and words."""
    if comparison is None:
        return {"measured": False}
    tables = zip(("domains", "sizes", "tasks"), comparison.parts(), strict=True)
    shown = {name: markdown_table(rows) for name, rows in tables if len(rows) > 1 and name != "sizes"}
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in comparison.settings.items())
    verdict = getattr(comparison, "verdict", "")
    verdict = verdict() if callable(verdict) else verdict
    return {
        "measured": True,
        "compared": comparison.reference is not None,
        "verdict": "\n\n".join(filter(None, map(plain, str(verdict or "").splitlines()))),
        "text_kind": plain(text_kind(comparison)),
        "measured_with": plain(settings),
        "drafts": [plain(words) for words in comparison.draft_words()],
        **shown,
    }


def recovery(plan: PruningPlan) -> Json:
    """What a recovery gave back, as a sentence and a table."""
    found = recovery_of(plan)
    if found is None:
        return {"recovered": False, "recovery": ""}
    table = [[plain(cell) for cell in row] for row in table_of(found)]
    return {
        "recovered": found["accepted"],
        "recovery": plain(sentence_of(found)),
        "recovery_table": markdown_table(table),
        "recovery_steps": [step for step in found["steps"] if step in (names.REFIT, names.DISTIL)],
    }


def notes(plan: PruningPlan) -> list[str]:
    """What a person must know of this choice, as sentences; what became of heads is said elsewhere."""
    of_heads = mapping(plan.provenance.get("heads")).get("note")
    found = texts(plan.notes)
    return [sentence(plain(note)) for note in dict.fromkeys(found) if note.strip() and note != of_heads]


def calibration(plan: PruningPlan) -> Json:
    """What text they were chosen on, how, and with what programs."""
    made = mapping(plan.provenance.get("calibration"))
    by_domain = mapping(made.get("tokens_by_domain"))
    rows = [["calibration text", "tokens"], *([str(domain), str(tokens)] for domain, tokens in by_domain.items())]
    sources = [
        plain(source if source.startswith("hub:") else Path(source).name) for source in texts(made.get("sources"))
    ]
    return {
        "texts": markdown_table(rows) if by_domain else "",
        "samples": plain(made.get("samples")),
        "sources": sources,
        "precision": plain(made["dtype"]) if isinstance(made.get("dtype"), str) else "",
        "progressive": made.get(PROGRESSIVE) is True,
        "weights": pairs(made.get("domain_weights")),
        "versions": pairs(made.get("versions")),
    }


def pictures(folder: Path) -> dict[str, str]:
    """Pictures beside the card as Markdown, by the beginnings of their names; of several pages the first.

    Those of what was lost are left out where the evaluation there is a later one.
    """
    there = sorted((folder / names.REPORT_PICTURES).glob("*.png"))
    evaluation = folder / names.EVALUATION_NAME
    shown = {}
    for start, alt in _PICTURES.items():
        first = next((path for path in there if path.stem in (start, f"{start}-1")), None)
        if first is None:
            continue
        if alt == _LOST and (not evaluation.is_file() or evaluation.stat().st_mtime_ns > first.stat().st_mtime_ns):
            continue
        shown[start] = f"![{alt}]({names.REPORT_PICTURES}/{first.name})"
    return shown
