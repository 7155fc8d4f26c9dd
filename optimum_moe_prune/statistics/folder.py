# SPDX-License-Identifier: Apache-2.0
"""The folder of saved statistics, found without torch."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RequestError
from ..names import STATS_NAME
from ..storage.kinds import STATS, reading


def header_of(folder: str | os.PathLike) -> Path:
    """The file that says what a folder of statistics holds.

    Raises:
        RequestError: If there is none.
    """
    path = Path(folder) / STATS_NAME
    with reading(folder, STATS):
        if not path.is_file():
            raise RequestError(f"{folder} holds no calibration statistics ({STATS_NAME} is missing).")
    return path
