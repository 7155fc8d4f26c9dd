# SPDX-License-Identifier: Apache-2.0
"""Layers that send a token where a table says by its id: what the table says when experts are gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_AT_ONCE = 4096  # rows of a table


def remapped(table: Tensor, router: Tensor, retained: Sequence[int]) -> Tensor:
    """A table for the retained experts, in their new numbering.

    An expert that is gone gives way to the retained one whose row of the router is nearest and which the token is not
    sent to already: no token loses a place, and none counts an expert twice.

    Args:
        table: Ids of the experts of each token id ``(V, K)``.
        router: The router's rows ``(E, H)``.
        retained: Sorted ids, at least K.
    """
    rows = router.detach().float()
    kept = torch.tensor(retained, device=rows.device)
    new = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    new[kept] = torch.arange(len(kept), device=rows.device)
    nearest = torch.cdist(rows[None].double(), rows[kept][None].double())[0].sort(dim=1, stable=True).indices  # (E, R)
    old = table.detach().long()
    result = new[old]
    for part in torch.arange(len(old), device=rows.device).split(_AT_ONCE):
        ids = result[part]
        for slot in range(ids.shape[1]):
            gone = (ids[:, slot] < 0).nonzero().flatten()
            if len(gone) == 0:
                continue
            order = nearest[old[part][gone, slot]]
            taken = (order[:, :, None] == ids[gone][:, None, :]).any(-1)
            first = taken.int().argmin(dim=1, keepdim=True)
            ids[gone, slot] = order.gather(1, first).flatten()
        result[part] = ids
    return result.to(table.dtype)
