"""Checkpoints of transformers' Trainer, of a model on which `minilora.slim_checkpoints` was called.

    config.json         the model's, with an entry "minilora" that says what the tensors are
    model.safetensors   the tensors that train, by their names in the injected model

The entry holds three texts of JSON: "minilora" and "minilora_base", as in the header of minilora's own files,
and "tensors", which says where each tensor of such a file is found. What else trains stands beside them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, several
from ...manifest import Manifest
from ...names import described
from ..contents import Announced
from ..fingerprint import Fingerprint
from ..tensors import opened, parse_json, read_json
from . import native
from .recognise import CHECKPOINT_CONFIG as CONFIG_FILE
from .recognise import ENTRY, is_checkpoint

TENSOR_FILE = "model.safetensors"
TENSORS_KEY = "tensors"

__all__ = ["CONFIG_FILE", "ENTRY", "TENSOR_FILE", "entry", "is_checkpoint", "reading"]


def entry(manifest: Manifest, base: Fingerprint, stored: Mapping[str, str]) -> dict[str, str]:
    """Return what the config says of a model's injections. Inverse: `reading`.

    Args:
        manifest: of the model.
        base: its fingerprint.
        stored: the name in `state_dict` of each tensor, by its name in a file of minilora's.
    """
    texts: dict[str, Any] = {
        native.METADATA_KEY: native.manifest_to_json(manifest),
        native.BASE_KEY: base.to_dict(),
        TENSORS_KEY: dict(stored),
    }
    return {key: json.dumps(value, separators=(",", ":")) for key, value in texts.items()}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Announced]:
    """Open a checkpoint and give what it says that it holds. Inverse: `entry`, and a Trainer that saves.

    Raises:
        CheckpointError: when it is not sound, or not the checkpoint that its config speaks of.
        OSError: when there is no such folder, or a file cannot be read.
    """
    config = read_json(path / CONFIG_FILE)
    texts = config.get(ENTRY) if isinstance(config, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of an injected model: its {CONFIG_FILE} has no entry {ENTRY!r}, "
            "which minilora.slim_checkpoints(model) puts there before training"
        )
    if not (path / TENSOR_FILE).exists():
        raise CheckpointError(f"{str(path)!r} has no {TENSOR_FILE!r}: its tensors may be in several files")
    with opened(path / TENSOR_FILE) as file:
        entries = file.entries()
        try:
            manifest = native.manifest_from_json(_parsed(texts, native.METADATA_KEY))
            base = native.base_of(texts)
            stored = _parsed(texts, TENSORS_KEY)
            if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored.values()):
                raise CheckpointError(f"{TENSORS_KEY!r} in its {CONFIG_FILE} is no list of names")
        except CheckpointError as error:
            raise CheckpointError(f"{str(path)!r} cannot be loaded: {error}") from error
        if missing := [key for key in stored.values() if key not in entries]:
            line = f"missing from {TENSOR_FILE}: {described(missing)}"
            footer = "The injections may have been removed, or others made, since its config was written."
            raise CheckpointError(several([line], outcome=f"{str(path)!r} was not read", footer=footer))
        beside = [key for key in entries if key not in set(stored.values())]
        note = f"{described(beside)}: in the checkpoint, and not part of the adapter"
        yield Announced(
            manifest,
            {name: entries[key] for name, key in stored.items()},
            base=base,
            notes=(note,) if beside else (),
        )


def _parsed(texts: Mapping[str, str], key: str) -> object:
    return parse_json(texts.get(key, ""), what=f"{key!r} in its {CONFIG_FILE}")
