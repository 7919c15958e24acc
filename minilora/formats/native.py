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

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..files import digest, entries_of, parse_json, read_tensors, write_tensors
from ..fingerprint import Fingerprint
from ..manifest import Contents, Manifest

METADATA_KEY = "minilora"
BASE_KEY = "minilora_base"
DIGEST_KEY = "minilora_sha256"


def read(path: Path) -> Contents:
    """Return what a file holds. Inverse: `write`.

    Raises:
        CheckpointError: when the file is not sound, or not of this format.
        OSError: when there is no such file, or it cannot be read.
    """
    metadata, tensors = read_tensors(path)
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{str(path)!r} is no minilora file: its header has no {METADATA_KEY!r} entry. A file of another "
            'format needs to be told so: minilora.load(model, path, format="loralib", config=...)'
        )
    try:
        manifest = Manifest.from_dict(parse_json(metadata[METADATA_KEY], what="its header"))
        return Contents(manifest, tensors, base=base_of(metadata), damage=damage(tensors, metadata))
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r} cannot be loaded: {error}") from error


def write(path: Path, contents: Contents) -> None:
    """Write one file, whole or not at all. Inverse: `read`.

    Raises:
        CheckpointError: for a dtype that safetensors does not know.
        OSError: when the file cannot be written.
    """
    manifest = {METADATA_KEY: json.dumps(contents.manifest.to_dict())}
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
    """Return how a file is seen to be damaged, or None. Inverse of the checksum in `header`."""
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
