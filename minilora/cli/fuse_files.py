"""`fuse_files`: a base on disk and an adapter become a checkpoint on disk, one tensor in memory at a time.

Shard by shard the base is copied, with W_eff in the place of each adapted weight and the trained modules in
the place of the originals. No model is built and transformers is not needed, so a base may be larger than
the memory; the result is what `minilora.fuse` and `save_pretrained` would give.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LoRAConfig
from ..errors import CheckpointError, quoted, several
from ..files.atomic import new_folder, write_whole
from ..files.contents import Contents
from ..files.tensors import FLOAT_DTYPES, Entry, opened, write_tensors
from ..functional import effective_weight
from ..names import described
from .base_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, TORCH_DTYPES, BaseFiles, Fit, fit

# Other copies of the weights, which would contradict the fused ones.
WEIGHT_SUFFIXES = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
}


def fuse_files(
    base_folder: Path,
    contents: Contents,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the base with the adapter in its weights to a new folder, whole or not at all.

    Args:
        base_folder: with the base's safetensors files, its config and what else belongs to it.
        contents: of an adapter file; LoRA and modules trained in full.
        out: a folder that does not exist, or is empty.
        dtype: of all floating-point tensors in the result; None keeps each tensor's own.
        check_base: refuse a base other than the one that the adapter was trained on.
        say: told a line about each step.

    Raises:
        CheckpointError: listing everything in which the adapter does not fit the base, or cannot be fused.
        OSError: when a file cannot be read or written.
    """
    if adapters := [
        s for config, sites in contents.manifest.injections for s in sites if config.kind == "adapter"
    ]:
        raise CheckpointError(
            f"{described(adapters)}: a bottleneck adapter is not linear; no weight can take it in"
        )
    base = BaseFiles.open(base_folder)
    placed = fit(contents, base)
    problems = [*_unfusable(placed, contents, base)]
    if check_base and placed.comparison.different:
        problems.append(f"this is not the base that the adapter was trained on: {placed.comparison}")
    if problems:
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    say(f"base: {placed.comparison}")
    shards = _shards(base, contents, placed, dtype)
    with new_folder(out) as folder:
        for number, (file_name, entries) in enumerate(shards.items(), start=1):
            say(f"[{number}/{len(shards)}] {file_name}: {len(entries)} tensors")
            with opened(base.folder / file_name) as source:
                metadata = {"format": "pt", **(source.metadata() or {})}
            write_tensors(folder / file_name, entries, metadata)
        if base.index is not None:
            _write_json(folder / INDEX_FILE, _new_index(base.index, shards))
        _carry_along(base, folder, dtype, say)
    added = [name for name in placed.heads.values() if name not in base.tensors]
    if added:
        say(f"new in this checkpoint: {quoted(sorted(added))}; config.json is as it was, so mind num_labels")


def _unfusable(placed: Fit, contents: Contents, base: BaseFiles) -> list[str]:
    """Return why weights that are there cannot take an update."""
    problems = []
    loras = [
        s for config, sites in contents.manifest.injections for s in sites if isinstance(config, LoRAConfig)
    ]
    for site in loras:
        name = placed.weights[site]
        if TORCH_DTYPES.get(base.tensors[name].dtype) not in FLOAT_DTYPES.values():
            problems.append(f"{site!r}: the base's weight is {base.tensors[name].dtype}, quantised")
        elif (other := _tied_to(name, base)) is not None:
            problems.append(
                f"{site!r}: its weight is tied to {other}, so the update would reach both, or be lost when "
                "the result is loaded and tied again; set tie_word_embeddings to false and store both first"
            )
    return problems


def _is_embedding(name: str) -> bool:
    """Return whether the weight of an embedding may have this name."""
    return any("emb" in part or part in ("wte", "shared") for part in name.split("."))


def _tied_to(name: str, base: BaseFiles) -> str | None:
    """Return the embedding that an output layer's weight is tied to, or None."""
    shape = base.tensors[name].shape
    inner = base.config.get("text_config")
    settings = {**base.config, **(inner if isinstance(inner, dict) else {})}
    if _is_embedding(name):  # the weight of a linear layer, found by its values
        return repr(name)
    embeddings = [
        other
        for other, stored in base.tensors.items()
        if other != name and stored.shape == shape and _is_embedding(other)
    ]
    weight: Tensor | None = None
    for other in embeddings:
        weight = base.tensor(name) if weight is None else weight
        if torch.equal(weight, base.tensor(other)):
            return repr(other)
    if shape[:1] == (settings.get("vocab_size"),) and (not embeddings or settings.get("tie_word_embeddings")):
        return "the embedding, by config.json or because that is not stored apart"
    return None


def _shards(
    base: BaseFiles, contents: Contents, placed: Fit, dtype: torch.dtype | None
) -> dict[str, dict[str, Entry]]:
    """Return the files to write, with the tensors in each."""
    updates = {
        placed.weights[site]: (site, config)
        for config, sites in contents.manifest.injections
        for site in sites
        if isinstance(config, LoRAConfig)
    }
    heads = {name: contents.tensors[key] for key, name in placed.heads.items()}
    shards: dict[str, dict[str, Entry]] = {}
    for name, stored in base.tensors.items():
        if stored.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{name!r} of the base is {stored.dtype}, which cannot be copied")
        own = heads[name].dtype if name in heads else TORCH_DTYPES[stored.dtype]
        to = dtype if dtype is not None and own.is_floating_point else own
        read: Callable[[], Tensor]
        if name in heads:
            read = partial(heads.__getitem__, name)
        elif name in updates:
            site, config = updates[name]
            A, B = contents.tensors[f"{site}.lora_A"], contents.tensors[f"{site}.lora_B"]
            read = partial(_fused, base, name, A, B, config.scaling, site in placed.transposed, to)
        else:
            read = partial(base.tensor, name)
        shards.setdefault(stored.file, {})[name] = Entry(to, stored.shape, read)
    last = shards[list(shards)[-1]] if shards else shards.setdefault(SINGLE_FILE, {})
    for name, head in heads.items():
        if name not in base.tensors:
            to = dtype if dtype is not None and head.is_floating_point() else head.dtype
            last[name] = Entry(to, tuple(head.shape), partial(heads.__getitem__, name))
    return shards


def _fused(
    base: BaseFiles, name: str, A: Tensor, B: Tensor, scaling: float, transposed: bool, dtype: torch.dtype
) -> Tensor:
    """Return W_eff of one weight, rounded once."""
    return effective_weight(base.tensor(name), A, B, scaling, transposed=transposed, dtype=dtype)


def _new_index(index: Mapping[str, Any], shards: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    entries = [entry for shard in shards.values() for entry in shard.values()]
    sizes = {
        "total_size": sum(entry.nbytes for entry in entries),
        "total_parameters": sum(torch.Size(entry.shape).numel() for entry in entries),
    }
    stated = index.get("metadata")
    metadata = {**(stated if isinstance(stated, dict) else {"total_size": 0})}
    metadata |= {key: size for key, size in sizes.items() if key in metadata}
    return {
        **index,
        "metadata": metadata,
        "weight_map": {name: file_name for file_name, shard in shards.items() for name in sorted(shard)},
    }


def _carry_along(
    base: BaseFiles, folder: Path, dtype: torch.dtype | None, say: Callable[[str], None]
) -> None:
    """Copy what is not weights: the config, the tokenizer, and whatever else stands there."""
    left: list[str] = []
    for source in sorted(base.folder.rglob("*")):
        relative = source.relative_to(base.folder)
        if any(part.startswith(".") for part in relative.parts) or relative.name == INDEX_FILE:
            continue
        if source.suffix in WEIGHT_SUFFIXES or relative.name.endswith(".index.json"):
            left += [] if relative.name in {d.file for d in base.tensors.values()} else [relative.as_posix()]
        elif source.is_file():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / relative)
    if left:
        say(f"not carried along, being the unfused weights in other forms: {quoted(left)}")
    if dtype is not None and base.config:
        _write_json(folder / CONFIG_FILE, _with_dtype(dict(base.config), str(dtype).removeprefix("torch.")))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config that states the new dtype wherever it stated one."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _with_dtype(value, dtype)
        if isinstance(value, dict) and key.endswith("_config")
        else value
        for key, value in config.items()
    }


def _write_json(path: Path, value: object) -> None:
    write_whole(path, [json.dumps(value, indent=2).encode() + b"\n"])
