"""`BaseFiles`: the safetensors files of a base model, read tensor by tensor, without the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, listed, quoted
from ..files.fingerprint import Fingerprint, Signature, untrained
from ..files.formats import native, peft
from ..files.formats.recognise import other_kind
from ..files.tensors import DTYPE_NAMES, FLOAT_DTYPES, opened, read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SUFFIX = ".safetensors"

SAVE_ANEW = "A base can be saved as safetensors, anew too: model.save_pretrained(folder)"

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """What a file says of a tensor without its values being read."""

    file: str
    dtype_name: str
    """As safetensors names it."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """As torch names it; None for a dtype that is not read here."""
        return TORCH_DTYPES.get(self.dtype_name)

    @property
    def is_float(self) -> bool:
        """Whether it is of a dtype for weights."""
        return self.dtype in FLOAT_DTYPES.values()


@dataclass(frozen=True)
class BaseFiles:
    """Where each tensor of a base model is stored."""

    path: Path
    """As it was given: of a folder, or of the one file."""
    folder: Path
    tensors: Mapping[str, Stored]
    left_out: Mapping[str, str]
    """What a header says was left out for a stored name, as `safetensors.torch.save_model` has it say."""
    index: Mapping[str, Any] | None
    """The JSON of the index file; None where there is one file only."""
    config: Mapping[str, Any]
    """The JSON of config.json; empty where there is none."""

    @classmethod
    def open(cls, path: Path) -> BaseFiles:
        """Return the description of a folder's safetensors files, or of one file, from the headers alone.

        Raises:
            CheckpointError: when there are none, or they are not sound, or not those that the index names,
                or hold an adapter.
            OSError: when they cannot be read.
        """
        path.stat()  # FileNotFoundError where there is nothing at all
        folder = path if path.is_dir() else path.parent
        index = _read_index(folder / INDEX_FILE) if path.is_dir() else None
        if not path.is_dir():
            names = [path.name]
        elif index is not None:
            names = sorted(set(index["weight_map"].values()))
        elif (folder / SINGLE_FILE).exists():
            names = [SINGLE_FILE]
        else:
            raise CheckpointError(_no_base(folder))
        tensors: dict[str, Stored] = {}
        left_out: dict[str, str] = {}
        for file_name in names:
            stored, metadata = _read_header(folder / file_name)
            tensors |= stored
            left_out |= {other: name for other, name in metadata.items() if name in stored}
        if index is not None:
            _require_agreement(folder / INDEX_FILE, index, tensors)
        config: Any = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        return cls(path, folder, tensors, left_out, index, config if isinstance(config, dict) else {})

    def files(self) -> dict[str, list[str]]:
        """Return the names of the tensors in each file."""
        return _by_file(self.tensors, self.tensors)

    def values(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors with their names, one at a time, each file opened once.

        Raises:
            CheckpointError: when a file is not sound.
            OSError: when it cannot be read.
        """
        for file_name, inside in _by_file(names, self.tensors).items():
            with opened(self.folder / file_name) as file:
                for name in inside:
                    yield name, file.get_tensor(name)

    def signatures(
        self, names: Iterable[str], rows: Mapping[str, Sequence[int]] | None = None
    ) -> Iterator[tuple[str, Signature]]:
        """Yield the signatures of those tensors that are weights, with their names.

        Args:
            names: of tensors.
            rows: which rows of a tensor are trained, and so no part of its signature.
        """
        for name, tensor in self.values(name for name in names if self.tensors[name].is_float):
            yield name, Signature.of(untrained(tensor, (rows or {}).get(name, ())))

    def fingerprint(
        self, weights: Mapping[str, str], transposed: frozenset[str], rows: Mapping[str, Sequence[int]]
    ) -> Fingerprint:
        """Return the fingerprint of weights, given by site as names in the files; rows as in `signatures`."""
        found = dict(self.signatures(set(weights.values()), rows))
        return Fingerprint(
            {site: found[name] for site, name in weights.items() if name in found},
            {
                site: "quantised, or otherwise no plain weight"
                for site, name in weights.items()
                if name not in found
            },
            transposed,
        )


def _read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return what a file of a base says of its tensors, and its metadata."""
    tensors: dict[str, Stored] = {}
    if other := other_kind(path):
        raise CheckpointError(f"{str(path)!r} is not a sound safetensors file but {other}. {SAVE_ANEW}")
    try:
        with opened(path) as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118  a file, not a dictionary
                view = file.get_slice(name)
                tensors[name] = Stored(path.name, view.get_dtype(), tuple(view.get_shape()))
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {SAVE_ANEW}") from error
    if native.METADATA_KEY in metadata:
        raise CheckpointError(f"{str(path)!r} is an adapter, and no base model")
    return tensors, metadata


def _by_file(names: Iterable[str], tensors: Mapping[str, Stored]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(tensors[name].file, []).append(name)
    return files


def _read_index(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(index, dict) or not isinstance(weight_map, dict):
        raise CheckpointError(f"{str(path)!r} has no weight_map")
    # A name that leads elsewhere could have any file read, and written in its place.
    if outside := sorted({str(name) for name in weight_map.values() if not _is_file_name(name)}):
        raise CheckpointError(f"{str(path)!r} names files elsewhere: {quoted(outside)}")
    return index


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _require_agreement(path: Path, index: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    placed = {name: stored.file for name, stored in tensors.items()}
    if wrong := sorted({name for name, _ in placed.items() ^ index["weight_map"].items()}):
        raise CheckpointError(f"{str(path)!r} and the files disagree on {quoted(wrong)}")


def _no_base(folder: Path) -> str:
    """Return what a folder without a base in it is, and what may have been meant."""
    present = sorted(file.name for file in folder.iterdir())
    if peft.CONFIG_FILE in present:
        return f"{str(folder)!r} is a PEFT adapter's folder, and no base model"
    message = f"{str(folder)!r} has neither {SINGLE_FILE!r} nor {INDEX_FILE!r}"
    if single := [name for name in present if name.endswith(SUFFIX)]:
        return f"{message}, but {quoted(single)}: give the file itself, as --base {str(folder / single[0])!r}"
    holds = f", but {listed(present)}" if present else "; it is empty"
    return f"{message}{holds}. {SAVE_ANEW}"
