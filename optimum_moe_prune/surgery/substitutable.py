# SPDX-License-Identifier: Apache-2.0
"""Whether experts of a checkpoint can be left out and answer with a constant, before any work."""

from __future__ import annotations

from ..architectures.substitution import DTYPES, MODEL_TYPES, READER, READER_VERSION
from ..checkpoints.layout import Layout
from ..errors import RequestError, nearest_first
from ..names import KEEP

_WAY = "Without substitute=True the experts are removed."


def check_substitution(layout: Layout, standalone: bool = False, mtp: str | None = None) -> None:
    """Raise unless experts of a checkpoint can be left out and answer with a constant.

    Args:
        layout: The checkpoint.
        standalone: Whether a modelling file is asked for.
        mtp: What is asked to become of heads for further tokens.

    Raises:
        RequestError: With what its reader takes.
    """
    reader, name, kind = f"{READER} {READER_VERSION}", layout.checkpoint.name_or_path, layout.spec.model_type
    if kind not in MODEL_TYPES:
        raise RequestError(
            f"substitute=True is for {reader}, which reads no constant experts of a {kind!r} model; types of which it "
            f"does: {nearest_first(kind, sorted(MODEL_TYPES))}. {_WAY}"
        )
    if standalone:
        raise RequestError(f"standalone is for transformers, and substitute=True for {reader} alone.")
    if layout.heads and mtp not in (None, KEEP):
        raise RequestError(
            f"mtp is {mtp!r}; beside experts that answer with a constant heads for further tokens stay whole "
            "(mtp='keep')."
        )
    for index, layer in layout.layers.items():
        tensors = [*layer.fused.values(), *(n for own in layer.experts.values() for n in own.values())]
        found = sorted({layout.checkpoint.tensors[tensor].dtype for tensor in tensors} - {*DTYPES})
        if found or layout.plain.method:
            raise RequestError(
                f"{name} is quantised ({layout.plain.method or found[0]}), and {reader} takes constant experts of "
                f"unquantised models alone. {_WAY}"
            )
        if layer.fused:
            raise RequestError(
                f"{next(iter(layer.fused.values()))} of {name} holds all experts of layer {index}, and {reader} reads "
                "constant experts beside tensors of each expert alone. Load and save the checkpoint with "
                "transformers, which writes these."
            )
