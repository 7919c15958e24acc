"""Safetensors files: what is read here is what the safetensors package reads, and nothing is read unasked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from checks import raw
from hypothesis import given
from test_fuzz import GOOD, HOSTILE, damaged, quickly

from minilora import CheckpointError
from minilora.files.tensors import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    entries_of,
    is_finite,
    opened,
    read_tensors,
    write_tensors,
)


def by_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: raw(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def by_minilora(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    metadata, tensors = read_tensors(path)
    return metadata, {name: raw(tensor) for name, tensor in tensors.items()}


@quickly
@given(content=damaged(GOOD))
def test_what_is_taken_for_sound_is_sound_for_safetensors_too(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    try:
        ours = by_minilora(path)
    except CheckpointError:
        return
    assert ours == by_safetensors(path)


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_safetensors_refuses_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[kind])
    try:
        theirs = by_safetensors(path)
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError, match=r"not a sound safetensors file|neither written nor read"):
            by_minilora(path)
        return
    try:
        assert by_minilora(path) == theirs
    except CheckpointError as error:
        assert "neither written nor read" in str(error)  # noqa: PT017


def test_every_dtype_and_odd_shapes_both_ways(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5)).to(torch.float32).to(dtype).view(5, 3)
        for dtype in DTYPE_NAMES
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "none": torch.empty(3, 0)}
    tensors |= {"é\n": torch.randn(2, 3), "turned": torch.randn(4, 6).T.contiguous()}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"a": "b", "é": "\n"})
    assert by_minilora(tmp_path / "theirs") == by_safetensors(tmp_path / "theirs")
    tensors["turned"] = torch.randn(4, 6).T
    write_tensors(tmp_path / "ours", entries_of(tensors), {"a": "b", "é": "\n"})
    assert by_minilora(tmp_path / "ours") == by_safetensors(tmp_path / "ours")
    write_tensors(tmp_path / "nothing", {}, {})
    assert by_minilora(tmp_path / "nothing") == by_safetensors(tmp_path / "nothing") == ({}, {})


def header_and(path: Path, header: dict[str, Any], size: int) -> Path:
    """Write a file of a header and a hole."""
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_dtype_that_torch_does_not_have_is_listed_and_not_read(tmp_path: Path) -> None:
    path = header_and(tmp_path / "a", {"x": entry("F4", [4], 0, 2), "y": entry("U8", [2], 2, 4)}, 4)
    with opened(path) as file:
        assert file.get_slice("x").get_dtype() == "F4"
        assert file.get_slice("x").get_shape() == [4]
        assert file.get_tensor("y").tolist() == [0, 0]
        with pytest.raises(CheckpointError, match="'x' is F4, which is neither"):
            file.get_tensor("x")
        with pytest.raises(CheckpointError, match="'x' is F4, which is neither"):
            file.entries()


@pytest.mark.parametrize("ends", [(2, 1, 4), (3, 2, 4), (1, 2, 4)], ids=["overlap", "inside", "gap"])
def test_values_that_do_not_follow_each_other(ends: tuple[int, int, int], tmp_path: Path) -> None:
    """Of a dtype whose size nobody knows, so that the offsets alone can tell."""
    first, second, end = ends
    header = {"x": entry("F4", [4], 0, first), "y": entry("F4", [4], second, end)}
    header_and(tmp_path / "a", header, 4)
    with pytest.raises(CheckpointError, match="do not begin where others end"), opened(tmp_path / "a"):
        pass


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """A file that says to be of a TiB, and of which next to nothing is on the disk."""
    size = 2**40 if sys.platform == "linux" else 2**31
    header = {"small": entry("F32", [2], 0, 8), "huge": entry("U8", [size], 8, 8 + size)}
    with opened(header_and(tmp_path / "a", header, 8 + size)) as file:
        assert list(file.entries()) == ["small", "huge"]
        assert file.get_tensor("small").tolist() == [0.0, 0.0]


def test_another_file_that_takes_the_name_is_not_mixed_in(tmp_path: Path) -> None:
    for name, value in (("old", 1.0), ("new", 2.0)):
        write_tensors(tmp_path / name, entries_of({"x": torch.full((3,), value)}), {"is": name})
    with opened(tmp_path / "old") as file:
        os.replace(tmp_path / "new", tmp_path / "old")
        assert (file.metadata()["is"], file.get_tensor("x")[0]) == ("old", 1.0)
    assert by_minilora(tmp_path / "old")[0] == {"is": "new"}


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", entries_of({"x": torch.ones(4096)}), {})
    with opened(tmp_path / "a") as file:
        os.truncate(tmp_path / "a", 1000)
        with pytest.raises(CheckpointError, match="it ends inside 'x'"):
            file.get_tensor("x")


def test_the_storage_of_what_is_written_and_read_stays_resizable(tmp_path: Path) -> None:
    """numpy's view of a tensor would pin it, and FSDP frees what it shards."""
    tensor = torch.ones(3)
    write_tensors(tmp_path / "a", entries_of({"x": tensor}), {})
    assert tensor.untyped_storage().resizable()


def test_a_header_of_other_json(tmp_path: Path) -> None:
    for header in (
        {"x": 1},
        {"x": []},
        {"x": {}},
        {"__metadata__": 1},
        {"__metadata__": {"a": 1}},
        {"x": None},
    ):
        header_and(tmp_path / "a", header, 0)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="not a sound safetensors file"), opened(tmp_path / "a"):
            pass
    for wrong in (
        entry("F32", [2], 0, 4),
        entry("F32", [True], 0, 4),
        entry("F32", [1.0], 0, 4),  # type: ignore[list-item]
        entry("F32", [2**62, 2**62], 0, 4),
        entry("F32", [1] * 65, 0, 4),
        {**entry("F32", [1], 0, 4), "more": 1},
    ):
        header_and(tmp_path / "a", {"x": wrong}, 4)
        with pytest.raises(CheckpointError, match="not a sound safetensors file"), opened(tmp_path / "a"):
            pass


@pytest.mark.parametrize("dtype", FLOAT_DTYPES.values(), ids=str)
def test_what_is_not_finite_is_found_and_what_is_large_is_not(dtype: torch.dtype) -> None:
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(large)
    assert is_finite(torch.empty(0, dtype=dtype))
    for values in ([torch.nan], [torch.inf], [torch.inf, -torch.inf]):
        assert not is_finite(torch.cat([large, torch.tensor(values, dtype=dtype)]))
