# SPDX-License-Identifier: Apache-2.0
"""Surgery on files gives what surgery in memory gives, to the byte; damage is named before anything is written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_equal_states, load, make_model, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import optimum_moe_prune.surgery.files as checkpoint_module
from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan, RequestError, RunError
from optimum_moe_prune.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from optimum_moe_prune.names import LIST_NAME
from optimum_moe_prune.surgery.files import shard_bytes

BLOCK = {"mixtral": "block_sparse_moe", "qwen2_moe": "mlp", "qwen2_moe_norm": "mlp"}


def random_plan(folder: Path, allocation: str = "uniform", sparsity: float = 0.4) -> PruningPlan:
    """Uniform, or with layers that really differ."""
    for seed in range(20):
        config = MoEPrunerConfig(method="random", sparsity=sparsity, allocation=allocation, seed=seed)
        plan = MoEPruner.from_pretrained(folder, config)
        plan.prune(load(folder))
        assert plan.pruning_plan is not None
        if (plan.pruning_plan.uniform_num_experts is None) == (allocation == "global"):
            return plan.pruning_plan
    raise AssertionError("no seed gives such a plan")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(bits(tensor), bits(b[name])), name


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("fused", [False, True], ids=["numbered", "fused"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_same_bytes_as_surgery_in_memory(
    kind: str, allocation: str, fused: bool, sharded: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = tmp_path / "model"
    make_model(kind).to(torch.bfloat16).save_pretrained(
        source, save_original_format=not fused, max_shard_size="20KB" if sharded else "1GB"
    )
    tokenizer.save_pretrained(source)
    assert len(list(source.glob("*.safetensors"))) > 1 or not sharded
    plan = random_plan(source, allocation)
    pruned = load(source)
    in_memory = MoEPruner.from_plan(plan, source)
    in_memory.prune(pruned)
    in_memory.save_pretrained(tmp_path / "memory")
    plan.apply_to_checkpoint(source, tmp_path / "files", max_shard_size="15KB" if sharded else "5GB")

    written = tensors_of(tmp_path / "files")
    if not fused:
        assert_same_tensors(written, tensors_of(tmp_path / "memory"))
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 1 or not sharded
    assert (tmp_path / "files" / INDEX_FILE).exists() == sharded
    assert_equal_states(load(tmp_path / "files"), load(tmp_path / "memory"))
    assert_equal_states(load(tmp_path / "files"), pruned)
    names = {path.name for path in (tmp_path / "files").iterdir() if "safetensors" not in path.name} - {LIST_NAME}
    there = {path.name for path in (tmp_path / "memory").iterdir() if "safetensors" not in path.name}
    assert names | {LIST_NAME} == there  # the list holds digests of weights, whose files have other headers
    for name in names - {"README.md"}:
        assert (tmp_path / "files" / name).read_text() == (tmp_path / "memory" / name).read_text(), name
    cards = [(tmp_path / name / "README.md").read_text().rpartition("<!--")[0] for name in ("files", "memory")]
    assert cards[0].replace("files", "memory") == cards[1]


def test_only_the_pruning_keys_of_the_config_change(folder: Path, kind: str, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["rope_theta"], values["from_another_tool"] = 12345.0, {"a": [1, None]}
    values["torch_dtype"] = values.pop("dtype")
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "notes").mkdir()
    (folder / "notes" / "more.txt").write_text("come along")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("stay")
    (folder / "pytorch_model.bin").write_text("stay")
    (folder / "README.md").write_text("the base model's own")
    random_plan(folder).apply_to_checkpoint(folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    key = "num_local_experts" if kind == "mixtral" else "num_experts"
    assert written.pop(key) == values.pop(key) - 3
    assert written == values
    assert (tmp_path / "out" / "notes" / "more.txt").read_text() == "come along"
    assert not any((tmp_path / "out" / name).exists() for name in (".git", "pytorch_model.bin"))
    assert "Experts of" in (tmp_path / "out" / "README.md").read_text()
    assert (folder / "README.md").read_text() == "the base model's own"
    assert (tmp_path / "out" / "README.base.md").read_text() == "the base model's own"
    assert "[README.base.md](README.base.md)" in (tmp_path / "out" / "README.md").read_text()


def test_no_weights_are_loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(folder)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for kind in (AutoModelForCausalLM, PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: self.weight.is_meta or refuse())
    plan.apply_to_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "allocation"),
    [
        ("mixtral", "global"),
        ("qwen2_moe", "uniform"),
        *(
            pytest.param(kind, allocation, marks=pytest.mark.slow)
            for kind, allocation in (("mixtral", "uniform"), ("qwen2_moe", "global"), ("qwen2_moe_norm", "global"))
        ),
    ],
)
def test_in_a_process_that_knows_no_model(allocation: str, folder: Path, kind: str, tmp_path: Path) -> None:
    """Neither transformers' modelling code nor what this package adds to it is imported there."""
    plan = random_plan(folder, allocation)
    plan.apply_to_checkpoint(folder, tmp_path / "here")
    command = [sys.executable, "-m", "optimum_moe_prune", "apply", "--model", str(folder)]
    command += ["--plan", str(plan.save(tmp_path / "plan.json")), str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(tensors_of(tmp_path / "here"), tensors_of(tmp_path / "there"))
    assert (tmp_path / "here" / "config.json").read_bytes() == (tmp_path / "there" / "config.json").read_bytes()
    if allocation == "global" and kind == "mixtral":  # and of what it made, again
        again = random_plan(tmp_path / "there", "global", 0.2)
        command[5], command[-1] = str(tmp_path / "there"), str(tmp_path / "twice")
        again.save(tmp_path / "plan.json")
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_equal_states(load(tmp_path / "twice"), again.apply(load(tmp_path / "there")))


def test_pruning_twice_and_a_plan_from_the_first(folder: Path, tmp_path: Path) -> None:
    first = random_plan(folder, "global", 0.2)
    first.apply_to_checkpoint(folder, tmp_path / "one", standalone=True)
    assert "auto_map" in json.loads((tmp_path / "one" / "config.json").read_text())
    again = MoEPruner.from_pretrained(tmp_path / "one", MoEPrunerConfig(method="random", num_experts=3))
    again.prune_checkpoint(tmp_path / "two")
    assert set(again.pruning_plan.num_experts.values()) == {3}
    assert not {"per_layer_config", "auto_map"} & set(json.loads((tmp_path / "two" / "config.json").read_text()))
    assert not (tmp_path / "two" / "modeling_unequal_moe.py").exists()
    assert again.pruning_plan.provenance["parent"]["method"] == "random"
    model = again.prune(load(tmp_path / "one"))
    assert_equal_states(load(tmp_path / "two"), model)
    repeated = MoEPruner.from_pretrained(tmp_path / "one")
    with pytest.raises(RequestError, match="this plan is for another model"):
        repeated.prune_checkpoint(tmp_path / "three")
    repeated.prune_checkpoint(tmp_path / "three", source=folder)
    assert_same_tensors(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "three"))


# ------------------------------------------------------------------------------------------- what models never load


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("fused", [False, True])
def test_float8_is_cut_as_bytes(dtype: torch.dtype, fused: bool, tmp_path: Path) -> None:
    source = tmp_path / "model"
    make_model().save_pretrained(source, save_original_format=not fused)
    plan = random_plan(source)

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(dtype)
            if not fused:
                tensors[f"{name}_scale_inv"] = torch.randn(1, 2)

    before = load_file(edit(source, quantise) / SINGLE_FILE)
    plan.apply_to_checkpoint(source, tmp_path / "out")
    after = load_file(tmp_path / "out" / SINGLE_FILE)
    for layer, retained in plan.retained.items():
        if fused:
            for name in ("gate_up_proj", "down_proj"):
                path = f"model.layers.{layer}.mlp.experts.{name}"
                assert after[path].dtype == dtype
                assert torch.equal(bits(after[path]), bits(before[path])[list(retained)])
            continue
        for new, old in enumerate(retained):
            for part in ("w1.weight", "w2.weight", "w3.weight", "w1.weight_scale_inv"):
                path = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.{part}"
                assert torch.equal(bits(after[path.format(new)]), bits(before[path.format(old)]))
        assert f"model.layers.{layer}.block_sparse_moe.experts.{len(retained)}.w1.weight" not in after


def test_what_the_model_does_not_load_is_kept(folder: Path, kind: str, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mtp.layers.0.proj.weight"] = torch.randn(3, 5)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(4)
        tensors["a.number"] = torch.tensor(3, dtype=torch.int32)

    random_plan(edit(folder, add)).apply_to_checkpoint(folder, tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    for name in ("mtp.layers.0.proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "a.number"):
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.experts.0.w1.weight", "model.layers.3.mlp.experts.gate_up_proj"])
def test_experts_of_extra_heads(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer)
    edit(folder, lambda tensors: tensors.update({name: torch.ones(8, 2)}))
    with pytest.raises(RequestError, match=f"{name}.* are experts outside the model's layers"):
        random_plan(folder).apply_to_checkpoint(folder, tmp_path / "out")
    random_plan(folder, "global").apply_to_checkpoint(folder, tmp_path / "out")  # the model-wide number stays 8
    assert tensors_of(tmp_path / "out")[name].shape == (8, 2)


def test_tied_weights(kind: str, tmp_path: Path) -> None:
    make_model(kind, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    assert "lm_head.weight" not in tensors_of(tmp_path / "model")
    plan = random_plan(tmp_path / "model")
    plan.apply_to_checkpoint(tmp_path / "model", tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_equal_states(loaded, plan.apply(load(tmp_path / "model")))


def test_a_checkpoint_of_the_bare_decoder(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "bare")
    plan = random_plan(tmp_path / "whole")
    assert not any(name.startswith("model.") for name in tensors_of(tmp_path / "bare"))
    plan.apply_to_checkpoint(tmp_path / "whole", tmp_path / "out")
    plan.apply_to_checkpoint(tmp_path / "bare", tmp_path / "out_bare")
    whole, bare = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "out_bare")
    assert_same_tensors({k.removeprefix("model."): v for k, v in whole.items() if k.startswith("model.")}, bare)


def test_metadata_of_files_and_index(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    for path in (tmp_path / "model").glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", "origin": "somewhere"})
    index = json.loads((tmp_path / "model" / INDEX_FILE).read_text())
    index["metadata"]["mine"] = "yes"
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps(index))
    random_plan(tmp_path / "model").apply_to_checkpoint(tmp_path / "model", tmp_path / "out", max_shard_size="20KB")
    opened = Checkpoint.open(tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    assert opened.metadata == {"format": "pt", "origin": "somewhere"}
    assert opened.index_metadata["mine"] == "yes"
    assert opened.index_metadata["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert opened.index_metadata["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert sum(t.nbytes for t in load_file(path).values()) <= max(20_000, largest)


# ------------------------------------------------------------------------------------------- how bytes travel


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EXDEV, 0])
def test_without_copying_by_the_system(
    error: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(folder)
    plan.apply_to_checkpoint(folder, tmp_path / "by_system")

    def refuse(*_: object) -> int:
        if error == 0:
            return 0  # some file systems say so
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    plan.apply_to_checkpoint(folder, tmp_path / "by_hand")
    for name in sorted(path.name for path in (tmp_path / "by_system").iterdir()):
        if name != "README.md":
            assert (tmp_path / "by_hand" / name).read_bytes() == (tmp_path / "by_system" / name).read_bytes()


Copy = Callable[[int, int, int, int, int], int]


def lost(real: Copy) -> Copy:
    """Zeros in place of what was asked for."""
    return lambda source, target, count, begin, position: os.pwrite(target, bytes(count), position)


def shifted(real: Copy) -> Copy:
    """The bytes eight before."""
    return lambda source, target, count, begin, position: real(source, target, count, begin - 8, position)


def beyond(real: Copy) -> Copy:
    """Eight bytes too far, so that the file becomes longer."""
    return lambda source, target, count, begin, position: real(source, target, count, begin, position + 8)


@pytest.mark.parametrize("wrong", [lost, shifted, beyond])
def test_what_was_written_is_read_back(
    wrong: Callable[[Copy], Copy], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(folder)
    monkeypatch.setattr(os, "copy_file_range", wrong(os.copy_file_range))
    with pytest.raises(RunError, match="was not written as it should be"):
        plan.apply_to_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_source_that_changes_meanwhile(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(folder)
    other = load(folder)
    for parameter in other.model.layers[0].self_attn.parameters():
        parameter.data.neg_()
    other.save_pretrained(tmp_path / "other")
    select = checkpoint_module.select

    def replaced(*arguments: object) -> object:
        os.replace(tmp_path / "other" / SINGLE_FILE, folder / SINGLE_FILE)
        return select(*arguments)

    with monkeypatch.context() as patched, pytest.raises(RunError, match="was changed while it was read"):
        patched.setattr(checkpoint_module, "select", replaced)
        plan.apply_to_checkpoint(folder, tmp_path / "out")
    write = checkpoint_module._write_file
    with monkeypatch.context() as patched, pytest.raises(RunError, match="was changed while it was read"):
        patched.setattr(checkpoint_module, "_write_file", lambda *a: (write(*a), os.utime(folder / SINGLE_FILE)))
        plan.apply_to_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_lies_beside_a_checkpoint(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that transformers does not load from there are named and left; earlier outputs are no part of it."""
    plan = random_plan(folder)
    save_file({"a": torch.ones(2)}, folder / "mtp.safetensors")
    plan.apply_to_checkpoint(folder, folder / "first")
    assert "mtp.safetensors" in caplog.text and "is not looked at" in caplog.text
    plan.apply_to_checkpoint(folder, tmp_path / "second")
    names = {path.relative_to(tmp_path / "second").as_posix() for path in (tmp_path / "second").rglob("*")}
    assert "mtp.safetensors" not in names and not any(name.startswith("first") for name in names)


def test_a_target_that_is_a_link(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(folder)
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large_disk")
    plan.apply_to_checkpoint(folder, tmp_path / "out")
    plan.apply_to_checkpoint(folder, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "large_disk" / SINGLE_FILE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large_disk", "model", "out"]
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(RequestError, match="mounted is where a disk is mounted"):
        plan.apply_to_checkpoint(folder, tmp_path / "mounted")


def test_options_of_the_hub_and_another_source(folder: Path, tmp_path: Path) -> None:
    plan = random_plan(folder)
    plan.apply_to_checkpoint(folder, tmp_path / "out", revision="main", token=None, cache_dir=tmp_path)
    pruner = MoEPruner(MoEPrunerConfig(method="reap", num_experts=4))  # bound to nothing: all comes from the source
    pruner.prune_checkpoint(tmp_path / "other", source=folder, calibration=["w1 w2 w3", "w4 w5"])
    assert pruner.pruning_plan is not None and pruner.stats is not None
    assert PruningPlan.load(tmp_path / "other").retained == pruner.pruning_plan.retained
    with pytest.raises(RequestError, match="is not bound to a checkpoint"):
        pruner.prune_checkpoint(tmp_path / "more")


@pytest.mark.parametrize("name", ["model.layers.0.{}.experts.\u00b2.a", "model.layers.{}9.mlp.experts.0.a"])
def test_odd_names(name: str, folder: Path, kind: str, tmp_path: Path) -> None:
    name = name.format("9" * 5000 if "{}9" in name else BLOCK[kind])
    plan = random_plan(folder)
    edit(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(RequestError, match=r"holds its experts twice|are experts outside the model's layers"):
        plan.apply_to_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize("size", ["", "5 XB", "0", "-1", "1.5GB", 0, None])
def test_sizes_of_files(size: object, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="max_shard_size is"):
        random_plan(folder).apply_to_checkpoint(folder, tmp_path / "out", max_shard_size=size)
    assert [shard_bytes(s) for s in (7, "7", "7kb", "5GB", "2 MB")] == [7, 7, 7000, 5 * 10**9, 2 * 10**6]


# ------------------------------------------------------------------------------------------- damage


def shard(folder: Path) -> list[Path]:
    """Split a checkpoint into files."""
    load(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / SINGLE_FILE).unlink()
    return sorted(folder.glob("*.safetensors"))


def change_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def experts(folder: Path, end: str) -> str:
    return next(name for name in sorted(tensors_of(folder)) if ".experts." in name and name.endswith(end))


def twice_under_two_names(folder: Path) -> str:
    name = next(n for n in tensors_of(folder) if n.endswith(".gate.weight"))
    bare = name.removeprefix("model.")
    edit(folder, lambda tensors: tensors.update({bare: tensors[name].clone()}))
    return f"({name} and {bare}|{bare} and {name}) of .* are the same tensor under two names"


def config_that_is_no_json(folder: Path) -> str:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"threshold": Infinity,', 1))
    return "config.json cannot be read as JSON: Infinity is not JSON"


def missing_shard(folder: Path) -> str:
    files = shard(folder)
    files[1].unlink()
    return f"{files[1].name} is missing; the index says that it holds"


def truncated_shard(folder: Path) -> str:
    files = shard(folder)
    files[2].write_bytes(files[2].read_bytes()[:-1])
    return f"{files[2].name} is damaged"


def corrupt_header(folder: Path) -> str:
    data = bytearray((folder / SINGLE_FILE).read_bytes())
    data[40] = 0xFF
    (folder / SINGLE_FILE).write_bytes(data)
    return f"{SINGLE_FILE} is damaged"


def absent_tensor(folder: Path) -> str:
    files = shard(folder)
    change_index(folder, lambda weights: weights.update({"model.nothing": files[0].name}))
    return f"says that model.nothing is in {files[0].name}, and it is not"


def absent_file(folder: Path) -> str:
    shard(folder)
    change_index(folder, lambda weights: weights.update({"model.nothing": "more.safetensors"}))
    return "more.safetensors is missing; the index says that it holds model.nothing"


def file_elsewhere(folder: Path) -> str:
    shard(folder)
    change_index(folder, lambda weights: weights.update({"model.nothing": "../more.safetensors"}))
    return "model.nothing is in '../more.safetensors', which is no safetensors file beside it"


def no_weight_map(folder: Path) -> str:
    shard(folder)
    (folder / INDEX_FILE).write_text("{}")
    return "has no weight_map"


def twice(folder: Path) -> str:
    files = shard(folder)
    name = next(iter(load_file(files[1])))
    save_file({**load_file(files[0]), name: torch.ones(2)}, files[0], metadata={"format": "pt"})
    return f"{name} is in two files of .*{files[0].name} and {files[1].name}"


def no_safetensors(folder: Path) -> str:
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")
    return "has no safetensors files"


def missing_expert(folder: Path) -> str:
    name = experts(folder, "2.w2.weight" if "mixtral" in str(load(folder).config.model_type) else "2.down_proj.weight")
    edit(folder, lambda tensors: tensors.pop(name, None) is None or None)
    return f"{name} is missing"


def further_expert(folder: Path) -> str:
    name = experts(folder, "weight")
    more = name.replace(".experts.0.", ".experts.9.")
    edit(folder, lambda tensors: tensors.update({more: tensors[name].clone()}))
    return f"{SINGLE_FILE}: {more} is there, and config.json says"


def missing_projection(folder: Path) -> str:
    end = experts(folder, "weight").split(".experts.0.")[1]

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(f".{end}") and ".layers.2." in name]:
            if ".experts." in name:
                del tensors[name]

    edit(folder, remove)
    return f"layer 2 of .* no expert has '{end.removesuffix('.weight')}'"


def shape_of_an_expert(folder: Path) -> str:
    name = experts(folder, "weight")
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    return f"{SINGLE_FILE}: {name} has shape .* and config.json says"


def shape_of_a_router(folder: Path) -> str:
    name = next(n for n in tensors_of(folder) if n.endswith((".mlp.gate.weight", "block_sparse_moe.gate.weight")))
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    return f"{SINGLE_FILE}: {name} has shape .* and config.json says"


def missing_router(folder: Path) -> str:
    name = next(n for n in tensors_of(folder) if n.endswith((".mlp.gate.weight", "block_sparse_moe.gate.weight")))
    edit(folder, lambda tensors: tensors.pop(name, None) is None or None)
    return "the router's mlp.gate.weight is missing"


def missing_experts(folder: Path) -> str:
    edit(
        folder,
        lambda tensors: [tensors.pop(n) for n in list(tensors) if ".layers.2." in n and ".experts." in n] and None,
    )
    return "layer 2 of .* has a router and no experts"


def missing_layer(folder: Path) -> str:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.2." in n and (".experts." in n or ".gate." in n)]:
            del tensors[name]

    edit(folder, remove)
    return "hold no experts of layer 2, which the plan names; the checkpoint is damaged"


def no_experts(folder: Path) -> str:
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".experts." in n or ".gate." in n] and None)
    return "hold no experts of a"


def another_number(folder: Path) -> str:
    values = json.loads((folder / "config.json").read_text())
    for key in {"num_experts", "num_local_experts"} & set(values):
        values[key] -= 1
    (folder / "config.json").write_text(json.dumps(values))
    return "is for another model, with"


def other_routers(folder: Path) -> str:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(".gate.weight"):
                tensors[name] = tensors[name] + 1

    edit(folder, change)
    return "was made for a model with other router weights"


DAMAGE = [
    missing_shard, truncated_shard, corrupt_header, absent_tensor, absent_file, file_elsewhere, no_weight_map, twice,
    no_safetensors, missing_expert, further_expert, missing_projection, shape_of_an_expert, shape_of_a_router,
    missing_router, missing_experts, no_experts, another_number, other_routers, twice_under_two_names,
    config_that_is_no_json, missing_layer,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_before_anything_is_written(
    damage: Callable[[Path], str], folder: Path, tmp_path: Path
) -> None:
    plan = random_plan(folder)
    message = damage(folder)
    with pytest.raises(RequestError, match=message):
        plan.apply_to_checkpoint(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("fused", [False, True])
def test_fused_experts_of_another_shape(fused: bool, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model", save_original_format=False)
    plan = random_plan(tmp_path / "model")
    name = "model.layers.1.mlp.experts.down_proj"
    if fused:
        edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name][1:].contiguous()}))
        message = f"{name} has shape .* and config.json says 8 experts"
    else:
        edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name][:, 1:].contiguous()}))
        message = "an expert has .* weights, and config.json says"
    with pytest.raises(RequestError, match=message):
        plan.apply_to_checkpoint(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["router", "expert"])
def test_weights_that_are_not_finite(what: str, value: float, folder: Path, kind: str, tmp_path: Path) -> None:
    plan = random_plan(folder)
    layer = max(plan.retained)
    kept, pruned = plan.retained[layer][-1], min(set(range(7)) - set(plan.retained[layer]))
    last = "w3" if kind == "mixtral" else "up_proj"
    path = f"model.layers.{layer}.{BLOCK[kind]}."
    path += "gate.weight" if what == "router" else f"experts.{{}}.{last}.weight"
    if what == "expert":  # what is pruned is not read
        edit(folder, lambda tensors: tensors[path.format(pruned)].view(-1)[-1:].fill_(value) and None)
        plan.apply_to_checkpoint(folder, tmp_path / "fine")
    name = path.format(kept)
    edit(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value) and None)
    with pytest.raises(RunError, match=f"{SINGLE_FILE}: {name} holds NaN or infinite weights"):
        plan.apply_to_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_disk_without_room(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(folder)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RequestError, match=r"takes [0-9.]+ [kM]B, and 1 kB are free there"):
        plan.apply_to_checkpoint(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_settings_follow_the_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """From file to file and from memory: names of experts in ``config.json`` and beside it are those of after."""
    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer)
    plan = random_plan(folder)
    kept, gone = plan.retained[1][-1], next(e for e in range(8) if e not in plan.retained[1])
    start = "model.layers.1.block_sparse_moe.experts"
    new = len(plan.retained[1]) - 1
    named = ["lm_head", f"{start}.{gone}.w1", f"{start}.{kept}.w1", f"re:.*layers.1.*experts.{kept}.w2"]
    beside = {"quantization": {"exclude_modules": [f"{start}.{kept}", f"{start}.{gone}"]}, "num_experts": 8}
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "compressed-tensors", "ignore": named}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    plan.apply_to_checkpoint(folder, tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored[:2] == ["lm_head", f"{start}.{new}.w1"]
    modules = [f"{start}.{number}.w2" for number in range(len(plan.retained[1]))]
    patterns = [re.compile(entry.removeprefix("re:")) for entry in ignored[2:]]
    assert [m for m in modules if any(pattern.match(m) for pattern in patterns)] == [f"{start}.{new}.w2"]
    written = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert written == {"quantization": {"exclude_modules": [f"{start}.{new}"]}, "num_experts": len(plan.retained[1])}

    values["quantization_config"]["ignore"] = [f"experts.{kept}.w1"]  # of which layer?
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(RequestError, match=r"config.json.*experts"):
        plan.apply_to_checkpoint(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()
