# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that shows what a plan retains, why, how far a model can be pruned and what was lost.

``data`` and ``measured`` turn what is given into plain arrays, ``explain`` finds Mosaic's clusters and Pathfinder's
paths again, ``maps``, ``grids``, ``graphs`` and ``curves`` make figures of them, ``canvas`` draws these, ``sections``,
``why``, ``outcome`` and ``origin`` say how to read them, and ``page`` is the HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from ...storage.files import write_bytes, write_text

if TYPE_CHECKING:
    from ...plan import PruningPlan
    from ...statistics.stats import CalibrationStats


def write_report(
    target: str | Path,
    *,
    stats: CalibrationStats | None = None,
    plans: Iterable[PruningPlan] | Mapping[str, PruningPlan] = (),
    sensitivity: Any = None,
    evaluation: Any = None,
    title: str | None = None,
    overwrite: bool = False,
    pictures: str | Path | None = None,
    formats: Sequence[str] = ("png", "svg"),
) -> Path:
    """Write a report as one HTML file that needs nothing else, neither the network nor scripts.

    Every input may be absent, and its sections are then too; one must be there. The same inputs give the same bytes.

    Args:
        target: The file to write.
        stats: Shows which domains the experts serve, and why Mosaic and Pathfinder chose as they did.
        plans: What was chosen; a mapping names them, else they are called by method and sparsity.
        sensitivity: What it costs to prune each layer and the whole model: a mapping in the form of the file of
            ``optimum-cli moe-prune sensitivity``, or an object with ``to_dict()``.
        evaluation: What was lost: a mapping in the form of ``evaluate --json``, or an object with ``to_dict()``.
        title: Of the page.
        overwrite: Replace an earlier report, and earlier pictures.
        pictures: A folder for the figures as files of their own; made if absent.
        formats: Of these files: ``"png"``, ``"svg"``, ``"pdf"``.

    Returns:
        The file.

    Raises:
        RequestError: If there is nothing to report, an input is damaged, matplotlib is not installed, or something
            else is in the way of a file.
        RunError: If a file cannot be written.
    """
    from .canvas import FORMATS, Gallery, require_matplotlib
    from .data import named, reduce_stats
    from .measured import read_evaluation, read_sensitivity
    from .origin import origin_section, overview
    from .outcome import evaluation_section, sensitivity_section, size_section
    from .page import page
    from .sections import domain_section, retained_section, score_section
    from .why import mosaic_section, paths_section
    from .words import model_name

    target, folder = Path(target), None if pictures is None else Path(pictures)
    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    if unknown := [form for form in formats if form not in FORMATS]:
        raise RequestError(f"format {unknown[0]!r} is not known. Known: {', '.join(FORMATS)}.")
    _check_target(target, overwrite)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; name a folder for the pictures.")
    chosen = named(plans)
    if stats is None and not chosen and sensitivity is None and evaluation is None:
        raise RequestError("there is nothing to report; give statistics, plans, sensitivities or an evaluation.")
    require_matplotlib()
    costs = None if sensitivity is None else read_sensitivity(sensitivity)
    results = None if evaluation is None else read_evaluation(evaluation)

    gallery = Gallery(formats if folder is not None else ())
    reduced = None if stats is None else reduce_stats(stats)
    sections = [
        evaluation_section(results, gallery),
        sensitivity_section(costs, gallery),
        retained_section(chosen, gallery),
        size_section(chosen, results, gallery),
    ]
    if stats is not None and reduced is not None:
        sections.append(domain_section(stats, reduced, chosen, gallery))
    sections += [
        score_section(stats, reduced, chosen, gallery),
        mosaic_section(stats, chosen, gallery),
        paths_section(stats, chosen, gallery),
        origin_section(stats, chosen),
    ]
    if title is None:
        facts = [stats.model if stats is not None else None, *(plan.made_for for plan in chosen.values())]
        facts.append(costs.model if costs is not None else None)
        name = next(filter(None, map(model_name, facts)), None)
        title = f"Pruning report: {name}" if name else "Pruning report"
    text = page(title, overview(stats, chosen, costs, results), sections)
    if folder is not None:
        _write_pictures(folder, gallery.files, overwrite)
    return write_text(target, text)


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise unless the report may be written there.

    Raises:
        RequestError: If something is there that is no earlier report, or may not be replaced.
    """
    from .page import GENERATOR

    if target.is_dir():
        raise RequestError(f"{target} is a folder; name a file, as report.html.")
    if not target.exists():
        return
    if not overwrite:
        raise RequestError(f"{target} exists; name another file, or allow replacing it (overwrite=True).")
    with target.open("rb") as file:
        if GENERATOR.encode() not in file.read(2000):
            raise RequestError(f"{target} is no report of this package and is not replaced; name another file.")


def _write_pictures(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write pictures, each beside its target and renamed into place."""
    there = [name for name in files if (folder / name).exists()]
    if there and not overwrite:
        raise RequestError(f"{folder / there[0]} exists; name another folder, or allow replacing it (overwrite=True).")
    for name, content in files.items():
        write_bytes(folder / name, content)


__all__ = ["write_report"]
