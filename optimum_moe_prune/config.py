# SPDX-License-Identifier: Apache-2.0
"""The recipe of a pruning run: :class:`MoEPrunerConfig`.

Each setting says in its metadata what it is for, in which bounds it lies and how the command line writes it: checks,
flags, help and defaults come from here. Importing this module is light.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .config_checks import BUDGETS, MOST, check_numbers, check_words, one_budget, parts_of, steps_of
from .environment import PACKAGE, is_newer, package_version
from .errors import RequestError, nearest_first
from .names import BY_SENSITIVITY, CONFIG_NAME, DISTIL, ESTIMATED, UNIFORM
from .storage.files import write_text
from .storage.kinds import RECIPE, reading
from .storage.paths import check_name
from .storage.values import Json, Values, fraction, is_integer, read_from
from .targets.table import get_target

if TYPE_CHECKING:
    import os

    from .statistics.needs import Need

logger = logging.getLogger(__name__)


def _setting(default: Any, help: str, metavar: str = "", least: int | None = None, most: int = MOST) -> Any:
    """A setting: default, help and placeholder on the command line; the bounds of a whole number."""
    metadata = {"help": help, "metavar": metavar, "least": least, "most": most}
    if isinstance(default, (dict, list)):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class MoEPrunerConfig:
    """How to prune: method, budget and calibration. Checked when made.

    Attributes:
        method: Name of a method (``list_methods()``); by default ``"auto"``, which takes of several methods' sets
            those that lose least when they are measured on the model.
        num_experts: Experts to retain in each layer (on average, where layers keep different numbers); or
        sparsity: the fraction of experts to remove, as 0.4 or ``"40%"``; or
        total_experts: the experts to retain in the whole model, for a global allocation; or
        fit: the memory that the pruned model has to fit in, as bytes or ``"24GB"``: the fewest experts are removed.
            At most one of the four; a plan needs one.
        bits: With ``fit``: bits of a weight after the quantisation that follows, of which the scales take half a bit
            more, and embeddings, routers and norms stay in 16; None counts the files as they are.
        context: With ``fit``: tokens of one sequence whose keys and values are counted.
        allocation: How the budget is spread over layers: ``"uniform"``, the same in each; ``"global"``, one number for
            the whole model, so that layers keep different numbers; ``"sensitivity"``, one number for the whole model,
            spread so that measured divergences of the final output add up to the least; ``"estimated"``, the same with
            estimates from gradients in place of what is measured; None for the method's own way (of ``"auto"`` by
            sensitivity, and uniform where a model's layers have to keep the same number).
        count_multiple_of: Layers that are pruned keep a multiple of it, for servers that spread experts evenly over
            devices; where the router has groups, a multiple of their number as well. A request that lies between two
            such numbers is refused, naming them. Layers that are left whole keep their number.
        method_options: Options of the method, by name.
        protect: Experts that are retained in any case, by layer.
        skip_layers: MoE layers that keep all their experts.
        protect_super_experts: Retain experts with extreme outputs (arXiv 2507.23279).
        num_samples: Calibration samples to use at most, in equal shares of the domains; not with ``num_clusters``.
        max_length: Tokens of a sample at most; less if the model was made for less (``max_position_embeddings``).
        batch_size: Samples in a forward pass.
        max_tokens: Tokens for which statistics per token are kept, at most, or ``"all"``. What takes the output of
            every expert is gathered of these.
        sample_selection: ``"first"``, ``"random"``, or ``"kmeans"``, representatives of clusters (see
            ``calibration.representatives``).
        num_clusters: For ``"kmeans"``: representatives of each domain, or ``"auto"``; by default ``num_samples`` in
            equal shares of the domains.
        pack: Join the samples of a domain and cut them into samples of ``max_length`` tokens.
        text_column: The column of records that holds the text, where it is none of the usual ones.
        template_args: Further arguments of the chat template, such as ``{"enable_thinking": False}``.
        skip_bad: Leave out and count records that cannot be used; by default they are refused.
        sensitivity_samples: With ``allocation="sensitivity"`` and ``"auto"``: samples to measure divergences on at
            most, in equal shares of the domains; ``"auto"`` takes as many again that decide nothing, to report on.
        progressive: Calibrate each layer on the hidden states that the pruned layers before it leave.
        recover: What is done after the cut to give back of what it cost: ``"refit"``, down projections of retained
            experts in closed form, ``"distil"``, training against the original's output, or ``"refit,distil"``.
        recover_what: What a distillation trains, of ``"experts"`` (down projections), ``"router"`` and ``"norms"``
            (those before MoE blocks); by default all three.
        recovery_samples: Samples of the calibration's texts to recover with at most, in equal shares of the domains;
            by default all, which may be far more than ``num_samples``. A fifth of them is held back to judge.
        substitute: Write a checkpoint in which experts that go are left out and answer with their mean output, which
            vLLM reads, in place of one without them.
        seed: For whatever is drawn.
        mtp: What becomes of heads for further tokens (MTP) in a checkpoint's files: ``"prune"``, as a layer is;
            ``"keep"``, whole; ``"drop"``, left out; None for what loads: pruned where every layer keeps the same
            number of experts, else whole.
        target: The program that is to open the output (``list targets``): numbers of experts that it does not take are
            rounded up or refused, and ``config.json`` has the keys that it reads.
        parallel_size: With ``target``: the devices over which it is to spread the experts.
        version: The version of this package.
    """

    method: str = _setting("auto", "see: list methods", "NAME")
    num_experts: int | None = _setting(None, "experts to retain in each layer (global: on average)", "N", least=1)
    sparsity: float | None = _setting(None, "or the fraction of experts to remove, as 0.4 or 40%%", "F")
    total_experts: int | None = _setting(
        None, "or, global: the experts to retain in all layers together", "N", least=1
    )
    fit: str | int | None = _setting(
        None, "or the memory that the pruned model has to fit in, as 24GB: removes the fewest experts", "SIZE"
    )
    bits: int | None = _setting(
        None, "with --fit: bits of a weight after the quantisation that follows (default: as the files are)", "N"
    )
    context: int = _setting(0, "with --fit: tokens of context to count", "N", least=0)
    allocation: str | None = _setting(
        None,
        "uniform: the same count in each layer; global: one for the whole model; sensitivity: one for the whole "
        "model, spread by measured divergences; estimated: by estimates of these, from gradients, where measuring is "
        "out of reach (default: the method's own way)",
        "A",
    )
    count_multiple_of: int = _setting(1, "retain a multiple of N experts in each layer that is pruned", "N", least=1)
    method_options: Json = _setting({}, "an option of the method; may be repeated", "K=V")
    protect: dict[int, tuple[int, ...]] = _setting({}, "experts to retain in any case; may be repeated", "LAYER:E,E")
    skip_layers: tuple[int, ...] = _setting((), "layers that keep all their experts", "L,L")
    protect_super_experts: bool = _setting(False, "retain experts with extreme outputs")
    num_samples: int = _setting(128, "samples to use, in equal shares of the domains", "N", least=1)
    max_length: int = _setting(2048, "cut samples to this many tokens", "L", least=2)
    batch_size: int = _setting(8, "samples in a forward pass", "B", least=1)
    max_tokens: int | Literal["all"] = _setting(8192, "tokens to keep statistics per token for, or all", "N", least=1)
    sample_selection: str = _setting("first", "first, random or kmeans", "S")
    num_clusters: int | Literal["auto"] | None = _setting(
        None, "with kmeans: representatives of each domain, or auto (default: --num-samples)", "K"
    )
    pack: bool = _setting(False, "join samples and cut them into full lengths")
    text_column: str | None = _setting(None, "the column that holds the text (default: text, messages ...)", "NAME")
    template_args: Json = _setting(
        {}, "an argument of the chat template, as enable_thinking=false; may be repeated", "K=V"
    )
    skip_bad: bool = _setting(False, "leave out and count records that cannot be used")
    sensitivity_samples: int = _setting(32, "samples to measure divergences on", "N", least=1)
    progressive: bool = _setting(False, "calibrate each layer on what the pruned layers before it leave")
    recover: tuple[str, ...] = _setting((), "after the cut: refit, distil, or refit,distil", "refit|distil")
    recover_what: tuple[str, ...] = _setting(
        (), "with distil: what is trained, of experts,router,norms (default: all three)", "PART,PART"
    )
    recovery_samples: int | None = _setting(
        None, "samples to recover with, in equal shares of the domains (default: all that are given)", "N", least=2
    )
    substitute: bool = _setting(
        False, "experts that go answer with their mean output, for vLLM, and are not removed from the router"
    )
    seed: int = _setting(0, "for whatever is drawn", "S", least=0, most=2**32 - 1)
    mtp: str | None = _setting(
        None,
        "heads for further tokens (MTP): prune, as layers are; keep, whole; drop, left out (default: prune where all "
        "layers keep the same number of experts, else keep)",
        "prune|keep|drop",
    )
    target: str | None = _setting(
        None, "the program that is to open the output (see: list targets): numbers and keys that it takes", "NAME"
    )
    parallel_size: int = _setting(1, "with --for: devices over which it is to spread the experts", "N", least=1)
    version: str = field(
        default_factory=package_version,
        compare=False,
        repr=False,
        metadata={"help": "of this package", "metavar": "V", "least": None, "most": None},
    )

    def __post_init__(self) -> None:
        from .methods import get_method, make_options

        self.version = package_version()
        method = get_method(self.method)
        self.method = method.name
        options = make_options(method, self.method_options)
        # Plain values, so that they compare and travel as JSON.
        self.method_options = {name: getattr(options, name) for name in self.method_options}
        if isinstance(self.sparsity, str) and self.sparsity.strip().endswith("%"):
            try:
                self.sparsity = fraction(self.sparsity)
            except RequestError as error:
                raise RequestError(f"sparsity: {error}") from error
        self.target = None if self.target is None else get_target(self.target).name
        self.recover, self.recover_what = steps_of(self.recover), parts_of(self.recover_what)
        check_numbers(self)
        check_words(self)
        if self.allocation not in (None, *method.takes):
            raise RequestError(
                f"allocation {self.allocation!r} is not for method {self.method!r}, which takes "
                f"{' or '.join(map(repr, method.takes))}: it chooses a set for a given number of experts in a "
                "layer."
            )
        if self.total_experts is not None and self.allocates == UNIFORM:
            raise RequestError(
                "total_experts is for allocations 'global', 'sensitivity' and 'estimated', and the allocation is "
                "'uniform'; give num_experts or sparsity."
            )
        if self.progressive and method.measures:
            raise RequestError(
                f"progressive does not go with method {self.method!r}, which measures sets of the unpruned model; "
                "name one of its candidates, as enumeration."
            )
        if self.progressive and any(str(need) == "fisher" for need in self.needs):
            raise RequestError(
                "progressive does not go with method 'fisher' or allocation 'estimated': gradients are those of the "
                "unpruned model, which has no layers that were pruned before."
            )
        self.template_args = dict(self.template_args)
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
        from .methods import get_method

        return self.allocation or get_method(self.method).allocations[0]

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that planning with this recipe reads, and what it writes of the experts that go."""
        from .methods import get_method
        from .statistics.needs import Need

        needs = get_method(self.method).needs(self.options())
        if self.allocates == ESTIMATED:
            needs |= {Need.ROUTING, Need.FISHER}
        if self.substitute:
            needs |= {Need.ROUTING, Need.MEAN_OUTPUTS}
        return needs | {Need.ROUTING, Need.ROUTED_NORMS} if self.protect_super_experts else needs

    @property
    def needs_text(self) -> bool:
        """Whether planning with this recipe takes a calibration, and not the model alone."""
        from .statistics.needs import WITHOUT_TEXT

        return bool(self.needs - WITHOUT_TEXT)

    @property
    def measures(self) -> bool:
        """Whether planning with this recipe measures the model on texts: for its method or its allocation."""
        from .methods import get_method

        return self.allocates == BY_SENSITIVITY or get_method(self.method).measures

    def options(self) -> Any:
        """The options of the method, with its defaults filled in."""
        from .methods import get_method, make_options

        return make_options(get_method(self.method), self.method_options)

    @property
    def has_budget(self) -> bool:
        """Whether it says how much is to be pruned."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    def require_budget(self) -> None:
        """Raise unless a plan can be asked for.

        Raises:
            RequestError: If none of ``num_experts``, ``sparsity``, ``total_experts`` and ``fit`` is given.
        """
        if not self.has_budget:
            raise one_budget([])

    # -- plain values and files

    def to_dict(self) -> Json:
        """As plain JSON values."""
        values = dataclasses.asdict(self)
        values["protect"] = {str(layer): list(experts) for layer, experts in sorted(self.protect.items())}
        for name in ("skip_layers", "recover", "recover_what"):
            values[name] = list(getattr(self, name))
        return values

    @classmethod
    def from_dict(cls, values: Values, **overrides: Any) -> MoEPrunerConfig:
        """From plain values.

        Keys that a newer version wrote, and this one does not know, are left out with a warning.

        Args:
            values: As :meth:`to_dict` gives them.
            overrides: Take precedence. Giving one of ``num_experts``, ``sparsity``, ``total_experts`` and ``fit``
                replaces the others, and settings that are for another method or recovery go with these.

        Raises:
            RequestError: If a key is not known, or a value is not one that its setting takes.
        """
        known = {setting.name for setting in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown and is_newer(values.get("version")):
            logger.warning(
                "The recipe was written by %s %s, which is newer than this, %s; these of its keys are not known here "
                "and are ignored: %s.",
                *(PACKAGE, values["version"], package_version(), ", ".join(unknown)),
            )
            unknown = []
        if wrong := unknown + sorted(set(overrides) - known):
            settings = sorted(known - {"version"})
            raise RequestError(
                f"{wrong[0]!r} is no setting of MoEPrunerConfig. Settings: {nearest_first(wrong[0], settings)}."
            )
        merged = {key: value for key, value in values.items() if key in known}
        if any(overrides.get(name) is not None for name in BUDGETS):
            merged = {key: value for key, value in merged.items() if key not in (*BUDGETS, "bits", "context")}
        if "method" in merged and overrides.get("method", merged["method"]) != merged["method"]:
            for name in ("method_options", "allocation"):  # those of another method
                merged.pop(name, None)
        if overrides.get("recover") is not None:
            steps = steps_of(overrides["recover"])
            for name in ("recovery_samples",) * (not steps) + ("recover_what",) * (DISTIL not in steps):
                merged.pop(name, None)
        if overrides.get("sample_selection", "kmeans") != "kmeans":
            merged.pop("num_clusters", None)
        return cls(**{**merged, **overrides})

    def _json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Path:
        """Write ``moe_pruner_config.json`` into a folder.

        Args:
            save_directory: The folder, made if absent.
            push_to_hub: Push it to the Hub as well.
            kwargs: Of :meth:`push_to_hub`; ``repo_id`` is the folder's name by default.
        """
        path = write_text(check_name(save_directory) / CONFIG_NAME, self._json())
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
        from huggingface_hub import HfApi

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

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> MoEPrunerConfig:
        """Read the recipe from a folder, a ``.json`` or ``.yaml`` file, or a repository on the Hub.

        Args:
            name_or_path: Where it is.
            kwargs: ``revision``, ``token``, ``cache_dir``, ``subfolder`` for the Hub; anything else overrides a
                setting.
        """
        from .checkpoints.recipes import read_recipe

        hub: Json = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
        file_name = "/".join(filter(None, (kwargs.pop("subfolder", None), CONFIG_NAME)))
        with reading(name_or_path, RECIPE):
            path, values = read_recipe(name_or_path, file_name, hub)
            with read_from(path):
                return cls.from_dict(values, **kwargs)
