# SPDX-License-Identifier: Apache-2.0
"""What one calibration pass leaves behind, so that every method and budget can be planned later without the model.

Sums over tokens are kept per sample, so that domains can be re-weighted and runs merged; what cannot be summed is kept
per token, for the *kept tokens*: all of them up to ``max_tokens``, else those with the lowest hash of seed, sample and
position, the same ones for any batch size, order or number of processes. Samples stand in the order of their hashes,
so that nothing depends on the order they were seen in.

Shapes: S samples, N kept tokens, E experts, P experts of the MoE layer before, H hidden size, K top_k.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..architectures.routers import RoutingRule, rule_from_dict
from ..errors import RequestError
from ..storage.folders import written_folder
from ..storage.tensor_files import MappedTensors, Shapes
from ..storage.values import read_json
from .samples import Sample, check_domain_weights, keep_tokens, samples_fingerprint
from .weights import sample_weights

FORMAT_VERSION = 2

SINCE_FORMAT_2 = ("max_element",)
"""Statistics that folders of format 1 lack."""


class Need(str, enum.Enum):
    """A group of statistics that a method can ask the calibration for."""

    ROUTING = "routing"
    ROUTED_NORMS = "routed_norms"
    DENSE_NORMS = "dense_norms"
    SINGLE_ERROR = "single_error"
    GRAM = "gram"
    INPUTS = "inputs"
    COACTIVATION = "coactivation"

    def __str__(self) -> str:
        return self.value


PER_SAMPLE: dict[Need, tuple[str, ...]] = {
    # tokens with the expert among the chosen; sum of p over them; sums of p and of p log2 p over all tokens
    Need.ROUTING: ("routed_tokens", "routed_probability", "probability", "probability_log2"),
    # over the tokens routed to the expert: sums of ||f||, ||f||^2, g ||f|| with three readings of g, and the largest
    # absolute element of f
    Need.ROUTED_NORMS: (
        "norm",
        "squared_norm",
        "norm_applied",
        "norm_probability",
        "norm_renormalised",
        "max_element",
    ),
    # sum over all tokens of ||f||
    Need.DENSE_NORMS: ("dense_norm",),
    # sum over tokens of ||F_{e} - F_all||^2 and, in every column, of ||F_all||^2
    Need.SINGLE_ERROR: ("single_error", "output_energy"),
    # (S, P, E) float32 in place of (S, E), P the experts of the MoE layer before (0 in the first): the sum over the
    # tokens routed to an expert there of p here
    Need.COACTIVATION: ("coactivation",),
}
"""Tensors ``(S, E)`` in float64 where nothing else is said, by need."""


PER_TOKEN: dict[Need, tuple[str, ...]] = {
    Need.ROUTING: ("logits",),  # (N, E), dtype of the router's logits
    Need.SINGLE_ERROR: ("token_single_error",),  # (N, E) float32, ||F_{e} - F_all||^2
    Need.GRAM: ("gram",),  # (N, E (E + 1) / 2) float32, upper triangles
    Need.INPUTS: ("inputs",),  # (N, H), dtype of the block's input
}
"""Tensors of the kept tokens, by need."""


DENSE = frozenset({Need.DENSE_NORMS, Need.SINGLE_ERROR, Need.GRAM})
"""The needs for which every expert runs on every token."""


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one MoE layer.

    Attributes:
        num_experts: Routed experts in the layer.
        routing: How its router turns logits into weights.
        tensors: The statistics by name (``PER_SAMPLE``, ``PER_TOKEN``); read from disk when asked for, if loaded.
        sample_weights: The weight of each sample in sums over its tokens ``(S,)`` float64.
        token_sample: The sample of each kept token ``(N,)``.
        kept_weights: The weight of each sample in sums over its kept tokens ``(S,)``; None for ``sample_weights``.
        root_weights: The weight of each sample in sums of roots ``(S,)``; None for ``sample_weights``. What the three
            are for says ``statistics.weights``.
    """

    num_experts: int
    routing: RoutingRule
    tensors: Mapping[str, Tensor]
    sample_weights: Tensor
    token_sample: Tensor
    kept_weights: Tensor | None = None
    root_weights: Tensor | None = None

    def total(self, name: str) -> Tensor:
        """Weighted sum over samples of a per-sample statistic: ``(E,)`` float64."""
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

    model: dict[str, Any]
    samples: tuple[Sample, ...]
    layers: dict[int, LayerStats]
    needs: frozenset[Need]
    token_sample: Tensor
    token_position: Tensor
    max_tokens: int
    seed: int
    provenance: dict[str, Any] = field(default_factory=dict)
    domain_weights: dict[str, float] | None = None

    @property
    def num_experts(self) -> dict[int, int]:
        """Experts in each MoE layer."""
        return {index: layer.num_experts for index, layer in self.layers.items()}

    @property
    def routing(self) -> RoutingRule:
        """How the routers choose, in every layer alike."""
        return next(iter(self.layers.values())).routing

    @property
    def domains(self) -> dict[str, int]:
        """Tokens of each domain."""
        tokens: dict[str, int] = {}
        for sample in sorted(self.samples, key=lambda s: s.domain):
            tokens[sample.domain] = tokens.get(sample.domain, 0) + sample.num_tokens
        return tokens

    @property
    def fingerprint(self) -> str:
        """A hash of the calibration samples and their domains."""
        return samples_fingerprint(self.samples)

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the tensors of each layer."""
        there = set(next(iter(self.layers.values())).tensors)
        return tuple(name for name in tensor_names(self.needs) if name in there)

    def require(self, needs: Iterable[Need], method: str) -> None:
        """Raise unless everything in ``needs`` was gathered.

        Raises:
            RequestError: Naming what the method lacks and how to gather it.
        """
        missing = sorted(str(need) for need in set(needs) - self.needs)
        if missing:
            have = ", ".join(sorted(map(str, self.needs))) or "nothing"
            raise RequestError(
                f"method {method!r} needs the statistics {', '.join(missing)}, and these hold {have}. Calibrate again "
                "and gather them (score --method all gathers everything)."
            )

    def with_domain_weights(self, domain_weights: Mapping[str, float] | None) -> CalibrationStats:
        """The same statistics with every domain counting for a given share, in every method (``statistics.weights``).

        Args:
            domain_weights: A positive number for each domain; only ratios matter. None counts every token once.

        Raises:
            RequestError: If a domain is missing or unknown, or a weight is not positive.
        """
        sums, kept, roots = torch.ones(len(self.samples), dtype=torch.float64), None, None
        if domain_weights is not None:
            check_domain_weights(self.samples, domain_weights)
            tokens = torch.tensor([sample.num_tokens for sample in self.samples])
            num_kept = torch.bincount(self.token_sample.long(), minlength=len(self.samples)).double()
            sums, kept, roots = (
                sample_weights(self.samples, domain_weights, amount) for amount in (tokens, num_kept, num_kept.sqrt())
            )
        layers = {
            index: replace(layer, sample_weights=sums, kept_weights=kept, root_weights=roots)
            for index, layer in self.layers.items()
        }
        return replace(self, layers=layers, domain_weights=None if domain_weights is None else dict(domain_weights))

    # -- files

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write ``stats.json``, ``tokens.safetensors`` and one ``layer_NNNNN.safetensors`` for each MoE layer.

        Args:
            folder: The target, absent or empty.
            overwrite: Replace an earlier output of this package.

        Raises:
            RequestError: If the target is in the way.
            RunError: If something cannot be written.
        """
        names = self._names
        header = {
            "format_version": FORMAT_VERSION if names == tensor_names(self.needs) else 1,
            "model": self.model,
            "needs": sorted(map(str, self.needs)),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "kept_tokens": len(self.token_sample),
            "layers": {
                str(index): {"num_experts": layer.num_experts, "routing": layer.routing.to_dict()}
                for index, layer in sorted(self.layers.items())
            },
            "samples": [asdict(sample) for sample in self.samples],
            "provenance": self.provenance,
        }
        with written_folder(folder, overwrite) as partial:
            for index, layer in self.layers.items():
                _save_layer(layer.tensors, names, partial / layer_file(index))
            tokens = {"sample": self.token_sample.contiguous(), "position": self.token_position.contiguous()}
            save_file(tokens, partial / "tokens.safetensors")
            (partial / "stats.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> CalibrationStats:
        """Read a stats folder; a layer's tensors stay on disk until a method asks for them.

        Raises:
            RequestError: If the folder holds no statistics, or those of a newer format, or damaged ones.
        """
        folder = Path(folder)
        if not (folder / "stats.json").is_file():
            raise RequestError(f"{folder} holds no calibration statistics (stats.json is missing).")
        header = read_json(folder / "stats.json")
        version = header.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise RequestError(
                f"{folder} has format version {version!r}; this package reads up to {FORMAT_VERSION}. Install a newer "
                "one."
            )
        lacking = SINCE_FORMAT_2 if version < 2 else ()
        try:
            samples = tuple(Sample(**sample) for sample in header["samples"])
            needs = frozenset(Need(need) for need in header["needs"])
            names = tuple(name for name in tensor_names(needs) if name not in lacking)
            with safe_open(folder / "tokens.safetensors", framework="pt") as file:
                token_sample, token_position = file.get_tensor("sample"), file.get_tensor("position")
            weights = torch.ones(len(samples), dtype=torch.float64)
            layers = {
                int(index): LayerStats(
                    num_experts=entry["num_experts"],
                    routing=rule_from_dict(entry["routing"]),
                    tensors=_LayerFile(folder / layer_file(int(index)), names),
                    sample_weights=weights,
                    token_sample=token_sample,
                )
                for index, entry in header["layers"].items()
            }
            stats = cls(
                model=header["model"],
                samples=samples,
                layers=layers,
                needs=needs,
                token_sample=token_sample,
                token_position=token_position,
                max_tokens=header["max_tokens"],
                seed=header["seed"],
                provenance=header["provenance"],
            )
            stats._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError, SafetensorError) as error:
            raise RequestError(f"the statistics in {folder} are damaged: {error!r}. Calibrate again.") from error
        return stats

    def _check(self) -> None:
        """Raise ValueError unless everything that was read has the type and shape it should have."""
        facts = {"model_type": str, "top_k": int, "fingerprint": str}
        types = [(self.model[name], kind) for name, kind in facts.items()]
        types += [(self.provenance, dict), (self.max_tokens, int), (self.seed, int)]
        types += [(v, t) for s in self.samples for v, t in ((s.hash, str), (s.domain, str), (s.num_tokens, int))]
        for layer in self.layers.values():
            types += [(layer.num_experts, int)]
        wrong = [value for value, kind in types if type(value) is not kind]
        if wrong:
            raise ValueError(f"{wrong[0]!r} has the wrong type")
        if not self.layers:
            raise ValueError("there are no layers")
        before, kept = 0, self.token_sample
        for index, layer in sorted(self.layers.items()):
            if index < 0 or not self.model["top_k"] == layer.routing.top_k <= layer.num_experts:
                raise ValueError(f"layer {index} has {layer.num_experts} experts and top_k {layer.routing.top_k}")
            if isinstance(layer.tensors, _LayerFile):
                layer.tensors.check(len(self.samples), len(kept), layer.num_experts, before, self.needs)
            before = layer.num_experts
        if len(kept) != len(self.token_position) or (
            len(kept) and not 0 <= kept.min() <= kept.max() < len(self.samples)
        ):
            raise ValueError("kept tokens name samples that are not there")

    def merge(self, other: CalibrationStats) -> CalibrationStats:
        """Statistics of the samples of both, as if they had been gathered together.

        Raises:
            RequestError: If they come from different models or settings, or share samples.
        """
        for what, mine, theirs in (
            ("model", self.model.get("fingerprint"), other.model.get("fingerprint")),
            ("seed", self.seed, other.seed),
            ("max_tokens", self.max_tokens, other.max_tokens),
            ("needs", sorted(map(str, self.needs)), sorted(map(str, other.needs))),
        ):
            if mine != theirs:
                raise RequestError(
                    f"these statistics cannot be merged: {what} is {mine} in one and {theirs} in the other."
                )
        shared = {s.hash for s in self.samples} & {s.hash for s in other.samples}
        if shared:
            raise RequestError(f"these statistics cannot be merged: {len(shared)} samples are in both.")
        both = [*self.samples, *other.samples]
        order = sorted(range(len(both)), key=lambda i: both[i].hash)
        samples = tuple(both[i] for i in order)
        token_sample, token_position = keep_tokens(samples, self.max_tokens, self.seed)
        # Kept tokens of the union were kept in their part: find them there.
        rank = {old: new for new, old in enumerate(order)}
        offset = len(self.samples)
        where = {
            (rank[int(s) + first], int(p)): row
            for row, (s, p, first) in enumerate(
                [(s, p, 0) for s, p in zip(self.token_sample, self.token_position, strict=True)]
                + [(s, p, offset) for s, p in zip(other.token_sample, other.token_position, strict=True)]
            )
        }
        rows = torch.tensor(
            [where[int(s), int(p)] for s, p in zip(token_sample, token_position, strict=True)], dtype=torch.int64
        )
        weights = torch.ones(len(samples), dtype=torch.float64)
        layers = {}
        for index, layer in self.layers.items():
            theirs = other.layers[index].tensors
            tensors = {}
            for names, picked in ((PER_SAMPLE, torch.tensor(order)), (PER_TOKEN, rows)):
                for name in tensor_names(self.needs, names):
                    if name not in self._names or name not in other._names:
                        continue  # of format 1
                    parts = [layer.tensors[name], theirs[name]]
                    if parts[0].dtype != parts[1].dtype:
                        raise RequestError(
                            f"these statistics cannot be merged: {name} is {parts[0].dtype} in one and "
                            f"{parts[1].dtype} in the other; calibrate both in the same precision."
                        )
                    tensors[name] = torch.cat(parts)[picked]
            layers[index] = LayerStats(layer.num_experts, layer.routing, tensors, weights, token_sample)
        provenance = {**self.provenance, "merged": [self.provenance, other.provenance]}
        return replace(
            self,
            samples=samples,
            layers=layers,
            token_sample=token_sample,
            token_position=token_position,
            provenance=provenance,
            domain_weights=None,
        )


def tensor_names(needs: Iterable[Need], *tables: dict[Need, tuple[str, ...]]) -> tuple[str, ...]:
    """Names of the tensors that ``needs`` stand for, of ``PER_SAMPLE``, ``PER_TOKEN`` or (by default) both."""
    wanted = set(needs)
    return tuple(
        name for table in tables or (PER_SAMPLE, PER_TOKEN) for need in table if need in wanted for name in table[need]
    )


def layer_shapes(
    needs: Iterable[Need],
    num_samples: int,
    num_tokens: int,
    num_experts: int,
    experts_before: int,
    hidden_size: int,
    logits_dtype: torch.dtype,
    inputs_dtype: torch.dtype,
) -> Shapes:
    """Shape and dtype of each tensor of a layer's statistics.

    Args:
        needs: What is gathered.
        num_samples: S.
        num_tokens: N, the kept tokens.
        num_experts: E.
        experts_before: P, experts of the MoE layer before, 0 in the first.
        hidden_size: H.
        logits_dtype: Of the router's logits.
        inputs_dtype: Of the block's input.
    """
    others = {
        "coactivation": ((num_samples, experts_before, num_experts), torch.float32),
        "logits": ((num_tokens, num_experts), logits_dtype),
        "token_single_error": ((num_tokens, num_experts), torch.float32),
        "gram": ((num_tokens, num_experts * (num_experts + 1) // 2), torch.float32),
        "inputs": ((num_tokens, hidden_size), inputs_dtype),
    }
    return {name: others.get(name, ((num_samples, num_experts), torch.float64)) for name in tensor_names(needs)}


def _save_layer(tensors: Mapping[str, Tensor], names: Iterable[str], path: Path) -> None:
    """Write a layer's statistics: the file they live in under another name, or a copy that needs no memory."""
    if isinstance(tensors, MappedTensors) and tensors.path.name == path.name and tensors.path.is_file():
        with contextlib.suppress(OSError):  # another disk, or a system without links
            os.link(tensors.path, path)
            return
    found = {name: tensors[name] for name in names}
    written = MappedTensors.create(path, {name: (tuple(t.shape), t.dtype) for name, t in found.items()})
    for name, tensor in found.items():
        written[name].copy_(tensor)


def layer_file(index: int) -> str:
    """The name of the file with a layer's statistics."""
    return f"layer_{index:05d}.safetensors"


class _LayerFile(Mapping[str, Tensor]):
    """The tensors of one layer's file, each read when it is asked for and not kept."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path = path
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def check(self, num_samples: int, num_tokens: int, num_experts: int, experts_before: int, needs: Any) -> None:
        """Raise ValueError unless every tensor is there in the shape the header promises."""
        with safe_open(self._path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in self._names}
            hidden = found["inputs"].get_shape()[-1] if "inputs" in found else 0
            shapes = layer_shapes(
                needs, num_samples, num_tokens, num_experts, experts_before, hidden, torch.float32, torch.float32
            )
            for name, (shape, _) in shapes.items():
                if name not in self._names:
                    continue  # of a later format
                if tuple(found[name].get_shape()) != shape:
                    raise ValueError(f"{self._path.name}: {name} has shape {found[name].get_shape()}, not {shape}")
                if (dtype := found[name].get_dtype()) not in ("F64", "F32", "BF16", "F16"):
                    raise ValueError(f"{self._path.name}: {name} has dtype {dtype}")
