# SPDX-License-Identifier: Apache-2.0
"""What comes from others' files does not command the terminal it is shown on."""

from __future__ import annotations

import pytest

from optimum_moe_prune.commands.shown import show


def test_results_command_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A plan's method, a domain, a folder: only bold print, which tables make, is let through."""
    show("\x1b[31mreap\x1b]0;title\x07: \x1b[1mbest\x1b[0m\n  layer 0\u202e")
    said = "\\x1b[31mreap\\x1b]0;title\\x07: \x1b[1mbest\x1b[0m\n  layer 0\\u202e\n"
    assert capsys.readouterr().out == said
