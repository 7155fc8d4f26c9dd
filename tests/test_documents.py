# SPDX-License-Identifier: Apache-2.0
"""Documents: short where they should be, links that lead somewhere, commands and flags that exist."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from optimum_moe_prune.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for place in (ROOT, ROOT / "optimum_moe_prune", ROOT / "examples")
    for path in (place.glob("*.md") if place == ROOT else place.rglob("*.md"))
)
FLAGS: dict[str, set[str]] = {}
for command in COMMANDS:
    parser = argparse.ArgumentParser()
    command.parse_args(parser)
    FLAGS[command.COMMAND.name] = set(parser._option_string_actions)


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?: *)optimum-cli moe-prune ([^\n]+)", text, re.M):
        name, *rest = shlex.split(line, comments=True)
        assert name in FLAGS, line
        assert {part for part in rest if part.startswith("--")} <= FLAGS[name], line
