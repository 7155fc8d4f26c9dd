# SPDX-License-Identifier: Apache-2.0
"""A modelling file that travels with an unequal checkpoint, so that ``trust_remote_code=True`` loads it without us.

It holds ``unequal.py`` as it is and, below, a causal language model that is transformers' own with MoE blocks of the
right size put in place of those of other sizes. Plain loading does not look at it. ``AutoModel`` is not offered:
transformers translates the names of experts' tensors for its own backbone classes only, and would leave those of a
class of ours random.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from string import Template

from ..architectures import unequal
from ..architectures.structure import Structure, structure_of
from ..architectures.table import architecture_of
from ..compat import ModelConfig, build_on_meta, causal_lm_class, text_config
from ..errors import RequestError

_CLASSES = Template(
    '''

# ---------------------------------------------------------------------------- this architecture

import $module as modelling

# transformers looks for this in the file of a model's class, to know that an experts implementation (grouped_mm,
# eager, ...) can be chosen for it; here it is the experts' own class that has it:
# @use_experts_implementation

modelling.load_balancing_loss_func = balanced_by_layer(modelling.load_balancing_loss_func)
setattr(modelling.$causal.config_class, PERMISSION, GLOBAL_COUNT_ALLOWED)


class Unequal$causal(modelling.$causal):
    """transformers' own model, with MoE blocks of the number of experts that each layer has."""

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.$layers):
            block = layer.$block
            count = count_of_layer(config, "$count_key", index)
            if hasattr(block, "$experts") and len(block.$experts.$tensor) != count:
                own = config.per_layer_config[index]
                layer.$block = build_like(block, own, index)
                share_config(layer.$block, own, config)
        self.post_init()

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        if found := damage(model.config, loading_info, "$layer_list", "$block", $counted):
            raise RuntimeError(found)
        return modelling.$causal._finalize_model_loading(model, load_config, loading_info)
'''
)


def standalone_class(config: ModelConfig) -> str:
    """The class of transformers that the file's own derives from.

    Raises:
        RequestError: If transformers has no causal language model of this type.
    """
    return _parts(config)[0]


def _parts(config: ModelConfig) -> tuple[str, str, Structure]:
    """That class, its module, and where its models have experts; as :func:`standalone_class`."""
    spec = architecture_of(config)
    name = causal_lm_class(spec.model_type)
    if name is None or text_config(config) is not config:
        raise RequestError(f"standalone: transformers has no causal language model of type {config.model_type!r}.")
    model = build_on_meta(uniform_copy(config))
    structure = structure_of(model, spec)
    if not next(iter(structure.moe.values())).block:
        raise RequestError(
            f"standalone: layers of a {spec.model_type!r} model have no block to put another in place of."
        )
    return name, type(model).__module__, structure


def uniform_copy(config: ModelConfig) -> ModelConfig:
    """A config whose layers all have the number of experts of the whole model; the classes are the same."""
    config = copy.deepcopy(config)
    text_config(config).per_layer_config = None
    return config


def write_standalone(folder: str | Path, config: ModelConfig) -> Path:
    """Add the modelling file to a checkpoint and name it in ``config.json`` (``auto_map``).

    Args:
        folder: The checkpoint.
        config: Its config, of a known architecture.

    Returns:
        The file.
    """
    causal, module, structure = _parts(config)
    layer = next(iter(structure.moe.values()))
    classes = _CLASSES.substitute(
        module=module,
        causal=causal,
        block=layer.block,
        count_key=architecture_of(config).key_of_count(config),
        experts=layer.experts.rpartition(".")[2],
        tensor=layer.expert_tensors[0].rpartition(".")[2],
        layers=structure.layers,
        layer_list=structure.where[0],
        counted=repr(structure.where[2]),
    )
    path = Path(folder) / f"{unequal.FILE_STEM}.py"
    path.write_text(inspect.getsource(unequal) + classes, encoding="utf-8")
    config_file = Path(folder) / "config.json"
    values = json.loads(config_file.read_text(encoding="utf-8"))
    values.setdefault("auto_map", {})["AutoModelForCausalLM"] = f"{unequal.FILE_STEM}.Unequal{causal}"
    config_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path
