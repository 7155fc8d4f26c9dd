# SPDX-License-Identifier: Apache-2.0
"""The house: a room imports rooms above it in this list, never below, and no circle is left inside a room."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimum_moe_prune

PACKAGE = Path(optimum_moe_prune.__file__).parent

ORDER = (
    "errors",
    "environment",
    "progress",
    "provenance",
    "names",
    "compat",
    "storage",
    "processes",
    "architectures",
    "plan",
    "checkpoints",
    "targets",  # facts about programs that open outputs; a recipe names one
    "models",
    "statistics",  # what methods read and calibrations leave behind, so it stands above both
    "methods",
    "config_checks",
    "config",  # a recipe names a method and its options
    "calibration",  # gathers what methods and recipes say they need
    "planning",
    "surgery",
    "formats",
    "evaluation",
    "recovery",
    "publishing",
    "pruner",
    "commands",
    "",  # the package's own __init__ and __main__, and what optimum-cli reads
)

EXCEPTIONS = {
    # A plan is a value that people hold in their hands: what can be done with it is found on it.
    ("plan", "surgery"): "PruningPlan.apply and PruningPlan.apply_to_checkpoint",
    ("plan", "publishing"): "PruningPlan.export",
    ("plan", "checkpoints"): "PruningPlan.from_pretrained reads the plan of a checkpoint on the Hub",
}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").removeprefix("__init__")


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    first = module.partition(".")[0]
    return first if first in ORDER else ""


def imports_of(module: str, file: Path) -> Iterator[tuple[str, bool]]:
    """The modules of the package that a file imports anywhere, and whether it does so as soon as it is imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    late = {
        node
        for scope in ast.walk(tree)
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(scope, ast.If) and ast.unparse(scope.test) == "TYPE_CHECKING")
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [
                a.name.removeprefix("optimum_moe_prune").strip(".")
                for a in node.names
                if a.name.startswith("optimum_moe_prune")
            ]
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            names = [".".join([*above, *([node.module] if node.module else [])])]
            if f"{names[0]}.{node.names[0].name}".strip(".") in FILES:
                names = [f"{names[0]}.{alias.name}".strip(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "optimum_moe_prune":
            names = [str(node.module).removeprefix("optimum_moe_prune").strip(".")]
        else:
            continue
        yield from ((name, node not in late) for name in names)


def test_a_room_imports_rooms_above_it() -> None:
    wrong, used = [], set()
    for module, file in FILES.items():
        for name, _ in imports_of(module, file):
            mine, theirs = room_of(module), room_of(name)
            if (mine, theirs) in EXCEPTIONS:
                used.add((mine, theirs))
            elif ORDER.index(theirs) > ORDER.index(mine):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)
    assert used == set(EXCEPTIONS), "an exception that nobody needs"
    assert len(EXCEPTIONS) <= 3


def test_no_circle_is_left() -> None:
    """Of files too, and of imports inside functions too; but for the named exceptions."""
    graph = {
        module: {name for name, _ in imports_of(module, file) if (room_of(module), room_of(name)) not in EXCEPTIONS}
        - {module}
        for module, file in FILES.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_room_is_in_the_list() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found == {*ORDER, "__init__", "__main__", "_optimum_register"} - {""}


def length(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("module", sorted(FILES), ids=lambda module: module or "__init__")
def test_no_file_is_long(module: str) -> None:
    """The front door alone is longer: a third of it says what its arguments are."""
    assert length(FILES[module]) <= (605 if module == "pruner" else 405)
