# SPDX-License-Identifier: Apache-2.0
"""A flipped bit in unfinished work is found and named, or of no consequence; so are other weights under old names."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_texts, make_tokenizer, save_checkpoint
from oracles import assert_identical, calibrated, layout_of
from safetensors.torch import load_file, save_file

import optimum_moe_prune.calibration.in_memory as in_memory
import optimum_moe_prune.storage.contents as contents
from optimum_moe_prune import CalibrationSet, MoEPrunerConfig, Need, RequestError, measure_sensitivity
from optimum_moe_prune.calibration.observer import LayerObserver
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.models.memory import Compute
from optimum_moe_prune.storage.contents import content_digest
from optimum_moe_prune.storage.growing import Store
from optimum_moe_prune.storage.workspace import Workspace

DAMAGED = r"(?s)damaged.*\(restart=True\)|something else"


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("mixtral", tmp_path_factory.mktemp("place") / "model", make_tokenizer())


@pytest.fixture(scope="module")
def texts() -> CalibrationSet:
    return CalibrationSet.build(make_texts(), make_tokenizer())


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def places(kept: Path, count: int, seed: int = 0) -> Iterator[tuple[Path, int]]:
    """Bits of all files, of headers and of values."""
    rng = random.Random(seed)
    files = sorted(path for path in kept.rglob("*") if path.is_file())
    for number in range(count):
        path = files[number % len(files)]
        bits = 8 * path.stat().st_size
        yield path.relative_to(kept), rng.randrange(min(bits, 4000) if number % 2 else bits)


def stop_after(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: int) -> None:
    real, seen = getattr(owner, name), []

    def counting(*args: object, **kwargs: object) -> object:
        seen.append(name)
        if len(seen) > calls:
            raise Stopped
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_of_a_calibration(
    streamed: bool, model: Path, texts: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_memory, "GROUP_SECONDS", 0)
    how = {"batch_size": 4, "stream": streamed, "max_tokens": 60}
    layout = layout_of(model)
    expected = calibrated(layout, texts, Need, **how)
    with monkeypatch.context() as patched:
        stop_after(patched, LayerObserver, "experts_forward", 7)
        with pytest.raises(Stopped):
            calibrated(layout, texts, Need, **how, folder=tmp_path / "whole")
    found = 0
    for file, bit in places(tmp_path / "whole", 24):
        shutil.copytree(tmp_path / "whole", tmp_path / "kept")
        flipped(tmp_path / "kept" / file, bit)
        try:
            assert_identical(calibrated(layout, texts, Need, **how, folder=tmp_path / "kept"), expected)
        except RequestError as error:
            found += 1
            assert str(tmp_path / "kept") in str(error) and "restart=True" in str(error) and "\n" not in str(error)
        shutil.rmtree(tmp_path / "kept")
    assert found >= 8
    assert_identical(calibrated(layout, texts, Need, **how, folder=tmp_path / "whole"), expected)


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_of_a_measurement(
    streamed: bool, model: Path, texts: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = MoEPrunerConfig(method="random", sensitivity_samples=12)

    def measured(folder: Path | None) -> list[object]:
        found = measure_sensitivity(
            model, texts, [recipe], counts=[4], sparsities=[0.5], batch_size=4,
            compute=Compute(stream=streamed), workspace=Workspace(folder),
        )  # fmt: skip
        return [found.methods]

    expected = measured(None)
    calls = 9 if streamed else 20
    with monkeypatch.context() as patched:
        stop_after(patched, Store, "commit", 2) if streamed else stop_after(patched, LayerByLayer, "forward", calls)
        with pytest.raises(Stopped):
            measured(tmp_path / "whole")
    assert list((tmp_path / "whole").rglob("progress.json"))
    found = 0
    for file, bit in places(tmp_path / "whole", 12):
        shutil.copytree(tmp_path / "whole", tmp_path / "kept")
        flipped(tmp_path / "kept" / file, bit)
        try:
            assert measured(tmp_path / "kept") == expected
        except RequestError as error:
            found += 1
            assert "restart=True" in str(error) and "\n" not in str(error)
        shutil.rmtree(tmp_path / "kept")
    assert found >= 4
    assert measured(tmp_path / "whole") == expected


# ------------------------------------------------------------------------------------------- the model's content


def one_expert(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "experts" in name)
    tensors[name][tuple(0 for _ in tensors[name].shape)] += 1


def one_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if ".1." in name and "experts" in name:
            tensors[name] *= 2


def all_experts(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "experts" in name:
            tensors[name] = tensors[name].flip(-1).contiguous()


@pytest.mark.parametrize("swap", [one_expert, one_layer, all_experts])
@pytest.mark.parametrize("large", [False, True], ids=["whole", "blocks"])
def test_other_experts_with_the_time_kept_are_not_mixed_in(
    swap: Callable, large: bool, model: Path, texts: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "WHOLE_BYTES", 0 if large else contents.WHOLE_BYTES)
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    how = {"batch_size": 4, "stream": True, "folder": tmp_path / "kept"}
    with monkeypatch.context() as patched:
        stop_after(patched, LayerObserver, "experts_forward", 4)
        with pytest.raises(Stopped):
            calibrated(layout_of(copy), texts, {Need.ROUTING}, **how)
    file = copy / "model.safetensors"
    before = os.stat(file)
    tensors = load_file(file)
    swap(tensors)
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(file).st_size == before.st_size and os.stat(file).st_mtime_ns == before.st_mtime_ns
    with pytest.raises(RequestError, match=r"of something else: model\.safetensors of the model was changed\."):
        calibrated(layout_of(copy), texts, {Need.ROUTING}, **how)


@pytest.mark.parametrize("shape", [(4, 64, 48), (4, 3, 2), (5000,), (3, 1, 70_000)])
def test_every_expert_of_a_large_file_counts(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "WHOLE_BYTES", 0)
    torch.manual_seed(0)
    tensors = {"a": torch.randn(shape), "b": torch.randn(7), "empty": torch.zeros(0, 3, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    digests = {content_digest(tmp_path / "a.safetensors")}
    for row in range(shape[0] if len(shape) > 2 else 1):
        other = {name: tensor.clone() for name, tensor in tensors.items()}
        (other["a"][row] if len(shape) > 2 else other["a"]).add_(1)
        save_file(other, tmp_path / "a.safetensors")
        digests.add(content_digest(tmp_path / "a.safetensors"))
    assert len(digests) == 1 + (shape[0] if len(shape) > 2 else 1)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x05" + b"\0" * 7 + b"[1,2]", b"\x02" + b"\0" * 7 + b"{}"])
def test_whatever_a_file_holds_has_a_digest(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "WHOLE_BYTES", 0)
    for name in ("a.safetensors", "a.bin"):
        (tmp_path / name).write_bytes(content)
        first = content_digest(tmp_path / name)
        (tmp_path / name).write_bytes(content + b"\0")
        assert content_digest(tmp_path / name) != first
