# SPDX-License-Identifier: Apache-2.0
"""Heads for further tokens (MTP) run as transformers runs them, from a checkpoint's files.

``from_pretrained`` leaves a head out; transformers reads it for drafting alone (``generate(use_mtp=True)``), into a
decoder layer of the model's own class. That layer is run here on the texts: at every position on the model's last
hidden states there and on the token that follows. So a head is one more MoE layer, whose block is watched as any.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..architectures.heads import with_heads
from ..architectures.structure import LayerStructure, part
from ..checkpoints.heads import Head
from ..checkpoints.layout import Layout
from ..compat import ModelConfig, build_on_meta
from ..compat.heads import build_heads, cache_of_heads, names_of_heads, share_with_heads
from .batches import Batch
from .blocks import MoEBlock, decoder_layers, decoder_of
from .skeleton import Skeleton, Weights
from .transfers import sent
from .widened import widened

logger = logging.getLogger(__name__)


class Heads:
    """The heads of a checkpoint. They are built without weights; see :meth:`loaded`.

    Args:
        layout: The checkpoint.
        skeleton: Its model.

    Attributes:
        blocks: Their MoE blocks.

    Raises:
        Exception: Whatever transformers raises for heads that it cannot build or run.
    """

    def __init__(self, layout: Layout, skeleton: Skeleton) -> None:
        heads, self._skeleton = layout.heads, skeleton
        if problem := next((head.problem for head in heads if head.problem), ""):
            raise ValueError(problem)
        counts = [head.layer.num_experts for head in heads]
        self._config = with_heads(layout.spec, layout.config, [head.like for head in heads], counts)
        model, decoder = skeleton.model, decoder_of(skeleton.model)
        self._model = build_heads(model, decoder, self._config, skeleton.dtype)
        self.blocks = [
            MoEBlock(layout.spec, head.index, layer.mtp_block, layout.structure_of(head.index), rule, is_head=True)
            for head, layer, rule in zip(heads, self._model.layers, self._rules(layout), strict=True)
        ]
        names = names_of_heads(self._model, model, decoder, self._config)
        plain = layout.plain
        own = dict.fromkeys(plain.owners.get(name, name) for name in layout.head_names)
        rounded = {}
        if skeleton.held != skeleton.dtype:  # they are loaded in what is calculated in
            held = build_heads(model, decoder, self._config, skeleton.held).state_dict()
            rounded = {name: tensor.dtype for name, tensor in held.items()}
        self._weights = Weights(self._model, plain, names, skeleton.device, own, whole=model, rounded=rounded)
        self._own = [name for name in self._weights.parameters if name.startswith(("layers.", "shared_post_norm."))]
        if missing := sorted(set(self._own) - set(self._weights.sources)):
            raise ValueError(f"{missing[0]} and {len(missing) - 1} more of its parameters are in no file")
        for name in self._own:
            self._weights.check(name)
        self._device = skeleton.device
        with widened(model, skeleton.dtype):
            self._try()

    @staticmethod
    def _rules(layout: Layout) -> list[Any]:
        rule = layout.spec.routing(layout.config)
        return [layout.spec.by_table(rule) if head.layer.table else rule for head in layout.heads]

    def _try(self) -> None:
        """Run them once without weights, so that what cannot be run is known before a model is."""
        batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64), torch.zeros(1))
        hidden = torch.empty(1, 2, self._model.config.hidden_size, device="meta", dtype=self._skeleton.dtype)
        with contextlib.ExitStack() as watching, torch.no_grad():
            for block in self.blocks:
                watching.enter_context(block.observed(_ignore, lambda own, hidden, *_: torch.empty_like(hidden)))
            self._run(
                batch, hidden, torch.device("meta"), cache_of_heads(self._model)
            )  # without, values are looked at

    @contextlib.contextmanager
    def loaded(self, model: Any = None) -> Iterator[None]:
        """With their parameters, inside a ``with``.

        Args:
            model: The model in memory, whose embeddings and positions are used; by default those of the skeleton.
        """
        if model is not None:
            share_with_heads(self._model, model, decoder_of(model), self._config)
            self._device = self._weights.device = next(decoder_layers(model)[-1].parameters()).device
        try:
            self._weights.load(self._own)
            for layer in self._model.layers:
                self._weights.init_buffers(layer)
            yield
        finally:
            self._model.layers.to("meta")

    def run(self, batch: Batch, hidden: Tensor) -> None:
        """Run all heads, one on what the one before it gives.

        At the end of a sample nothing follows; there its own first token stands for it, as the next text's would where
        texts are joined.

        Args:
            batch: The batch.
            hidden: The model's last hidden states ``(B, L, H)``.
        """
        self._run(batch, hidden.to(self._device), self._model.embed_tokens.weight.device)

    def _run(self, batch: Batch, hidden: Tensor, device: torch.device, cache: Any = None) -> None:
        lengths = batch.attention_mask.sum(1, keepdim=True)
        place = torch.arange(batch.input_ids.shape[1])
        for head in range(len(self.blocks)):
            ids = batch.input_ids.gather(1, torch.where(place < lengths, (place + head + 1) % lengths, place))
            positions = sent((place + head + 1)[None], hidden.device)
            hidden = self._model.forward_layer(head, hidden, positions, cache, input_ids=sent(ids, device))


def _ignore(logits: Tensor) -> None:
    """Logits of a trial."""


def open_heads(layout: Layout, skeleton: Skeleton) -> Heads | str | None:
    """The heads of a checkpoint; why they cannot be run, where that is so; None where there are none."""
    if not layout.heads:
        return None
    try:
        return Heads(layout, skeleton)
    except Exception as error:  # transformers' own code, made for the few models whose heads it loads
        logger.debug("heads cannot be run", exc_info=True)
        why = " ".join(str(error).split()) or type(error).__name__
        logger.warning("the heads for further tokens are not calibrated: %s", why)
        return why


def counts_built(layout: Layout, config: ModelConfig) -> dict[int, int] | str:
    """The experts that transformers gives the heads of a model, by number of the head; why it builds none, if so.

    Args:
        layout: The checkpoint that the model comes from.
        config: The model's config.
    """
    try:
        model = build_on_meta(config, trust_remote_code=layout.checkpoint.source.trust_remote_code)
        built = build_heads(model, decoder_of(model), config)
        return {n: _count(built.layers[n].mtp_block, layout, head) for n, head in enumerate(layout.heads)}
    except Exception as error:  # as above
        return " ".join(str(error).split()) or type(error).__name__


def _count(layer: Any, layout: Layout, head: Head) -> int:
    found: LayerStructure = layout.structure_of(head.index)
    axis = found.tensors[found.logits_from]
    return axis.count(part(layer, found.logits_from).shape)
