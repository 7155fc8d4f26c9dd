# SPDX-License-Identifier: Apache-2.0
"""Parameters of a checkpoint that does not fit in memory, as they were trained; made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from ..models.skeleton import Skeleton
from .masters import VALUE, kept_name, rank_of
from .student import masters_of
from .trained import Trained


class Folded(Mapping[str, Tensor]):
    """Trained parameters by name, in their own dtype; each is made when it is asked for.

    Args:
        skeleton: The checkpoint, of which changes of low rank are changes.
        trained: The parameters.
        values: What was trained of them.
        rank: Of the changes of down projections.
    """

    def __init__(
        self, skeleton: Skeleton, trained: Sequence[Trained], values: Mapping[str, Tensor], rank: int
    ) -> None:
        self._skeleton, self._values, self._rank = skeleton, values, rank
        self._trained = {one.name: one for one in trained}
        self._like = skeleton.model.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        one, like = self._trained[name], self._like[name]
        if not rank_of(one, like.shape, self._rank):
            return self._values[kept_name(one, 0, VALUE)].to(like.dtype, copy=True)
        ((_, start),) = self._skeleton.read([name])
        (master,) = masters_of([one], lambda t: start, lambda role: 0.0, self._rank, 0, changes=False)
        master.set(self._values)
        return master.rounded().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._trained)

    def __len__(self) -> int:
        return len(self._trained)
