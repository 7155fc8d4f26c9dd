# SPDX-License-Identifier: Apache-2.0
"""Results of several models side by side, for people, for cards and reports, and as a file beside a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..models.substituted import left_out
from ..planning.sensitivity import ALL
from ..storage.files import check_own, write_json
from ..storage.kinds import EVALUATION, reading
from ..storage.values import Json, Values, check_version, read_from, read_json
from .draft import Drafting, draft_table
from .losses import DomainResult, Evaluation, nats, short
from .overlap import CALIBRATED_ON, HELD_OUT, PARTLY, UNKNOWN, Overlap
from .speed import Generation, with_range
from .tables import Table, best_of, filled
from .tables import markdown_table as markdown_table
from .verdict import EXPLAINED, growth, times, verdict_of

FORMAT_VERSION = 1

Tasks = dict[str, dict[str, float]]

_NAMED = 3  # models, beyond which they are counted
KINDS = (CALIBRATED_ON, PARTLY, UNKNOWN, HELD_OUT)


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model.

    Attributes:
        evaluation: Perplexity by domain; of the reference without comparisons.
        parameters: How many it has.
        nbytes: Bytes they take.
        generation: Speed and peak memory, if measured.
        tasks: Metrics by task, if measured.
        overlap: Which of the samples it was calibrated on; None where it is no pruned model, or that is not known.
        draft: What it is worth as a draft of the reference, if measured.
    """

    evaluation: Evaluation = field(default_factory=Evaluation)
    parameters: int | None = None
    nbytes: int | None = None
    generation: Generation | None = None
    tasks: Tasks = field(default_factory=dict)
    overlap: Overlap | None = None
    draft: Drafting | None = None

    @classmethod
    def of(cls, model: Any, evaluation: Evaluation | None = None, tasks: Tasks | None = None) -> ModelResult:
        """With the size of a model."""
        parameters = list(model.parameters())
        count, nbytes = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
        zeros, zero_bytes = left_out(model)
        return cls(evaluation or Evaluation(), count - zeros, nbytes - zero_bytes, tasks=tasks or {})

    def to_dict(self) -> Json:
        """As plain JSON values; what was not measured is left out."""
        values: Json = {"domains": self.evaluation.to_dict()}
        if self.parameters is not None:
            values |= {"parameters": self.parameters, "bytes": self.nbytes}
        if self.generation is not None:
            values["generation"] = self.generation.to_dict()
        if self.tasks:
            values["tasks"] = self.tasks
        if self.overlap is not None:
            values["overlap"] = self.overlap.to_dict()
        if self.draft is not None:
            values["draft"] = self.draft.to_dict()
        return values


@dataclass(frozen=True)
class Comparison:
    """Models by the name they are shown under.

    Attributes:
        models: Their results, the reference's among them.
        reference: Which one the others are compared with, if any.
        settings: How it was measured: data, cut, precision, device, versions.
    """

    models: dict[str, ModelResult]
    reference: str | None = None
    settings: Json = field(default_factory=dict)

    @property
    def compared(self) -> dict[str, ModelResult]:
        """The models but the reference."""
        return {name: result for name, result in self.models.items() if name != self.reference}

    @property
    def text_kind(self) -> str:
        """What to call the text they were judged on: held out, unless some of it is known to be calibrated on."""
        kinds = [result.overlap.kind for result in self.compared.values() if result.overlap is not None]
        return next((kind for kind in KINDS if kind in kinds), HELD_OUT)

    def verdict(self) -> str:
        """What was lost, in a sentence for each model that needs no knowledge of the field; empty without a reference.

        Where samples were calibrated on, another sentence says so.
        """
        several = len(self.compared) > 1
        said = []
        for name, result in self.compared.items():
            words = verdict_of(result.evaluation)
            said += [f"{name}: {words}" if several else words] if words else []
        return "\n".join([*said, *self.warnings()])

    def warnings(self) -> list[str]:
        """What a person must know of the text: which models were calibrated on how much of it."""
        groups: dict[str, list[str]] = {}
        for name, result in self.models.items():
            if result.overlap is not None and (sentence := result.overlap.sentence("{}")):
                groups.setdefault(sentence, []).append(name)
        said = []
        for sentence, names in groups.items():
            shown = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} of {len(self.compared)} models"
            everyone = set(names) >= set(self.compared or self.models)
            said.append(sentence.replace(" for {}", "" if everyone else f" for {shown}", 1))
        return said

    def parts(self) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
        """Results by domain, sizes and speed, and tasks, as rows of text with the head first; no more where empty."""
        return self.by_domain().rows, self._sizes(), self._tasks().rows

    def summary(self, bold: bool = False, width: int | None = None) -> str:
        """Tables for people, what their words mean, and what it comes to.

        Args:
            bold: Whether the best of each row is printed bold, where there are several models.
            width: Characters in a line; wider tables are continued below.
        """
        parts = [table.text(bold, width) for table in self._tables()]
        return "\n\n".join([*parts, *(filled(words, width) for words in self._words())])

    def markdown(self) -> str:
        """The same in Markdown."""
        return "\n\n".join([*(table.markdown() for table in self._tables()), *self._words()])

    def _tables(self) -> list[Table]:
        """Those that hold something; of several models each is a column."""
        sizes = Table(self._sizes())
        if len(self.compared) > 1 and sizes:
            sizes = sizes.transposed()
        return [table for table in (self.by_domain(), sizes, self._drafts(), self._tasks()) if table]

    def _drafts(self) -> Table:
        found = {name: result.draft for name, result in self.models.items() if result.draft is not None}
        return Table(draft_table(found, str(self.reference)))

    def _words(self) -> list[str]:
        """What stands below the tables."""
        judged = any(result.evaluation.domains for result in self.models.values())
        compared = judged and self.reference is not None
        speeds = [r.generation for r in self.models.values() if r.generation is not None and r.generation.has_spread]
        words = [EXPLAINED] if compared else [EXPLAINED.partition(" Lost:")[0]] if judged else []
        if speeds:
            against = f", in turn with {self.reference}" if self.reference is not None else ""
            words.append(
                f"Speed: medians of {speeds[0].rounds} rounds{against}, with the least and the most, generating "
                f"{speeds[0].new_tokens} tokens of one text on {speeds[0].hardware}."
            )
        words += self.draft_words()
        return [*words, *([verdict] if (verdict := self.verdict()) else [])]

    def draft_words(self) -> list[str]:
        """What each model is worth as a draft of the reference, a sentence each."""
        drafts = {name: result.draft for name, result in self.models.items() if result.draft is not None}
        said = {name: draft.sentence(str(self.reference)) for name, draft in drafts.items()}
        return [f"{name}: {words}" if len(said) > 1 else words for name, words in said.items()]

    def by_domain(self) -> Table:
        """Results by domain; of several models each is a column, and the best of a row stands out."""
        models = self.compared or self.models
        judged = {name: result.evaluation.domains for name, result in models.items() if result.evaluation.domains}
        if not judged:
            return Table([["domain"]])
        if len(judged) == 1:
            return Table(Evaluation(next(iter(judged.values()))).table())
        domains = list(dict.fromkeys(domain for results in judged.values() for domain in results))
        compared = all(result.lost is not None for results in judged.values() for result in results.values())
        last = ALL if ALL in domains else domains[-1]

        def row(name: str, shown: Callable[[DomainResult], str], domain: str) -> list[str]:
            return [name, *("" if domain not in found else shown(found[domain]) for found in judged.values())]

        if not compared:
            rows = [["perplexity", *judged], *(row(d, lambda r: short(r.perplexity), d) for d in domains)]
            return Table(rows, best_of(rows, float))
        rows = [["lost (nats)", *judged], *(row(d, lambda r: nats(r.lost), d) for d in domains if d != ALL)]
        if ALL in domains:
            means = [mean_lost(found) for found in judged.values()]
            rows.append(["mean", *map(nats, means)])
            rows.append(row("all text", lambda r: nats(r.lost), ALL))
        rows.append(row("perplexity", lambda r: times(growth(r) or 1.0), last))
        rows.append(row("KL (nats)", lambda r: nats(r.kl_divergence), last))
        rows.append(row("top-1 same", lambda r: f"{r.top1_agreement:.1%}", last))
        return Table(rows, best_of(rows, float) | best_of(rows, _percent, max))

    def _sizes(self) -> list[list[str]]:
        rows = [["model", "parameters", "GB", "to first token (s)", "tokens/s", "times as fast", "peak memory (GB)"]]
        for name, result in self.models.items():
            if result.parameters is None and result.generation is None:
                continue
            g, size = result.generation, "" if result.nbytes is None else f"{result.nbytes / 1e9:.3g}"
            speed = ["", "", ""]
            if g is not None and g.has_spread:
                speed = [f"{g.prompt_seconds:.3g}", with_range(g.tokens_per_second, g.tokens_per_second_range)]
                speed.append(with_range(g.speedup, g.speedup_range))
            memory = "" if g is None else f"{g.peak_memory_bytes / 1e9:.3g}"
            rows.append([name, "" if result.parameters is None else f"{result.parameters:,}", size, *speed, memory])
        kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
        return [[row[i] for i in kept] for row in rows]

    def _tasks(self) -> Table:
        rows = [["task", "metric", *self.models]]
        metrics = dict.fromkeys(
            (task, metric)
            for result in self.models.values()
            for task, values in result.tasks.items()
            for metric in values
            if not metric.endswith("_stderr")
        )
        for task, metric in metrics:
            row = [task, metric]
            for result in self.models.values():
                values = result.tasks.get(task, {})
                error = values.get(f"{metric}_stderr")
                shown = "" if metric not in values else f"{values[metric]:.3f}"
                row.append(shown if error is None else f"{shown} ± {error:.3f}")
            rows.append(row)
        return Table(rows)

    def updated(self, later: Comparison) -> Comparison:
        """With later results of the same models in place of these; what was not measured again stays."""
        if set(self.models) != set(later.models) or self.reference != later.reference:
            return later
        models = {}
        for name, new in later.models.items():
            old = self.models[name]
            models[name] = replace(
                new,
                evaluation=new.evaluation if new.evaluation.domains else old.evaluation,
                parameters=new.parameters or old.parameters,
                nbytes=new.nbytes or old.nbytes,
                generation=new.generation or old.generation,
                tasks={**old.tasks, **new.tasks},
                overlap=new.overlap if new.evaluation.domains else old.overlap,
                draft=new.draft or old.draft,
            )
        return Comparison(models, later.reference, {**self.settings, **later.settings})

    # -- files

    def to_dict(self) -> Json:
        """As plain JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "reference": self.reference,
            "settings": self.settings,
            "models": {name: result.to_dict() for name, result in self.models.items()},
        }

    @classmethod
    def from_dict(cls, values: Values) -> Comparison:
        """From plain values.

        Raises:
            RequestError: If they are of a newer format, or damaged.
        """
        check_version(values, FORMAT_VERSION, "the evaluation")
        try:
            models = {str(name): _result(entry) for name, entry in values["models"].items()}
            reference = values.get("reference")
            if reference is not None and reference not in models:
                raise ValueError(f"the reference {reference!r} is not among the models")
            return cls(models, reference, dict(values.get("settings") or {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"the evaluation is damaged: {error!r}.") from error

    def save(self, path: str | Path) -> Path:
        """Write a ``.json`` file."""
        return write_json(check_own(path, Comparison.load), self.to_dict(), indent=1)

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a file.

        Raises:
            RequestError: If there is none, or it is damaged or of a newer format.
        """
        with reading(path, EVALUATION), read_from(path):
            return cls.from_dict(read_json(path))


def reference_of(evaluation: Evaluation) -> Evaluation:
    """The reference's own results, from those of a model that was compared with it."""
    return Evaluation(
        {
            name: DomainResult(result.samples, result.tokens, result.reference_loss)
            for name, result in evaluation.domains.items()
            if result.reference_loss is not None
        }
    )


def mean_lost(domains: Mapping[str, DomainResult]) -> float:
    """The mean over domains of what was lost, in nats: each counts the same, however much text it has."""
    lost = [result.lost for name, result in domains.items() if name != ALL and result.lost is not None]
    return sum(lost) / len(lost) if lost else math.nan


def _percent(text: str) -> float:
    if not text.endswith("%"):
        raise ValueError(text)
    return float(text[:-1])


def _result(values: Values) -> ModelResult:
    domains = {str(name): DomainResult.from_dict(entry) for name, entry in values["domains"].items()}
    generation, overlap, draft = (values.get(name) for name in ("generation", "overlap", "draft"))
    tasks = {str(t): {str(m): float(v) for m, v in found.items()} for t, found in values.get("tasks", {}).items()}
    return ModelResult(
        Evaluation(domains),
        values.get("parameters"),
        values.get("bytes"),
        None if generation is None else Generation.from_dict(generation),
        tasks,
        None if overlap is None else Overlap.from_dict(overlap),
        None if draft is None else Drafting.from_dict(draft),
    )
