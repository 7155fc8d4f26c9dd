# SPDX-License-Identifier: Apache-2.0
"""GGUF files that a plan does not fit, or that are damaged: one line each, and nothing is written."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from optimum_moe_prune.errors import RequestError, RunError
from optimum_moe_prune.storage.gguf_files import read_gguf
from tests.formats.gguf_models import EXPERTS, HIDDEN, floats, moe_tensors, plan_for, quantised, write_gguf


def refused(folder: Path, source: Path, said: str, plan: Any = None, name: str = "out.gguf", **options: Any) -> None:
    """Applying a plan is refused in one line, and leaves the folder as it was."""
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with pytest.raises(RequestError, match=said) as caught:
        (plan or plan_for(moe_tensors())).apply_to_checkpoint(source, folder / name, **options)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            {"model_type": "mixtral", "top_k": 1},
            r"for a 'mixtral' model, and .*a.gguf is a 'qwen3moe' model .*expected: llama",
        ),
        ({"top_k": 3}, r"with top_k 3; .* has qwen3moe.expert_used_count = 2"),
        ({"layers": [0]}, "with experts in layers 0; .* has them in layers 0-1"),
        (
            {"retained": {0: (0, 1), 1: (0, 1, 2)}},
            "keep 2 to 3 experts, and a GGUF file has one .*--allocation uniform",
        ),
    ],
)
def test_a_plan_for_another_model(tmp_path: Path, plan: dict[str, Any], said: str) -> None:
    tensors = moe_tensors()
    refused(tmp_path, write_gguf(tmp_path / "a.gguf", tensors), said, plan_for(tensors, **plan))


def test_a_plan_for_another_number_of_experts_or_other_routers(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", moe_tensors())
    larger = plan_for(moe_tensors(experts=16), experts=16)
    refused(tmp_path, source, "with 16 experts in layer 0; .* has 8", larger)
    other = moe_tensors()
    other["blk.1.ffn_gate_inp.weight"][7, 3] += 0.05
    refused(tmp_path, source, "made for a model with other router weights", plan_for(other))
    swapped = moe_tensors()
    router = swapped["blk.1.ffn_gate_inp.weight"]
    router[[0, 1]] = router[[1, 0]]
    refused(tmp_path, source, "made for a model with other router weights", plan_for(swapped))
    refused(tmp_path, source, "for a 'mixtral' model, and .* is a 'qwen3moe'", plan_for(swapped, model_type="mixtral"))


def test_groups_of_experts(tmp_path: Path) -> None:
    tensors, groups = moe_tensors(), {"expert_group_count": 4, "expert_group_used_count": 2}
    source = write_gguf(tmp_path / "a.gguf", tensors, "deepseek2", **groups)
    plan = plan_for(tensors, (0, 2, 4, 6), "deepseek_v3")
    refused(tmp_path, source, "4 experts, and the router has 4 groups .*more experts than groups. Keep 8", plan)
    groups["expert_group_count"] = 2
    source = write_gguf(tmp_path / "a.gguf", tensors, "deepseek2", **groups)
    uneven = plan_for(tensors, (0, 1, 2, 6), "deepseek_v3")
    refused(tmp_path, source, "layer 0: the plan retains 3, 1 experts of the router's 2 groups", uneven)
    plan.apply_to_checkpoint(source, tmp_path / "out.gguf")


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    """At every place in the header, and in the tensors."""
    content = write_gguf(tmp_path / "whole.gguf", moe_tensors()).read_bytes()
    data = read_gguf(tmp_path / "whole.gguf").data
    short, plan = tmp_path / "a.gguf", plan_for(moe_tensors())
    for size in [*range(5, data, 97), data, data + 1, len(content) // 2]:
        short.write_bytes(content[:size])
        with pytest.raises(RequestError, match=r"truncated|ends within its header|damaged"):
            plan.apply_to_checkpoint(short, tmp_path / "out.gguf")
    short.write_bytes(content[: len(content) // 2])
    refused(tmp_path, short, r"a.gguf is truncated: it has \d+ bytes, and .* ends at \d+. Fetch it again")
    short.write_bytes(content[: data // 2])
    refused(tmp_path, short, r"ends within its header")


def damaged(change: Callable[[bytearray, Any], None]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        source = write_gguf(folder / "a.gguf", moe_tensors())
        content = bytearray(source.read_bytes())
        change(content, read_gguf(source))
        source.write_bytes(content)
        return source

    return made


def _type_number(content: bytearray, file: Any) -> None:
    struct.pack_into("<I", content, file.infos[1] - 12, 199)  # of the last tensor


def _version(content: bytearray, file: Any) -> None:
    struct.pack_into("<I", content, 4, 1)


def _dimensions(content: bytearray, file: Any) -> None:
    at = bytes(content).index(b"token_embd.weight") + 17
    struct.pack_into("<I", content, at, 77)


def _key_type(content: bytearray, file: Any) -> None:
    struct.pack_into("<I", content, file.keys["general.name"].at - 4, 99)


def _many_keys(content: bytearray, file: Any) -> None:
    struct.pack_into("<Q", content, 16, 2**60)


def _twice(content: bytearray, file: Any) -> None:
    at = bytes(content).index(b"blk.1.ffn_norm.weight")
    content[at : at + 21] = b"blk.0.ffn_norm.weight"


def _length(content: bytearray, file: Any) -> None:
    struct.pack_into("<Q", content, file.keys["general.name"].at, 2**63)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_type_number, r"blk.1.ffn_norm.weight is of the tensor type 199, which gguf [\d.]+ does not know"),
        (_version, "GGUF file of version 1; versions 2 and 3 are read"),
        (_dimensions, "damaged: token_embd.weight has 77 dimensions"),
        (_key_type, "damaged: the key 'general.name' has a value of type 99"),
        (_many_keys, "ends within its header"),
        (_twice, "damaged: it names the tensor 'blk.0.ffn_norm.weight' twice"),
        (_length, "ends within its header"),
    ],
)
def test_a_damaged_file(tmp_path: Path, change: Callable[[bytearray, Any], None], said: str) -> None:
    refused(tmp_path, damaged(change)(tmp_path), said)


def test_what_is_no_model_of_experts(tmp_path: Path) -> None:
    source = tmp_path / "a.gguf"
    source.write_text("no\n")
    refused(tmp_path, source, "is no GGUF file")
    source.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    refused(tmp_path, source, r"Git LFS pointer to one \(git lfs pull\)")
    dense = {"blk.0.ffn_up.weight": floats(8, HIDDEN, seed=0)}
    refused(tmp_path, write_gguf(source, dense, "llama", experts=0), "holds no experts: it is a 'llama' model")
    refused(tmp_path, write_gguf(source, dense, "qwen3moe"), "says that it has 8 experts .* holds no tensor of one")
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path, source, "is of type 'adapter' .*, and a model is needed")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (
            "blk.0.ffn_new_thing.weight",
            (HIDDEN, EXPERTS),
            r"what blk.0.ffn_new_thing.weight \[64, 8\] holds is not known",
        ),
        ("blk.3.ffn_new_thing.weight", (EXPERTS,), "is not known, and it may count the 8 experts"),
        ("output_exps.weight", (EXPERTS, 4), "is not known"),
        ("blk.0.ffn_up_chexps.weight", (4, HIDDEN), "experts that several others share"),
        ("blk.0.ffn_up_exps.bias", (4, HIDDEN), r"shape \[4, 64\], and qwen3moe.expert_count is 8"),
        ("blk.0.ffn_up.2.weight", (4, HIDDEN), "layer 0 has its experts in one tensor and also one by one"),
        ("blk.2.ffn_up_exps.weight", (EXPERTS, HIDDEN), r"layer 2 has experts and no router"),
    ],
)
def test_a_tensor_that_may_hold_experts(tmp_path: Path, name: str, shape: tuple[int, ...], said: str) -> None:
    source = write_gguf(tmp_path / "a.gguf", moe_tensors() | {name: floats(*shape, seed=5)})
    refused(tmp_path, source, said)


def test_tensors_that_are_not_known_and_hold_no_experts(tmp_path: Path) -> None:
    more = {"blk.0.ffn_new_thing.weight": floats(HIDDEN, HIDDEN, seed=5), "new.weight": floats(3, seed=6)}
    source = write_gguf(tmp_path / "a.gguf", moe_tensors() | more)
    plan_for(moe_tensors()).apply_to_checkpoint(source, tmp_path / "out.gguf")
    assert read_gguf(tmp_path / "out.gguf").tensors.keys() == read_gguf(source).tensors.keys()


def test_biases_whose_experts_share_blocks(tmp_path: Path) -> None:
    tensors = moe_tensors([0], experts=32)
    tensors["blk.0.exp_probs_b.bias"] = quantised(floats(32, seed=1), Type.Q8_0)
    source = write_gguf(tmp_path / "a.gguf", tensors, experts=32)
    plan = plan_for(tensors, range(16), experts=32)
    refused(tmp_path, source, r"exp_probs_b.bias \(Q8_0\) cannot be cut between experts", plan)


def test_keys_that_may_count_experts(tmp_path: Path) -> None:
    tensors = moe_tensors()
    source = write_gguf(tmp_path / "a.gguf", tensors, expert_bank_size=EXPERTS)
    refused(tmp_path, source, "the key qwen3moe.expert_bank_size may count the 8 experts")
    source = write_gguf(tmp_path / "a.gguf", tensors, expert_bank_size=5, expert_feed_forward_length=EXPERTS)
    plan_for(tensors).apply_to_checkpoint(source, tmp_path / "out.gguf")


def test_a_table_of_ids_that_are_not_there(tmp_path: Path) -> None:
    tensors = moe_tensors() | {"blk.0.ffn_gate_tid2eid.weight": np.full((96, 2), 8, dtype=np.int32)}
    source = write_gguf(tmp_path / "a.gguf", tensors, "deepseek4")
    refused(tmp_path, source, "names experts that there are not", plan_for(tensors, model_type="deepseek_v4"))


def test_one_of_several_files(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", moe_tensors(), in_parts_of=4)
    second = first.with_name("a-00002-of-00003.gguf")
    refused(tmp_path, second, r"a later part of a model of 3 files; name the first \(a-00001-of-00003.gguf\)")
    renamed = tmp_path / "b.gguf"
    renamed.write_bytes(first.read_bytes())
    refused(tmp_path, renamed, "is one of 3 parts, and its name does not say where the others are")
    third = first.with_name("a-00003-of-00003.gguf").read_bytes()
    content = second.read_bytes()
    second.write_bytes(third)
    refused(tmp_path, first, "a-00002-of-00003.gguf is not part 2 of 3")
    second.unlink()
    refused(tmp_path, first, "a-00002-of-00003.gguf is missing: .* is the first of 3 parts")
    second.write_bytes(content[: len(content) // 2])
    refused(tmp_path, first, "a-00002-of-00003.gguf is truncated")


def test_where_the_output_may_not_be(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", moe_tensors())
    refused(tmp_path, source, "must end in .gguf", name="out")
    refused(tmp_path, source, "a.gguf exists", name="a.gguf")
    refused(tmp_path, source, "a.gguf exists", name="absent/../a.gguf")
    refused(tmp_path, source, "a.gguf has no key moe_prune.plan", name="absent/../a.gguf", overwrite=True)
    refused(tmp_path, source, "name of one of several files", name="b-00001-of-00002.gguf")
    refused(tmp_path, source, "max_shard_size is for outputs of several files", max_shard_size="1GB")
    refused(tmp_path, source, "mtp is for transformers checkpoints, and .* is a GGUF file", mtp="keep")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path, source, "folder.gguf exists", name="folder.gguf")


def test_a_source_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_moe_prune.formats.gguf import writing

    source, copy = write_gguf(tmp_path / "a.gguf", moe_tensors()), writing.copy_ranges

    def meanwhile(*args: Any) -> None:
        copy(*args)
        source.write_bytes(source.read_bytes() + bytes(32))

    monkeypatch.setattr(writing, "copy_ranges", meanwhile)
    with pytest.raises(RunError, match=re.escape(f"{source} was changed while it was read")):
        plan_for(moe_tensors()).apply_to_checkpoint(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "a.gguf", moe_tensors())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(tmp_path, source, r"needs the \[gguf\] extra: pip install 'optimum-moe-prune\[gguf\]'")


def packed(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def tensor_info(name: str, kind: int, offset: int, *dimensions: int) -> bytes:
    begin = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dimensions))
    return begin + struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset)


ONE = packed("general.name", 8, struct.pack("<Q", 1) + b"x")
DEEP = struct.pack("<IQ", 9, 1) * 20 + struct.pack("<IQ", 4, 0)


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ([ONE, ONE], [], "it has the key 'general.name' twice"),
        ([packed("general.alignment", 4, struct.pack("<I", 33))], [], "alignment is 33, and must be a power of two"),
        ([packed("general.alignment", 6, struct.pack("<f", 32))], [], "alignment is 32.0, and must be"),
        ([packed("x", 9, DEEP)], [], "'x' holds arrays in arrays in arrays"),
        ([packed("x", 9, struct.pack("<IQ", 77, 1))], [], "'x' has a value of type 77"),
        ([ONE], [tensor_info("a", 0, 7, 4)], "a lies at 7, no multiple of 32"),
        ([ONE], [tensor_info("a", 0, 0, 2**40, 2**40)], "a has the shape"),
    ],
)
def test_a_damaged_header(tmp_path: Path, keys: list[bytes], tensors: list[bytes], said: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys + tensors) + bytes(99))
    with pytest.raises(RequestError, match=f"is damaged: .*{re.escape(said)}"):
        read_gguf(path)


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    tensors = moe_tensors() | {"blk.0.ffn_up_exps.weight": quantised(floats(EXPERTS, 32, HIDDEN, seed=3), Type.Q4_0)}
    source = write_gguf(tmp_path / "a.gguf", tensors)
    content = bytearray(source.read_bytes())
    struct.pack_into("<Q", content, bytes(content).index(b"blk.0.ffn_up_exps.weight") + 28, HIDDEN - 1)
    source.write_bytes(content)
    refused(tmp_path, source, "rows of blk.0.ffn_up_exps.weight have 63 numbers, and Q4_0 has blocks of 32")


def test_a_router_that_is_not_finite(tmp_path: Path) -> None:
    tensors = moe_tensors()
    tensors["blk.1.ffn_gate_inp.weight"][7, 0] = np.inf
    source = write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(RunError, match=r"blk.1.ffn_gate_inp.weight holds NaN or infinite weights"):
        plan_for(moe_tensors()).apply_to_checkpoint(source, tmp_path / "out.gguf")


def test_experts_of_their_own_that_are_not_whole(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in moe_tensors([0]).items() if "_exps" not in name}
    own = {
        f"blk.0.ffn_{name}.{e}.weight": floats(4, HIDDEN, seed=e) for e in range(EXPERTS) for name in ("up", "down")
    }
    plan = plan_for(tensors, model_type="mixtral")
    for gone, said in (
        (["blk.0.ffn_up.3.weight"], "expert 3 of layer 0 lacks blk.0.ffn_up.3.weight"),
        (["blk.0.ffn_up.3.weight", "blk.0.ffn_down.3.weight"], "layer 0 has 7 experts, and llama.expert_count is 8"),
    ):
        left = {name: tensor for name, tensor in own.items() if name not in gone}
        refused(tmp_path, write_gguf(tmp_path / "a.gguf", tensors | left, "llama"), said, plan)


def test_parts_of_two_models(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", moe_tensors(), in_parts_of=4)
    content, key = bytearray(first.read_bytes()), read_gguf(first).keys["split.tensors.count"]
    struct.pack_into("<i", content, key.at, 99)
    first.write_bytes(content)
    refused(tmp_path, first, "the 3 parts of .* hold 12 tensors, and its split.tensors.count says 99")
