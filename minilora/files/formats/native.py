"""minilora's own format: one `.safetensors` file that holds everything.

Its tensors are named `<site>.lora_A`, `<site>.lora_B`, `<site>.adapter_down.weight`, ..., and trainable
modules' own tensors under their own names. Its header's metadata has three entries. "minilora" is JSON:

    {"format_version": 1,
     "injections": [{"kind": "lora", "config": {...}, "sites": ["encoder.layer.0.query", ...]}, ...],
     "trainable": ["classifier"]}

"minilora_base" is the fingerprint of the base (`fingerprint.Fingerprint.to_dict`), and "minilora_sha256" a
checksum of all the rest: one byte that changed on a disk would otherwise be a weight like any other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, MiniLoRAError
from ...manifest import CONFIGS, Manifest
from ..contents import Announced, Contents
from ..fingerprint import Fingerprint
from ..tensors import digest, entries_of, opened, parse_json, write_tensors
from .recognise import require_safetensors, what_it_is

METADATA_KEY = "minilora"
BASE_KEY = "minilora_base"
DIGEST_KEY = "minilora_sha256"
FORMAT_VERSION = 1


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Announced]:
    """Open a file and give what it says that it holds. Inverse: `write`.

    Raises:
        CheckpointError: when the file is not sound, or not of this format.
        OSError: when there is no such file, or it cannot be read.
    """
    require_safetensors(path)
    with opened(path) as file:
        metadata = file.metadata()
        if METADATA_KEY not in metadata:
            raise CheckpointError(
                f"{str(path)!r} is no minilora file: its header has no {METADATA_KEY!r} entry. "
                f"{what_it_is(path, file.keys())}"
            )
        try:
            announced = Announced(
                manifest_from_json(parse_json(metadata[METADATA_KEY], what="its header")),
                file.entries(),
                base=base_of(metadata),
                damage=partial(damage, metadata=metadata),
            )
        except CheckpointError as error:
            raise CheckpointError(f"{str(path)!r} cannot be loaded: {error}") from error
        yield announced


def write(path: Path, contents: Contents) -> None:
    """Write one file, whole or not at all. Inverse: `reading`.

    Raises:
        CheckpointError: for a dtype that safetensors does not know.
        OSError: when the file cannot be written.
    """
    manifest = {METADATA_KEY: json.dumps(manifest_to_json(contents.manifest))}
    write_tensors(path, entries_of(contents.tensors), header(contents.tensors, manifest, contents.base))


def header(
    tensors: Mapping[str, Tensor], entries: Mapping[str, str], base: Fingerprint | None
) -> dict[str, str]:
    """Return a header's metadata: the entries given, the base's fingerprint, and the checksum.

    Raises:
        CheckpointError: for a dtype that safetensors does not know.
    """
    metadata = {"format": "pt", **entries}
    if base is not None and base != Fingerprint():
        metadata[BASE_KEY] = json.dumps(base.to_dict(), separators=(",", ":"))
    return metadata | {DIGEST_KEY: digest(tensors, metadata)}


def damage(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """Return how a file is seen to be damaged, or None. Inverse: the checksum in `header`."""
    if DIGEST_KEY not in metadata:
        return (
            f"it has no checksum ({DIGEST_KEY!r} in its header), so it was not written by minilora as it is"
        )
    rest = {key: value for key, value in metadata.items() if key != DIGEST_KEY}
    if digest(tensors, rest) != metadata[DIGEST_KEY]:
        return "its checksum is wrong: it was altered after it was written"
    return None


def base_of(metadata: Mapping[str, str]) -> Fingerprint | None:
    """Return the base's fingerprint from a header, if it has one. Inverse: `header`.

    Raises:
        CheckpointError: when the entry is not valid.
    """
    if BASE_KEY not in metadata:
        return None
    return Fingerprint.from_dict(parse_json(metadata[BASE_KEY], what="the fingerprint of its base"))


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """Return plain JSON values. Inverse: `manifest_from_json`."""
    return {
        "format_version": FORMAT_VERSION,
        "injections": [
            {"kind": config.kind, "config": config.to_dict(), "sites": list(sites)}
            for config, sites in manifest.injections
        ],
        "trainable": list(manifest.trainable),
    }


def manifest_from_json(header: object) -> Manifest:
    """Build the manifest from plain JSON values. Inverse: `manifest_to_json`.

    Raises:
        CheckpointError: for whatever `manifest_to_json` would not have written.
    """
    if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
        raise CheckpointError("the header has no format_version")
    if header["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"it has format version {header['format_version']} and this minilora reads version "
            f"{FORMAT_VERSION}: upgrade minilora"
        )
    if set(header) != {"format_version", "injections", "trainable"}:
        raise CheckpointError(f"the header's entries are {sorted(header)}, which is not this format")
    if not isinstance(header["injections"], list):
        raise CheckpointError("the header's injections are not a list")
    injections = []
    for entry in header["injections"]:
        if not isinstance(entry, dict) or set(entry) != {"kind", "config", "sites"}:
            raise CheckpointError(f"an injection is not made of kind, config and sites: {entry!r:.200}")
        kind = entry["kind"]
        if not isinstance(kind, str) or kind not in CONFIGS or not isinstance(entry["config"], dict):
            raise CheckpointError(f"an injection is of the unknown kind {kind!r:.200}")
        try:
            config = CONFIGS[kind].from_dict(entry["config"])
        except (MiniLoRAError, TypeError) as error:
            raise CheckpointError(f"a config in the header is not valid: {error}") from error
        injections.append((config, _names(entry["sites"])))
    return Manifest(tuple(injections), _names(header["trainable"]))


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"the header has no list of names where one must be: {value!r:.200}")
    return tuple(value)
