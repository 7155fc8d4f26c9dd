# SPDX-License-Identifier: Apache-2.0
"""One of several processes: its number, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Which of several processes this is.

    Attributes:
        rank: The number of this one; 0 is the main process, which writes and prints.
        count: How many there are.
        local_rank: The number of this one on its machine.
        local_count: How many there are on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.count == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0
