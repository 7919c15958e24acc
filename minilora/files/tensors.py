"""Safetensors files: read with suspicion from one descriptor, written in one order.

    8 bytes    the length of the header, little-endian
    header     {"__metadata__": {...}, "<name>": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    values     back to back

What is read may have been cut, altered or made to do harm: whatever is wrong with it ends in a
`CheckpointError`, and no value is read before it is asked for. A file is opened once, so that another one
which takes its name meanwhile cannot mix with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .atomic import write_whole

MAX_HEADER_BYTES = 32 * 2**20
"""An adapter of ten thousand tensors has a header of one or two MiB; parsing a larger one costs memory."""

MAX_DIMENSIONS = 64
"""As many as torch allows."""

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

TORCH_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""torch's dtypes by the names that safetensors gives them."""

FLOAT_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
"""The dtypes that weights come in, by torch's names."""


class Entry(NamedTuple):
    """A tensor of a file that is about to be read or written: what the header says, and how to get values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Stored(NamedTuple):
    """A tensor as a header describes it."""

    dtype: str
    """As safetensors names it; newer files know some that are not in `TORCH_DTYPES`."""
    shape: tuple[int, ...]
    begin: int
    """Of the values, in bytes from the end of the header."""
    end: int

    def get_dtype(self) -> str:
        """Return the dtype, as safetensors names it."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.shape)


class TensorFile:
    """An open safetensors file whose header is sound. It speaks as `safetensors.safe_open` does."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 and length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{str(path)!r} is not a sound safetensors file: its header claims {length} bytes, and "
                f"{MAX_HEADER_BYTES} are the most that is read"
            )
        if size < 8 + length:
            raise self._unsound("it ends inside its header")
        text = file.read(length)
        self._begin = 8 + length
        self._metadata, self._tensors = self._parsed(text, size - self._begin)

    def keys(self) -> list[str]:
        """Return the tensors' names, in the header's order."""
        return list(self._tensors)

    def metadata(self) -> dict[str, str]:
        """Return the header's own entries."""
        return dict(self._metadata)

    def get_slice(self, name: str) -> Stored:
        """Return what the header says of a tensor."""
        return self._tensors[name]

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, in memory of its own.

        Raises:
            CheckpointError: for a dtype that torch does not have, or when the file was cut meanwhile.
        """
        stored = self._tensors[name]
        dtype = self._dtype(name)
        values = bytearray(stored.end - stored.begin)
        self._file.seek(self._begin + stored.begin)
        if self._file.readinto(values) != len(values):  # type: ignore[attr-defined]
            raise self._unsound(f"it ends inside {name!r}")
        if not values:
            return torch.empty(stored.shape, dtype=dtype, device="cpu")
        return torch.frombuffer(values, dtype=dtype).reshape(stored.shape)

    def entries(self) -> dict[str, Entry]:
        """Return all tensors, unread.

        Raises:
            CheckpointError: for a dtype that torch does not have.
        """
        return {
            name: Entry(self._dtype(name), stored.shape, partial(self.get_tensor, name))
            for name, stored in self._tensors.items()
        }

    def _dtype(self, name: str) -> torch.dtype:
        stored = self._tensors[name].dtype
        if stored not in TORCH_DTYPES:
            raise CheckpointError(
                f"{str(self._path)!r}: {name!r} is {stored}, which is neither written nor read"
            )
        return TORCH_DTYPES[stored]

    def _parsed(self, text: bytes, size: int) -> tuple[dict[str, str], dict[str, Stored]]:
        """Return a header's metadata and tensors, which must fill the file without a gap."""
        if not text.startswith(b"{"):
            raise self._unsound("its header is no JSON object")
        header: Any = parse_json(
            text, what=f"{str(self._path)!r} is not a sound safetensors file: its header"
        )
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self._unsound("its metadata are not text")
        tensors: dict[str, Stored] = {}
        for name, entry in header.items():
            match entry:
                case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
                    len(entry) == 3
                    and len(shape) <= MAX_DIMENSIONS
                    and all(map(_is_size, [*shape, begin, end]))
                ):
                    tensors[name] = Stored(dtype, tuple(shape), begin, end)
                case _:
                    raise self._unsound(f"its entry for {name!r:.200} is no dtype, shape and data_offsets")
        at = 0
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if stored.begin != at or stored.end < at:
                raise self._unsound(f"the values of {name!r:.200} do not begin where others end")
            if stored.dtype in TORCH_DTYPES:
                if math.prod(stored.shape) * TORCH_DTYPES[stored.dtype].itemsize != stored.end - at:
                    raise self._unsound(f"{name!r:.200} does not have the size of its shape and dtype")
            at = stored.end
        if at != size:
            raise self._unsound(f"it has {size} bytes of values, and its header describes {at}")
        return metadata, tensors

    def _unsound(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{str(self._path)!r} is not a sound safetensors file, or was cut or altered on its way: "
            f"{problem}"
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file, and close it when the block ends.

    Raises:
        CheckpointError: when the file is not sound.
        OSError: when there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        yield TensorFile(file, path)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return a safetensors file's metadata and all its tensors, on the CPU. Inverse: `write_tensors`.

    Raises:
        CheckpointError: when the file is not sound.
        OSError: when there is no such file, or it cannot be read.
    """
    with opened(path) as file:
        return file.metadata(), {name: entry.read() for name, entry in file.entries().items()}


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

    Raises:
        CheckpointError: for a dtype that safetensors does not know.
        OSError: when the file cannot be written; what stood there before still does.
    """
    write_whole(path, chunks_of(entries, metadata))


def chunks_of(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Iterator[bytes | bytearray]:
    """Yield the bytes of a safetensors file.

    The same entries and metadata always give the same bytes, which the safetensors package does not
    promise: it puts metadata in an order that changes from call to call.

    Raises:
        CheckpointError: for a dtype that safetensors does not know.
    """
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
        tensor = entry.read()
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(f"{name!r} has shape {tuple(tensor.shape)}, announced was {entry.shape}")
        yield _bytes_of(tensor, entry.dtype)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256, in hexadecimal, of everything in a safetensors file but for the layout.

    Raises:
        CheckpointError: for a dtype that safetensors does not know.
    """
    content = hashlib.sha256()
    described = {name: [_dtype_name(t.dtype), list(t.shape)] for name, t in tensors.items()}
    content.update(json.dumps([dict(metadata), described], sort_keys=True).encode())
    for name in sorted(tensors):
        content.update(_bytes_of(tensors[name], tensors[name].dtype))
    return content.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity; integers never have."""
    if tensor.dtype not in FLOAT_DTYPES.values():
        return True
    # What is not finite shows in the sum, at a fraction of the cost; a sum of finite ones may overflow.
    return math.isfinite(tensor.detach().sum().item()) or bool(torch.isfinite(tensor).all())


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{dtype} tensors are neither written nor read; cast them first")
    return DTYPE_NAMES[dtype]


def _bytes_of(tensor: Tensor, dtype: torch.dtype) -> bytes | bytearray:
    if not tensor.numel():
        return b""
    values = bytearray(tensor.numel() * dtype.itemsize)
    torch.frombuffer(values, dtype=dtype).view(tensor.shape).copy_(tensor.detach())
    return values


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
