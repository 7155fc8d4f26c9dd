# SPDX-License-Identifier: Apache-2.0
"""One pass over a model in memory -> :class:`CalibrationStats`.

The chosen experts and their weights are taken where the model uses them. Outputs of single experts come from the
model's own experts implementation, asked for one expert per row with weight 1, so that every architecture, dtype and
kernel is observed as it is. What the pass costs depends on what is asked for:

- *routing*: the model's own forward; only the router is watched.
- *routed*: the experts run once on the tokens routed to them, as in the plain forward, and the block's output is put
  together here from their outputs.
- *dense*: every expert runs once on every token, in chunks; the block's output is put together from those.

Shapes: E experts, T tokens, S samples, N kept tokens, K top_k, H hidden size.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .architectures.block import (
    ExpertsForward,
    MoEBlock,
    dense_layers,
    evaluating,
    fingerprint,
    input_device,
    moe_blocks,
    vocabulary,
)
from .calibration import Batch, CalibrationSet
from .errors import RequestError, RunError
from .progress import progress
from .stats import DENSE, PER_SAMPLE, CalibrationStats, LayerStats, Need, keep_tokens, tensor_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_BYTES = 128 * 2**20  # outputs of all experts for a chunk of tokens, in float32


def collect(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    needs: Iterable[Need],
    *,
    batch_size: int = 8,
    max_tokens: int = 8192,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
) -> CalibrationStats:
    """Run a model over the calibration samples once and gather statistics of its MoE layers.

    Args:
        model: A causal language model with real parameters, on any device or ``device_map``. Its training mode is
            restored.
        calibration: The samples.
        needs: What to gather.
        batch_size: Samples in a forward pass.
        max_tokens: The most tokens for which statistics per token are kept.
        seed: Decides which tokens are kept when there are more.
        provenance: Added to the provenance of the result.

    Raises:
        RequestError: If the model cannot be observed, or a token id is outside its vocabulary.
        RunError: If a router gives NaN or infinite logits, or an expert such outputs.
    """
    needs = frozenset(needs)
    check_model(model)
    check_finite(model)
    blocks = moe_blocks(model)
    calibration.check_vocabulary(vocabulary(model))
    token_sample, token_position = keep_tokens(calibration.samples, max_tokens, seed)
    row_of_token = [
        torch.full((sample.num_tokens,), -1, dtype=torch.int64) for sample in calibration.samples
    ]  # position -> kept row
    for row, (sample, position) in enumerate(zip(token_sample.tolist(), token_position.tolist(), strict=True)):
        row_of_token[sample][position] = row
    current = _Current()
    observers: list[_LayerObserver] = []
    for block in blocks:
        before = observers[-1] if observers else None
        observers.append(_LayerObserver(block, needs, len(calibration), len(token_sample), current, before))

    decoder = model.base_model
    device = input_device(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        for observer in observers:
            stack.enter_context(observer.block.observed(observer.on_logits, observer.experts_forward))
        batches = calibration.batches(batch_size)
        for batch in progress(batches, "calibrating", calibration.num_batches(batch_size), unit="batch"):
            current.set(batch, row_of_token)
            decoder(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
            )

    weights = torch.ones(len(calibration), dtype=torch.float64)
    layers = {
        observer.block.layer: LayerStats(
            observer.block.num_experts, observer.block.routing, observer.finished(), weights, token_sample
        )
        for observer in observers
    }
    return CalibrationStats(
        model=model_facts(model),
        samples=calibration.samples,
        layers=layers,
        needs=needs,
        token_sample=token_sample,
        token_position=token_position,
        max_tokens=max_tokens,
        seed=seed,
        provenance={
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "truncated_samples": calibration.truncated,
            "duplicate_samples": calibration.duplicates,
            **(provenance or {}),
        },
    )


def empty_stats(model: PreTrainedModel, *, seed: int = 0) -> CalibrationStats:
    """Statistics of no calibration at all, for methods that need none."""
    check_model(model)
    blocks = moe_blocks(model)
    nothing = torch.zeros(0, dtype=torch.int64)
    layers = {
        b.layer: LayerStats(b.num_experts, b.routing, {}, torch.zeros(0, dtype=torch.float64), nothing) for b in blocks
    }
    provenance = {"made": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions()}
    return CalibrationStats(model_facts(model), (), layers, frozenset(), nothing, nothing, 0, seed, provenance)


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What statistics and plans remember of the model they were made for."""
    blocks = moe_blocks(model)
    return {
        "model_type": blocks[0].spec.model_type,
        "top_k": blocks[0].routing.top_k,
        "fingerprint": fingerprint(blocks),
        "dense_layers": dense_layers(model),
        "name_or_path": model.config._name_or_path or None,
        "revision": getattr(model.config, "_commit_hash", None),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("optimum-moe-prune", "transformers", "torch", "scikit-learn", "scipy")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def check_model(model: PreTrainedModel) -> None:
    """Raise unless the parameters of a model are really there, and plain.

    Raises:
        RequestError: For meta or offloaded, quantised, and PEFT-wrapped models, with the way that works.
    """
    if hasattr(model, "peft_config") or type(model).__module__.startswith("peft."):
        raise RequestError("this model carries PEFT adapters; merge them first (model.merge_and_unload()).")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise RequestError(
            "this model is quantised; load it without quantization_config, prune, and quantise the result."
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise RequestError(
                f"{name} is on the meta device (offloaded or not loaded); load the model so that it fits the "
                "machine's memory (device_map without offload)."
            )


def check_finite(model: PreTrainedModel) -> None:
    """Raise unless every weight of a model is finite.

    Raises:
        RunError: Naming the parameter that holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point() and not _all_finite(parameter.detach()):
            raise RunError(f"{name} holds NaN or infinite weights; the checkpoint is damaged.")


def _all_finite(values: Tensor) -> bool:
    """Whether all values are finite, without a mask of their size."""
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _weighted_sum(y: Tensor, weight: Tensor) -> Tensor:
    """The experts' output ``(T, H)`` from ``(T, K, H)`` and ``(T, K)``, rounded as transformers rounds."""
    return (y * weight[..., None]).sum(1).to(y.dtype)


class _Current:
    """The batch being computed: which rows of hidden states are real tokens, of which samples, kept as which rows."""

    padded: bool
    rows: Tensor
    sample: Tensor
    kept: Tensor
    kept_row: Tensor

    def set(self, batch: Batch, row_of_token: list[Tensor]) -> None:
        self.padded = not bool(batch.attention_mask.all())
        self.rows = batch.attention_mask.flatten().nonzero().flatten()
        lengths = batch.attention_mask.sum(1)
        self.sample = batch.samples.repeat_interleave(lengths)
        kept = torch.cat([row_of_token[index] for index in batch.samples.tolist()])
        self.kept = (kept >= 0).nonzero().flatten()  # among the real tokens
        self.kept_row = kept[self.kept]

    def real(self, tensor: Tensor) -> Tensor:
        """The rows of real tokens."""
        return tensor[self.rows.to(tensor.device)] if self.padded else tensor


class _LayerObserver:
    """Gathers the statistics of one layer while the model runs."""

    def __init__(
        self,
        block: MoEBlock,
        needs: frozenset[Need],
        samples: int,
        kept: int,
        current: _Current,
        before: _LayerObserver | None,
    ) -> None:
        self.block = block
        self.before = before
        self.needs = needs
        self.current = current
        self.num_kept = kept
        self.num_experts = block.num_experts
        self.sums = {
            name: torch.zeros(samples, self.num_experts, dtype=torch.float64)
            for name in tensor_names(needs - {Need.COACTIVATION}, PER_SAMPLE)
        }
        if Need.COACTIVATION in needs:
            experts_before = 0 if before is None else before.num_experts
            self.sums["coactivation"] = torch.zeros(samples, experts_before, self.num_experts)
        self.chosen: Tensor | None = None
        self.kept: dict[str, Tensor] = {}
        triangle = torch.triu_indices(self.num_experts, self.num_experts)
        self.triangle = (triangle[0], triangle[1])
        self.logits: Tensor | None = None

    # -- called by the block

    def on_logits(self, logits: Tensor) -> None:
        logits = self.current.real(logits.detach().view(-1, logits.shape[-1]))
        if not bool(torch.isfinite(logits).all()):
            raise RunError(f"layer {self.block.layer}: the router's logits are NaN or infinite.")
        self.logits = logits

    def experts_forward(self, own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        logits, self.logits = self.logits, None
        if logits is None:
            raise RunError(
                f"layer {self.block.layer}: the experts ran without their router; this model cannot be observed."
            )
        shape = hidden.shape
        hidden = hidden.view(-1, shape[-1])
        real = self.current.real
        x, chosen, weight = real(hidden), real(ids), real(weights)
        self._routing(logits, chosen)
        if Need.INPUTS in self.needs:
            self._keep("inputs", x)
        if self.needs & DENSE:
            output = self._dense(own, x, logits, chosen, weight)
        elif Need.ROUTED_NORMS in self.needs:
            output = self._routed(own, x, logits, chosen, weight)
        else:
            return own(hidden, ids, weights).view(shape)
        if self.current.padded:  # the output on padding reaches no real token
            whole = torch.zeros_like(hidden)
            whole[self.current.rows.to(hidden.device)] = output
            output = whole
        return output.view(shape)

    def finished(self) -> dict[str, Tensor]:
        """The statistics by name."""
        return {**self.sums, **self.kept}

    # -- the work

    def _routing(self, logits: Tensor, chosen: Tensor) -> None:
        if not self.needs & {Need.ROUTING, Need.COACTIVATION}:
            return
        log_p = torch.log_softmax(logits.double(), dim=-1)
        p = log_p.exp()
        if Need.COACTIVATION in self.needs:
            self._coactivation(p.cpu(), chosen.cpu())
        if Need.ROUTING not in self.needs:
            return
        self._keep("logits", logits)
        self._add("probability", p)
        self._add("probability_log2", p * log_p / math.log(2))
        self._add_chosen("routed_tokens", chosen, torch.ones_like(chosen, dtype=torch.float64))
        self._add_chosen("routed_probability", chosen, p.gather(1, chosen))

    def _coactivation(self, p: Tensor, chosen: Tensor) -> None:
        """Probabilities ``(T, E)`` here, summed over the tokens routed to each expert of the MoE layer before."""
        self.chosen = chosen
        if self.before is None:
            return
        routed_before = self.before.chosen
        assert routed_before is not None
        for number in self.current.sample.unique().tolist():  # the whole of a sample is in one batch
            rows = (self.current.sample == number).nonzero().flatten()
            routed = torch.zeros(len(rows), self.before.num_experts, dtype=torch.float64)
            routed.scatter_(1, routed_before[rows], 1.0)
            self.sums["coactivation"][number] = (routed.T @ p[rows]).float()

    def _routed(self, own: ExpertsForward, x: Tensor, logits: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """The block's output from the outputs of the chosen experts, each computed once."""
        top_k = chosen.shape[1]
        rows = x.repeat_interleave(top_k, dim=0)
        y = own(rows, chosen.reshape(-1, 1), torch.ones_like(weight).view(-1, 1)).view(len(x), top_k, -1)
        self._norms(torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32), logits, chosen, weight)
        return _weighted_sum(y, weight)

    def _dense(self, own: ExpertsForward, x: Tensor, logits: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """The block's output from the outputs of all experts, and the statistics that need them all."""
        outputs = []
        chosen_norms = []
        size = max(1, _CHUNK_BYTES // (4 * self.num_experts * x.shape[1]))
        for rows in torch.arange(len(x), device=x.device).split(size):
            part, ids, w = x[rows], chosen[rows], weight[rows]
            one = torch.ones(len(rows), 1, dtype=weight.dtype, device=x.device)
            y = torch.empty(len(rows), self.num_experts, x.shape[1], dtype=torch.float32, device=x.device)
            for expert in range(self.num_experts):
                y[:, expert] = own(part, torch.full_like(ids[:, :1], expert), one)
            if not _all_finite(y):
                raise RunError(f"layer {self.block.layer}: an expert's output is NaN or infinite.")
            routed = y.gather(1, ids[..., None].expand(-1, -1, y.shape[-1]))
            full = (routed * w[..., None].float()).sum(1)
            outputs.append(_weighted_sum(routed.to(x.dtype), w))
            if Need.ROUTED_NORMS in self.needs:
                chosen_norms.append(torch.linalg.vector_norm(routed, dim=-1))
            if Need.DENSE_NORMS in self.needs:
                self._add("dense_norm", torch.linalg.vector_norm(y, dim=-1), rows)
            if Need.SINGLE_ERROR in self.needs:
                error = torch.stack([(y[:, e] - full).square_().sum(-1) for e in range(self.num_experts)], dim=1)
                self._add("single_error", error, rows)
                self._add("output_energy", full.square().sum(-1, keepdim=True).expand_as(error), rows)
                self._keep("token_single_error", error, rows)
            if Need.GRAM in self.needs:
                self._keep_gram(y, rows)
        if Need.ROUTED_NORMS in self.needs:
            self._norms(torch.cat(chosen_norms), logits, chosen, weight)
        return torch.cat(outputs)

    def _norms(self, norm: Tensor, logits: Tensor, chosen: Tensor, weight: Tensor) -> None:
        """Sums over the tokens routed to each expert; ``norm``, ``chosen`` and ``weight`` are ``(T, K)``."""
        if not bool(torch.isfinite(norm).all()):
            raise RunError(f"layer {self.block.layer}: an expert's output is NaN or infinite.")
        norm = norm.double()
        p = torch.softmax(logits.double(), dim=-1).gather(1, chosen)
        self._add_chosen("norm", chosen, norm)
        self._add_chosen("squared_norm", chosen, norm.square())
        self._add_chosen("norm_applied", chosen, norm * weight.double())
        self._add_chosen("norm_probability", chosen, norm * p)
        self._add_chosen("norm_renormalised", chosen, norm * p / p.sum(1, keepdim=True))
        slot = self.current.sample[:, None] * self.num_experts + chosen.cpu()
        self.sums["max_norm"].view(-1).scatter_reduce_(0, slot.flatten(), norm.cpu().flatten(), "amax")

    def _keep_gram(self, y: Tensor, rows: Tensor) -> None:
        """Keep upper triangles of Gram matrices, in float32 or better whatever the process allows elsewhere."""
        picked, _ = self._kept_among(rows)
        if len(picked) == 0:
            return
        if len(picked) < len(y):
            y = y[picked.to(y.device)]
        with torch.autocast(y.device.type, enabled=False):
            # float64 where float32 products may silently be TF32; it costs little beside the experts themselves
            y = y.double() if y.is_cuda else y
            gram = (y @ y.transpose(1, 2)).float()
        self._keep("gram", gram[:, self.triangle[0], self.triangle[1]], rows, already_picked=True)

    # -- adding up

    def _add(self, name: str, values: Tensor, rows: Tensor | None = None) -> None:
        """Add ``(T, E)`` values of all tokens (or of the tokens ``rows``) to their samples."""
        sample = self.current.sample if rows is None else self.current.sample[rows.cpu()]
        self.sums[name].index_add_(0, sample, values.double().cpu())

    def _add_chosen(self, name: str, chosen: Tensor, values: Tensor) -> None:
        """Add ``(T, K)`` values to the samples of the tokens and the experts ``chosen``."""
        slot = self.current.sample[:, None] * self.num_experts + chosen.cpu()
        self.sums[name].view(-1).index_add_(0, slot.flatten(), values.double().cpu().flatten())

    def _kept_among(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which of some tokens are kept: their places among ``rows`` and their rows in the kept tensors."""
        if rows is None:
            return self.current.kept, self.current.kept_row
        first, last = int(rows[0]), int(rows[-1])  # chunks are contiguous
        inside = (self.current.kept >= first) & (self.current.kept <= last)
        return self.current.kept[inside] - first, self.current.kept_row[inside]

    def _keep(self, name: str, values: Tensor, rows: Tensor | None = None, already_picked: bool = False) -> None:
        """Store values of kept tokens, of all tokens or of the tokens ``rows``."""
        picked, kept_row = self._kept_among(rows)
        if not already_picked:
            values = values[picked.to(values.device)]
        if name not in self.kept:
            self.kept[name] = torch.zeros(self.num_kept, values.shape[1], dtype=values.dtype)
        self.kept[name][kept_row] = values.cpu()
