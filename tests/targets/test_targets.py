# SPDX-License-Identifier: Apache-2.0
"""What is known of the programs that open outputs: the table, what each takes and refuses, and how it is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oracles import call

from optimum_moe_prune.architectures.table import all_architectures
from optimum_moe_prune.commands.list import _targets
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.targets import sglang, table, vllm
from optimum_moe_prune.targets.served import IN_SGLANG, IN_VLLM
from optimum_moe_prune.targets.target import CHECKPOINT, GGUF, READ, RUN

MIXTRAL = next(spec for spec in all_architectures() if spec.model_type == "mixtral")
VLLM, SGLANG, TRANSFORMERS = (table.TARGETS[name] for name in ("vllm", "sglang", "transformers"))


def config(architecture: str, **values: Any) -> Any:
    return SimpleNamespace(architectures=[architecture], **values)


def same(count: int) -> dict[int, int]:
    return {1: count, 2: count}


def test_the_page_is_not_stale() -> None:
    page = (Path(table.__file__).parent / "README.md").read_text(encoding="utf-8")
    written = page.split("<!-- targets -->\n")[1].split("\n<!-- /targets -->")[0]
    assert written == _targets(markdown=True)[0], "python -m optimum_moe_prune list targets --markdown"


def test_every_row_is_whole() -> None:
    head, *rows = table.as_table()
    assert len(rows) == len(table.TARGETS) and all(len(row) == len(head) and all(row) for row in rows)
    for name, target in table.TARGETS.items():
        assert name == target.name and target.evidence in (RUN, READ)
        assert bool(target.parallel) == (target.count_multiple(MIXTRAL, config("MixtralForCausalLM"), 3) == 3)


@pytest.mark.parametrize(
    ("given", "name"), [("vLLM", "vllm"), ("SGLang", "sglang"), ("MLX-LM", "mlx"), ("llama_cpp", "llama.cpp")]
)
def test_names_in_any_spelling(given: str, name: str) -> None:
    assert table.get_target(given).name == name


@pytest.mark.parametrize("given", ["vlm", "", None, 3])
def test_what_is_not_known_is_refused_with_the_nearest(given: object) -> None:
    with pytest.raises(RequestError, match=r"target is .*, and no program of that name is known\. Known: ") as error:
        table.get_target(given)
    if given == "vlm":
        assert "Known: vllm" in str(error.value)


def test_files_of_refusals_are_files_of_implementations() -> None:
    assert {*vllm._NOT_MORE_DEVICES, *vllm._EVEN_ONLY} <= set(IN_VLLM.values())
    assert set(sglang._NOT_MORE_DEVICES) <= set(IN_SGLANG.values())


@pytest.mark.parametrize(
    ("architecture", "count", "devices", "why"),
    [
        ("Qwen3MoeForCausalLM", 8, 8, None),
        ("Qwen3MoeForCausalLM", 6, 8, "more devices than experts for this model (qwen3_moe.py, line 154)"),
        ("Qwen3MoeForCausalLM", 6, 4, None),  # spread unevenly
        ("Qwen3_5MoeForCausalLM", 4, 8, "more devices than experts for this model (qwen3_next.py, line 176)"),
        ("MixtralForCausalLM", 4, 8, None),
        ("GptOssForCausalLM", 6, 4, "experts of this model evenly only (gpt_oss.py, line 1322)"),
        ("GptOssForCausalLM", 8, 4, None),
        ("OfNobodyForCausalLM", 6, 8, None),
    ],
)
def test_what_vllm_refuses(architecture: str, count: int, devices: int, why: str | None) -> None:
    found = VLLM.check(MIXTRAL, config(architecture), same(count), devices)
    assert found is None if why is None else found is not None and found.endswith(why)


@pytest.mark.parametrize(
    ("architecture", "count", "devices", "why"),
    [
        ("MixtralForCausalLM", 6, 1, None),
        ("MixtralForCausalLM", 6, 3, None),
        ("MixtralForCausalLM", 6, 4, "spreads experts evenly only (layers/moe/fused_moe_triton/layer.py, line 414)"),
        ("DeepseekV3ForCausalLM", 4, 8, "for this model (models/deepseek_v2.py, line 714)"),
        ("Dots3NoteForCausalLM", 4, 8, "for this model (models/dots3_common/modeling.py, line 285)"),
    ],
)
def test_what_sglang_refuses(architecture: str, count: int, devices: int, why: str | None) -> None:
    found = SGLANG.check(MIXTRAL, config(architecture), same(count), devices)
    assert found is None if why is None else found is not None and found.endswith(why)


@pytest.mark.parametrize("target", [VLLM, SGLANG, table.TARGETS["mlx"], table.TARGETS["llama.cpp"]])
def test_unequal_layers_are_refused_by_all_but_transformers(target: Any) -> None:
    assert target.check(MIXTRAL, config("MixtralForCausalLM"), {0: 4, 1: 6}, 1) is not None
    assert target.check(MIXTRAL, config("MixtralForCausalLM"), None, 1) is None
    assert TRANSFORMERS.check(MIXTRAL, config("MixtralForCausalLM"), {0: 4, 1: 6}, 1) is None


def test_fp8_in_blocks_wants_multiples_of_four_of_vllm() -> None:
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for settings, multiple in (({}, 6), (blocks, 12), ({"quant_method": "fp8"}, 6), (SimpleNamespace(**blocks), 12)):
        quantised = config("Qwen3MoeForCausalLM", quantization_config=settings)
        assert VLLM.count_multiple(MIXTRAL, quantised, 6) == multiple
    assert VLLM.count_multiple(MIXTRAL, config("Qwen3MoeForCausalLM"), 1) == 1
    alone = VLLM.why_multiple(MIXTRAL, config("Qwen3MoeForCausalLM", quantization_config=blocks), 1)
    assert alone == "its kernel for fp8 in blocks takes only multiples of 4"


@pytest.mark.parametrize(
    ("settings", "takes"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "SGLang"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "vLLM"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_data": {r"re:.*\\.experts\\.w1": {}}}}}, ""),
        ({"quant_method": "compressed-tensors"}, "vLLM SGLang"),
    ],
)
def test_quantisation_that_they_do_not_read(settings: dict[str, Any], takes: str) -> None:
    for values in (settings, SimpleNamespace(**settings)):
        quantised = config("MixtralForCausalLM", quantization_config=values)
        found = {t.program for t in (VLLM, SGLANG) if t.check(MIXTRAL, quantised, None, 1) is None}
        assert found == set(takes.split())
        said = table.opened_by(CHECKPOINT, MIXTRAL, quantised, same(4)).partition("; not by ")[2]
        assert all((program in said) == (program not in takes) for program in ("vLLM", "SGLang"))


def test_which_programs_open_it() -> None:
    known, of_nobody = config("MixtralForCausalLM"), config("OfNobodyForCausalLM")
    read = ", vLLM 0.33 (read in source), SGLang 0.5.23 (read in source)"
    assert table.opened_by(CHECKPOINT, MIXTRAL, known, same(4)) == f"transformers 5.14+{read}"
    assert table.opened_by(CHECKPOINT, MIXTRAL, of_nobody, same(4)) == "transformers 5.14+"
    assert table.opened_by(CHECKPOINT, MIXTRAL, SimpleNamespace(), same(4)) == "transformers 5.14+"
    assert table.opened_by(CHECKPOINT, MIXTRAL, known, same(4), made_for="llama.cpp") == f"transformers 5.14+{read}"
    beside = "; not by vLLM 0.33, SGLang 0.5.23"
    unequal = table.opened_by(CHECKPOINT, MIXTRAL, known, {0: 4, 1: 5})
    assert unequal == f"transformers 5.14+ (after import optimum_moe_prune){beside}"
    alone = table.opened_by(CHECKPOINT, MIXTRAL, known, {0: 4, 1: 5}, standalone=True)
    assert alone == f"transformers 5.14+ (after import optimum_moe_prune, or with trust_remote_code=True){beside}"
    made = {name: table.opened_by(CHECKPOINT, MIXTRAL, known, same(4), made_for=name) for name in table.TARGETS}
    assert "llama.cpp" not in made["llama.cpp"]  # it opens what is made of a checkpoint, and no checkpoint
    assert table.opened_by(GGUF, MIXTRAL, known, {0: 4, 1: 5}).startswith("no program that is known here; not by ")


def test_llama_cpp_opens_no_checkpoint() -> None:
    said = table.opened_by(CHECKPOINT, MIXTRAL, config("MixtralForCausalLM"), same(4), made_for="llama.cpp")
    assert "llama.cpp" not in said
    whole = table.opened_by(GGUF, MIXTRAL, config("MixtralForCausalLM"), same(4))
    assert whole == table.TARGETS["llama.cpp"].title


def test_layers_of_different_sizes_of_nemotron_are_read_in_other_shapes() -> None:
    nemotron = config("NemotronHForCausalLM")
    assert "code that comes with NVIDIA's checkpoints" in (VLLM.check(MIXTRAL, nemotron, {1: 4, 3: 6}, 1) or "")
    assert "not from per_layer_config" in (SGLANG.check(MIXTRAL, nemotron, {1: 4, 3: 6}, 1) or "")
    assert VLLM.check(MIXTRAL, nemotron, same(4), 1) is SGLANG.check(MIXTRAL, nemotron, same(4), 1) is None


def test_keys_for_routers_that_transformers_does_not_save() -> None:
    values = {"model_type": "deepseek_v3", "n_routed_experts": 8}
    written = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    for target in (VLLM, SGLANG):
        assert target.config(values, same(8)) == values | written
        kept = values | {"scoring_func": "softmax"}
        assert target.config(kept, same(8)) == kept | {"topk_method": "noaux_tc"}
        nested = {"model_type": "kimi_k25", "text_config": values, "vision_config": {"model_type": "seeing"}}
        assert target.config(nested, same(8)) == {**nested, "text_config": values | written}
        for other in ({"model_type": "mixtral"}, {"model_type": "glm4_moe"}):
            assert target.config(other, same(8)) == other
    assert values == {"model_type": "deepseek_v3", "n_routed_experts": 8}
    lacking = config("DeepseekV3ForCausalLM", model_type="deepseek_v3", scoring_func="sigmoid")
    assert table.opened_by(CHECKPOINT, MIXTRAL, lacking, same(8)) == (
        "transformers 5.14+; not by vLLM 0.33 (it reads topk_method, which --for vllm writes), "
        "SGLang 0.5.23 (it reads topk_method, which --for sglang writes)"
    )
    read = "transformers 5.14+, vLLM 0.33 (read in source), SGLang 0.5.23 (read in source)"
    assert table.opened_by(CHECKPOINT, MIXTRAL, lacking, same(8), made_for="sglang") == read
    whole = config("DeepseekV3ForCausalLM", model_type="deepseek_v3", **written)
    assert table.opened_by(CHECKPOINT, MIXTRAL, whole, same(8)) == read


@pytest.mark.parametrize(
    ("model_type", "architecture", "keys", "of_vllm", "of_sglang"),
    [
        ("minimax_m2", "MiniMaxM2ForCausalLM", {"scoring_func": "sigmoid", "use_routing_bias": True}, True, True),
        ("deepseek_v2", "DeepseekV2ForCausalLM", {"scoring_func": "softmax"}, False, True),
        ("deepseek_v4", "DeepseekV4ForCausalLM", {"topk_method": "noaux_tc"}, True, False),
        (
            "mimo_v2_flash",
            "MiMoV2FlashForCausalLM",
            {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
            False,
            True,
        ),
    ],
)
def test_keys_that_one_of_them_reads(
    model_type: str, architecture: str, keys: dict[str, Any], of_vllm: bool, of_sglang: bool
) -> None:
    lacking = config(architecture, model_type=model_type)
    said = " and ".join(keys)
    assert (VLLM.lacks(lacking), SGLANG.lacks(lacking)) == (said if of_vllm else "", said if of_sglang else "")
    for target in (VLLM, SGLANG):
        assert target.config({"model_type": model_type}, same(8)) == {"model_type": model_type, **keys}
        assert target.lacks(config(architecture, model_type=model_type, **keys)) == ""


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = call(capsys, "list", "targets")
    assert code == 0 and [line.split()[0] for line in shown.splitlines()] == ["for", *table.TARGETS]
    values = json.loads(call(capsys, "list", "targets", "--json")[1])["targets"]
    assert values["vllm"]["program"] == "vLLM" and values["vllm"]["evidence"] == READ
    assert set(values) == set(table.TARGETS)
