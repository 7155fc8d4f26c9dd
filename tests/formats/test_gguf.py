# SPDX-License-Identifier: Apache-2.0
"""GGUF files: experts are cut as blocks of bytes, and everything else stays as it was, byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from optimum_moe_prune import PruningPlan
from optimum_moe_prune.errors import RunError
from optimum_moe_prune.formats import form_of
from optimum_moe_prune.names import GGUF_PLAN_KEY
from optimum_moe_prune.storage.gguf_files import read_gguf
from tests.formats.gguf_models import (
    EXPERTS,
    HIDDEN,
    INNER,
    Tensors,
    floats,
    moe_tensors,
    plan_for,
    quantised,
    raw_keys,
    read_tensors,
    write_gguf,
)
from tests.oracles import call

RETAINED = [0, 3, 5, 6]
COUNTING = ("_exps.", "ffn_gate_inp.", "exp_probs_b")


def assert_cut(source: dict, output: dict, retained: list[int] = RETAINED) -> None:
    """Tensors that count experts hold the retained, and all others are as they were."""
    assert list(output) == list(source)
    for name, (values, kind) in output.items():
        before, same = source[name]
        assert kind == same
        kept = before[..., retained] if before.shape == (1, EXPERTS) else before[retained]
        kept = kept if any(part in name for part in COUNTING) else before
        assert values.shape == kept.shape and values.tobytes() == kept.tobytes(), name


def test_everything_else_stays_byte_for_byte(tmp_path: Path) -> None:
    tensors = moe_tensors([1, 2])
    source = write_gguf(tmp_path / "a.gguf", tensors, alignment=64)
    plan = plan_for(tensors)
    assert plan.apply_to_checkpoint(source, tmp_path / "out.gguf") == tmp_path / "out.gguf"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "out.gguf"]
    assert_cut(read_tensors(source), read_tensors(tmp_path / "out.gguf"))
    before, after = read_gguf(source), read_gguf(tmp_path / "out.gguf")
    assert after.value("qwen3moe.expert_count") == 4 and after.alignment == 64 and after.version == before.version
    mine, theirs = raw_keys(after), raw_keys(before)
    assert list(mine) == [*theirs, GGUF_PLAN_KEY]
    assert {name for name in theirs if mine[name] != theirs[name]} == {"qwen3moe.expert_count"}
    assert all((t.begin - after.data) % 64 == 0 for t in after.tensors.values())
    content = after.path.read_bytes()
    assert len(content) % 64 == 0
    stored = PruningPlan.load(tmp_path / "out.gguf")
    assert (stored.retained, stored.method) == (plan.retained, plan.method)


def test_keys_of_every_type_stay(tmp_path: Path) -> None:
    """Empty strings and arrays too, which the library's own writer leaves out."""
    writer_kinds = {
        0: 200,
        1: -7,
        2: 60000,
        3: -300,
        4: 2**31,
        5: -5,
        6: 0.1,
        7: True,
        10: 2**60,
        11: -(2**60),
        12: 0.1,
    }
    tensors = moe_tensors([0])
    source = write_gguf(tmp_path / "a.gguf", tensors)
    before = read_gguf(source)
    added = b""
    for kind, value in writer_kinds.items():
        packed = np.array(value, dtype=[*"BbHhIif?", "", "", *"Qqd"][kind]).tobytes()
        added += _key(f"x.{kind}", kind, packed)
        added += _key(f"x.{kind}.array", 9, np.uint32(kind).tobytes() + np.uint64(2).tobytes() + packed * 2)
    added += _key("x.empty", 8, np.uint64(0).tobytes())
    added += _key("x.none", 9, np.uint32(8).tobytes() + np.uint64(0).tobytes())
    inner = np.uint32(8).tobytes() + np.uint64(1).tobytes() + np.uint64(2).tobytes() + b"ab"
    added += _key("x.nested", 9, np.uint32(9).tobytes() + np.uint64(2).tobytes() + inner * 2)
    content, at = source.read_bytes(), before.infos[0]
    header = content[:16] + np.uint64(len(before.keys) + 2 * len(writer_kinds) + 3).tobytes()
    infos = header + content[24:at] + added + content[at : before.infos[1]]
    (tmp_path / "b.gguf").write_bytes(infos + bytes(-len(infos) % 32) + content[before.data :])
    plan_for(tensors).apply_to_checkpoint(tmp_path / "b.gguf", tmp_path / "out.gguf")
    mine, theirs = raw_keys(read_gguf(tmp_path / "out.gguf")), raw_keys(read_gguf(tmp_path / "b.gguf"))
    assert len(theirs) == len(before.keys) + 2 * len(writer_kinds) + 3
    assert {name for name in theirs if mine[name] != theirs[name]} == {"qwen3moe.expert_count"}
    found = read_gguf(tmp_path / "b.gguf")
    assert {kind: found.value(f"x.{kind}") for kind in writer_kinds} == writer_kinds | {6: float(np.float32(0.1))}
    assert_cut(read_tensors(tmp_path / "b.gguf"), read_tensors(tmp_path / "out.gguf"))


def _key(name: str, kind: int, value: bytes) -> bytes:
    return np.uint64(len(name)).tobytes() + name.encode() + np.uint32(kind).tobytes() + value


def test_every_type_is_cut_as_blocks(tmp_path: Path) -> None:
    """One layer for each type that the library knows: whatever the bytes mean, experts keep theirs."""
    kinds = [kind for kind in gguf.GGML_QUANT_SIZES if kind not in (Type.F32, Type.F16, Type.BF16, Type.F64)]
    assert len(kinds) > 25
    tensors, rng = moe_tensors(range(len(kinds)), experts=4), np.random.default_rng(0)
    for layer, kind in enumerate(kinds):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (4, 2, 256 // block * size), dtype=np.uint8)
        plain = {Type.I8: np.int8, Type.I16: np.int16, Type.I32: np.int32, Type.I64: np.int64}.get(kind)
        tensors[f"blk.{layer}.ffn_up_exps.weight"] = (raw, kind) if plain is None else raw.view(plain)
    source = write_gguf(tmp_path / "a.gguf", tensors, experts=4)
    plan_for(tensors, (1, 3), experts=4).apply_to_checkpoint(source, tmp_path / "out.gguf")
    before, after = read_tensors(source), read_tensors(tmp_path / "out.gguf")
    assert_cut(before, after, [1, 3])
    dequantised = 0
    with np.errstate(all="ignore"):
        for layer, kind in enumerate(kinds):
            name = f"blk.{layer}.ffn_up_exps.weight"
            try:
                whole = gguf.dequantize(before[name][0], kind)
            except NotImplementedError:
                continue
            dequantised += 1
            assert np.array_equal(gguf.dequantize(after[name][0], kind), whole[[1, 3]], equal_nan=True)
    assert dequantised > 20


def test_what_counts_experts_follows(tmp_path: Path) -> None:
    """Biases, correction biases and scales of each expert; shared experts and norms stay, and so do dense layers."""
    tensors = moe_tensors([1])
    tensors |= {
        "blk.0.ffn_up.weight": floats(EXPERTS, HIDDEN, seed=70),  # dense, and of a suspicious length
        "blk.1.ffn_gate_inp.bias": floats(EXPERTS, seed=71),
        "blk.1.exp_probs_b.bias": floats(1, EXPERTS, seed=72),  # Ernie's is a matrix with one row
        "blk.1.ffn_gate_up_exps.weight": quantised(floats(EXPERTS, 2 * INNER, HIDDEN, seed=73), Type.Q4_0),
        "blk.1.ffn_down_exps.bias": floats(EXPERTS, HIDDEN, seed=74),
        "blk.1.ffn_down_exps.scale": floats(EXPERTS, seed=75),
        "blk.1.ffn_down_exps.input_scale": floats(EXPERTS, seed=76),
        "blk.1.ffn_gate_inp.scale": floats(HIDDEN, seed=77),
        "blk.1.ffn_up_shexp.weight": floats(EXPERTS, HIDDEN, seed=78),
        "blk.1.ffn_gate_inp_shexp.weight": floats(HIDDEN, seed=79),
        "blk.1.ffn_norm_exps.weight": floats(EXPERTS, seed=80),
        "output.weight": floats(96, EXPERTS, seed=81),
    }
    source = write_gguf(tmp_path / "a.gguf", tensors)
    plan = plan_for(tensors, beside=("exp_probs_b.bias", "ffn_gate_inp.bias"))
    plan.apply_to_checkpoint(source, tmp_path / "out.gguf")
    before, after = read_tensors(source), read_tensors(tmp_path / "out.gguf")
    whole = {"blk.1.ffn_gate_inp.scale", "blk.1.ffn_norm_exps.weight"}
    for name in whole:
        assert np.array_equal(after[name][0], before[name][0])
    assert_cut(*({n: v for n, v in found.items() if n not in whole} for found in (before, after)))


def test_experts_with_tensors_of_their_own(tmp_path: Path) -> None:
    """The first files of Mixtral."""
    tensors = {n: t for n, t in moe_tensors([0, 1]).items() if "_exps" not in n}
    for layer in (0, 1):
        for expert in range(EXPERTS):
            for name in ("gate", "up", "down"):
                seed = 1000 * layer + 10 * expert + len(name)
                shape = (HIDDEN, INNER) if name == "down" else (INNER, HIDDEN)
                tensors[f"blk.{layer}.ffn_{name}.{expert}.weight"] = quantised(floats(*shape, seed=seed), Type.Q8_0)
    source = write_gguf(tmp_path / "a.gguf", tensors, "llama")
    plan_for(tensors, model_type="mixtral").apply_to_checkpoint(source, tmp_path / "out.gguf")
    before, after = read_tensors(source), read_tensors(tmp_path / "out.gguf")
    assert sum(".ffn_up." in name for name in after) == 2 * len(RETAINED)
    for new, old in enumerate(RETAINED):
        for name in ("gate", "up", "down"):
            mine, theirs = (
                found[f"blk.1.ffn_{name}.{number}.weight"] for found, number in ((after, new), (before, old))
            )
            assert mine[1] == theirs[1] and np.array_equal(mine[0], theirs[0])
    assert np.array_equal(after["blk.1.ffn_gate_inp.weight"][0], before["blk.1.ffn_gate_inp.weight"][0][RETAINED])


def test_files_in_parts_become_one(tmp_path: Path) -> None:
    tensors = moe_tensors()
    whole = write_gguf(tmp_path / "whole.gguf", tensors)
    first = write_gguf(tmp_path / "parts.gguf", tensors, in_parts_of=4)
    assert first.name == "parts-00001-of-00003.gguf"
    plan = plan_for(tensors)
    plan.apply_to_checkpoint(whole, tmp_path / "a.gguf")
    plan.apply_to_checkpoint(first, tmp_path / "b.gguf")
    mine, theirs = read_tensors(tmp_path / "b.gguf"), read_tensors(tmp_path / "a.gguf")
    assert list(mine) == list(theirs)
    assert all(np.array_equal(mine[name][0], theirs[name][0]) for name in mine)
    assert raw_keys(read_gguf(tmp_path / "b.gguf")) == raw_keys(read_gguf(tmp_path / "a.gguf"))


def test_numbers_in_the_other_byte_order(tmp_path: Path) -> None:
    tensors = moe_tensors()
    source = write_gguf(tmp_path / "a.gguf", tensors, endian=gguf.GGUFEndian.BIG)
    plan_for(tensors).apply_to_checkpoint(source, tmp_path / "out.gguf")
    assert_cut(read_tensors(source), read_tensors(tmp_path / "out.gguf"))
    assert read_gguf(tmp_path / "out.gguf").value("qwen3moe.expert_count") == 4
    assert PruningPlan.load(tmp_path / "out.gguf").retained[0] == tuple(RETAINED)


def test_a_table_of_ids_names_retained_experts(tmp_path: Path) -> None:
    tensors: Tensors = moe_tensors([0, 1])
    table = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (96, 1)), axis=1)[:, :2]
    tensors["blk.0.ffn_gate_tid2eid.weight"] = np.ascontiguousarray(table)
    source = write_gguf(tmp_path / "a.gguf", tensors, "deepseek4")
    plan_for(tensors, model_type="deepseek_v4").apply_to_checkpoint(source, tmp_path / "out.gguf")
    after, kind = read_tensors(tmp_path / "out.gguf")["blk.0.ffn_gate_tid2eid.weight"]
    assert (after.shape, kind) == (table.shape, Type.I32)
    assert after.min() >= 0 and after.max() < 4 and (after[:, 0] != after[:, 1]).all()
    kept = np.isin(table, RETAINED)
    assert np.array_equal(np.array(RETAINED)[after][kept], table[kept])


def test_heads_keep_as_many_experts_as_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file has one number; of a head without statistics the largest rows of its router stay."""
    tensors = moe_tensors([0, 1, 2])
    source = write_gguf(tmp_path / "a.gguf", tensors, "glm4moe", nextn_predict_layers=1)
    plan = plan_for(tensors, model_type="glm4_moe", layers=[0, 1])
    plan.apply_to_checkpoint(source, tmp_path / "out.gguf")
    stored = PruningPlan.load(tmp_path / "out.gguf")
    norms = np.linalg.norm(tensors["blk.2.ffn_gate_inp.weight"].astype(float), axis=1)
    largest = sorted(np.argsort(-norms)[:4].tolist())
    assert stored.heads == (2,) and list(stored.retained[2]) == largest and "layer 2" in caplog.text
    before, after = read_tensors(source), read_tensors(tmp_path / "out.gguf")
    name = "blk.2.ffn_down_exps.weight"
    assert np.array_equal(after[name][0], before[name][0][largest])

    chosen = replace(
        plan, retained={**plan.retained, 2: (1, 2, 4, 7)}, original_num_experts={0: 8, 1: 8, 2: 8}, heads=(2,)
    )
    chosen.apply_to_checkpoint(source, tmp_path / "b.gguf")
    assert np.array_equal(read_tensors(tmp_path / "b.gguf")[name][0], before[name][0][[1, 2, 4, 7]])
    without = write_gguf(tmp_path / "c.gguf", moe_tensors([0, 1]), "glm4moe")  # as most converters write it
    chosen.apply_to_checkpoint(without, tmp_path / "d.gguf")
    assert PruningPlan.load(tmp_path / "d.gguf").heads == ()


def test_heads_keep_as_many_experts_of_each_group(tmp_path: Path) -> None:
    tensors = moe_tensors([0, 1])
    tensors["blk.1.ffn_gate_inp.weight"][:4] *= 10
    numbers = {"nextn_predict_layers": 1, "expert_group_count": 2, "expert_group_used_count": 1}
    source = write_gguf(tmp_path / "a.gguf", tensors, "deepseek2", **numbers)
    plan = plan_for(tensors, (0, 3, 4, 7), "deepseek_v3", layers=[0])
    plan.apply_to_checkpoint(source, tmp_path / "out.gguf")
    norms = np.linalg.norm(tensors["blk.1.ffn_gate_inp.weight"].astype(float), axis=1)
    best = [*np.argsort(-norms[:4])[:2], *(4 + np.argsort(-norms[4:])[:2])]
    assert PruningPlan.load(tmp_path / "out.gguf").retained[1] == tuple(sorted(map(int, best)))


def test_quantised_routers_are_known_by_their_sketch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = moe_tensors()
    plan = plan_for(tensors)
    for layer in (0, 1):
        name = f"blk.{layer}.ffn_gate_inp.weight"
        tensors[name] = quantised(tensors[name], Type.Q4_0)
    source = write_gguf(tmp_path / "a.gguf", tensors)
    prepared = form_of(source).prepare(plan, source, tmp_path / "out.gguf")
    assert prepared.facts["known_by"] == "by a sketch of their numbers" and "sketch" in prepared.summary
    prepared.write()
    assert_cut(read_tensors(source), read_tensors(tmp_path / "out.gguf"))
    with pytest.raises(ValueError, match="other router weights"):
        plan_for(moe_tensors(seed=1)).apply_to_checkpoint(source, tmp_path / "b.gguf")
    caplog.clear()
    plan_for(moe_tensors(), known=False).apply_to_checkpoint(source, tmp_path / "b.gguf")
    assert "not proven" in caplog.text


def test_a_sketch_proves_as_well_where_a_plan_has_no_fingerprint(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", moe_tensors())
    for seed, same in ((0, True), (1, False)):
        plan = plan_for(moe_tensors(seed=seed))
        model = {name: value for name, value in plan.made_for.items() if "fingerprint" not in name}
        plan = replace(plan, provenance={"model": model})
        if same:
            facts = form_of(source).prepare(plan, source, tmp_path / "out.gguf").facts
            assert facts["known_by"] == "by a sketch of their numbers"
        else:
            with pytest.raises(ValueError, match="other router weights"):
                plan.apply_to_checkpoint(source, tmp_path / "out.gguf")


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16])
def test_routers_in_half_precision_are_known(tmp_path: Path, kind: Type) -> None:
    tensors = moe_tensors()
    plan = plan_for(tensors)
    for layer in (0, 1):
        name = f"blk.{layer}.ffn_gate_inp.weight"
        tensors[name] = quantised(tensors[name], kind)
    source = write_gguf(tmp_path / "a.gguf", tensors)
    facts = form_of(source).prepare(plan, source, tmp_path / "out.gguf").facts
    assert facts["known_by"] == "by their numbers"


def test_an_architecture_of_ones_own_is_known_by_its_routers(tmp_path: Path) -> None:
    tensors = moe_tensors()
    source = write_gguf(tmp_path / "a.gguf", tensors, "grok")
    plan_for(tensors, model_type="of_my_own").apply_to_checkpoint(source, tmp_path / "out.gguf")
    with pytest.raises(ValueError, match=r"'of_my_own' model, and .* is a 'grok' model by llama\.cpp's names"):
        plan_for(tensors, model_type="of_my_own", known=False).apply_to_checkpoint(source, tmp_path / "b.gguf")


def test_a_retained_expert_that_is_not_finite_ends_it(tmp_path: Path) -> None:
    tensors = moe_tensors()
    tensors["blk.1.ffn_up_exps.weight"][5, 3, 3] = np.nan
    source = write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(RunError, match=r"blk.1.ffn_up_exps.weight holds NaN"):
        plan_for(tensors).apply_to_checkpoint(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    plan_for(tensors, (0, 1, 2, 3)).apply_to_checkpoint(source, tmp_path / "out.gguf")  # it goes


def test_an_earlier_output_is_replaced_if_nobody_changed_it(tmp_path: Path) -> None:
    tensors = moe_tensors()
    source, out = write_gguf(tmp_path / "a.gguf", tensors), tmp_path / "out.gguf"
    plan_for(tensors).apply_to_checkpoint(source, out)
    other = plan_for(tensors, (1, 2, 3))
    with pytest.raises(ValueError, match="exists"):
        other.apply_to_checkpoint(source, out)
    other.apply_to_checkpoint(source, out, overwrite=True)
    assert read_gguf(out).value("qwen3moe.expert_count") == 3
    content, file = bytearray(out.read_bytes()), read_gguf(out)
    at = file.keys["general.name"].at + 8
    content[at : at + 4] = b"Mine"
    out.write_bytes(content)
    with pytest.raises(ValueError, match="changed since this package wrote it"):
        other.apply_to_checkpoint(source, out, overwrite=True)
    foreign = write_gguf(tmp_path / "foreign.gguf", tensors)
    before = foreign.read_bytes()
    with pytest.raises(ValueError, match=f"no key {GGUF_PLAN_KEY}"):
        other.apply_to_checkpoint(source, foreign, overwrite=True)
    assert foreign.read_bytes() == before
    with pytest.raises(ValueError, match="what is read"):
        plan_for(read := {n: v for n, (v, _) in read_tensors(out).items()}, (0, 1), experts=3).apply_to_checkpoint(
            _mended(out, b"Tiny"), out, overwrite=True
        )
    plan_for(read, (0, 1), experts=3).apply_to_checkpoint(out, tmp_path / "twice.gguf")
    twice = PruningPlan.load(tmp_path / "twice.gguf")
    assert twice.provenance["parent"]["layers"]["0"]["retained"] == [1, 2, 3]


def _mended(path: Path, name: bytes) -> Path:
    content, at = bytearray(path.read_bytes()), read_gguf(path).keys["general.name"].at + 8
    content[at : at + 4] = name
    path.write_bytes(content)
    return path


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = moe_tensors()
    source = write_gguf(tmp_path / "a.gguf", tensors)
    plan_for(tensors).save(tmp_path / "plan.json")
    out = tmp_path / "out.gguf"
    begin = ["apply", "--model", source, "--plan", tmp_path / "plan.json"]
    code, said, _ = call(capsys, *begin, "--dry-run", "--json", out)
    facts = json.loads(said)
    assert code == 0 and not out.exists() and facts["dry_run"]
    assert (facts["original_num_experts"], facts["num_experts"], facts["architecture"]) == (8, 4, "qwen3moe")
    code, said, work = call(capsys, *begin, out)
    assert (code, said.strip()) == (0, str(out)) and "4 of 8 experts" in work
    assert facts["bytes"] == out.stat().st_size and facts["original_bytes"] == source.stat().st_size
    code, _, error = call(capsys, *begin, "--standalone", tmp_path / "b.gguf")
    assert code == 2 and "--standalone is for transformers checkpoints" in error
    code, _, error = call(capsys, "run", "--model", source, "--num-experts", 4, tmp_path / "b")
    assert code == 2 and "make a plan with the original checkpoint, and apply it to this file" in error


def test_a_table_of_values_is_read_as_it_is(tmp_path: Path) -> None:
    """What the library reads of the output is what was written, with one more key."""
    tensors = moe_tensors()
    source = write_gguf(tmp_path / "a.gguf", tensors)
    plan_for(tensors).apply_to_checkpoint(source, tmp_path / "out.gguf")
    before, after = (gguf.GGUFReader(path).fields for path in (source, tmp_path / "out.gguf"))
    changed = {name for name in before if before[name].contents() != after[name].contents()}
    assert changed == {"GGUF.kv_count", "qwen3moe.expert_count"}
    assert json.loads(after[GGUF_PLAN_KEY].contents())["layers"]["0"]["retained"] == RETAINED
    assert torch.equal(
        torch.from_numpy(read_tensors(tmp_path / "out.gguf")["blk.0.ffn_gate_inp.weight"][0]),
        torch.from_numpy(tensors["blk.0.ffn_gate_inp.weight"][RETAINED]),
    )
