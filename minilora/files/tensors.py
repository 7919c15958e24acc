"""Safetensors and JSON, read with suspicion.

What is read may have been cut, altered or made to do harm; whatever is wrong with it ends in a
`CheckpointError`. `atomic` is the way in which it is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors
import torch
from torch import Tensor

from ..errors import CheckpointError
from .atomic import write_whole

MAX_HEADER_BYTES = 32 * 2**20
"""An adapter of ten thousand tensors has a header of one or two MiB; parsing a larger one costs memory."""

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names that safetensors gives to torch's dtypes."""

FLOAT_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
"""The dtypes that weights come in, by torch's names."""


class Entry(NamedTuple):
    """A tensor that is about to be written: what the header says of it, and where its values come from."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return a safetensors file's metadata and its tensors, on the CPU and owning their memory.

    Raises:
        CheckpointError: when the file is not sound.
        OSError: when there is no such file, or it cannot be read.
    """
    with opened(path) as file:
        names = list(file.keys())
        return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in names}


class OpenFile(Protocol):
    """What `opened` gives: the part of `safetensors.safe_open`, which has no types, that is used here."""

    def keys(self) -> Iterable[str]:
        """Return the tensors' names; there is nothing else to iterate over."""

    def metadata(self) -> dict[str, str] | None:
        """Return the header's own entries."""

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, whose memory may belong to the file."""

    def get_slice(self, name: str) -> Any:
        """Return a view with `get_dtype` and `get_shape`, whose values have not been read."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """Open a safetensors file. What goes wrong with it, inside the block too, is a `CheckpointError`.

    Raises:
        CheckpointError: when the file is not sound.
        OSError: when there is no such file, or it cannot be read.
    """
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{str(path)!r} is not a sound safetensors file: its header claims {length} bytes, and "
            f"{MAX_HEADER_BYTES} are the most that is read"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{str(path)!r} is not a sound safetensors file, or was cut or altered on its way: {error}"
        ) from error


def read_json(path: Path) -> object:
    """Return what a JSON file says.

    Raises:
        CheckpointError: when it is not JSON, or absurdly large.
        OSError: when there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_HEADER_BYTES + 1)
    if len(content) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{str(path)!r} is larger than {MAX_HEADER_BYTES} bytes, the most that is read")
    return parse_json(content, what=repr(str(path)))


def parse_json(text: str | bytes, *, what: str) -> object:
    """Return what JSON text says.

    Raises:
        CheckpointError: naming `what`, when the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad syntax or bytes, or an endless number
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Return tensors in memory as entries for `write_tensors`."""
    return {
        name: Entry(tensor.dtype, tuple(tensor.shape), partial(tensors.__getitem__, name))
        for name, tensor in tensors.items()
    }


def write_tensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole, one tensor in memory at a time. Inverse: `read_tensors`.

    The same entries and metadata always give the same bytes; the safetensors package, whose own writer
    is not used here, puts metadata in an order that changes from call to call.

    Raises:
        CheckpointError: for a dtype that safetensors does not know.
        OSError: when the file cannot be written; what stood there before still does.
    """
    write_whole(path, _safetensors_chunks(entries, metadata))


def _safetensors_chunks(
    entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    # Wide dtypes first, so that every tensor begins at a multiple of its element size.
    order = sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, entry in order:
        end = offset + entry.nbytes
        header[name] = {
            "dtype": _dtype_name(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, entry in order:
        tensor = entry.read().detach().to("cpu", entry.dtype).contiguous()
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(f"{name!r} has shape {tuple(tensor.shape)}, announced was {entry.shape}")
        yield _bytes_of(tensor)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256, in hexadecimal, of everything in a safetensors file but for the layout.

    Raises:
        CheckpointError: for a dtype that safetensors does not know.
    """
    content = hashlib.sha256()
    described = {name: [_dtype_name(t.dtype), list(t.shape)] for name, t in tensors.items()}
    content.update(json.dumps([dict(metadata), described], sort_keys=True).encode())
    for name in sorted(tensors):
        content.update(_bytes_of(tensors[name].detach().cpu().contiguous()))
    return content.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{dtype} tensors are neither written nor read; cast them first")
    return DTYPE_NAMES[dtype]


def _bytes_of(tensor: Tensor) -> bytes | memoryview:
    # numpy has no bfloat16, but all dtypes are bytes; a scalar must become a row to be seen so.
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity; integers never have."""
    return tensor.dtype not in FLOAT_DTYPES.values() or bool(torch.isfinite(tensor).all())
