# SPDX-License-Identifier: Apache-2.0
"""Settings beside the weights name the same experts after pruning, or are refused.

The oracle never looks at how a setting is rewritten: a tool's own way of matching decides for every module of the
original whether a setting names it, and has to decide alike for the retained ones under their new names.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.quantizers.quantizers_utils import should_convert_module

from optimum_moe_prune import RequestError
from optimum_moe_prune.checkpoints.source import Source
from optimum_moe_prune.surgery.files import carry_files
from optimum_moe_prune.surgery.side_files import Cut, carried, foreign_format, rewritten, rewritten_file

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PARTS = tuple(f"{name}.{end}" for name in PROJECTIONS for end in ("weight", "weight_scale"))
BELOW = ("", *(f".{name}" for name in PROJECTIONS), *(f".{part}" for part in PARTS))
OTHERS = (
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.shared_expert.gate_proj.weight",
    "model.layers.3.mlp.gate_proj.weight",
    "model.layers.9.mlp.experts.7.gate_proj.weight",
    "mtp.layers.0.mlp.experts.1.gate_proj.weight",
    "mtp.layers.0.mlp.experts.7.gate_proj.weight",
)
UNEQUAL = {0: (0, 1, 3, 7, 10), 1: (2, 7, 11), 2: tuple(range(12))}
UNIFORM = {0: (0, 1, 3, 7), 1: (2, 4, 7, 11), 2: (0, 7, 8, 10)}
CUTS = {"unequal": UNEQUAL, "uniform": UNIFORM, "alike": dict.fromkeys(range(3), (1, 3, 7, 11))}


def make_cut(
    retained: dict[int, tuple[int, ...]] = UNEQUAL,
    blocks: Sequence[str] = ("mlp",),
    prefix: str = "model.",
    known: bool = True,
    count: int = 12,
) -> Cut:
    modules = {
        (layer, number): tuple(f"{prefix}layers.{layer}.{block}.experts.{number}" for block in blocks)
        for layer in retained
        for number in range(count)
    }
    more = {"parts": PARTS, "others": OTHERS} if known else {}
    return Cut(retained, dict.fromkeys(retained, count), modules, **more)  # type: ignore[arg-type]


def renumbered(cut: Cut, prefix: str | None = None) -> Iterator[tuple[str, str]]:
    """The new and the old name of every module and tensor that remains."""
    for (layer, old), names in cut.modules.items():
        if old in cut.retained[layer]:
            new = sum(other < old for other in cut.retained[layer])
            for name in names:
                if prefix is not None:
                    name = prefix + name[name.index("layers.") :]
                stem = name[: -len(str(old))]
                yield from ((f"{stem}{new}{below}", f"{stem}{old}{below}") for below in BELOW)


def other_names() -> set[str]:
    return {".".join(name.split(".")[:n]) for name in OTHERS for n in range(1, name.count(".") + 2)}


Tool = Callable[[Any, str], object]


def compressed_tensors(entries: list[str], name: str) -> bool:
    return any(re.match(e[3:], name) if e.startswith("re:") else e == name for e in entries)


def modelopt(entries: list[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, entry) for entry in entries)


def awq(entries: list[str], name: str) -> bool:
    return any(entry in name for entry in entries)


def in_transformers(entries: list[str], name: str) -> bool:
    return not should_convert_module(name, entries)


def gptq_model(entries: dict[str, Any], name: str) -> object:
    for pattern, value in entries.items():
        if re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, name):
            return False if pattern.startswith("-:") else value
    return None


def torchao(entries: dict[str, Any], name: str) -> object:
    if name in entries:
        return entries[name]
    return next((v for e, v in entries.items() if e.startswith("re:") and re.fullmatch(e[3:], name)), None)


def auto_round(entries: dict[str, Any], name: str) -> object:
    if name in entries:
        return entries[name]
    return next((v for e, v in entries.items() if set(e) & set(r"*+?^$()[]{}|\\") and re.search(e, name)), None)


def quark(entries: dict[str, Any], name: str) -> object:
    return next((value for entry, value in entries.items() if fnmatch.fnmatchcase(name, entry)), None)


TOOLS: dict[str, tuple[Tool, Callable[[Any], dict[str, Any]]]] = {
    "compressed-tensors": (compressed_tensors, lambda e: {"quant_method": "compressed-tensors", "ignore": e}),
    "modelopt": (modelopt, lambda e: {"quant_method": "modelopt", "exclude_modules": e}),
    "transformers": (in_transformers, lambda e: {"quant_method": "fp8", "modules_to_not_convert": e}),
    "awq": (awq, lambda e: {"quant_method": "awq", "modules_to_not_convert": e}),
    "gptqmodel": (gptq_model, lambda e: {"quant_method": "gptq", "dynamic": e}),
    "torchao": (torchao, lambda e: {"quant_type": {"default": {"_data": {"module_fqn_to_config": e}}}}),
    "auto-round": (auto_round, lambda e: {"quant_method": "auto-round", "extra_config": e}),
    "quark": (quark, lambda e: {"quant_method": "quark", "layer_quant_config": e}),
}


def entries_of(settings: Any) -> Any:
    """The entries somewhere in settings."""
    if isinstance(settings, list):
        return settings
    for key in ("dynamic", "module_fqn_to_config", "extra_config", "layer_quant_config"):
        if key in settings:
            return settings[key]
    return next(found for v in settings.values() if isinstance(v, (dict, list)) for found in [entries_of(v)])


def after(tool: str, entries: Any, cut: Cut) -> Any:
    values = {"quantization_config": TOOLS[tool][1](entries)}
    before = copy.deepcopy(values)
    new = rewritten(values, cut, "config.json")
    assert values == before  # what was given stays as it was
    return entries_of(new["quantization_config"])


def assert_same_experts(tool: str, entries: Any, cut: Cut, others: bool = True, prefixes: Sequence[str] = ()) -> Any:
    new_entries = after(tool, entries, cut)
    matches = TOOLS[tool][0]
    for prefix in (None, *prefixes):
        for new, old in renumbered(cut, prefix):
            if tool == "awq" and new.rpartition(".")[2].isdigit():
                continue  # no Linear: AWQ asks for those alone
            assert matches(new_entries, new) == matches(entries, old), (entries, new_entries, new, old)
    for name in other_names() if others else ():
        assert matches(new_entries, name) == matches(entries, name), (entries, new_entries, name)
    return new_entries


# ------------------------------------------------------------------------------------------- names of one expert


@pytest.mark.parametrize("rest", ["", ".", ".gate_proj", ".gate_proj.weight"])
@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "backbone.", "model.language_model."])
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_a_name_is_renumbered_or_dropped_where_it_stands(block: str, prefix: str, rest: str) -> None:
    cut = make_cut(blocks=("mlp", "block_sparse_moe"))

    def name(layer: int, number: int) -> str:
        return f"{prefix}layers.{layer}.{block}.experts.{number}{rest}"

    every = [name(layer, number) for layer in range(3) for number in range(12)]
    new = [name(layer, n) for layer, kept in UNEQUAL.items() for n in range(len(kept))]
    for key in ("ignore", "exclude_modules", "ignored_layers", "targets"):
        values = {"quantization_config": {key: ["lm_head", *every, "re:.*mlp.gate$"]}}
        expected = {"quantization_config": {key: ["lm_head", *new, "re:.*mlp.gate$"]}}
        assert rewritten(values, cut, "config.json") == expected
    keyed: dict[str, Any] = {"quantized_layers": {entry: {"bits": index} for index, entry in enumerate(every)}}
    old = [layer * 12 + number for layer, kept in UNEQUAL.items() for number in kept]
    done = rewritten(keyed, cut, "hf_quant_config.json")["quantized_layers"]
    assert list(done.items()) == [(entry, {"bits": index}) for entry, index in zip(new, old, strict=True)]


@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config", "deep"])
def test_at_any_depth(where: str) -> None:
    inner: Any = {"ignore": ["model.layers.1.mlp.experts.7", "model.layers.1.mlp.experts.0"]}
    expected: Any = {"ignore": ["model.layers.1.mlp.experts.1"]}
    for wrap in {"text_config": ["quantization_config", "text_config"], "deep": ["b", "a"]}.get(where, [where]):
        inner, expected = {wrap: [inner] if wrap == "b" else inner}, {wrap: [expected] if wrap == "b" else expected}
    assert rewritten(inner, make_cut(), "config.json") == expected


@pytest.mark.parametrize(
    "entry",
    [
        "lm_head",
        "re:.*mlp.gate$",
        "re:.*experts.*",
        r"re:.*mlp\.experts\.\d+\.gate_proj$",
        r"re:.*experts\.[0-9]+\..*",
        "re:.*",
        "model.layers.*.mlp.experts.*",
        "*.experts.*",
        "*.mlp.gate",
        "model.layers.1.mlp.shared_expert.gate_proj",
        "model.layers.1.mlp.experts",
        "model.layers.3.mlp.gate_proj",
        "model.layers.9.mlp.experts.7.gate_proj",
        "model.layers.2.mlp.experts.7",
        "mtp.layers.0.mlp.experts.7",
        r"re:model\.layers\.9\.mlp\.experts\.7\..*",
        r"re:mtp\.layers\.0\.mlp\.experts\.7\..*",
        "model.visual.layers.1.mlp.experts.7",
        r"re:model\.layers\.1\.mlp\..*",
        "model.layers.1.*",
        "Linear",
        "W8A8 (7 experts)",
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_what_names_no_pruned_layers_expert_stays(entry: str, known: bool) -> None:
    cut = make_cut(known=known)
    for tool in ("compressed-tensors", "modelopt", "transformers", "torchao"):
        entries = {entry: 1} if tool == "torchao" else [entry]
        assert after(tool, entries, cut) == entries


def test_nothing_pruned_changes_nothing() -> None:
    cut = make_cut(dict.fromkeys(range(3), tuple(range(12))))
    values = {"quantization_config": {"ignore": ["experts.7", r"re:.*experts\.7\..*"]}, "num_experts": 12}
    assert rewritten(values, cut, "config.json") == values


# ------------------------------------------------------------------------------------------- patterns

REGEXES = [
    r".*mlp\.experts\.(0|3)\..*",
    r"model\.layers\.1\.mlp\.experts\.7\.",
    r"model\.layers\.1\.mlp\.experts\.7",
    r".*experts\.7\..*",
    r".*experts\.1",
    r".*experts\.[0-3]\..*",
    r".*experts\.[^7]\.",
    r".*experts\.\d\.",
    r".*experts\.1\d\.",
    r".*experts\.\d{2}\.gate_proj$",
    r".*layers\.[01]\.mlp\.experts\.(?:7|11)\.(?:gate|up)_proj$",
    r".*experts\.7\.(?!gate_proj).*",
    r".*experts\.7\.up_proj\.(?!weight$).*",
    r"(?!.*experts\.7\.).*",
    r".*(experts\.7|lm_head).*",
    r".*\.7\..*",
    r"(?i).*EXPERTS\.7\..*",
    r".*layers\.(\d)\.mlp\.experts\.\1\..*",
    r".*experts\.(?:7|10)\.down_proj\.weight$",
    r"language_model\.model\.layers\.1\.mlp\.experts\.7\..*",
    r"(?:model\.)?layers\.1\.mlp\.experts\.7\..*",
    r"^model\.layers\.\d+\.mlp\.experts\.(2|7)$",
    r".*experts\.\x37\..*",
    r".*experts\.[2-8]+\..*",
]
PREFIXES = ("", "model.", "language_model.model.", "backbone.")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("regex", REGEXES)
def test_regular_expressions(regex: str, known: bool, cut: str) -> None:
    made = make_cut(CUTS[cut], known=known)
    if not known and "\\.(?!" in regex:
        with pytest.raises(RequestError, match=r"names (?:parts|tensors) of experts"):
            after("compressed-tensors", [f"re:{regex}"], made)
        return
    for prefixes in ((), PREFIXES):
        assert_same_experts("compressed-tensors", ["lm_head", f"re:{regex}"], made, prefixes=prefixes)
    for mark in ("+:", "-:", ""):
        entries = {mark + regex: {"bits": 8}, "+:.*experts.*": {"bits": 4}, r".*\.7": {"bits": 2}}
        assert_same_experts("gptqmodel", entries, made)
    if any(re.fullmatch(regex, old) for prefix in PREFIXES for _, old in renumbered(made, prefix)):
        assert_same_experts("torchao", {f"re:{regex}": {"bits": 8}, "_default": None}, made)
    assert_same_experts("auto-round", {regex: {"bits": 8}, ".*experts.*": {"bits": 4}}, made)
    if "(?i)" not in regex:  # no expression there
        assert_same_experts("transformers", ["lm_head", regex], made)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "glob",
    [
        "*.experts.7.*",
        "model.layers.*.mlp.experts.0.*",
        "model.layers.1.mlp.experts.7*",
        "model.layers.1.mlp.experts.[0-7].gate_proj",
        "*.experts.1?.*",
        "*experts.?.down_proj*",
        "*experts.7",
        "*.7.gate_proj",
        "language_model.model.layers.0.mlp.experts.7.*",
    ],
)
def test_globs(glob: str, cut: str) -> None:
    made = make_cut(CUTS[cut])
    new = assert_same_experts("modelopt", ["lm_head", glob], made)
    assert new[0] == "lm_head" and not any("re:" in entry for entry in new)
    prefixes = ("language_model.model.",) if glob.startswith("language") else ()
    assert_same_experts("quark", {glob: {"bits": 8}, "*": {"bits": 4}}, made, prefixes=prefixes)
    if "experts" in glob:
        assert_same_experts("modelopt", [glob], make_cut(CUTS[cut], known=False), others=False)


def test_a_glob_is_replaced_by_names_in_the_spelling_of_the_files() -> None:
    assert after("modelopt", ["a", "*.experts.7.*", "b"], make_cut(UNIFORM, known=False)) == [
        "a",
        "model.layers.0.mlp.experts.3.*",
        "model.layers.1.mlp.experts.2.*",
        "model.layers.2.mlp.experts.1.*",
        "b",
    ]
    cut = make_cut({0: (1, 2), 1: (1, 7)}, blocks=("mlp", "block_sparse_moe"))
    assert after("modelopt", ["model.layers.*.mlp.experts.7.*"], cut) == [
        "model.layers.1.mlp.experts.1.*",
        "model.layers.9.mlp.experts.7.gate_proj.weight",  # not pruned
        "model.layers.9.mlp.experts.7.gate_proj",
    ]
    assert after("modelopt", ["model.layers.1.mlp.experts.[0-1].*"], cut) == ["model.layers.1.mlp.experts.0.*"]
    assert after("modelopt", ["model.layers.1.mlp.experts.[01].*"], make_cut()) == []


def test_an_expression_is_replaced_by_one_for_layers_that_differ_by_number_alone() -> None:
    cut = make_cut({0: (1, 3, 7), 1: (3, 7, 8), 2: (1, 3, 7)})
    prefix = r"re:(?:(?:backbone|language_model|model)\.)*"
    no_others = Cut(cut.retained, cut.original, cut.modules, PARTS, ["lm_head.weight"])
    assert after("compressed-tensors", [r"re:.*mlp\.experts\.(3|7)\..*"], no_others) == [
        prefix + r"layers\.(?:0|2)\.mlp\.experts\.(?:1|2)\..*$",
        prefix + r"layers\.1\.mlp\.experts\.(?:0|1)\..*$",
    ]
    assert after("compressed-tensors", [r"re:model\.layers\.1\.mlp\.experts\.0\."], no_others) == []


@pytest.mark.parametrize("entry", ["experts.7", "mlp.experts.7", "mlp.experts.1.gate_proj", "experts.11."])
@pytest.mark.parametrize("known", [True, False])
def test_parts_of_names(entry: str, known: bool) -> None:
    assert_same_experts("awq", ["lm_head", entry], make_cut(known=known), others=known)
    if entry.endswith("."):
        with pytest.raises(RequestError, match="no such module is known"):  # transformers finds none
            after("transformers", [entry], make_cut(known=known))
    else:
        assert_same_experts("transformers", ["lm_head", entry], make_cut(known=known))
    with pytest.raises(RequestError, match="names an expert by number and says no layer"):
        after("compressed-tensors", [entry], make_cut())


@pytest.mark.parametrize("entry", ["7", ".7.", "1.gate_proj", "layers.1.", "model.layers.0.self_attn", ".1.down"])
def test_parts_of_names_without_the_word(entry: str) -> None:
    for cut in CUTS.values():
        assert_same_experts("awq", ["lm_head", entry], make_cut(cut))
        if not entry.endswith("down"):
            assert_same_experts("transformers", ["lm_head", entry], make_cut(cut))


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("rest", ["", ".", ".gate_proj"])
def test_part_of_the_name_of_another_expert(number: int, rest: str) -> None:
    """``experts.1`` is part of ``experts.11``: for AWQ it names both."""
    for cut in (make_cut(), make_cut({0: (1, 2, 10, 11), 1: tuple(range(1, 12))}, count=12)):
        for layer in (0, 1):
            for prefix in ("model.", ""):
                entry = f"{prefix}layers.{layer}.mlp.experts.{number}{rest}"
                assert_same_experts("awq", [entry, "lm_head"], cut)
                if rest != ".":
                    assert_same_experts("transformers", [entry], cut)


def test_names_keep_their_spelling_where_they_can() -> None:
    name = "model.layers.{}.mlp.experts.{}"
    for tool in ("awq", "transformers"):
        assert after(tool, [name.format(1, 7), name.format(1, 8)], make_cut()) == [name.format(1, 1)]
        assert after(tool, [name.format(0, 3)], make_cut()) == [name.format(0, 2)]
    assert after("awq", [name.format(1, 1)], make_cut()) == [name.format(1, 2)]  # of experts 1, 10 and 11 the last


def test_a_last_dot_that_transformers_takes_for_any_character() -> None:
    assert in_transformers(["model.layers.0.mlp.experts.1."], "model.layers.0.mlp.experts.11")
    with pytest.raises(RequestError, match="remove its last dot"):
        after("transformers", ["model.layers.0.mlp.experts.1."], make_cut())
    assert after("compressed-tensors", ["model.layers.0.mlp.experts.3."], make_cut()) == [
        "model.layers.0.mlp.experts.2."
    ]


@pytest.mark.parametrize(
    "entry",
    [
        "re:.*experts.*7.*",
        r"re:mtp\..*experts\.\w*1\..*",
        r"re:.*layers\.0\.mlp\.experts\.\w*7\..*",
        "*.experts*7.*",
        "mtp.layers.0.*[17].gate_proj",
        "mtp.layers.0.mlp.experts.{}",
        "mtp.layers.0.mlp.experts.{}.gate_proj",
        "model.mtp.layers.0.mlp.experts.{}.gate_proj",
        "model.layers.0.mlp.experts.{}.gate_proj",
    ],
)
@pytest.mark.parametrize("head", ["mlp.experts.", "mlp.experts.expert_", "experts."])
def test_extra_heads_and_other_names_of_experts(head: str, entry: str) -> None:
    """An extra head counts its layers anew: mtp.layers.0 is layer 3 here."""
    retained = {0: (0, 1, 7, 8), 1: (1, 2, 7, 11), 3: (1, 5, 7, 10)}
    places = {0: "model.layers.0.", 1: "model.layers.1.", 3: "mtp.layers.0."}
    modules = {(layer, n): (f"{place}{head}{n}",) for layer, place in places.items() for n in range(12)}
    cut = Cut(retained, dict.fromkeys(retained, 12), modules, PARTS, ["lm_head.weight", "mtp.fc.weight"])
    entries = [entry.replace("mlp.experts.{}", f"{head}{{}}").format(n) for n in range(12 if "{}" in entry else 1)]
    if "mlp" in entry and "{}" not in entry:
        entries = [entry.replace("mlp\\.experts", "(?:mlp\\.)?experts") if "re:" in entry else entry]
    new = assert_same_experts("compressed-tensors", entries, cut, others=False)
    assert (new == entries) == ("*" in entry and "re:" not in entry)  # globs are nothing there
    assert_same_experts("modelopt", entries, cut, others=False)


def test_random_expressions() -> None:
    generator = random.Random(0)

    def some(*choices: str) -> str:
        return generator.choice(choices)

    changed = 0
    for _ in range(160):
        numbers = [str(generator.randrange(12)) for _ in range(generator.randint(1, 4))]
        low, high = sorted(generator.sample(range(10), 2))
        regex = "".join(
            [
                some(r"model\.", ".*", r"(?:.*\.)?", r"^model\.", r"(?:model|mtp)\."),
                some(r"layers\.1", r"layers\.\d+", r"layers\.[0-1]", r"layers\.(?:0|2)", r"layers\..*", ".*"),
                some(r"\.mlp\.", r"\..*\.", r"\.[a-z]+\."),
                "experts" + some(r"\.", "."),
                some("|".join(numbers).join(("(", ")")), numbers[0], f"[{low}-{high}]", f"[^{low}{high}]", r"\d+")
                + some("", "", "", r"\d*", "?"),
                some(r"\.", r"\..*", "$", "", r"\.gate_proj$", r"\.(?:gate|up)_proj", r"\b.*", r"\.\w+$"),
            ]
        )
        retained = {layer: tuple(sorted(generator.sample(range(12), generator.randint(1, 12)))) for layer in range(3)}
        made = make_cut(retained, blocks=generator.choice([("mlp",), ("mlp", "moe")]))
        new = assert_same_experts("compressed-tensors", [f"re:{regex}"], made)
        changed += new != [f"re:{regex}"]
        assert_same_experts("transformers", [regex], made)
        assert_same_experts("gptqmodel", {f"-:{regex}": {}, "+:.*": {"bits": 4}}, made)
        assert_same_experts("auto-round", {regex: 8, r".*experts\.\d\..*": 4}, made)
    assert 80 < changed < 156  # else the test would show little


def test_random_globs() -> None:
    generator = random.Random(1)
    changed = 0
    for _ in range(300):
        glob = "".join(
            [
                generator.choice(["model.", "*", "*.", "model.*"]),
                generator.choice(["layers.1", "layers.?", "layers.[01]", "layers.*", "*"]),
                generator.choice([".mlp.", ".*."]),
                generator.choice(["experts.", "*experts."]),
                generator.choice(["7", "1", "1*", "?", "[1-4]", "[!7]", "1?", "11", "*"]),
                generator.choice(["", ".*", "*", ".gate_proj", ".*_proj", ".down_proj.weight", ".g*"]),
            ]
        )
        retained = {layer: tuple(sorted(generator.sample(range(12), generator.randint(1, 12)))) for layer in range(3)}
        made = make_cut(retained, blocks=generator.choice([("mlp",), ("mlp", "moe")]))
        new = assert_same_experts("modelopt", [glob], made)
        assert_same_experts("quark", {glob: 8, "*.gate_proj": 4}, made)
        changed += new != [glob]
    assert 100 < changed < 290


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ignore": ["mlp.experts.7"]},
            r"config\.json \(quantization_config > ignore\): 'mlp.experts.7' names an exp",
        ),
        ({"ignore": ["model.layers.1.ffn.experts.7"]}, "no such module is known"),
        ({"ignore": ["somewhere.layers.1.mlp.experts.7"]}, "no such module is known"),
        ({"ignore": ["model.layers.1.mlp.experts.12"]}, r"an expert that is not there \(layer 1 has 12\)"),
        ({"ignore": ["model/layers/1/mlp/experts/7"]}, "in a way that is not known here"),
        ({"ignore": ["model.layers.1.mlp.experts.07"]}, "in a way that is not known here"),
        ({"ignore": ["model.layers.1.mlp.experts[7]"]}, "no such module is known"),
        ({"ignore": ["model.layers.1.mlp.experts.7,lm_head"]}, "in a way that is not known here"),
        ({"ignore": "model.layers.1.mlp.experts.7, lm_head"}, "inside a longer text"),
        ({"ignore": [r"re:somewhere\.layers\.1\.mlp\.experts\.7\..*"]}, "no such module is known"),
        ({"ignore": [r"re:.*experts\.(7"]}, "is no regular expression"),
        ({"ignore": [r".*experts\.7\..*"]}, "write it after 're:'"),
        ({"target": "model.layers.1.mlp.experts.0"}, "names only experts that are pruned"),
        ({"target": "*.experts.7.*"}, "names 3 experts after pruning, and one string cannot"),
        ({"a": [{"x": "model.layers.1.mlp.experts.0", "y": "model.layers.1.mlp.experts.2"}]}, "and others that are"),
        (
            {"map": {"*.layers.1.mlp.experts.7": 8, "model.layers.1.mlp.experts.7": 4}},
            "becomes 'model.layers.1.mlp.experts.1', which is there already with another value",
        ),
        (
            {
                "config_groups": {
                    "a": {"targets": [r"re:.*experts\.7\..*"], "weights": {"num_bits": 8}},
                    "b": {"targets": ["re:.*experts.*"], "weights": {"num_bits": 4}},
                }
            },
            "of another group name the same experts",
        ),
        ({"a": ["model.layers.1.mlp.experts.0", 8]}, "stands in a list with other values"),
        ({"a": [[*(["re:.*experts.7"] * 2), 8]]}, "stands in a list with other values"),
        ({"ignore": [r"model\.layers\.1\.mlp\.experts\.(?:7|8)\..*"]}, "write it after 're:'"),
        ({"ignore": ["model.layers.1.mlp.experts.[^7].gate_proj"]}, "write it after 're:'"),
        ({"experts": {str(number): 1 for number in range(13)}}, "seem to be numbers of experts"),
        ({"expert_bits": list(range(12))}, "has one entry per expert and says no layer"),
        ({"protected_experts": [7, 3]}, "seems to list experts by number"),
        ({"expert_ids": list(range(12))}, "seems to list experts by number"),
        ({"layers": {"1": {"expert_ids": [7, 3]}}}, "seems to list experts by number"),
        ({"experts": {"3": {"bits": 8}, "7": {"bits": 4}}}, "seem to be numbers of experts"),
    ],
)
def test_what_is_not_certain_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        rewritten({"quantization_config": settings}, make_cut(known=False), "config.json")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("config.json (quantization_config")
    assert "rewrite or remove that entry in the source" in str(caught.value)


def test_groups_of_modules_that_do_not_overlap() -> None:
    groups = {
        "a": {"targets": [r"re:.*experts\.7\..*", "Linear"]},
        "b": {"targets": [r"re:.*experts\.(?!7\.).*", r"re:.*self_attn.*"]},
    }
    new = rewritten({"quantization_config": {"config_groups": groups}}, make_cut(), "config.json")
    done = new["quantization_config"]["config_groups"]
    for name, group in groups.items():
        for now, old in renumbered(make_cut()):
            targets = done[name]["targets"]
            assert compressed_tensors(targets, now) == compressed_tensors(group["targets"], old)


def test_one_string_for_several_experts() -> None:
    values = {"quantization_config": {"targets": r"re:.*experts\.7\..*"}}
    new = rewritten(values, make_cut(), "config.json")["quantization_config"]["targets"]
    for now, old in renumbered(make_cut()):
        assert bool(re.match(new[3:], now)) == ("experts.7." in old)


def test_text_of_other_files_is_left_alone() -> None:
    values = {
        "chat_template": "{% if experts.7 * [x] %}\nUse *experts* (7 of them)",
        "note": "*not* experts",
        "pattern": "*.7.*",
    }
    assert rewritten(values, make_cut(), "tokenizer_config.json") == values


def test_records_about_pruned_experts_go() -> None:
    records = [{"name": f"model.layers.1.mlp.experts.{number}", "bits": number} for number in range(12)]
    new = rewritten({"layers": records}, make_cut(), "quant.json")
    assert new == {
        "layers": [{"name": f"model.layers.1.mlp.experts.{n}", "bits": old} for n, old in enumerate(UNEQUAL[1])]
    }
    pairs = [[record["name"], record["bits"]] for record in records]
    assert rewritten({"layers": pairs}, make_cut(), "quant.json") == {
        "layers": [[record["name"], record["bits"]] for record in new["layers"]]
    }


def test_a_model_whose_modules_are_not_numbered() -> None:
    cut = Cut(UNEQUAL, dict.fromkeys(UNEQUAL, 12), {})
    stays = {"ignore": ["lm_head", "re:.*experts.*", "model.layers.9.mlp.experts.7", "model.layers.2.mlp.experts.7"]}
    assert rewritten(stays, cut, "quant.json") == stays
    for entry in ("model.layers.1.mlp.experts.7", r"re:model\.layers\.1\.mlp\.experts\.7\..*", "*.experts.7"):
        with pytest.raises(RequestError, match="no such module is known"):
            rewritten({"ignore": [entry]}, cut, "quant.json")


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "key", ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts"]
)
def test_counts(key: str) -> None:
    values = {
        "moe": {key: 12, "num_experts_per_tok": 2},
        "vision_config": {key: 12},
        "dense": {key: 3},
        "model.layers.1": {key: 12},
        "model.layers.9": {key: 12},
    }
    expected = copy.deepcopy(values)
    expected["moe"][key] = expected["model.layers.1"][key] = 4
    assert rewritten(values, make_cut(UNIFORM), "params.json") == expected
    expected["moe"][key], expected["model.layers.1"][key] = 12, 3  # config.json keeps the number for the whole, too
    assert rewritten(values, make_cut(UNEQUAL), "params.json") == expected
    head = {(3, n): (f"mtp.layers.0.mlp.experts.{n}",) for n in range(12)}
    for kept in (UNIFORM[0], tuple(range(12))):
        extra = Cut({**UNIFORM, 3: kept}, dict.fromkeys(range(4), 12), {**make_cut().modules, **head})
        assert rewritten({"mtp_config": {key: 12}}, extra, "a.json") == {"mtp_config": {key: len(kept)}}
        assert rewritten({"mtp": {key: 11}, "audio": {key: 12}}, extra, "a.json") == {
            "mtp": {key: 11},
            "audio": {key: 12},
        }
    mixed = Cut(UNIFORM, {0: 12, 1: 12, 2: 11}, make_cut().modules)
    with pytest.raises(RequestError, match=r"params.json \(moe > .*\): 12 counts experts, of which layers had diff"):
        rewritten({"moe": {key: 12}}, mixed, "params.json")
    assert rewritten({key: 4}, mixed, "params.json") == {key: 4}


def test_counts_of_each_layer() -> None:
    assert rewritten({"num_experts": [12, 12, 12, 6]}, make_cut(), "a.json") == {"num_experts": [5, 3, 12, 6]}
    assert rewritten({"num_experts": [1, 2]}, make_cut(), "a.json") == {"num_experts": [1, 2]}
    with pytest.raises(RequestError, match="not those of each layer in turn"):
        rewritten({"num_experts": [12, 12]}, make_cut(), "a.json")


def test_one_entry_per_expert() -> None:
    bits = [float(n) for n in range(12)]
    values: dict[str, Any] = {"model.layers.1.mlp": {"expert_scales": bits}, "layers": {"0": {"expert_scales": bits}}}
    new = rewritten(values, make_cut(), "a.json")
    assert new["model.layers.1.mlp"]["expert_scales"] == [2.0, 7.0, 11.0]
    assert new["layers"]["0"]["expert_scales"] == [0.0, 1.0, 3.0, 7.0, 10.0]
    alike = make_cut(CUTS["alike"])
    values = {"expert_scales": bits, "all_expert_scales": [bits, bits], "scales": bits, "num_experts_of_layer": bits}
    expected = {**values, "expert_scales": bits[1:12:2], "all_expert_scales": [bits[1:12:2]] * 2}
    for kept in expected["expert_scales"], *expected["all_expert_scales"]:
        kept[:] = [1.0, 3.0, 7.0, 11.0]
    assert rewritten(values, alike, "a.json") == expected
    other = {"model.layers.9.mlp": {"expert_scales": bits}}
    assert rewritten(other, make_cut(), "a.json") == other


def test_one_key_per_expert() -> None:
    values = {"model.layers.1.mlp.experts": {str(number): {"bits": number} for number in range(12)}}
    new = rewritten(values, make_cut(), "a.json")
    assert new == {"model.layers.1.mlp.experts": {"0": {"bits": 2}, "1": {"bits": 7}, "2": {"bits": 11}}}
    whole = {"model.layers.2.mlp.experts": {"7": 1}, "model.layers.9.mlp.experts": {"7": 1}, "expert_layers": {"1": 1}}
    assert rewritten(whole, make_cut(), "a.json") == whole
    every = {"expert_bits": {number: number for number in range(12)}}
    assert rewritten(every, make_cut(CUTS["alike"]), "a.yaml") == {"expert_bits": {0: 1, 1: 3, 2: 7, 3: 11}}
    some = {"model.layers.1.mlp.experts": {"7": 1, "8": 2}}
    assert rewritten(some, make_cut(), "a.json") == {"model.layers.1.mlp.experts": {"1": 1}}


# ------------------------------------------------------------------------------------------- files


def test_files(tmp_path: Path) -> None:
    cut = make_cut(UNIFORM, known=False)
    name = "model.layers.1.mlp.experts.{}.gate_proj"
    settings = {"quantization": {"exclude_modules": ["lm_head", name.format(7), name.format(0)]}, "é": 1e-5}
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps(settings, indent=4, ensure_ascii=False) + "\n")
    settings["quantization"]["exclude_modules"] = ["lm_head", name.format(2)]  # type: ignore[index]
    assert rewritten_file(path, cut) == (json.dumps(settings, indent=4, ensure_ascii=False) + "\n").encode()

    path = tmp_path / "quantization.json"
    path.write_text(json.dumps({"dtype_map": {f"{name.format(7)}.weight": "fp8", f"{name.format(0)}.weight": "bf16"}}))
    assert rewritten_file(path, cut) == json.dumps({"dtype_map": {f"{name.format(2)}.weight": "fp8"}}).encode()

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n      targets: [Linear]\n"
        f"      ignore: [lm_head, '{name.format(7)}', '{name.format(0)}']\n      scheme: FP8\n"
    )
    new = yaml.safe_load(rewritten_file(path, cut) or b"")
    modifier = new["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    assert list(modifier.items()) == [
        ("targets", ["Linear"]),
        ("ignore", ["lm_head", name.format(2)]),
        ("scheme", "FP8"),
    ]

    path = tmp_path / "quant.json"
    path.write_text(json.dumps({"ignore": [r"re:.*\.7\..*"]}))
    assert rewritten_file(path, cut) not in (None, path.read_bytes())  # without the word

    for file, text in {
        "tokenizer.json": '{"vocab": {"experts": 7}}',
        "quant.json": '{"ignore": ["lm_head"]}',
        "notes.txt": "experts.7",
        "broken.json": "experts and no JSON",
        "recipe.yml": "a: !strange [1]\n",
    }.items():
        (tmp_path / file).write_text(text)
        assert rewritten_file(tmp_path / file, cut) is None
    for file in ("broken.json", "recipe.yml"):
        (tmp_path / file).write_text("a: !strange [model.layers.1.mlp.experts.7]\n")
        with pytest.raises(RequestError, match=f"{file} names experts by number, .* cannot be read"):
            rewritten_file(tmp_path / file, cut)


WEIGHTS = "unpruned weights in another format"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapter_config.json", "an adapter for the unpruned model"),
        ("lora/adapter_config.json", "an adapter for the unpruned model"),
        ("adapter_model.safetensors", "an adapter for the unpruned model"),
        ("model.onnx", WEIGHTS),
        ("model.onnx.data", WEIGHTS),
        ("onnx/model.onnx_data_1", WEIGHTS),
        ("Model-Q4_K_M.GGUF", WEIGHTS),
        ("pytorch_model.bin", WEIGHTS),
        ("pytorch_model.bin.index.json", WEIGHTS),
        ("original/consolidated.00.pth", WEIGHTS),
        ("consolidated.safetensors", WEIGHTS),
        ("consolidated.safetensors.index.json", WEIGHTS),
        ("tf_model.h5", WEIGHTS),
        ("weights.npz", WEIGHTS),
        ("model.mlpackage/Manifest.json", WEIGHTS),
        ("ggml-model.ggml", WEIGHTS),
        ("rank0.engine", "compiled from the unpruned model"),
        ("imatrix.dat", "statistics of the unpruned experts"),
        ("model.imatrix", "statistics of the unpruned experts"),
        ("optimizer.pt", "of the training before pruning"),
        ("4bit/model.safetensors", "weights in a sub-folder"),
        ("4bit/config.json", "of weights that stay out"),
        ("other.safetensors", "weights that are not the model's"),
        ("model-00001-of-00002.safetensors", None),
        ("odd name.safetensors", None),
        ("model.safetensors.index.json", None),
        ("config.json", ""),
        ("tokenizer.json", ""),
        ("params.json", ""),
        ("recipe.yaml", ""),
        ("hf_quant_config.json", ""),
        ("expert_statistics.json", ""),
        ("modeling_x.py", ""),
        ("original/params.json", ""),
        ("figures/a.png", ""),
        ("unknown.xyz", ""),
        ("id_rsa", "it may hold what is private"),
        ("server.pem", "it may hold what is private"),
        ("data/train.jsonl", "data, and not the model's"),
        ("__pycache__/modeling_x.json", "a program's own, and not the model's"),
        ("training_args.bin", "of the training before pruning"),
        ("trainer_state.json", "of the training before pruning"),
        ("checkpoint-500/tokenizer.json", "of the training before pruning"),
        ("wandb/run/config.yaml", "of the training before pruning"),
        ("train.log", "of the training before pruning"),
        ("credentials.json", "it may hold what is private"),
        ("secrets.yaml", "it may hold what is private"),
        ("prod.env", "it may hold what is private"),
        ("env.json", "it may hold what is private"),
        ("token.txt", "it may hold what is private"),
        ("tokenizer.model", ""),
        ("tokenizer_config.json", ""),
        ("special_tokens_map.json", ""),
        ("added_tokens.json", ""),
        ("merges.txt", ""),
        ("qwen.tiktoken", ""),
        ("chat_template.jinja", ""),
        ("LICENSE", ""),
        ("LICENSE-MODEL", ""),
        ("USE_POLICY.md", ""),
        ("NOTICE.txt", ""),
        ("preprocessor_config.json", ""),
        ("additional_chat_templates/tool_use.jinja", ""),
    ],
)
def test_what_is_carried(name: str, reason: str | None, tmp_path: Path) -> None:
    """Reason: why not; None where it is the model's own weights."""
    index = tmp_path / "index"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "odd name.safetensors"}})
    )
    names = ["model.safetensors.index.json", "special_tokens_map.json"]
    names += [name] * (name not in names) + ["4bit/model.safetensors"] * (name == "4bit/config.json")
    kept, out = carried(names, {"model.safetensors.index.json": index}.get)
    assert (name in kept) == (reason == "")
    assert out.get(name) == (reason or None)
    assert "special_tokens_map.json" in kept and "model.safetensors.index.json" not in [*kept, *out]


def test_without_an_index() -> None:
    names = ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "a.txt"]
    kept, out = carried(names, lambda name: None)
    assert kept == ["a.txt"] and list(out) == ["model-00001-of-00001.safetensors"]


def test_a_single_file_of_weights_hides_an_index() -> None:
    names = ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "a.txt"]
    kept, out = carried(names, lambda name: pytest.fail(name))
    assert kept == ["a.txt"] and out == {"model-00001-of-00001.safetensors": "weights that are not the model's"}


def test_what_stays_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "adapter_config.json", "model.onnx.data", "tokenizer.json", "README.md"):
        (tmp_path / "model" / name).write_text("{}")
    left_out = carry_files(Source(str(tmp_path / "model")), tmp_path, {})
    assert left_out == {"adapter_config.json": "an adapter for the unpruned model", "model.onnx.data": WEIGHTS}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "tokenizer.json", "README.base.md"}


E = "model.layers.0.mlp.experts.0.gate_proj."


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        (
            {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
            [f"model.layers.0.mlp.switch_mlp.gate_proj.{end}" for end in ("weight", "scales", "biases")],
            "MLX, quantised to 4 bits in groups of 64 (config.json's quantization)",
        ),
        ({}, ["model.layers.0.mlp.switch_mlp.gate_proj.weight"], "MLX (its experts are switch_mlp tensors)"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            [f"{E}qweight"],
            "GPTQ, quantised to 4 bits (config.json's quantization_config)",
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            [],
            "AWQ (config.json's quantization",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, [], "bitsandbytes (config.json's quantization_config)"),
        ({"quantization_config": {"quant_method": "brand-new"}}, [], "brand-new (config.json's quantization_config)"),
        ({}, [f"{E}{end}" for end in ("qweight", "qzeros", "scales", "g_idx")], "GPTQ (its weights are qweight, "),
        ({}, [f"{E}{end}" for end in ("qweight", "qzeros", "scales")], "AWQ (its weights are qweight, qzeros and"),
        ({}, [f"{E}weight.quant_state.bitsandbytes__nf4", f"{E}weight.absmax"], "bitsandbytes (its weights have"),
        ({}, ["blk.0.ffn_gate_exps.weight"], "GGUF (llama.cpp)"),
        ({}, [f"{E}q_weight", f"{E}q_invperm"], "EXL2"),
        ({}, [f"{E}trellis", f"{E}suh"], "EXL3"),
        ({}, [f"{E}W_q"], "HQQ"),
        ({}, ["model.layers.0.mlp.experts.gate_up_proj_blocks"], "MXFP4"),
        ({}, [f"{E}weight_packed"], "compressed-tensors"),
        ({}, ["layers.0.attention.wq.weight"], "Mistral's or Meta's"),
        ({}, [f"{E}weight", "lm_head.weight"], None),
        ({"quantization": "none"}, [f"{E}weight"], None),
    ],
)
def test_formats_of_other_tools(config: dict[str, Any], tensors: list[str], expected: str | None) -> None:
    found = foreign_format(config, iter(tensors))
    assert found is None if expected is None else str(found).startswith(expected)
