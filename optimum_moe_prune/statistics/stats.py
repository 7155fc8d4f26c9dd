# SPDX-License-Identifier: Apache-2.0
"""What one calibration pass leaves behind, so that every method and budget can be planned later without the model.

Sums over tokens are kept per sample, so that domains can be re-weighted and runs merged; what cannot be summed is kept
per token, for the *kept tokens*: all of them up to ``max_tokens``, else each sample's share and at least a few of
each, chosen by hashes of seed, sample and position (``samples.keep_tokens``), the same ones for any batch size, order
or number of processes. What takes the output of every expert is gathered of these alone, and sums over it are
estimated from them. Samples stand in the order of their hashes, so that nothing depends on the order they were seen
in.

Shapes: S samples, N kept tokens, E experts. ``storage/FORMATS.md`` describes the files.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..architectures.own_code import OwnCode
from ..architectures.routers import RoutingRule, rule_from_dict
from ..errors import RequestError, check_type
from ..names import STATS_NAME
from ..storage.files import write_bytes, write_json
from ..storage.folders import written_folder
from ..storage.tensor_files import read_tensors
from ..storage.values import Json, check_version, read_json
from .files import LayerFile, MergedTensors, layer_file, names_of_format_1, save_layer, tensor_shapes
from .folder import header_of
from .merging import check_mergeable, kept_rows, merged_tensors, rows_by_name
from .needs import IN_FORMAT_1, OF_RULE, Need, layer_shapes, names_in, names_of_format
from .progressive import check_unpruned, fingerprint_with
from .samples import Sample, check_domain_weights, keep_tokens, samples_fingerprint
from .weights import sample_weights

FORMAT_VERSION = 3
TOKENS_NAME = "tokens.safetensors"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one MoE layer.

    Attributes:
        num_experts: Routed experts in the layer.
        routing: How its router turns logits into weights.
        tensors: The statistics by name (``statistics.needs``); read from disk when asked for, if loaded.
        sample_weights: The weight of each sample in sums over its tokens ``(S,)`` float64.
        token_sample: The sample of each kept token ``(N,)``.
        kept_weights: The weight of each sample in sums over its kept tokens ``(S,)``; None for ``sample_weights``.
        root_weights: The weight of each sample in sums of roots ``(S,)``; None for ``sample_weights``. What the three
            are for says ``statistics.weights``.
        is_head: Whether it is a head for further tokens (MTP), which counts as a layer after the model's last.
    """

    num_experts: int
    routing: RoutingRule
    tensors: Mapping[str, Tensor]
    sample_weights: Tensor
    token_sample: Tensor
    kept_weights: Tensor | None = None
    root_weights: Tensor | None = None
    is_head: bool = False

    def total(self, name: str) -> Tensor:
        """Weighted sum over samples of a per-sample statistic: ``(E,)`` float64.

        Raises:
            RequestError: If it needs a rule of the routers, and none is known.
        """
        if name in OF_RULE and isinstance(self.routing, OwnCode):
            raise self.routing.refusal(f"the statistic {name!r}")
        return self.sample_weights @ self.tensors[name].double()

    def maximum(self, name: str) -> Tensor:
        """Largest value over samples of a per-sample statistic: ``(E,)``."""
        return self.tensors[name].amax(dim=0)

    @property
    def token_weights(self) -> Tensor:
        """The weight of each kept token ``(N,)``."""
        weights = self.sample_weights if self.kept_weights is None else self.kept_weights
        return weights[self.token_sample.long()]

    @property
    def loss_weights(self) -> Tensor:
        """The weight of each sample in the reconstruction loss ``(S,)``."""
        return self.sample_weights if self.root_weights is None else self.root_weights


@dataclass(frozen=True)
class CalibrationStats:
    """Everything a calibration gathered.

    Attributes:
        model: Where it comes from: ``model_type``, ``top_k``, ``fingerprint``, ``name_or_path``, ``revision``.
        samples: The samples, ordered by hash.
        layers: Statistics by decoder-layer index.
        needs: What was gathered.
        token_sample: For each kept token its sample ``(N,)`` int64.
        token_position: For each kept token its position in the sample ``(N,)`` int64.
        max_tokens: The most tokens that are kept.
        seed: Decides which tokens are kept when there are more.
        provenance: What made it: versions, settings, times.
        domain_weights: The share of each domain where it was set, else None.
    """

    model: Json
    samples: tuple[Sample, ...]
    layers: dict[int, LayerStats]
    needs: frozenset[Need]
    token_sample: Tensor
    token_position: Tensor
    max_tokens: int
    seed: int
    provenance: Json = field(default_factory=dict)
    domain_weights: dict[str, float] | None = None

    @property
    def num_experts(self) -> dict[int, int]:
        """Experts in each MoE layer."""
        return {index: layer.num_experts for index, layer in self.layers.items()}

    @property
    def without_heads(self) -> CalibrationStats:
        """The statistics of the model's own layers."""
        return self._of_layers(is_head=False)

    @property
    def of_heads(self) -> CalibrationStats | None:
        """Those of heads for further tokens; None where there are none."""
        heads = self._of_layers(is_head=True)
        return heads if heads.layers else None

    def _of_layers(self, is_head: bool) -> CalibrationStats:
        return replace(self, layers={n: layer for n, layer in self.layers.items() if layer.is_head == is_head})

    @property
    def routing(self) -> RoutingRule:
        """How the routers choose, in every layer alike."""
        return next(iter(self.layers.values())).routing

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors of each layer; those of an earlier format are not all today's."""
        return names_in(next(iter(self.layers.values())).tensors, self.needs)

    @property
    def domains(self) -> dict[str, int]:
        """Tokens of each domain."""
        tokens: dict[str, int] = {}
        for sample in sorted(self.samples, key=lambda s: s.domain):
            tokens[sample.domain] = tokens.get(sample.domain, 0) + sample.num_tokens
        return tokens

    @property
    def fingerprint(self) -> str:
        """A hash of the calibration samples and their domains; and of the experts that layers kept meanwhile, if any
        lost some (``statistics.progressive``)."""
        return fingerprint_with(samples_fingerprint(self.samples), self.provenance)

    def require(self, needs: Iterable[Need], method: str) -> None:
        """Raise unless everything in ``needs`` was gathered.

        Raises:
            RequestError: Naming what the method lacks and how to gather it.
        """
        missing = sorted(str(need) for need in set(needs) - self.needs)
        if missing and isinstance(self.routing, OwnCode):
            raise self.routing.refusal(f"method {method!r}")
        if missing:
            have = ", ".join(sorted(map(str, self.needs))) or "nothing"
            how = "score --method all gathers everything" + (
                " that a forward pass gives, with --fisher gradients as well" if str(Need.FISHER) in missing else ""
            )
            raise RequestError(
                f"method {method!r} needs the statistics {', '.join(missing)}, and these hold {have}. Calibrate again "
                f"and gather them ({how})."
            )

    def with_domain_weights(self, domain_weights: Mapping[str, float] | None) -> CalibrationStats:
        """The same statistics with every domain counting for a given share, in every method (``statistics.weights``).

        Args:
            domain_weights: A positive number for each domain; only ratios matter. None counts every token once.

        Raises:
            RequestError: If a domain is missing or unknown, or a weight is not positive.
        """
        sums, kept, roots = torch.ones(len(self.samples), dtype=torch.float64), None, None
        stands_for = self._stands_for
        if stands_for is not None:
            kept, roots = stands_for, stands_for.sqrt()
        if domain_weights is not None:
            check_domain_weights(self.samples, domain_weights)
            tokens = torch.tensor([sample.num_tokens for sample in self.samples])
            num_kept = torch.bincount(self.token_sample.long(), minlength=len(self.samples)).double()
            each = torch.ones_like(num_kept) if stands_for is None else stands_for
            sums, kept, roots = (
                sample_weights(self.samples, domain_weights, amount) * factor
                for amount, factor in ((tokens, 1), (each * num_kept, each), ((each * num_kept).sqrt(), each.sqrt()))
            )
        layers = {
            index: replace(layer, sample_weights=sums, kept_weights=kept, root_weights=roots)
            for index, layer in self.layers.items()
        }
        return replace(self, layers=layers, domain_weights=None if domain_weights is None else dict(domain_weights))

    @functools.cached_property  # for each of many plans it would be worked out anew
    def _stands_for(self) -> Tensor | None:
        """How many tokens each kept one of a sample stands for, over the mean ``(S,)``; None where all stand for one.

        At least a few tokens of each sample are kept, so that those of a short one stand for less. In formats 1 and 2
        every token was as likely to be kept.
        """
        lengths = torch.tensor([sample.num_tokens for sample in self.samples], dtype=torch.float64)
        if len(self.token_sample) == int(lengths.sum()):
            return None
        shares = keep_tokens(self.samples, self.max_tokens, self.seed)
        if not (torch.equal(shares[0], self.token_sample) and torch.equal(shares[1], self.token_position)):
            return None
        num_kept = torch.bincount(self.token_sample.long(), minlength=len(self.samples))
        each = torch.where(num_kept > 0, lengths / num_kept.clamp(min=1), 0.0)
        return each * (len(self.token_sample) / (each * num_kept).sum())

    # -- files

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write ``stats.json``, ``tokens.safetensors`` and one ``layer_NNNNN.safetensors`` for each MoE layer.

        One tensor is in memory at a time.

        Args:
            folder: The target, absent or empty.
            overwrite: Replace an earlier output of this package.

        Raises:
            RequestError: If the target is in the way, or holds what was merged.
            RunError: If something cannot be written.
        """
        header = {
            "format_version": next((v for v in (3, 2) if self.names == names_of_format(v, self.needs)), 1),
            "model": self.model,
            "needs": sorted(map(str, self.needs)),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "kept_tokens": len(self.token_sample),
            "layers": {
                str(index): {"num_experts": layer.num_experts, "routing": layer.routing.to_dict()}
                | ({"head": True} if layer.is_head else {})
                for index, layer in sorted(self.layers.items())
            },
            "samples": [asdict(sample) for sample in self.samples],
            "provenance": self.provenance,
        }
        merged = [layer.tensors.files() for layer in self.layers.values() if isinstance(layer.tensors, MergedTensors)]
        with written_folder(folder, overwrite, sorted(set().union(*merged)), STATS_NAME) as partial:
            for index, layer in self.layers.items():
                save_layer(layer.tensors, self.names, partial / layer_file(index))
            tokens = {"sample": self.token_sample.contiguous(), "position": self.token_position.contiguous()}
            write_bytes(partial / TOKENS_NAME, save(tokens))
            write_json(partial / STATS_NAME, header)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> CalibrationStats:
        """Read a stats folder; a layer's tensors stay on disk until a method asks for them.

        Raises:
            RequestError: If the folder holds no statistics, or those of a newer format, or damaged ones.
        """
        folder = Path(folder)
        header = read_json(header_of(folder))
        check_version(header, FORMAT_VERSION, str(folder))
        try:
            samples = tuple(Sample(**sample) for sample in header["samples"])
            needs = frozenset(Need(need) for need in header["needs"])
            first = folder / layer_file(min(map(int, header["layers"]), default=0))
            version = header["format_version"]
            names = names_of_format(version, needs) if version > 1 else names_of_format_1(needs, first)
            tokens = read_tensors(folder / TOKENS_NAME, ("sample", "position"))
            token_sample, token_position = tokens["sample"], tokens["position"]
            weights = torch.ones(len(samples), dtype=torch.float64)
            layers = {
                int(index): LayerStats(
                    num_experts=entry["num_experts"],
                    routing=rule_from_dict(entry["routing"]),
                    tensors=LayerFile(folder / layer_file(int(index)), names),
                    sample_weights=weights,
                    token_sample=token_sample,
                    is_head=bool(entry.get("head")),
                )
                for index, entry in header["layers"].items()
            }
            settings = {name: header[name] for name in ("model", "max_tokens", "seed", "provenance")}
            stats = cls(
                samples=samples,
                layers=layers,
                needs=needs,
                token_sample=token_sample,
                token_position=token_position,
                **settings,
            )
            stats._check()
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            what = f"{error} is missing or wrong" if isinstance(error, LookupError) else str(error).rstrip(".")
            raise RequestError(f"the statistics in {folder} are damaged: {what}. Calibrate again.") from error
        return stats

    def _check(self) -> None:
        """Raise ValueError unless everything that was read has the type and shape it should have."""
        facts = {"model_type": str, "top_k": int, "fingerprint": str}
        types = [(self.model[name], kind) for name, kind in facts.items()]
        types += [(self.provenance, dict), (self.max_tokens, int), (self.seed, int)]
        types += [(v, t) for s in self.samples for v, t in ((s.hash, str), (s.domain, str), (s.num_tokens, int))]
        types += [(layer.num_experts, int) for layer in self.layers.values()]
        wrong = [value for value, kind in types if type(value) is not kind]
        if wrong:
            raise ValueError(f"{wrong[0]!r} has the wrong type")
        if not self.layers:
            raise ValueError("there are no layers")
        before, kept, today = 0, self.token_sample, {old: name for name, old in IN_FORMAT_1.items()}
        for index, layer in sorted(self.layers.items()):
            if index < 0 or not self.model["top_k"] == layer.routing.top_k <= layer.num_experts:
                raise ValueError(f"layer {index} has {layer.num_experts} experts and top_k {layer.routing.top_k}")
            there = tensor_shapes(layer.tensors)
            hidden = next((there[name][0][-1] for name in ("inputs", "output_sum") if name in there), 0)
            counts = (len(self.samples), len(kept), layer.num_experts, before, hidden)
            shapes = layer_shapes(self.needs, *counts, torch.float32, torch.float32, rule=layer.routing)
            for name in self.names:
                shape, _ = shapes[today.get(name, name)]
                if there[name][0] != shape or there[name][1] not in _DTYPES:
                    raise ValueError(f"layer {index}: {name} has shape and dtype {there[name]}, not {shape}")
            before = layer.num_experts
        if len(kept) != len(self.token_position) or (
            len(kept) and not 0 <= kept.min() <= kept.max() < len(self.samples)
        ):
            raise ValueError("kept tokens name samples that are not there")

    def merge(self, *others: CalibrationStats) -> CalibrationStats:
        """Statistics of the samples of all, as if they had been gathered together.

        A tensor is put together when it is asked for and not kept, so that statistics in folders, which must stay
        where they are, are merged with one tensor in memory at a time:
        ``CalibrationStats.load(a).merge(CalibrationStats.load(b), CalibrationStats.load(c)).save(d)``.

        Raises:
            RequestError: If they come from different models or settings, share samples, or layers were pruned while
                they were gathered.
        """
        for given in others:
            check_type(given, CalibrationStats, "a CalibrationStats (CalibrationStats.load reads a folder)")
        parts = (self, *others)
        for part in parts:
            check_unpruned(part.provenance, "merging")
        check_mergeable(parts)
        every = [sample for part in parts for sample in part.samples]
        order = sorted(range(len(every)), key=lambda i: every[i].hash)
        samples = tuple(every[i] for i in order)
        token_sample, token_position = keep_tokens(samples, self.max_tokens, self.seed)
        by_sample = torch.tensor(order, dtype=torch.int64)
        kept = kept_rows(parts, token_sample, token_position, order)
        everywhere = [name for name in self.names if all(name in part.names for part in parts)]
        rows = rows_by_name(everywhere, self.needs, by_sample, kept)
        weights = torch.ones(len(samples), dtype=torch.float64)
        layers = {}
        for index, layer in self.layers.items():
            tensors = merged_tensors([part.layers[index].tensors for part in parts], rows, token_sample, samples)
            layers[index] = LayerStats(
                layer.num_experts, layer.routing, tensors, weights, token_sample, is_head=layer.is_head
            )
        provenance = {**self.provenance, "merged": [part.provenance for part in parts]}
        if "dense_tokens" in provenance:
            provenance["dense_tokens"] = len(token_sample)
        return replace(
            self,
            samples=samples,
            layers=layers,
            token_sample=token_sample,
            token_position=token_position,
            provenance=provenance,
            domain_weights=None,
        )
