# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a GGUF file hold experts: by the names that llama.cpp gives them, proven by their shapes.

Experts are stacked: the outermost dimension counts them (``blk.3.ffn_up_exps.weight``), of a layer's scales and biases
too. Files of the first Mixtral conversions have a tensor for each (``blk.3.ffn_up.7.weight``). A tensor whose name
neither ``gguf`` nor this page knows, and one of whose dimensions is the number of experts, is refused: nobody can tell
whether it counts them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from ...errors import RequestError
from .model import GgufModel, Placed, library

COUNT = "expert_count"
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps")
_ROUTER = "ffn_gate_inp"
_BIASES = ("exp_probs_b", "exp_probs_b_vl")
_TABLE = "ffn_gate_tid2eid"
_CHUNKS = ("ffn_gate_chexps", "ffn_up_chexps", "ffn_down_chexps")
_WHOLE = frozenset({"ffn_norm_exps"})
"""Has the word in its name, and is a norm before all experts."""
_BLOCK = re.compile(r"blk\.([0-9]{1,6})\.(.+)")
_NUMBERED = re.compile(r"(ffn_gate|ffn_up|ffn_down)\.([0-9]{1,6})\.(.+)")


@dataclass
class Block:
    """The tensors of one layer that hold experts.

    Attributes:
        stacked: Those whose outermost dimension counts experts; the router's and its biases among them.
        numbered: By expert, where each has tensors of its own: names with a place for its number -> names.
        router: The router's weight.
        table: The table that says by a token's id where it goes, in a layer that has one.
    """

    stacked: list[str] = field(default_factory=list)
    numbered: dict[int, dict[str, str]] = field(default_factory=dict)
    router: str = ""
    table: str = ""

    @property
    def beside(self) -> list[str]:
        """What a router has beside its weight, in the order in which models usually have it."""
        stems = {name: name.split(".")[2] for name in self.stacked}
        biases = [name for name, stem in stems.items() if stem in (_ROUTER, *_BIASES) and name != self.router]
        scales = [name for name in self.stacked if name.endswith("ffn_down_exps.scale")]  # Gemma 4: the router's
        return [*biases, *scales]


def num_experts(model: GgufModel) -> int:
    """Experts of each layer, as the file says.

    Raises:
        RequestError: If it says none, or one number for each layer, which no program reads.
    """
    count = model.number(COUNT)
    if count < 1:
        raise RequestError(
            f"{model.path} holds no experts: it is a {model.architecture!r} model without {model.key(COUNT)}, so "
            "there is nothing to prune."
        )
    return count


def moe_blocks(model: GgufModel) -> dict[int, Block]:
    """The layers with experts, by their number, which is that of the decoder layer.

    Raises:
        RequestError: If a tensor has not the shape that the number of experts asks for, or may hold experts in a way
            that is not known.
    """
    count = num_experts(model)
    blocks: dict[int, Block] = {}
    for name, placed in model.tensors.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            _check_unknown(model, name, placed, count, "exps" in name)
            continue
        index, below = int(match[1]), match[2]
        stem, _, last = below.partition(".")
        numbered = _NUMBERED.fullmatch(below)
        block = blocks.get(index, Block())
        if stem in _EXPERTS or stem in _BIASES or (stem == _ROUTER and last in ("weight", "bias")):
            if placed.rows != count:
                raise _wrong_shape(model, name, placed, count)
            block.stacked.append(name)
            if (stem, last) == (_ROUTER, "weight"):
                block.router = name
        elif stem in _CHUNKS:
            raise RequestError(
                f"{model.path}: {name} holds experts that several others share ({model.architecture}); such layers "
                "cannot be pruned."
            )
        elif stem == _TABLE:
            block.table = name
        elif numbered is not None:
            own = block.numbered.setdefault(int(numbered[2]), {})
            own[f"blk.{index}.{numbered[1]}.{{}}.{numbered[3]}"] = name
        else:
            _check_unknown(model, name, placed, count)
            continue
        blocks[index] = block
    for index, block in sorted(blocks.items()):
        _check_block(model, index, block, count)
    if not blocks:
        raise RequestError(
            f"{model.path} says that it has {count} experts ({model.key(COUNT)}), and holds no tensor of one."
        )
    return dict(sorted(blocks.items()))


def renumbered(name: str, number: int) -> str:
    """The name of a tensor of an expert's own, for another number."""
    match = _BLOCK.fullmatch(name)
    below = None if match is None else _NUMBERED.fullmatch(match[2])
    assert match is not None and below is not None
    return f"blk.{match[1]}.{below[1]}.{number}.{below[3]}"


def _check_block(model: GgufModel, index: int, block: Block, count: int) -> None:
    """Raise unless a layer has a router and each of its experts whole."""
    if not block.router:
        raise RequestError(f"{model.path}: layer {index} has experts and no router (blk.{index}.{_ROUTER}.weight).")
    if any(name.split(".")[2] in _EXPERTS for name in block.stacked):
        if block.numbered:
            raise RequestError(f"{model.path}: layer {index} has its experts in one tensor and also one by one.")
        return
    if sorted(block.numbered) != list(range(count)):
        raise RequestError(
            f"{model.path}: layer {index} has {len(block.numbered)} experts, and {model.key(COUNT)} is {count}; the "
            "file is damaged."
        )
    every = {part for own in block.numbered.values() for part in own}
    for number, own in sorted(block.numbered.items()):
        if own.keys() != every:
            raise RequestError(
                f"{model.path}: expert {number} of layer {index} lacks {min(every - own.keys()).format(number)}; the "
                "file is damaged."
            )


def _check_unknown(model: GgufModel, name: str, placed: Placed, count: int, suspect: bool = False) -> None:
    """Raise if a tensor that is not known to hold experts may."""
    if count < 2 or count not in placed.shape or (not suspect and _is_known(name)):
        return
    raise RequestError(
        f"{model.path}: what {name} {list(placed.shape)} holds is not known, and it may count the {count} experts; "
        "install a newer gguf if there is one that knows it, or prune the original checkpoint and convert it."
    )


def _wrong_shape(model: GgufModel, name: str, placed: Placed, count: int) -> RequestError:
    return RequestError(
        f"{model.path}: {name} has the shape {list(placed.shape)}, and {model.key(COUNT)} is {count}: its outermost "
        "dimension does not count the experts; the file is damaged, or its layers have different numbers of them."
    )


def _is_known(name: str) -> bool:
    """Whether what a tensor holds is known, and that it is nothing of single experts."""
    match = _BLOCK.fullmatch(name)
    below = name if match is None else match[2]
    if below.split(".")[0] in _WHOLE:
        return True
    if match is None:
        return any(re.fullmatch(pattern, name) for pattern in _known()[1])
    return any(below == stem or below.startswith(f"{stem}.") for stem in _known()[0])


@functools.cache
def _known() -> tuple[frozenset[str], tuple[str, ...]]:
    """What ``gguf`` names in layers, and patterns of what it names outside of them."""
    names = library().TENSOR_NAMES.values()
    inside = {name.removeprefix("blk.{bid}.") for name in names if name.startswith("blk.{bid}.")}
    outside = [name for name in names if not name.startswith("blk.{bid}.")]
    patterns = tuple(re.escape(name).replace(r"\{bid\}", "[0-9]+") + r"(\..+)?" for name in outside)
    return frozenset(inside), patterns
