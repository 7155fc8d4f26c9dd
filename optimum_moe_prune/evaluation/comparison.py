# SPDX-License-Identifier: Apache-2.0
"""Results of several models side by side, for people, for cards and reports, and as a file beside a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RequestError, one_line
from ..storage.files import check_own, write_json
from ..storage.values import Json, Values, check_version, read_from, read_json
from .losses import DomainResult, Evaluation, aligned
from .speed import Generation

FORMAT_VERSION = 1

Tasks = dict[str, dict[str, float]]


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model.

    Attributes:
        evaluation: Perplexity by domain; of the reference without comparisons.
        parameters: How many it has.
        nbytes: Bytes they take.
        generation: Speed and peak memory, if measured.
        tasks: Metrics by task, if measured.
    """

    evaluation: Evaluation = field(default_factory=Evaluation)
    parameters: int | None = None
    nbytes: int | None = None
    generation: Generation | None = None
    tasks: Tasks = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, evaluation: Evaluation | None = None, tasks: Tasks | None = None) -> ModelResult:
        """With the size of a model."""
        parameters = list(model.parameters())
        count, nbytes = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
        return cls(evaluation or Evaluation(), count, nbytes, tasks=tasks or {})

    def to_dict(self) -> Json:
        """As plain JSON values; what was not measured is left out."""
        values: Json = {"domains": self.evaluation.to_dict()}
        if self.parameters is not None:
            values |= {"parameters": self.parameters, "bytes": self.nbytes}
        if self.generation is not None:
            values["generation"] = self.generation.to_dict()
        if self.tasks:
            values["tasks"] = self.tasks
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

    def parts(self) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
        """Results by domain, sizes and speed, and tasks, as rows of text with the head first; no more where empty."""
        return self._by_domain(), self._sizes(), self._tasks()

    def summary(self) -> str:
        """Tables for people."""
        return "\n\n".join("\n".join(aligned(table)) for table in self.parts() if len(table) > 1)

    def markdown(self) -> str:
        """Tables in Markdown."""
        return "\n\n".join(markdown_table(table) for table in self.parts() if len(table) > 1)

    def _by_domain(self) -> list[list[str]]:
        several = len(self.compared) > 1
        rows: list[list[str]] = []
        for name, result in (self.compared if self.compared else self.models).items():
            table = result.evaluation.table() if result.evaluation.domains else []
            if not rows and table:
                rows.append((["model"] if several else []) + table[0])
            rows += [([name] if several else []) + row for row in table[1:]]
        return rows

    def _sizes(self) -> list[list[str]]:
        rows = [["model", "parameters", "GB", "to first token (s)", "tokens/s", "peak memory (GB)"]]
        for name, result in self.models.items():
            if result.parameters is None and result.generation is None:
                continue
            row = [name]
            size = "" if result.nbytes is None else f"{result.nbytes / 1e9:.3g}"
            row += ["" if result.parameters is None else f"{result.parameters:,}", size]
            g = result.generation
            row += (
                ["", "", ""]
                if g is None
                else [f"{g.prompt_seconds:.3g}", f"{g.tokens_per_second:.3g}", f"{g.peak_memory_bytes / 1e9:.3g}"]
            )
            rows.append(row)
        kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
        return [[row[i] for i in kept] for row in rows]

    def _tasks(self) -> list[list[str]]:
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
        return rows

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
        with read_from(path):
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


def markdown_table(rows: list[list[str]]) -> str:
    """A table of text in Markdown: the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    rule = "|" + "|".join("---" if i == 0 else "--:" for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(text: str) -> str:
    plain = one_line(text).replace("\\", "\\\\").replace("<", "&lt;")
    return plain.replace("|", "\\|").replace("[", "\\[").replace("`", "\\`")


def _result(values: Values) -> ModelResult:
    domains = {str(name): DomainResult.from_dict(entry) for name, entry in values["domains"].items()}
    generation = values.get("generation")
    tasks = {str(t): {str(m): float(v) for m, v in found.items()} for t, found in values.get("tasks", {}).items()}
    return ModelResult(
        Evaluation(domains),
        values.get("parameters"),
        values.get("bytes"),
        None if generation is None else Generation(**generation),
        tasks,
    )
