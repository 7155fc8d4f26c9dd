# SPDX-License-Identifier: Apache-2.0
"""Private and moving names of other libraries: that the installed versions have them, and what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_server import served
from huggingface_hub import HfApi, constants
from transformers import MixtralConfig

from optimum_moe_prune import Source
from optimum_moe_prune.compat import cached_commit, cached_file, commit_of_config, http_error, set_commit_of_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(cache: Path, repo_id: str = "some/model", commit: str = COMMIT) -> Path:
    """A repository in a cache of the Hub's client; its ``config.json``."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    file = repository / "snapshots" / commit / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return file


def test_a_file_of_a_folder_or_of_the_cache_or_none(tmp_path: Path) -> None:
    file = in_cache(tmp_path / "cache")
    hub: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert cached_file("some/model", "config.json", hub) == file
    assert cached_file(file.parent, "config.json", {}) == file
    assert cached_file("some/model", "other.json", hub) is None and cached_file(file.parent, "other.json", {}) is None


def test_a_repository_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as hub:
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        with pytest.raises(OSError, match="some/absent"):
            cached_file("some/absent", "config.json", {"cache_dir": tmp_path, "token": "hf_writer"})


def test_the_commit_is_where_the_cache_says_it(tmp_path: Path) -> None:
    """A folder that happens to be called ``snapshots`` is no cache, and a branch's name no commit."""
    assert cached_commit("some/model", in_cache(tmp_path / "cache")) == COMMIT
    assert cached_commit("gpt2", in_cache(tmp_path / "cache", "gpt2")) == COMMIT
    below = tmp_path / "snapshots" / ("f" * 40) / "cache"
    assert cached_commit("some/model", in_cache(below)) == COMMIT
    assert Source("some/model", cache_dir=below).commit() == COMMIT
    assert cached_commit("some/model", in_cache(tmp_path / "named", commit="main")) is None
    assert Source("some/model", cache_dir=tmp_path / "named").commit() is None
    assert cached_commit("some/model", Path("/data/snapshots") / COMMIT / "model" / "config.json") is None
    assert cached_commit("other/model", in_cache(tmp_path / "another")) is None


def test_a_config_remembers_its_commit(tmp_path: Path) -> None:
    config = MixtralConfig()
    assert commit_of_config(config) is None and commit_of_config(None) is None
    set_commit_of_config(config, COMMIT)
    assert commit_of_config(config) == COMMIT
    config.save_pretrained(tmp_path)
    assert COMMIT not in (tmp_path / "config.json").read_text()


def test_a_connection_that_fails() -> None:
    with pytest.raises(http_error()):
        HfApi(endpoint="http://127.0.0.1:9", token=False).model_info("some/model")


def test_the_classes_that_adapters_are_trained_in() -> None:
    """By name, by task, or the one that loads the checkpoint, and then the part of it that reads."""
    from architectures.tiny import tiny_config

    from optimum_moe_prune.compat.adapters import built_for_task

    def built(kind: str, named: str = "", auto: str | None = None) -> list[str]:
        config = tiny_config(kind)
        if kind == "llama4":
            config.architectures = ["Llama4ForConditionalGeneration"]
        models = list(built_for_task(config, named, auto, False))
        assert all(model.device.type == "meta" and not model.training for model in models)
        return [type(model).__name__ for model in models]

    assert built("mixtral") == built("mixtral", "NoClassOfTransformers") == ["MixtralForCausalLM"]
    assert built("mixtral", "MixtralModel") == ["MixtralModel"]
    assert built("mixtral", auto="AutoModelForSequenceClassification") == ["MixtralForSequenceClassification"]
    assert built("llama4") == ["Llama4ForConditionalGeneration", "Llama4ForCausalLM"]


def test_parameters_that_hold_inputs_before_outputs() -> None:
    from architectures.tiny import tiny_model
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper

    from optimum_moe_prune.compat.adapters import is_turned

    for kind, expected in (("gpt_oss", True), ("mixtral", False)):
        experts = tiny_model(kind).model.layers[1].mlp.experts
        assert is_turned(ParamWrapper(experts, "default", "down_proj", LoraConfig(), r=2)) is expected
