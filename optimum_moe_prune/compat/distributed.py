# SPDX-License-Identifier: Apache-2.0
"""What torch.distributed keeps to itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store


def default_store() -> Store:
    """The store by which the processes of the default group found one another.

    Why: it is the one thing that all of them reach without a device and without a limit of time, and torch (2.6 to
    2.13) exports no name for it.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
