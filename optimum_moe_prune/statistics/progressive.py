# SPDX-License-Identifier: Apache-2.0
"""Statistics of a calibration that pruned as it went: of hidden states that one choice of experts left, and no other.

They say so in their provenance: by which recipe the experts were chosen, how many, and which. So they serve that
recipe, and are refused where statistics of the unpruned model are meant.
"""

from __future__ import annotations

import hashlib
import json

from ..errors import RequestError
from ..storage.values import Values

PROGRESSIVE = "progressive"
"""Under which it stands in the provenance of statistics, and of plans made from them."""

Retained = dict[int, tuple[int, ...]]


def check_unpruned(provenance: Values, what: str) -> None:
    """Raise unless statistics are of the unpruned model.

    Args:
        provenance: Of the statistics.
        what: What needs them, in words that begin a sentence.

    Raises:
        RequestError: If the layers were pruned while they were gathered.
    """
    if PROGRESSIVE in provenance:
        raise RequestError(
            f"{what} needs statistics of the unpruned model, and these were gathered while its layers were pruned "
            "(progressive=True); calibrate again."
        )


def retained_of(provenance: Values) -> Retained:
    """The experts of each pruned layer that statistics were gathered with.

    Raises:
        RequestError: If what the statistics say of it is damaged.
    """
    try:
        found = provenance[PROGRESSIVE]["retained"]
        return {int(layer): tuple(map(int, experts)) for layer, experts in found.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(
            f"what the statistics say of the experts that they were gathered with is damaged: {error!r}. Calibrate "
            "again."
        ) from error


def fingerprint_with(samples: str, provenance: Values) -> str:
    """A hash of what statistics are of: of their samples, and of the experts that layers kept meanwhile.

    Args:
        samples: The samples' own.
        provenance: Of the statistics.
    """
    if PROGRESSIVE not in provenance:
        return samples
    retained = sorted(retained_of(provenance).items())
    return hashlib.sha256(json.dumps([samples, retained]).encode()).hexdigest()
