# SPDX-License-Identifier: Apache-2.0
"""Documents: short where they should be, links that lead somewhere, commands and flags that exist."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import optimum_moe_prune
from optimum_moe_prune.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for place in (ROOT, ROOT / "optimum_moe_prune", ROOT / "examples")
    for path in (place.glob("*.md") if place == ROOT else place.rglob("*.md"))
)
PARSERS = {command.COMMAND.name: argparse.ArgumentParser(command.COMMAND.name) for command in COMMANDS}
for command in COMMANDS:
    command.parse_args(PARSERS[command.COMMAND.name])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        assert (page.parent / path).exists(), link
        assert not anchor or anchor in anchors(page.parent / path if path else page), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_given_so(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?: *)optimum-cli moe-prune ([^\n]+)", text, re.M):
        name, *arguments = shlex.split(line, comments=True)
        assert name in PARSERS, line
        PARSERS[name].parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_are_there_and_take_their_flags(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ *python (examples/[^\n]+)", text, re.M):
        script, *arguments = shlex.split(line, comments=True)
        code = (ROOT / script).read_text(encoding="utf-8")
        assert not [flag for flag in arguments if flag.startswith("--") and f'"{flag}"' not in code], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_import_public_names(page: Path) -> None:
    for snippet in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module == "optimum_moe_prune":
                assert {alias.name for alias in node.names} <= set(optimum_moe_prune.__all__)


def test_the_first_snippet_prints_what_it_says(tmp_path: Path) -> None:
    """All but which experts: the model calculates in bfloat16, which processors round in their own ways."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^```python\n(.*?)^```\n```\n(.*?)^```", text, re.S | re.M)
    assert match is not None
    snippet = match[1].replace('"mixtral-4-experts"', repr(str(tmp_path / "out")))
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed, shown = (re.sub(r": [\d ]+$", ": ...", text, flags=re.M) for text in (done.stdout, match[2]))
    assert printed == shown
    assert (tmp_path / "out" / "config.json").is_file()
