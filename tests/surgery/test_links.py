# SPDX-License-Identifier: Apache-2.0
"""What a link leads to outside a model's folder is no part of the model, unless it is its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import load, make_tokenizer, save_checkpoint

from optimum_moe_prune import MoEPruner, PruningPlan, Source
from optimum_moe_prune.names import PLAN_NAME
from optimum_moe_prune.publishing.hub import _published

SECRET = '{"password": "hunter2"}'


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A model whose weights, and some of whose other files, are links to other places."""
    model = save_checkpoint("mixtral", tmp_path / "model", make_tokenizer())
    other_disk, private = tmp_path / "disk", tmp_path / "private"
    other_disk.mkdir()
    (private / "keys").mkdir(parents=True)
    (model / "model.safetensors").rename(other_disk / "weights-17")
    (model / "model.safetensors").symlink_to(other_disk / "weights-17")
    for name in ("generation_config.json", "README.md", "notes.json"):
        (private / name).write_text(SECRET)
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(private / name)
    (private / "keys" / "key.json").write_text(SECRET)
    (model / "assets").symlink_to(private / "keys")
    (model / "chat_template.jinja").symlink_to(model / "tokenizer.json")  # within
    return model


def test_links_that_lead_out_stay_out_and_weights_do_not(
    linked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pruner = MoEPruner.from_pretrained(linked, method="random", num_experts=4)
    pruner.prune_checkpoint(tmp_path / "files")
    pruner.prune(load(linked))
    pruner.save_pretrained(tmp_path / "memory")
    for out in (tmp_path / "files", tmp_path / "memory"):
        assert (out / "model.safetensors").is_file() and (out / "chat_template.jinja").is_file()
        assert not any(path.is_symlink() for path in out.rglob("*"))
        held = [path for path in out.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
        assert not held and not (out / "notes.json").exists() and not (out / "assets").exists()
    for name in ("generation_config.json", "README.md", "notes.json"):
        assert f"{name} of {linked} stays out of the pruned copy: a link that leads out of the folder" in caplog.text
    assert f"assets of {linked} stays out of the pruned copy: a link to a folder" in caplog.text


def test_snapshots_of_the_hubs_cache_are_links_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    save_checkpoint("mixtral", snapshot, make_tokenizer())
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / f"{number:040x}")
        path.symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    MoEPruner.from_pretrained(snapshot, method="random", num_experts=4).prune_checkpoint(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "generation_config.json").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").symlink_to(repository / "blobs" / f"{0:040x}")
    assert Source(str(other)).leads_out("tokenizer.json") is None


def test_links_are_not_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, private = tmp_path / "out", tmp_path / "private"
    PruningPlan("mixtral", 2, "reap", {0: (0, 3)}, {0: 4}).save(out)
    private.mkdir()
    for name in ("model.safetensors", "notes.txt"):
        (private / name).write_text(SECRET)
        (out / name).symlink_to(private / name)
    (out / "sub").symlink_to(private)
    (out / "mine.txt").write_text("published")
    assert _published(out) == ["mine.txt", "model.safetensors", PLAN_NAME]
    assert "notes.txt" in caplog.text and "sub of" in caplog.text


def test_what_people_leave_beside_a_model_is_not_carried(tmp_path: Path) -> None:
    model = save_checkpoint("mixtral", tmp_path / "model", make_tokenizer())
    kept = {path.name for path in model.iterdir()}
    for name in (
        ".env", ".git/config", ".cache/huggingface/token", "id_rsa", "server.pem", "credentials.json", "train.log",
        "optimizer.pt", "training_args.bin", "runs/events.out.tfevents.1", "wandb/config.yaml", "data.jsonl",
        "checkpoint-1/config.json", ".netrc", "aws_secret.txt",
    ):  # fmt: skip
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(SECRET)
    shutil.copy(model / "tokenizer.json", model / "tekken.json")
    MoEPruner.from_pretrained(model, method="random", num_experts=4).prune_checkpoint(tmp_path / "out")
    ours = {PLAN_NAME, ".moe_pruning_files.json", "moe_pruner_config.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").rglob("*")} == kept | {"tekken.json"} | ours
