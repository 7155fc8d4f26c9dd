# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files: each is read rightly, or refused in one line that names it; nothing else is raised."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_texts, make_tokenizer, save_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPruner,
    MoEPrunerConfig,
    PruningPlan,
    RequestError,
    RunError,
)
from optimum_moe_prune.checkpoints.checkpoint import Checkpoint
from optimum_moe_prune.checkpoints.source import Source
from optimum_moe_prune.errors import MoEPruneError, one_line, printable
from optimum_moe_prune.evaluation.comparison import Comparison
from optimum_moe_prune.models.memory import Compute, load_model
from optimum_moe_prune.planning.sensitivity import Sensitivity
from optimum_moe_prune.storage.tensor_files import read_header, read_tensors

STATISTICS = Path(__file__).parents[1] / "data" / "statistics_mixtral"
PLAN = PruningPlan("mixtral", 2, "reap", {0: (0, 3), 1: (1, 2)}, {0: 4, 1: 4}, {0: (1.0, 2.0, 3.0, 4.0)}).to_dict()

few = pytest.mark.parametrize("count", [25, pytest.param(1500, marks=pytest.mark.slow)], ids=["few", "many"])

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([10**12, -(2**63), 2**64]), st.floats(),
    st.text(max_size=5), st.sampled_from(["\x1b[31m", "\u202e", "mosaic", "a" * 300, "../x", "1", "nan", "auto"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with something in it taken away, or put in place of something else."""
    new = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(new)))
        if not path:
            continue
        inside = new
        for key in path[:-1]:
            inside = inside[key]
        if draw(st.booleans()):
            inside[path[-1]] = draw(values)
        elif isinstance(inside, dict):
            inside[draw(st.text(max_size=3))] = inside.pop(path[-1])
        else:
            del inside[path[-1]]
    return new if draw(st.integers(0, 15)) else draw(values)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut, flipped, or with others in between."""
    place = draw(st.integers(0, max(0, min(len(content), 600) - 1)))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "beginning", "other"]))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + draw(st.binary(max_size=9)) + content[place:]
    return draw(st.binary(max_size=30)) + (content[8:] if kind == "beginning" else b"")


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def every(count: int, strategy: st.SearchStrategy, check: Callable[[Any], object]) -> None:
    """Check some inputs, in CI always the same ones."""
    shown = settings(
        max_examples=count, deadline=None, derandomize=count < 100, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    shown(given(strategy)(lambda example: check(example) and None))()


def refused_or_read(path: Path, read: Callable[[Path], object]) -> object:
    """What is read, or None where it was refused as it should be."""
    try:
        return read(path)
    except (RequestError, RunError) as error:
        message = str(error)
        assert str(path) in message or path.name in message, message
        assert message == one_line(message) and len(message) < 3000, message
        return None


def reading(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def check(content: bytes) -> object:
        path.write_bytes(content)
        return refused_or_read(path, read)

    return check


@few
def test_plans(count: int, tmp_path: Path) -> None:
    def read(path: Path) -> object:
        plan = PruningPlan.load(path)
        assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan and plan.summary()
        return plan

    every(count, changed(PLAN).map(as_json) | damaged(as_json(PLAN)), reading(tmp_path / "plan.json", read))


@few
def test_recipes(count: int, tmp_path: Path) -> None:
    recipe = MoEPrunerConfig(
        method="mosaic", sparsity=0.5, protect={0: [1]}, skip_layers=[2], method_options={"num_domains": 2}
    ).to_dict()
    check = reading(tmp_path / "recipe.json", MoEPrunerConfig.from_pretrained)
    every(count, changed(recipe).map(as_json) | damaged(as_json(recipe)), check)


@few
def test_sensitivities_and_evaluations(count: int, tmp_path: Path) -> None:
    of_layer = {"original_num_experts": 4, "counts": {"2": {"retained": [0, 1], "kl": {"all": 0.1}}}}
    sensitivity = {
        "format_version": 1,
        "model": {"model_type": "mixtral", "top_k": 2, "fingerprint": "f"},
        "samples": {"tokens_by_domain": {"all": 3}},
        "methods": {"reap": {"config": {"method": "reap"}, "layers": {"0": of_layer}, "model": []}},
        "provenance": {},
    }
    every(count, changed(sensitivity).map(as_json), reading(tmp_path / "sensitivity.json", Sensitivity.load))
    domain = {"samples": 1, "tokens": 3, "loss": 1.0, "perplexity": 2.7}
    evaluation = {"format_version": 1, "reference": None, "settings": {}, "models": {"a": {"domains": {"x": domain}}}}
    every(count, changed(evaluation).map(as_json), reading(tmp_path / "evaluation.json", Comparison.load))


@few
def test_statistics(count: int, tmp_path: Path) -> None:
    shutil.copytree(STATISTICS, tmp_path / "stats")

    def read(_: Path) -> object:
        stats = CalibrationStats.load(tmp_path / "stats")
        return [layer.tensors[name] for layer in stats.layers.values() for name in stats.names]

    def check(change: tuple[str, Any]) -> None:
        name, content = change
        before = (STATISTICS / name).read_bytes()
        (tmp_path / "stats" / name).write_bytes(content)
        try:
            refused_or_read(tmp_path / "stats", read)
        finally:
            (tmp_path / "stats" / name).write_bytes(before)

    header = json.loads((STATISTICS / "stats.json").read_text())
    names = st.sampled_from(sorted(path.name for path in STATISTICS.iterdir() if path.suffix == ".safetensors"))
    bytes_of = names.flatmap(lambda n: st.tuples(st.just(n), damaged((STATISTICS / n).read_bytes())))
    every(count, st.tuples(st.just("stats.json"), changed(header).map(as_json)) | bytes_of, check)


@few
def test_headers_of_tensors(count: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, {"format": "pt"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def with_header(new: Any) -> bytes:
        text = as_json(new)
        return len(text).to_bytes(8, "little") + text + data

    def read(path: Path) -> object:
        entries, _ = read_header(path)
        return {name: tensor.shape for name, tensor in read_tensors(path, entries).items()}

    every(count, changed(header).map(with_header) | damaged(content), reading(path, read))


@few
def test_indices(count: int, tmp_path: Path) -> None:
    index: dict[str, Any] = {"metadata": {"total_size": 32}, "weight_map": {}}
    for number in (1, 2):
        save_file({f"t{number}": torch.ones(4)}, tmp_path / f"model-{number}.safetensors", {"format": "pt"})
        index["weight_map"][f"t{number}"] = f"model-{number}.safetensors"
    path = tmp_path / "model.safetensors.index.json"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            Checkpoint.open(tmp_path)
        except RequestError as error:
            assert str(tmp_path) in str(error) and str(error) == one_line(error)

    every(count, changed(index).map(as_json) | damaged(as_json(index)), check)


@few
def test_calibrations(count: int, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    records = [{"text": "w1 w2 w3", "domain": "a"}, {"messages": [{"role": "user", "content": "w1"}]}, {"text": "w4"}]
    lines = st.tuples(*map(changed, records)).map(lambda found: b"\n".join(map(as_json, found)))
    content = b"\n".join(map(as_json, records))

    def read(path: Path) -> object:
        return CalibrationSet.build(path, tokenizer)

    for name in ("texts.jsonl", "texts.txt"):
        every(count, lines | damaged(content), reading(tmp_path / name, read))


@pytest.mark.parametrize("count", [12, pytest.param(600, marks=pytest.mark.slow)], ids=["few", "many"])
def test_configs(count: int, tmp_path: Path) -> None:
    model = save_checkpoint("mixtral", tmp_path / "model", make_tokenizer())
    texts = [record["text"] for record in make_texts(2)]
    config = json.loads((model / "config.json").read_text())
    extra = {"quantization_config": {"quant_method": "fp8"}, "auto_map": {}, "per_layer_config": {"0": {}}}

    def check(new: Any) -> None:
        (model / "config.json").write_bytes(as_json(new))
        try:
            pruner = MoEPruner.from_pretrained(model, method="reap", num_experts=4)
            pruner.calibrate(calibration=texts, stream=True)
            pruner.plan()
            pruner.prune_checkpoint(tmp_path / "out")
        except MoEPruneError as error:
            assert "config.json" in str(error) or str(model) in str(error), error
            assert str(error) == one_line(error)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    every(count, changed(config) | changed({**config, **extra}), check)


@few
def test_text_that_is_shown_is_harmless(count: int) -> None:
    def check(text: str) -> None:
        assert str(RequestError(text)) == one_line(text)
        assert one_line(text).encode() is not None and "\n" not in one_line(text)
        assert not set(printable(text)) & {"\x1b", "\x00", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\r"}

    every(count, st.text() | st.text(alphabet="\x1b\r\n\u202e\u2066\ud800ab\u200f"), check)
    assert printable("a\tb\nc é 日本 \u200d") == "a\tb\nc é 日本 \u200d"
    assert printable("\x1b[31mred\u202e\ud800") == "\\x1b[31mred\\u202e\\ud800"


# ------------------------------------------------------------------------------------------- while it is read


def test_a_source_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    """Mapped into memory it would end the process without a word."""
    model = save_checkpoint("mixtral", tmp_path / "model", make_tokenizer())
    checkpoint = Checkpoint.open(model)
    last = list(checkpoint.tensors)[-1]
    with checkpoint.reader() as read:
        read(next(iter(checkpoint.tensors)))
        os.truncate(model / "model.safetensors", 5000)
        with pytest.raises(RunError, match=r"model\.safetensors of .* became shorter while it was read"):
            read(last)
    with checkpoint.reader() as read, pytest.raises(RunError, match="was changed while it was read"):
        read(last)
    with pytest.raises(RequestError, match=r"model\.safetensors is damaged"):
        Checkpoint.open(model)
    with pytest.raises(RequestError, match=r"model\.safetensors is damaged"):  # evaluate, which needs no layout
        load_model(Source.of(model), Compute())


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_truncated_in_the_middle_of_a_calibration(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum_moe_prune.calibration.observer import LayerObserver

    model = save_checkpoint("mixtral", tmp_path / "model", make_tokenizer())
    pruner = MoEPruner.from_pretrained(model, method="reap", num_experts=4)
    forward = LayerObserver.experts_forward

    def truncating(self: LayerObserver, *args: torch.Tensor) -> torch.Tensor:
        os.truncate(model / "model.safetensors", 5000)
        return forward(self, *args)

    monkeypatch.setattr(LayerObserver, "experts_forward", truncating)
    texts = [record["text"] for record in make_texts(4)]
    with pytest.raises(RunError, match=r"model\.safetensors of .* was changed while it was read"):
        pruner.calibrate(calibration=texts, stream=streamed)
        pruner.prune_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out").exists()
