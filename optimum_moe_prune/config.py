# SPDX-License-Identifier: Apache-2.0
"""The recipe of a pruning run: :class:`MoEPrunerConfig`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import HfApi
from transformers.utils import cached_file

from .errors import RequestError, nearest_first
from .methods import get_method, make_options
from .methods.registry import ALLOCATIONS, BY_SENSITIVITY
from .names import CONFIG_NAME
from .storage.files import write_text
from .storage.values import is_integer, read_json

if TYPE_CHECKING:
    import os

logger = logging.getLogger(__name__)

SIZES = ("num_experts", "sparsity", "total_experts")


SAMPLE_SELECTIONS = ("first", "random", "kmeans")


def check_clusters(sample_selection: str, num_clusters: Any) -> None:
    """Refuse a number of clusters that cannot be meant.

    Raises:
        RequestError: If it is below 1, or samples are not selected by clusters.
    """
    if num_clusters is None:
        return
    if num_clusters != "auto" and not (is_integer(num_clusters) and num_clusters >= 1):
        raise RequestError(f'num_clusters is {num_clusters!r}; it must be an integer of at least 1, or "auto".')
    if sample_selection != "kmeans":
        raise RequestError(
            f"num_clusters is for sample_selection 'kmeans', and sample_selection is {sample_selection!r}."
        )


@dataclass
class MoEPrunerConfig:
    """How to prune: method, budget and calibration. Checked when made.

    Attributes:
        method: Name of a method (``list_methods()``).
        num_experts: Experts to retain in each layer (on average, where layers keep different numbers); or
        sparsity: the fraction of experts to remove; or
        total_experts: the experts to retain in the whole model, for a global allocation. Exactly one of the three.
        allocation: How the budget is spread over layers: ``"uniform"``, the same in each; ``"global"``, one number for
            the whole model, so that layers keep different numbers; ``"sensitivity"``, one number for the whole model,
            spread so that measured divergences of the final output add up to the least; None for the method's own way.
        method_options: Options of the method, by name.
        protect: Experts that are retained in any case, by layer.
        skip_layers: MoE layers that keep all their experts.
        protect_super_experts: Retain experts with extreme outputs (arXiv 2507.23279).
        num_samples: Calibration samples to use at most, in equal shares of the domains; not with ``num_clusters``.
        max_length: Tokens of a sample at most; less if the model was made for less (``max_position_embeddings``).
        batch_size: Samples in a forward pass.
        max_tokens: Tokens for which statistics per token are kept, at most.
        sample_selection: ``"first"``, ``"random"``, or ``"kmeans"``, representatives of clusters (see
            ``representatives``).
        num_clusters: For ``"kmeans"``: representatives of each domain, or ``"auto"``; by default ``num_samples`` in
            equal shares of the domains.
        pack: Join the samples of a domain and cut them into samples of ``max_length`` tokens.
        sensitivity_samples: With ``allocation="sensitivity"``: samples to measure divergences on at most, in equal
            shares of the domains.
        seed: For whatever is drawn.
    """

    method: str = "mosaic"
    num_experts: int | None = None
    sparsity: float | None = None
    total_experts: int | None = None
    allocation: str | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    protect: dict[int, tuple[int, ...]] = field(default_factory=dict)
    skip_layers: tuple[int, ...] = ()
    protect_super_experts: bool = False
    num_samples: int = 128
    max_length: int = 2048
    batch_size: int = 8
    max_tokens: int = 8192
    sample_selection: str = "first"
    num_clusters: int | Literal["auto"] | None = None
    pack: bool = False
    sensitivity_samples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        options = make_options(get_method(self.method), self.method_options)
        # Plain values, so that they compare and travel as JSON.
        self.method_options = {name: getattr(options, name) for name in self.method_options}
        given = [name for name in SIZES if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                "exactly one of num_experts (to retain in each layer), sparsity (fraction to remove) and "
                f"total_experts (to retain in the whole model) is needed; given: {' and '.join(given) or 'none'}."
            )
        if self.sparsity is not None and (not isinstance(self.sparsity, (int, float)) or not 0 < self.sparsity < 1):
            raise RequestError(
                f"sparsity is {self.sparsity!r}; the fraction of experts to remove lies between 0 and 1."
            )
        method = get_method(self.method)
        allocations = (None, *ALLOCATIONS, BY_SENSITIVITY)
        for name, known in (("allocation", allocations), ("sample_selection", SAMPLE_SELECTIONS)):
            value = getattr(self, name)
            if value not in known:
                nearest = nearest_first(str(value), [choice for choice in known if choice is not None])
                raise RequestError(f"{name} {value!r} is not known. Known: {nearest}.")
        if self.allocation not in (None, *method.takes):
            raise RequestError(
                f"allocation {self.allocation!r} is not for method {self.method!r}, which takes "
                f"{' or '.join(map(repr, method.takes))}: it chooses a set for a given number of experts in a "
                "layer."
            )
        if self.total_experts is not None and self.allocates == "uniform":
            raise RequestError(
                "total_experts is for allocations 'global' and 'sensitivity', and the allocation is 'uniform'; give "
                "num_experts or sparsity."
            )
        least = {
            "num_experts": 1,
            "total_experts": 1,
            "num_samples": 1,
            "max_length": 2,
            "batch_size": 1,
            "max_tokens": 1,
            "sensitivity_samples": 1,
            "seed": 0,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            most = 2**32 - 1 if name == "seed" else 2**63 - 1
            if not (name in SIZES and value is None) and not (is_integer(value) and minimum <= value <= most):
                raise RequestError(
                    f"{name} is {value!r}; it must be an integer of at least {minimum} and at most {most}."
                )
        check_clusters(self.sample_selection, self.num_clusters)
        for name in ("protect_super_experts", "pack"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be true or false.")
        try:  # JSON has no integer keys
            self.protect = {int(layer): tuple(experts) for layer, experts in self.protect.items()}
            self.skip_layers = tuple(self.skip_layers)
            numbers = [*self.skip_layers, *(e for experts in self.protect.values() for e in experts)]
            if not all(map(is_integer, numbers)):
                raise ValueError(numbers)
        except (TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"protect must be {{layer: [expert, ...]}} and skip_layers [layer, ...]; they are {self.protect!r} "
                f"and {self.skip_layers!r}."
            ) from error

    @property
    def allocates(self) -> str:
        """``allocation``, or the method's own way."""
        return self.allocation or get_method(self.method).allocations[0]

    def options(self) -> Any:
        """The options of the method, with its defaults filled in."""
        return make_options(get_method(self.method), self.method_options)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = dataclasses.asdict(self)
        values["protect"] = {str(layer): list(experts) for layer, experts in sorted(self.protect.items())}
        values["skip_layers"] = list(self.skip_layers)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> MoEPrunerConfig:
        """From plain values; keys that this version does not know are left out with a warning.

        Args:
            values: As :meth:`to_dict` gives them.
            overrides: Take precedence. Giving one of ``num_experts``, ``sparsity`` and ``total_experts`` replaces the
                others.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            logger.warning(
                "These keys of the configuration are not known to this version and are ignored: %s.",
                ", ".join(unknown),
            )
        wrong = sorted(set(overrides) - known)
        if wrong:
            raise RequestError(
                f"{wrong[0]!r} is no setting of MoEPrunerConfig. Settings: {nearest_first(wrong[0], sorted(known))}."
            )
        merged = {key: value for key, value in values.items() if key in known}
        if any(overrides.get(name) is not None for name in SIZES):
            merged = {key: value for key, value in merged.items() if key not in SIZES}
        if "method" in merged and overrides.get("method", merged["method"]) != merged["method"]:
            for name in ("method_options", "allocation"):  # those of another method
                merged.pop(name, None)
        if overrides.get("sample_selection", "kmeans") != "kmeans":
            merged.pop("num_clusters", None)
        merged |= overrides
        return cls(**merged)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Path:
        """Write ``moe_pruner_config.json`` into a folder.

        Args:
            save_directory: The folder, made if absent.
            push_to_hub: Push it to the Hub as well.
            kwargs: Of :meth:`push_to_hub`; ``repo_id`` is the folder's name by default.
        """
        path = write_text(Path(save_directory) / CONFIG_NAME, self._json())
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **kwargs})
        return path

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload the pruning recipe",
        create_pr: bool = False,
    ) -> str:
        """Upload ``moe_pruner_config.json`` to a repository on the Hub, made if absent.

        Args:
            repo_id: The repository.
            private: Whether a new repository is private.
            token: Access token; by default the one of ``hf auth login``.
            revision: The branch.
            commit_message: Of the commit.
            create_pr: Open a pull request instead of committing.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_file(
            path_or_fileobj=self._json().encode(),
            path_in_repo=CONFIG_NAME,
            repo_id=repo_id,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        ).commit_url

    def _json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> MoEPrunerConfig:
        """Read the recipe from a folder, a ``.json`` file or a repository on the Hub.

        Args:
            name_or_path: Where it is.
            kwargs: ``revision``, ``token``, ``cache_dir``, ``subfolder`` for the Hub; anything else overrides a
                setting.
        """
        hub = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
        path = Path(name_or_path)
        if not path.is_file():
            try:
                found = cached_file(str(name_or_path), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
            except (OSError, ValueError) as error:
                raise RequestError(f"no recipe can be read from {str(name_or_path)!r}: {error}") from error
            if found is None:
                raise RequestError(f"{name_or_path} has no {CONFIG_NAME}.")
            path = Path(found)
        return cls.from_dict(read_json(path), **kwargs)
