# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that shows what a plan retains, why, how far a model can be pruned and what was lost.

``data`` and ``explain`` take statistics and plans apart, ``maps``, ``charts`` and ``graphs`` draw them (with what
``drawing`` has for all figures) and write the same values as ``tables``, ``sections``, ``why``, ``measured`` and
``origin`` put figures and tables together (``sizes`` reads how large models are), and ``page.html.jinja`` is the page
with all its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from ...storage.files import check_file, write_bytes, write_text
from ...storage.values import Values
from .drawing import FORMATS, Gallery, require_matplotlib, style

if TYPE_CHECKING:
    import os

    from ...checkpoints.source import Source
    from ...evaluation.comparison import Comparison
    from ...evaluation.losses import Evaluation
    from ...plan import PruningPlan
    from ...planning.sensitivity import Sensitivity
    from ...statistics.stats import CalibrationStats

GENERATOR = "optimum-moe-prune report"
"""Marks a file as a report of this package."""


def write_report(
    target: str | Path,
    *,
    stats: CalibrationStats | None = None,
    plans: Iterable[PruningPlan] | Mapping[str, PruningPlan] = (),
    sensitivity: Sensitivity | Values | None = None,
    evaluation: Comparison | Evaluation | Values | None = None,
    title: str | None = None,
    overwrite: bool = False,
    pictures: str | Path | None = None,
    formats: Sequence[str] = ("png", "svg"),
    model: str | os.PathLike | Source | None = None,
) -> Path:
    """Write a report as one HTML file that needs nothing else, neither the network nor scripts.

    Every input may be absent, and its sections are then too; one must be there. The same inputs give the same bytes.

    Args:
        target: The file to write.
        stats: Shows which domains the experts serve, and why Mosaic and Pathfinder chose as they did.
        plans: What was chosen; a mapping names them, else they are called by method and sparsity. Several stand side
            by side in the same figures and tables, in the order given.
        sensitivity: What it costs to prune each layer and the whole model; also as the plain values of its file.
        evaluation: What was lost: models side by side, or the results of one; also as the plain values of the file.
        title: Of the page.
        overwrite: Replace an earlier report, and earlier pictures.
        pictures: A folder for the figures as files of their own; made if absent.
        formats: Of these files: ``"png"``, ``"svg"``, ``"pdf"``.
        model: The folder or Hub id of the model that the plans were made for, or of one that a plan left: its files
            say how large the models are. By default these are looked for where the plans say that the model is, and
            beside the report; only folders are.

    Returns:
        The file.

    Raises:
        RequestError: If there is nothing to report, an input is damaged, ``model`` is none of the plans', matplotlib
            is not installed, or something else is in the way of a file.
        RunError: If a file cannot be written.
    """
    from ...planning.sensitivity import Sensitivity
    from . import measured, origin, sections, why
    from .data import named
    from .sizes import find_family
    from .text import model_name

    target, folder = Path(target), None if pictures is None else Path(pictures)
    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    if unknown := [form for form in formats if form not in FORMATS]:
        raise RequestError(f"format {unknown[0]!r} is not known. Known: {', '.join(FORMATS)}.")
    if target.suffix != ".html" and not target.is_dir():
        raise RequestError(f"the report's file must end in .html, and is {target}.")
    check_file(target, target.suffix, overwrite, _check_is_report)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; name a folder for the pictures.")
    given = named(plans)
    chosen = {name: plan.without_heads for name, plan in given.items()}  # layers are compared
    stats = None if stats is None else stats.without_heads
    if stats is None and not chosen and sensitivity is None and evaluation is None:
        raise RequestError("there is nothing to report; give statistics, plans, sensitivities or an evaluation.")
    require_matplotlib()
    costs = Sensitivity.from_dict(sensitivity) if isinstance(sensitivity, Mapping) else sensitivity
    results = origin.order(_comparison(evaluation), chosen)
    family = find_family(given, model, target.absolute().parent)
    if title is None:
        facts = [{} if stats is None else stats.model, *(plan.made_for for plan in chosen.values())]
        facts.append({} if costs is None else costs.model)
        name = next(filter(None, map(model_name, facts)), None)
        title = f"Pruning report: {name}" if name else "Pruning report"

    gallery = Gallery(formats if folder is not None else ())
    with style():
        text = _rendered(
            title=title,
            verdict=origin.verdict(results),
            overview=origin.overview(stats, chosen, costs, results),
            remarks=origin.remarks(stats, given),
            quality=measured.quality(results, gallery),
            recovery=origin.recovered(chosen),
            sensitivity=measured.sensitivity(costs, gallery),
            retained=sections.retained(chosen, gallery),
            sizes=measured.sizes(results, given, family),
            domains=sections.domains(stats, chosen, gallery),
            scores=sections.scores(stats, chosen, gallery),
            mosaic=why.mosaic(stats, chosen, gallery),
            paths=why.paths(stats, chosen, gallery),
            origin=origin.origin(stats, chosen),
        )
    if folder is not None:
        _write_pictures(folder, gallery.files, overwrite)
    return write_text(target, text)


def _comparison(given: Comparison | Evaluation | Values | None) -> Comparison | None:
    """Evaluated models side by side, also from the results of one, or from the plain values of a file.

    Raises:
        RequestError: If it is damaged or empty.
    """
    from ...evaluation.comparison import Comparison, ModelResult, reference_of
    from ...evaluation.losses import Evaluation

    if isinstance(given, Evaluation):
        models = {"model": ModelResult(given), "reference": ModelResult(reference_of(given))}
        given = Comparison(models, "reference" if models["reference"].evaluation.domains else None)
    found = Comparison.from_dict(given) if isinstance(given, Mapping) else given
    if found is not None and not found.models:
        raise RequestError("the evaluation is damaged: there are no models.")
    return found


def _rendered(**content: Any) -> str:
    """The page."""
    import jinja2

    from .text import plain

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else plain(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(generator=GENERATOR, **content)
    return page[page.index("<!DOCTYPE") :]


def _check_is_report(path: Path) -> None:
    """Raise unless a file is an earlier report.

    Raises:
        RequestError: If it is something else.
    """
    is_report = False
    if path.is_file():
        with path.open("rb") as file:
            is_report = GENERATOR.encode() in file.read(2000)
    if not is_report:
        raise RequestError(f"{path} is no report of this package.")


def _write_pictures(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write pictures, each beside its target and renamed into place."""
    there = [name for name in files if (folder / name).exists()]
    if there and not overwrite:
        raise RequestError(f"{folder / there[0]} exists; name another folder, or allow replacing it (overwrite=True).")
    for name, content in files.items():
        write_bytes(folder / name, content)


__all__ = ["require_matplotlib", "write_report"]
