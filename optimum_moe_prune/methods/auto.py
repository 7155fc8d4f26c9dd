# SPDX-License-Identifier: Apache-2.0
r"""Auto: of several methods' sets those that lose least, by measuring the model.

For each MoE layer :math:`l`, number of experts :math:`n` and candidate :math:`m`, the set :math:`S_{lnm}` that the
candidate retains is measured on the model: the divergence of its final output when that layer alone keeps the set.

.. math:: c_{ln} = \min_m KL(p \,\|\, p_{S_{lnm}}), \qquad \min_{n_l} \sum_l c_{l n_l}
          \quad \text{under} \quad \sum_l n_l = B

exactly, by dynamic programming over the layers; with ``allocation="uniform"`` every layer keeps the same number. The
plan that follows and those of each candidate alone are then measured whole, and the one that loses least is kept.

No paper: which method is best changes from model to model, from layer to layer and with the number of experts, and
what is measured needs no trust. The candidates by default have something different to say: the least change of a
layer's output (``enumeration``), where the router sends its probability (``soft_frequency``), how much arrives
(``reap``), and specialists (``mosaic``).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError
from ..statistics.needs import Need
from .registry import BY_SENSITIVITY, get_method, register_method

CANDIDATES = ("enumeration", "soft_frequency", "reap", "mosaic")


@dataclass(frozen=True)
class AutoOptions:
    """Whose sets are measured.

    Attributes:
        candidates: Names of methods, with commas between them, of which each chooses with its own defaults; the first
            wins where several lose as little. Of those by default the ones are left out that a model cannot serve.
    """

    candidates: str = ",".join(CANDIDATES)

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("candidates is empty; name methods with commas between them.")
        for name in self.names:
            try:
                method = get_method(name)
            except RequestError as error:
                raise ValueError(f"candidates: {error}") from error
            if BY_SENSITIVITY not in method.takes or method.measures:
                raise ValueError(f"candidates: {name!r} chooses no set for a given number of experts in a layer.")
        if twice := {name for name in self.names if self.names.count(name) > 1}:
            raise ValueError(f"candidates names {min(twice)!r} twice.")

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates."""
        return tuple(name.strip() for name in self.candidates.split(",") if name.strip())


def needs(options: AutoOptions) -> frozenset[Need]:
    """What the candidates read."""
    methods = [get_method(name) for name in options.names]
    return frozenset().union(*(method.needs(method.options()) for method in methods))


@register_method(
    "auto",
    kind="measured",
    summary="of several methods' sets those that lose least, by measuring the model",
    source="this package",
    formula=(
        "Several methods choose a set of experts for each layer and number of experts; for each set the divergence of "
        "the model's final output from the original's was measured, with that layer alone pruned. The sets with the "
        "least sum of divergences under the budget were taken, exactly; the whole plan and those of each method alone "
        "were measured as well, and the one that lost least was kept."
    ),
    needs=needs,
    options=AutoOptions,
)
def auto(options: AutoOptions) -> tuple[str, ...]:
    """The methods whose sets are measured."""
    return tuple(get_method(name).name for name in options.names)
