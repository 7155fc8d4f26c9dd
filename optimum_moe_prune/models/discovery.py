# SPDX-License-Identifier: Apache-2.0
"""Models whose type has no row: what has to be known of them is found by trying them.

Where the experts are is found as for any model. How the routers choose is found by comparing all forms of rules that
are known with the experts that were really called, and with which weights. What is found is proven before it is used:
layers without some of their experts have to do what the rule says, also when they are really cut, and a model built
with fewer experts has to be what cutting makes of it. Where no form is right, the router's own code is all that is
known (``architectures.own_code``): scores of what was observed are possible, and nothing that asks what it would do.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..architectures.candidates import AnyForm, Observed, find_form, of_precision, words_of
from ..architectures.own_code import Own
from ..architectures.spec import COUNT_KEYS, TOP_K_KEYS, MoESpec
from ..architectures.structure import Structure, counts_of, shapes_of, structure_of
from ..architectures.table import architecture_for, settings_of, supposing
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.layout import find_layout
from ..checkpoints.source import Source
from ..compat import ModelConfig, build_on_meta, built_like, loader_of, text_config
from ..errors import MoEPruneError, RequestError
from .batches import Batch
from .blocks import decoder_of, moe_blocks
from .checks import check_model, evaluating, input_device
from .devices import CPU
from .memory import Compute, open_skeleton
from .trials import Call, check_call, observed_of, prove
from .wrappers import plain_model

logger = logging.getLogger(__name__)

Calls = Callable[[], Iterator[Call]]
"""The MoE layers that are tried, each with its tensors for as long as it is at hand."""

_ROWS, _LENGTH = 2, 128  # tokens of a trial


def discover(model: Any) -> MoESpec:
    """The row of a model: its type's, or one that is found by trying it, and known from then on.

    Args:
        model: A causal language model with real parameters, or the folder, Hub id or ``Source`` of one.

    Raises:
        RequestError: Naming what was not found.
    """
    model = Source.of(model) if isinstance(model, (str, os.PathLike)) else plain_model(model)
    return architecture_for(model, model.config)


def spec_of(thing: Any, config: ModelConfig) -> MoESpec:
    """As :func:`discover`, for a type that is not known.

    Args:
        thing: The model, or its ``Source``.
        config: Its config.
    """
    name = text_config(config).model_type
    logger.warning("architecture %r is not known: it is found out by trying the model.", name)
    try:
        spec = _of_source(thing, config) if isinstance(thing, Source) else _of_model(thing)
    except MoEPruneError as error:
        raise RequestError(
            f"architecture {name!r} is not known, and could not be found out: {error} A row can be added with "
            "register_architecture."
        ) from error
    assert spec.found is not None
    logger.warning("%s: %s.", name, spec.found[0])
    return spec


def _of_source(source: Source, config: ModelConfig) -> MoESpec:
    """Of files: with the model in memory where it fits, else with three of its layers, one at a time."""
    supposed = _supposed(build_on_meta(config, trust_remote_code=source.trust_remote_code))
    with supposing(supposed):
        layout = find_layout(Checkpoint.open(source), config)
        compute = Compute(device=CPU)
        if not compute.settled(layout).stream:
            loader = loader_of(config, source.trust_remote_code)
            return _of_model(loader.from_pretrained(source.name_or_path, dtype="auto", **source.for_transformers))
        skeleton = open_skeleton(layout, compute)
        blocks = skeleton.blocks
        tried = [blocks[n] for n in sorted({0, len(blocks) // 2, len(blocks) - 1})]

        def calls() -> Iterator[Call]:
            skeleton.prepare()
            batch = _batch(skeleton.model)
            with skeleton.running():
                state = skeleton.random_state(batch)
                for block in tried:
                    with skeleton.loaded(block.layer), _called([block]) as found:
                        skeleton.forward(block.layer, batch, state)
                        yield found[block.layer]

        return _found(skeleton.model, supposed, calls)


def _of_model(model: Any) -> MoESpec:
    if next(model.parameters()).is_meta:
        raise RequestError("it has no weights to be tried with; pass the folder or Hub id of the model.")
    check_model(model)
    supposed = _supposed(model)
    with supposing(supposed):
        blocks = moe_blocks(model)
        batch, device = _batch(model), input_device(model)
        with torch.no_grad(), evaluating(model), _called(blocks) as found:
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
        for block in blocks:
            if block.layer not in found:
                raise RequestError(f"the block with the experts of layer {block.layer} is not called as a module.")

        def calls() -> Iterator[Call]:
            with evaluating(model):
                yield from found.values()

        return _found(model, supposed, calls)


def _found(model: Any, supposed: MoESpec, calls: Calls) -> MoESpec:
    """The row, from trials of layers."""
    config = model.config
    text = text_config(config)
    observed: list[Observed] = []
    lower: list[Observed] = []
    top_k = supposed.routing(config).top_k
    for call in calls():
        check_call(call)
        in_float32, in_bfloat16 = observed_of(call, _few(text, call.block.num_experts, top_k))
        observed += in_float32
        lower += in_bfloat16
    sizes = sorted({o.ids.shape[1] for o in observed})
    if sizes != [top_k]:
        said = " or ".join(map(str, sizes))
        raise RequestError(f"each token is sent to {said} experts, and {supposed.top_k_key} of the config is {top_k}.")
    form: AnyForm | Own
    try:
        found = of_precision(find_form(text, observed), text, lower)
        form, words = found, f"routing rule found by trial: {words_of(found, top_k)}"
    except RequestError as error:
        form = Own(str(error))
        words = f"{error}; only methods that score what was observed can be used"
    spec = replace(supposed, form=form, found=(words, settings_of(config, supposed.count_key)))
    rule = spec.routing(config)
    for number, call in enumerate(calls()):
        prove(call, rule, number)
    _prove_building(model, spec)
    return spec


def _supposed(model: Any) -> MoESpec:
    """A row with the keys of a model's config, by which its structure can be found, and no rule.

    Raises:
        RequestError: If no key counts experts, or tokens' experts.
    """
    config = model.config
    values = {key: value for key, value in text_config(config).to_dict().items() if type(value) in (int, list)}
    top_k_keys = [key for key in TOP_K_KEYS if key in values] or [
        key for key, value in values.items() if ("top" in key and "group" not in key) or "per_tok" in key
    ]
    if not top_k_keys:
        raise RequestError("no key of its config says how many experts a token is sent to.")
    count_keys = [key for key in COUNT_KEYS if key in values] or [
        key
        for key, value in values.items()
        if "expert" in key and type(value) is int and value > 1 and key not in top_k_keys and "shared" not in key
    ]
    refusals = []
    for key in count_keys:
        spec = MoESpec(text_config(config).model_type, Own(), count_key=key, top_k_key=top_k_keys[0],
                       modelling=type(model).__module__)  # fmt: skip
        try:
            structure_of(model, spec)
        except RequestError as error:
            refusals.append(str(error))
        except Exception as error:  # a model's own code, built with another config than it was made for
            refusals.append(f"it cannot be built with twice as many of {key}: {error}.")
        else:
            return replace(spec, count_key=spec.key_of_count(config), top_k_key=spec.key_of_top_k(config))
    raise RequestError(refusals[0] if refusals else "no key of its config counts experts.")


def _prove_building(model: Any, spec: MoESpec) -> None:
    """Raise unless models built with fewer experts have the shapes and counts that cutting gives them.

    Raises:
        RequestError: Naming the count or the tensor.
    """
    count, rule = getattr(text_config(model.config), spec.count_key), spec.routing(model.config)
    if type(count) is not int or spec.is_unequal(model.config):
        return
    possible = [number for number in range(max(rule.fewest, 1), count) if rule.allows(number)]
    for number in sorted({*possible[:1], *possible[-1:]}):
        config = copy.deepcopy(model.config)
        setattr(text_config(config), spec.count_key, number)
        try:
            built = built_like(model, config)
        except Exception as error:  # a model's own code
            raise RequestError(f"it cannot be built with {spec.count_key}={number}: {error}.") from error
        _compare(model, built, structure_of(model, spec), count, number)


def _compare(model: Any, built: Any, structure: Structure, count: int, less: int) -> None:
    """Raise unless a model built with ``less`` experts is what is left of one with ``count``, but for the experts."""
    counts, shapes, now = counts_of(built), shapes_of(built), shapes_of(model)
    for index, layer in structure.moe.items():
        start = f"{structure.layers}.{index}."
        for path, more in layer.counts.items():
            if counts.get(start + path) != less + more:
                raise RequestError(
                    f"{start}{path} is {counts.get(start + path)} in a model built with {less} experts, and would be "
                    f"{less + more} where experts are removed."
                )
        for path, axis in layer.tensors.items():
            shape = list(now[start + path])
            shape[axis.axis] += (less - count) * axis.each
            if shapes.get(start + path) != tuple(shape):
                raise RequestError(f"{start}{path} has another shape in a model built with {less} experts.")


def _few(text: ModelConfig, num_experts: int, top_k: int) -> list[int]:
    """The fewest experts that a layer can consist of whether groups limit the choice or not, as many in each group."""
    groups = getattr(text, "n_group", None) or 1
    least = top_k if groups == 1 else max(2, -(-top_k // (getattr(text, "topk_group", None) or 1)))
    width = num_experts // groups
    return [group * width + number for group in range(groups) for number in range(min(least, width))]


@contextlib.contextmanager
def _called(blocks: list[Any]) -> Iterator[dict[int, Call]]:
    """What the blocks are called with inside a ``with``, by layer."""
    found: dict[int, Call] = {}
    with contextlib.ExitStack() as hooks:
        for block in blocks:

            def remember(module: Any, args: Any, kwargs: Any, block: Any = block) -> None:
                found.setdefault(block.layer, Call(block, _detached(args), _detached(kwargs)))

            hooks.callback(block.module.register_forward_pre_hook(remember, with_kwargs=True).remove)
        yield found


def _detached(value: Any) -> Any:
    """Arguments with tensors of their own, which the model does not change when it goes on."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(_detached, value))
    return {name: _detached(part) for name, part in value.items()} if type(value) is dict else value


def _batch(model: Any) -> Batch:
    """Random token ids."""
    text = text_config(model.config)
    length = min(_LENGTH, getattr(text, "max_position_embeddings", None) or _LENGTH)
    ids = torch.randint(text.vocab_size, (_ROWS, length), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids), torch.arange(_ROWS))
