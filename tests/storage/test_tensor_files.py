# SPDX-License-Identifier: Apache-2.0
"""safetensors files by offsets, and in place: the library is the oracle."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_moe_prune import RequestError
from optimum_moe_prune.storage.tensor_files import MappedTensors, all_finite, header_bytes, read_header

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "half": torch.randn(5, 4).to(torch.bfloat16),
    "eight": torch.randn(3, 2).to(torch.float8_e4m3fn),
    "whole": torch.arange(4),
    "empty": torch.zeros(0, 7),
    "number": torch.tensor(2.5),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt", "more": "é"})
    return tmp_path / "a.safetensors"


def test_the_bytes_between_the_offsets_are_the_tensor(file: Path) -> None:
    entries, metadata = read_header(file)
    assert metadata == {"format": "pt", "more": "é"}
    data = file.read_bytes()
    assert set(entries) == set(TENSORS)
    for name, entry in entries.items():
        tensor = TENSORS[name]
        assert entry.shape == tuple(tensor.shape) and entry.nbytes == tensor.nbytes
        assert data[entry.begin : entry.end] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    begins = [entry.begin for entry in entries.values()]
    assert begins == sorted(begins)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = dict(sorted(TENSORS.items(), key=lambda item: -item[1].element_size()))
    names = {torch.float64: "F64", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64"}
    layout = {n: (names.get(t.dtype, "F32"), t.shape, t.nbytes) for n, t in tensors.items()}
    header = header_bytes(layout, {"why": "ö"})
    assert len(header) % 64 == 0
    body = b"".join(bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in tensors.values())
    (tmp_path / "b.safetensors").write_bytes(header + body)
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float())
    with safe_open(tmp_path / "b.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"why": "ö"}


def test_mapped_tensors_are_the_file(tmp_path: Path) -> None:
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in TENSORS.items() if t.dtype != torch.float8_e4m3fn}
    path = tmp_path / "m.safetensors"
    mapped = MappedTensors.create(path, shapes)
    assert not any(tensor.any() for tensor in mapped.values())
    for name in shapes:
        mapped[name].copy_(TENSORS[name])
    mapped.sync()
    again = MappedTensors.open(path)
    for found in (load_file(path), again):
        assert set(found) == set(shapes)
        for name, (_, dtype) in shapes.items():
            assert found[name].dtype == dtype and torch.equal(found[name], TENSORS[name])
    again["half"][0] = 7
    again.sync()
    assert load_file(path)["half"][0].eq(7).all()
    path.unlink()
    again["half"][1] = 3  # still there, and still shared
    assert mapped["half"][1].eq(3).all()
    del mapped
    assert again["half"][1].eq(3).all()


def test_a_full_disk_is_met_when_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        MappedTensors.create(tmp_path / "m.safetensors", {"a": ((4,), torch.float32)})


def header_of(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"", "is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (header_of("{}") + b"\0" * 9, "is damaged"),
        (b"\xff" * 8 + b"{}", "is damaged"),
        (header_of('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}') + b"\0" * 15, "is damaged"),
        (
            header_of(
                '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
                '"data_offsets":[0,1]}}'
            )
            + b"\0",
            "is damaged",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=f"bad.safetensors.*{message}"):
        read_header(path)


def test_truncated_anywhere(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for length in {*range(0, len(data), 37), len(data) - 1}:
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(RequestError, match=r"cut.safetensors is damaged"):
            read_header(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite(dtype: torch.dtype, value: float) -> None:
    values = torch.ones(1000).to(dtype)
    assert all_finite(values) and all_finite(values[:0])
    if dtype == torch.float8_e4m3fn:
        value = float("nan")  # it has no infinity
    values[777] = torch.tensor(value).to(dtype)
    assert not all_finite(values)
