# SPDX-License-Identifier: Apache-2.0
"""Tables that scripts write into Markdown files, each between two markers of its own."""

from __future__ import annotations

from pathlib import Path


def write_block(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; all else stays as it is.

    Args:
        path: The Markdown file.
        name: Of the block.
        text: What stands there from now on.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = path.read_text(encoding="utf-8")
    if page.count(first) != 1 or page.count(last) != 1 or page.index(first) > page.index(last):
        raise SystemExit(f"{path} has no block {first} ... {last}.")
    before, after = page.split(first)[0], page.split(last)[1]
    path.write_text(f"{before}{first}\n{text.strip()}\n{last}{after}", encoding="utf-8")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
