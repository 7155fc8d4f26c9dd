# SPDX-License-Identifier: Apache-2.0
"""Models on the Hub: the real client against a small server on the loopback address; and no network for folders."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_model, make_texts, make_tokenizer
from hub_server import Hub, served
from oracles import assert_same_result

from optimum_moe_prune import CalibrationStats, MoEPruner
from optimum_moe_prune.commands import main

REPO, COMMIT = "some/model", "a" * 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    make_model(num_hidden_layers=4).save_pretrained(folder / "model", max_shard_size="40KB")
    make_tokenizer().save_pretrained(folder / "model")
    assert len(list((folder / "model").glob("*.safetensors"))) > 3
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(record) for record in make_texts()))
    return folder


@pytest.fixture
def hub(place: Path) -> Iterator[Hub]:
    with served() as server:
        server.publish(REPO, place / "model", COMMIT)
        yield server


def command(address: str, cache: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process whose Hub is at an address."""
    variables = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "optimum_moe_prune", *map(str, arguments)],
        capture_output=True, text=True, env=variables,
    )  # fmt: skip


def test_shards_are_fetched_once_and_when_they_are_needed(hub: Hub, place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    calibration = ["--calibration", place / "texts.jsonl", "--batch-size", 4]
    score = ["score", "--model", REPO, *calibration, "--method", "reap", "--stream", tmp_path / "stats"]
    result = command(hub.address, cache, *score)
    assert result.returncode == 0, result.stderr
    shards = {path.name for path in (place / "model").glob("*.safetensors")}
    assert hub.downloads() == dict.fromkeys(shards, 1)
    parts = {file for _, file, part in hub.asked if part is not None and file.endswith(".safetensors")}
    assert parts == shards  # headers alone, before anything was downloaded
    gets = [(file, part) for method, file, part in hub.asked if method == "GET" and file in shards]
    assert [part is None for _, part in gets] == [False] * len(shards) + [True] * len(shards)
    blobs = [path for path in (cache / "hub").rglob("*") if path.is_file() and not path.is_symlink()]
    total = sum(path.stat().st_size for path in (place / "model").glob("*.safetensors"))
    assert total < sum(path.stat().st_size for path in blobs) < 1.5 * total  # once, and small files beside

    pruner = MoEPruner.from_pretrained(place / "model", method="reap", num_experts=4, batch_size=4)
    pruner.prune_checkpoint(tmp_path / "expected", calibration=place / "texts.jsonl", stream=True)
    assert pruner.stats is not None and pruner.pruning_plan is not None
    found = CalibrationStats.load(tmp_path / "stats")
    assert found.model["revision"] == COMMIT and found.model["name_or_path"] == REPO
    for index, layer in pruner.stats.layers.items():
        assert all(layer.tensors[name].equal(found.layers[index].tensors[name]) for name in layer.tensors)

    # Everything is in the cache now: nothing is fetched again, and nothing is asked for when offline.
    plan = pruner.pruning_plan.save(tmp_path / "plan.json")
    hub.asked.clear()
    applied = command(hub.address, cache, "apply", "--model", REPO, "--plan", plan, tmp_path / "out")
    assert applied.returncode == 0, applied.stderr
    assert hub.downloads() == {} and not any(part for _, _, part in hub.asked)
    assert_same_result("apply", tmp_path / "out", tmp_path / "expected")
    hub.asked.clear()
    offline = ["apply", "--model", REPO, "--plan", plan, tmp_path / "offline"]
    result = command("http://127.0.0.1:9", cache, *offline, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert_same_result("apply", tmp_path / "offline", tmp_path / "expected")
    assert hub.asked == []


def test_a_server_that_gives_no_parts_of_files(hub: Hub, place: Path, tmp_path: Path) -> None:
    hub.without_ranges = True
    result = command(
        hub.address, tmp_path / "cache", "run", "--model", REPO, "--method", "random", "--num-experts", 4,
        tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert set(hub.downloads().values()) == {1}


def test_offline_and_not_in_the_cache(place: Path, tmp_path: Path) -> None:
    result = command(
        "http://127.0.0.1:9", tmp_path / "cache", "run", "--model", REPO, "--method", "random", "--num-experts", 4,
        tmp_path / "out", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("error: ") == 1, result.stderr
    assert not (tmp_path / "out").exists()


def test_folders_never_touch_the_network(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    calibration = ["--calibration", str(place / "texts.jsonl")]
    for streamed in ("--stream", "--no-stream"):
        with pytest.raises(SystemExit) as ended:
            main(
                ["run", "--model", str(place / "model"), *calibration, streamed, "--num-experts", "4",
                 str(tmp_path / streamed)]
            )  # fmt: skip
        assert ended.value.code == 0, capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["score", "--model", str(place / "model"), *calibration, "--stream", str(tmp_path / "stats")])
    assert ended.value.code == 0
