# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose experts answer with constants in part, as a model to be evaluated.

transformers has no such model. Here it is the original's, whole in memory: experts that were left out have zeros for
weights, and behind the experts of a layer stands a hook that adds, for each of them that a token chose, its vector
times the router's weight, summed in float32 and rounded as its reader does (``architectures.substitution``).

Shapes: T tokens, K top_k, H hidden size, n experts of a layer that were left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..architectures.substitution import SUFFIX, constants_in, substituted_in
from ..checkpoints.plain import PlainTensor
from ..compat import text_config
from ..errors import RequestError
from .blocks import MoEBlock, moe_blocks

Substituted = Mapping[int, tuple[int, ...]]
Made = Mapping[str, Callable[[], Tensor]]


def with_zeros(
    made: Made, tensors: Mapping[str, PlainTensor], substituted: Substituted, name: str
) -> tuple[dict[str, Callable[[], Tensor]], dict[tuple[int, int], Callable[[], Tensor]]]:
    """The tensors of a whole model, zeros for experts that were left out, and apart from them the vectors of these.

    Args:
        made: What is in the files, by name, each made when it is asked for.
        tensors: The same, for their shapes.
        substituted: The experts that were left out, by layer.
        name: The checkpoint's.

    Raises:
        RequestError: If a vector is missing, or one is there that nobody asks for.
    """
    found = {(_layer_of(experts), number): (own, experts) for own, (experts, number) in constants_in(tensors).items()}
    wanted = {(layer, number) for layer, numbers in substituted.items() for number in numbers}
    if odd := sorted(wanted ^ found.keys()):
        layer, number = odd[0]
        state = "lacks" if (layer, number) in wanted else "holds, beside what config.json lists,"
        raise RequestError(
            f"{name} {state} the constant of expert {number} in layer {layer} (a tensor named ...{SUFFIX}); it is "
            "damaged."
        )
    whole = {key: make for key, make in made.items() if not key.endswith(SUFFIX)}
    for (_, number), (_, experts) in found.items():
        retained = next(key for key in whole if key.startswith(f"{experts}."))
        like = retained.removeprefix(f"{experts}.").partition(".")[0]
        for key in [key for key in made if key.startswith(f"{experts}.{like}.")]:
            new = f"{experts}.{number}.{key.removeprefix(f'{experts}.{like}.')}"
            whole[new] = functools.partial(torch.zeros, tensors[key].shape)
    return whole, {key: made[own] for key, (own, _) in found.items()}


def answer_with_constants(model: Any, constants: Mapping[tuple[int, int], Callable[[], Tensor]]) -> Any:
    """Have experts whose weights are zeros answer with their vectors.

    Args:
        model: The model.
        constants: The vectors ``(H,)`` by layer and expert.

    Raises:
        RequestError: If the model runs its experts in a way that is not known here.
    """
    for block in moe_blocks(model):
        numbers = sorted(number for layer, number in constants if layer == block.layer)
        if not numbers:
            continue
        if block.calls_modules:
            raise RequestError(
                f"layer {block.layer} calls its experts one by one, so what they answer with cannot be put in here; "
                "evaluate it where it is served."
            )
        values = torch.stack([constants[block.layer, number]() for number in numbers])
        block.experts.register_forward_hook(_adding(block, numbers, values), with_kwargs=True)
    return model


def left_out(model: Any) -> tuple[int, int]:
    """The parameters, and their bytes, that a model has here and not in its files: zeros, less the vectors there."""
    parameters = nbytes = 0
    if substituted := substituted_in(model.config):
        for block in moe_blocks(model):
            gone = len(substituted.get(block.layer, ()))
            tensors = list(block.expert_tensors.values())
            size = text_config(model.config).hidden_size
            parameters += gone * (sum(t[0].numel() for t in tensors) - size)
            nbytes += gone * (sum(t[0].numel() * t.element_size() for t in tensors) - size * tensors[0].element_size())
    return parameters, nbytes


def _adding(block: MoEBlock, numbers: list[int], values: Tensor) -> Callable[..., Tensor]:
    """A hook that adds what some experts answer with.

    Args:
        block: The block of the experts.
        numbers: Of these.
        values: Their vectors ``(n, H)``.
    """
    rows = torch.full((block.num_experts + 1,), len(numbers))  # what is none of them has a row that is dropped
    rows[numbers] = torch.arange(len(numbers))

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        _, ids, weights = (*args, *kwargs.values())[:3]  # (T, H), (T, K), (T, K)
        row = rows.to(ids.device)[ids.long().clamp(max=len(rows) - 1)]
        scales = torch.zeros(len(ids), len(numbers) + 1, device=ids.device)
        scales.scatter_add_(1, row, weights.float())
        constant = scales[:, :-1] @ values.to(ids.device, values.dtype).float()
        return output + constant.to(output.device, output.dtype).view(output.shape)

    return hook


def _layer_of(experts: str) -> int:
    """The layer that is named in how experts' names begin: their only number."""
    numbers = [int(part) for part in experts.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else -1
