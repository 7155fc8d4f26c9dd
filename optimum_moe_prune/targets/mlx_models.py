# SPDX-License-Identifier: Apache-2.0
"""What mlx-lm 0.32.2 makes of each model type: what it reads otherwise than transformers, or not at all.

Found by comparing the logits of tiny models in float32, transformers 5.24 against mlx-lm on a CPU, and by its source
(``mlx_lm/models``) where a row is not ``compared``. The conditions are values of a config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..storage.values import Json

SCALED = frozenset({"linear", "yarn", "llama3", "dynamic"})
"""Types of scaled rotary embeddings that mlx-lm calculates as transformers does, in models that read them."""
_NONE: frozenset[str] = frozenset()
Condition = tuple[Callable[[Any], bool], str]
"""Of the text part of a config: whether it holds, and what mlx-lm then does, in words that follow its name."""


@dataclass(frozen=True)
class Reads:
    """What mlx-lm reads of one model type.

    Attributes:
        compared: Whether its logits were seen to be those of transformers.
        rope: The types of scaled rotary embeddings that it calculates with as transformers does.
        window: Whether it knows sliding windows, where the model may have them.
        differs: What else makes it refuse the model, or calculate something else.
        refused: What it makes of this type whatever its config says, in words that follow its name.
        old_names: When it reads experts in files under their published names alone, not as transformers 5 writes them.
        aliases: Keys that it reads, and what transformers calls them.
        head_dim: Whether it wants ``head_dim`` where transformers takes it from other keys.
        adds: Further keys that it reads, made of those that there are.
        needs: Keys that it wants and that cannot be made of others.
    """

    compared: bool = True
    rope: frozenset[str] = _NONE
    window: bool = True
    differs: tuple[Condition, ...] = ()
    refused: str = ""
    old_names: Callable[[Any], bool] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    head_dim: bool = False
    adds: Callable[[Json], Json] | None = None
    needs: tuple[str, ...] = ()


def _is(key: str, *values: object) -> Callable[[Any], bool]:
    return lambda config: getattr(config, key, None) in values


def _has(key: str) -> Callable[[Any], bool]:
    return lambda config: bool(getattr(config, key, None))


def _lacks(key: str) -> Callable[[Any], bool]:
    return lambda config: not getattr(config, key, True)


def _any_of(key: str, value: str) -> Callable[[Any], bool]:
    return lambda config: value in (getattr(config, key, None) or ())


def _always(config: Any) -> bool:
    return True


def _one_expert(config: Any) -> bool:
    """One expert for each token, whose weight transformers divides by itself."""
    return config.num_experts_per_tok == 1 and bool(getattr(config, "norm_topk_prob", True))


def _own_heads(config: Any) -> bool:
    """Heads of another width than hidden states divided by their number."""
    width = getattr(config, "head_dim", None)
    return width is not None and width * config.num_attention_heads != config.hidden_size


def _half_rotated(config: Any) -> bool:
    """``rotary_dim`` says something else than ``partial_rotary_factor``, by which transformers goes."""
    rope = getattr(config, "rope_parameters", None) or {}
    rotary, width = getattr(config, "rotary_dim", None), getattr(config, "head_dim", None)
    return bool(rotary and width) and rotary != int(width * rope.get("partial_rotary_factor", 1.0))


_ACT: Condition = (
    lambda config: getattr(config, "hidden_act", "silu") not in ("silu", "swish"),
    "calculates experts with silu whatever hidden_act says",
)
_TIED: Condition = (_has("tie_word_embeddings"), "wants an output layer of its own (tie_word_embeddings is true)")
_BIAS: Condition = (_has("attention_bias"), "has no biases in this model's attention (attention_bias is true)")
_SINGLE: Condition = (
    _one_expert,
    "does not normalise the weight of a single expert, and this model has one for each token",
)
_DENSE: Condition = (
    lambda config: bool(getattr(config, "mlp_only_layers", None)) or getattr(config, "decoder_sparse_step", 1) != 1,
    "builds every layer of this model with experts, and some have none (mlp_only_layers, decoder_sparse_step)",
)
_NO_DENSE: Condition = (
    _any_of("mlp_layer_types", "dense"),
    "builds every layer of this model with experts, and some have none (mlp_layer_types)",
)
_INTERLEAVED: Condition = (
    _lacks("rope_interleave"),
    "rotates neighbouring numbers of queries and keys, and rope_interleave is false",
)
_ROTARY: Condition = (
    _half_rotated,
    "goes by rotary_dim, and transformers by partial_rotary_factor, which says something else",
)


def _dense_first(part: Json) -> Json:
    """Which layers have experts, of the names that layers go by in transformers 5."""
    kinds = part.get("mlp_layer_types")
    if not isinstance(kinds, list) or "sparse" not in kinds:
        return {}
    return {
        "is_moe_layer": [kind == "sparse" for kind in kinds],
        "first_k_dense_replace": part.get("first_k_dense_replace", kinds.index("sparse")),
    }


def _glm_dsa(part: Json) -> Json:
    return {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, **_dense_first(part)}


def _global_heads(part: Json) -> Json:
    """What Gemma's layers of full attention have of their own."""
    kinds, own = part.get("layer_types") or [], part.get("per_layer_config") or {}
    found = [own.get(str(index), {}) for index, kind in enumerate(kinds) if kind == "full_attention"]
    names = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
    values = {new: {each.get(old, part.get(old)) for each in found} for new, old in names.items()}
    return {new: each.pop() for new, each in values.items() if len(each) == 1}


def _time_steps(part: Json) -> Json:
    """What transformers limits the time steps of Mamba layers by; of its ``time_step_limit`` it reads nothing."""
    return {"time_step_limit": [part["time_step_min"], {"__float__": "Infinity"}]} if "time_step_min" in part else {}


def _old_names_of_layers(part: Json) -> Json:
    """``layer_types`` as they were called before transformers 5.13, which reads both."""
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    return {"layer_types": [names.get(kind, kind) for kind in part.get("layer_types") or []]}


def _constant(**values: object) -> Callable[[Json], Json]:
    return lambda part: dict(values)


_DEEPSEEK = Reads(rope=SCALED, differs=(_ACT, _TIED, _SINGLE, _INTERLEAVED))
_SHARED_INDEXERS: Condition = (_any_of("indexer_types", "shared"), "does not share indexers between layers")

MODELS: dict[str, Reads] = {
    "afmoe": Reads(rope=SCALED, differs=(_ACT, _BIAS, _SINGLE)),
    "bailing_hybrid": Reads(
        compared=False,
        aliases={"num_experts_per_tok": "num_experts_per_token", "n_group": "num_expert_group"}
        | {"max_position_embeddings": "model_max_length"},
        needs=("group_norm_size",),
    ),
    "deepseek_v2": Reads(
        rope=frozenset({"yarn"}),
        differs=(
            _ACT,
            _TIED,
            (lambda config: _rope_type(config) == "default", "opens it with scaled rotary embeddings only"),
        ),
    ),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": Reads(rope=SCALED, differs=(_ACT, _TIED, _SINGLE)),
    "dots1": Reads(rope=SCALED, window=False, differs=(_ACT, _BIAS)),
    "ernie4_5_moe": Reads(refused="drops the correction bias by which this model's routers choose"),
    "exaone_moe": Reads(rope=SCALED, differs=(_ACT, _SINGLE), head_dim=True, adds=_dense_first),
    "gemma4": Reads(adds=_global_heads),
    "gemma4_text": Reads(adds=_global_heads),
    "glm4_moe": Reads(differs=(_ACT, _TIED, _SINGLE), head_dim=True, adds=_constant(rope_scaling=None)),
    "glm4_moe_lite": Reads(rope=SCALED, differs=(_ACT, _TIED, _SINGLE, _INTERLEAVED), adds=_dense_first),
    "glm_moe_dsa": Reads(rope=SCALED, differs=(_ACT, _TIED, _SINGLE, _SHARED_INDEXERS), adds=_glm_dsa),
    "gpt_oss": Reads(compared=False, rope=frozenset({"yarn"}), differs=(_TIED,), old_names=_always),
    "granitemoe": Reads(rope=SCALED, differs=(_ACT,)),
    "granitemoehybrid": Reads(differs=(_ACT,), adds=_old_names_of_layers),
    "jamba": Reads(
        refused="divides the weights of a token's experts by their sum, which transformers does not for this model"
    ),
    "kimi_k2": _DEEPSEEK,
    "kimi_k25": Reads(compared=False, rope=SCALED, differs=(_ACT, _SINGLE), old_names=_always),
    "kimi_linear": Reads(compared=False, needs=("linear_attn_config",)),
    "laguna": Reads(
        differs=(_ACT, (_lacks("gating"), "builds this model with gates in attention, and gating is false"))
    ),
    "lfm2_moe": Reads(differs=((_lacks("tie_word_embeddings"), "has no output layer of its own for this model"),)),
    "llama4": Reads(
        compared=False,
        rope=frozenset({"llama3"}),
        adds=_constant(rope_scaling=None),
        differs=((lambda config: config.num_experts_per_tok != 1, "takes one expert for each token of this model"),),
        old_names=_always,
    ),
    "llama4_text": Reads(refused="builds this model without experts"),
    "longcat_flash": Reads(
        needs=("attention_method", "zero_expert_type", "mla_scale_q_lora", "mla_scale_kv_lora"),
        old_names=_has("zero_expert_num"),
    ),
    "mellum": Reads(differs=(_ACT, _BIAS, _NO_DENSE), aliases={"num_experts": "num_local_experts"}),
    "mimo_v2_flash": Reads(compared=False, needs=("hybrid_layer_pattern", "moe_layer_freq", "swa_rope_theta")),
    "minimax": Reads(refused="takes this type for MiniMax-M2, which is another model"),
    "minimax_m2": Reads(differs=(_ACT, _ROTARY), adds=_constant(shared_intermediate_size=0)),
    "minimax_m3_vl": Reads(differs=(_ROTARY,)),
    "mistral4": Reads(rope=frozenset({"yarn"}), differs=(_ACT,)),
    "mixtral": Reads(
        window=False,
        differs=(
            _ACT,
            (_own_heads, "takes hidden_size / num_attention_heads for head_dim, which says something else"),
        ),
    ),
    "muse_spark": Reads(compared=False, differs=(_NO_DENSE,)),
    "nemotron_h": Reads(differs=(_SINGLE,), adds=_time_steps),
    "olmoe": Reads(rope=SCALED, differs=(_ACT, (_has("clip_qkv"), "does not read clip_qkv, which this model has"))),
    "phimoe": Reads(
        window=False,
        differs=(
            _ACT,
            _TIED,
            (
                _is("num_experts_per_tok", 1),
                "weights a single expert otherwise, and this model has one for each token",
            ),
            (_lacks("attention_bias"), "wants biases in this model's attention, and attention_bias is false"),
            (_lacks("lm_head_bias"), "wants a bias in this model's output layer, and lm_head_bias is false"),
        ),
    ),
    "qwen2_moe": Reads(
        window=False,
        differs=(
            _ACT,
            _DENSE,
            (
                _has("norm_topk_prob"),
                "does not read norm_topk_prob, which is true: the weights of experts would differ",
            ),
            (_lacks("qkv_bias"), "wants biases in this model's attention, and qkv_bias is false"),
        ),
    ),
    "qwen3_5_moe": Reads(compared=False, old_names=_always),
    "qwen3_moe": Reads(
        window=False, differs=(_ACT, _BIAS), aliases={"num_experts": "num_local_experts"}, head_dim=True
    ),
    "qwen3_next": Reads(rope=SCALED, differs=(_ACT,)),
    "qwen3_vl_moe": Reads(
        compared=False, differs=(_TIED,), aliases={"num_experts": "num_local_experts"}, old_names=_always
    ),
    "solar_open": Reads(
        differs=(
            _ACT,
            _TIED,
            _SINGLE,
            (_has("use_qk_norm"), "wants norms in attention that transformers does not have"),
        ),
        adds=lambda part: {
            "intermediate_size": part.get("intermediate_size", part.get("moe_intermediate_size")),
            "first_k_dense_replace": 0,
            "partial_rotary_factor": 1.0,
        },
    ),
    "step3p5": Reads(compared=False),
}
"""By the ``model_type`` of the whole model, which mlx-lm goes by."""


def _rope_type(config: Any) -> str:
    """How rotary embeddings are scaled; ``default`` where they are not, or each kind of layer has its own."""
    rope = getattr(config, "rope_parameters", None)
    return str(rope.get("rope_type", "default")) if isinstance(rope, Mapping) else "default"


def _window_matters(config: Any) -> bool:
    """Whether a sliding window hides tokens of a text that the model takes."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    longest = getattr(config, "max_position_embeddings", None) or 0
    return window is not None and window < longest and (not kinds or "sliding_attention" in kinds)


def refusal(model_type: str, config: Any, by_5: bool) -> str | None:
    """Why mlx-lm does not open a model, or would calculate other logits, in words that follow its name; else None.

    Args:
        model_type: Of the whole model.
        config: The config of its text part.
        by_5: Whether transformers 5 wrote it.
    """
    reads = MODELS[model_type]
    if reads.refused:
        return reads.refused
    for holds, does in reads.differs:
        if holds(config):
            return does
    kind = _rope_type(config)
    if kind != "default" and kind not in reads.rope:
        return f"does not calculate rotary embeddings of the type {kind!r} as transformers does for this model"
    if not reads.window and _window_matters(config):
        return f"does not know this model's sliding window ({config.sliding_window} tokens)"
    if missing := [key for key in reads.needs if getattr(config, key, None) is None]:
        return f"wants {' and '.join(missing)} in config.json, and this has none"
    if by_5 and reads.old_names is not None and reads.old_names(config):
        return "does not read this model's experts as transformers 5 names them in files"
    return None


def keys_for(model_type: str, part: Json) -> Json:
    """What mlx-lm reads beside what is there, in the text part of a ``config.json``."""
    reads = MODELS[model_type]
    rope = part.get("rope_parameters")
    new: Json = {}
    if isinstance(rope, dict) and "rope_theta" in rope:
        new["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            new["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if rope.get("rope_type", "default") != "default":
            new["rope_scaling"] = dict(rope)
    for key, usual in reads.aliases.items():
        if usual in part:
            new[key] = part[usual]
    if reads.head_dim and part.get("head_dim") is None:
        new["head_dim"] = part["hidden_size"] // part["num_attention_heads"]
    more = {} if reads.adds is None else reads.adds({**part, **new})
    return {**{key: value for key, value in more.items() if key not in part or key in _CHANGED}, **new}


_CHANGED = ("layer_types", "time_step_limit")
"""Keys that are there and that mlx-lm reads in another sense."""
