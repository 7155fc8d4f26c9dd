# SPDX-License-Identifier: Apache-2.0
"""Models as people have them: wrapped, compiled, split, offloaded, with routers in another precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from conftest import assert_equal_states, load, make_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from optimum_moe_prune import CalibrationSet, MoEPruner, MoEPrunerConfig, RequestError, calibrate, evaluate
from optimum_moe_prune.calibration.calibrate import no_calibration
from optimum_moe_prune.models.checks import check_model, evaluating
from optimum_moe_prune.models.discovery import discover

IDS = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(0))
RECIPE = MoEPrunerConfig(method="reap", num_experts=4)


def tiny() -> Any:
    return make_model(num_hidden_layers=1)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def used(model: Any) -> Any:
    """A model that has run, so that what is compiled of it has been."""
    logits(model)
    return model


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return used(model)


def layers_in_place(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
        layer.mlp.experts.compile(backend="eager")
    return used(model)


def forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return used(model)


WORK = {
    "DataParallel": nn.DataParallel,
    "prepared": lambda model: Accelerator(cpu=True).prepare(model),
    "compiled": lambda model: used(torch.compile(model, backend="eager")),
    "layer.compile()": layers_in_place,
}
COMPILED = {  # the same in other ways
    "DataParallel of compiled": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "model.compile()": in_place,
    "model.forward compiled": forward,
}


@pytest.fixture(scope="module")
def pruned(samples: CalibrationSet) -> Any:
    return MoEPruner(RECIPE).prune(tiny(), samples)


@pytest.mark.parametrize(
    "wrap",
    [*WORK.values(), *(pytest.param(wrap, marks=pytest.mark.slow) for wrap in COMPILED.values())],
    ids=[*WORK, *COMPILED],
)
def test_the_same_model_is_pruned_inside_of_what_works_on(
    wrap: Callable[[Any], Any], pruned: Any, samples: CalibrationSet, tmp_path: Path
) -> None:
    model = tiny()
    wrapped, pruner = wrap(model), MoEPruner(RECIPE)
    assert pruner.prune(wrapped, samples) is wrapped
    assert pruner.model is model
    assert_equal_states(model, pruned)
    assert torch.equal(logits(wrapped), logits(pruned))  # also where it had been compiled for all experts
    again = evaluate(wrapped, samples).domains, evaluate(pruned, samples).domains
    assert again[0] == again[1]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_ddp_is_run_and_not_changed(process_group: None, samples: CalibrationSet) -> None:
    """Its reducer holds the parameters that would be replaced."""
    model = tiny()
    wrapped, before = DistributedDataParallel(model), tiny()
    stats = calibrate(wrapped, samples, ["reap"])
    assert stats.model == calibrate(before, samples, ["reap"]).model
    pruner = MoEPruner(RECIPE)
    plan = pruner.plan(pruner.calibrate(wrapped, samples))
    for prune in (lambda: pruner.prune(wrapped, samples), lambda: plan.apply(wrapped)):
        with pytest.raises(RequestError, match=r"prune model\.module in every process") as error:
            prune()
        assert "\n" not in str(error.value)
    assert_equal_states(model, before)


def split(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def nested(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def part_in_parallel(model: Any) -> Any:
    model.model.layers[0].mlp = nn.DataParallel(model.model.layers[0].mlp)
    return model


class WithValueHead(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model


def adapted(model: Any) -> Any:
    """A module of PEFT's inside, as ``inject_adapter_in_model`` leaves it."""
    layer = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})(2, 2)
    model.model.layers[0].self_attn.q_proj = layer
    return model


def special(model: Any) -> Any:
    """A parameter of another class, as quantised and sharded ones are."""
    kind = type("QuantizedTensor", (torch.Tensor,), {})
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(kind))
    return model


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fully_shard": (split, r"split over processes \(fully_shard\).*stream=True"),
    "FSDP": (
        lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
        r"split over processes \(FullyShardedDataParallel\).*stream=True",
    ),
    "TorchScript": (
        lambda m: torch.jit.trace(m.lm_head, torch.ones(1, 32)),
        "TorchScript.*pass the model it was made of",
    ),
    "traced": (lambda m: torch.fx.symbolic_trace(m.lm_head), "traced graph.*pass the model it was made of"),
    "a compiled part": (nested, r"\(model\.model\.layers\[0\] = model\.model\.layers\[0\]\._orig_mod\)"),
    "a parallel part": (part_in_parallel, r"\.mlp = model\.model\.layers\[0\]\.mlp\.module\)"),
    "a value head": (WithValueHead, r"pass the model inside it \(model\.pretrained_model\)"),
    "injected adapters": (adapted, "PEFT adapters.*merge_and_unload"),
    "offloaded": (lambda m: cpu_offload(m, "cpu"), r"\(offloaded\).*stream=True"),
    "quantised": (special, r"lm_head\.weight is no plain tensor \(QuantizedTensor"),
    "a name": (lambda m: "mixtral", "'mixtral' is the name of one.*prune_checkpoint"),
    "a state": (lambda m: m.state_dict(), "this is a OrderedDict"),
}


# torch says so of torch.jit and of FSDP 1, which people still have.
@pytest.mark.filterwarnings(
    "ignore:.*deprecated:DeprecationWarning", "ignore:.*FSDP:UserWarning", "ignore:.*FSDP:FutureWarning"
)
@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_refused_before_anything_happens(kind: str, process_group: None, samples: CalibrationSet) -> None:
    wrap, said = REFUSED[kind]
    model = wrap(tiny())
    pruner, plan = MoEPruner(RECIPE), MoEPruner(RECIPE)
    stats = calibrate(tiny(), samples, ["reap"])
    made = plan.plan(stats)
    tried = [
        lambda: pruner.prune(model, samples),
        lambda: pruner.measure_sensitivity(model, samples),
        lambda: made.apply(model),
        lambda: check_model(model),
    ]
    if not isinstance(model, str):
        tried += [
            lambda: calibrate(model, samples),
            lambda: no_calibration(model),
            lambda: pruner.calibrate(model, samples),
        ]
    for way in tried:
        with pytest.raises(RequestError, match=said) as error:
            way()
        assert "\n" not in str(error.value)
    assert pruner.stats is None and pruner.pruning_plan is None


def test_parts_on_disk_are_named_with_the_way_that_streams(samples: CalibrationSet, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=2)
    places = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu"
    )
    offloaded = dispatch_model(
        model, {**places, "model.layers.1": "disk"}, main_device="cpu", offload_dir=str(tmp_path / "disk")
    )
    expected = logits(make_model(num_hidden_layers=2))
    with pytest.raises(RequestError, match=r"model\.layers\.1\..*\(offloaded\).*folder or Hub id.*stream=True"):
        MoEPruner(RECIPE).prune(offloaded, samples)
    torch.testing.assert_close(logits(offloaded), expected)  # it still runs


def test_compiling_goes_on_afterwards() -> None:
    model = layers_in_place(tiny())
    with evaluating(model):
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    assert torch._dynamo.eval_frame._stance.stance == "default"
    with evaluating(tiny()):
        assert torch._dynamo.eval_frame._stance.stance == "default"


def test_code_that_looks_at_nothing_is_compiled_anew(pruned: Any, samples: CalibrationSet) -> None:
    """As servers compile: no guard notices that the model is another one."""
    made = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    model = tiny()
    model.model.layers[0].compile(backend=backend, options={"guard_filter_fn": lambda guards: [False for _ in guards]})
    logits(model), logits(model)
    before = len(made)
    MoEPruner(RECIPE).prune(model, samples)
    assert len(made) == before > 0
    assert torch.equal(logits(model), logits(pruned))
    assert len(made) > before


def test_rows_are_found_of_wrapped_models() -> None:
    assert discover(nn.DataParallel(tiny())).model_type == "mixtral"


def test_wrapped_models_are_saved(samples: CalibrationSet, tmp_path: Path) -> None:
    wrapped = nn.DataParallel(tiny())
    pruner = MoEPruner(RECIPE)
    pruner.save_pretrained(tmp_path / "out", pruner.prune(wrapped, samples))
    assert_equal_states(load(tmp_path / "out"), wrapped.module)
