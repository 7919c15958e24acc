"""What a file or a folder is that was given in the place of another, and the call that reads it.

Only names and a few bytes are looked at. Used where an error is certain, to say more than that.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import CheckpointError, quoted
from ..tensors import MAX_HEADER_BYTES, opened, read_json

PEFT_CONFIG = "adapter_config.json"
CHECKPOINT_CONFIG = "config.json"
ENTRY = "minilora"
"""Of a model's config.json, in a checkpoint of transformers' Trainer that holds an adapter."""

PICKLE = "a pickle, as torch.save writes it, which can run code when read and is never opened here"
JSON = "JSON"


def require_safetensors(path: Path, options: str = "") -> None:
    """Raise for a file that plainly is of another kind.

    Args:
        path: of the file.
        options: what the caller gave `minilora.load` beside the path, ", format=...", to be given again.

    Raises:
        CheckpointError: naming the kind, and what to do.
        OSError: when there is no such file, or it cannot be read.
    """
    if path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a folder. {what_a_folder_is(path)}")
    if (other := other_kind(path)) is None:
        return
    hint = f". {_instead_of_pickle(path, options)}" if other == PICKLE else ""
    if other == JSON and path.name == PEFT_CONFIG:
        hint = f": a PEFT adapter is the folder, minilora.load(model, {str(path.parent)!r})"
    raise CheckpointError(f"{str(path)!r} is not a sound safetensors file but {other}{hint}")


def other_kind(path: Path) -> str | None:
    """Return what a file plainly is that is no safetensors file, in words; None where that is not plain.

    Raises:
        OSError: when there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return None  # as in every safetensors file that is read
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start):
        return PICKLE
    if start.startswith(b"version https://git-lfs"):
        return "stands for one that Git LFS has: run `git lfs pull` to get it"
    return JSON if start.lstrip().startswith(b"{") else None


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a Trainer's checkpoint whose config says which adapter is in it."""
    config = path / CHECKPOINT_CONFIG
    if (path / PEFT_CONFIG).exists() or not config.is_file():
        return False
    with contextlib.suppress(CheckpointError):
        content = read_json(config)
        return isinstance(content, dict) and ENTRY in content
    return False


def what_it_is(path: Path, names: Iterable[str]) -> str:
    """Return what a safetensors file is by the names of its tensors, and the call that reads it."""
    names = list(names)
    folder = str(path.parent)
    if is_checkpoint(path.parent):
        return f"It is part of a Trainer's checkpoint, which is the folder: minilora.load(model, {folder!r})"
    if any(name.startswith("base_model.model.") for name in names):
        beside = (path.parent / PEFT_CONFIG).exists()
        which = f"which is the folder: minilora.load(model, {folder!r})"
        return "It has the tensors of a PEFT adapter" + (
            f", {which}" if beside else f"; {PEFT_CONFIG!r}, which belongs to it, is not beside it"
        )
    if any(re.search(r"\.(loras|adapters)\.[^.]+\.", name) for name in names):
        return (
            "It has the tensors of the adapters library, whose adapters are folders: "
            f'minilora.load(model, {folder!r}, format="adapters")'
        )
    ours = any(name.endswith((".lora_A", ".adapter_down.weight")) for name in names)
    if ours and any("base" in name.split(".") for name in names):
        return (
            "It is a checkpoint of a whole model with its injections, as a Trainer writes them. Inject as it "
            f"was trained, then model.load_state_dict(safetensors.torch.load_file({str(path)!r})), and keep "
            "the adapter alone with minilora.save(model, file)"
        )
    if ours:
        return (
            "It has LoRA tensors without a configuration, as loralib's files do: minilora.load(model, "
            f'{str(path)!r}, format="loralib", config=minilora.LoRAConfig(r=..., alpha=...))'
        )
    return (
        "There is no adapter's tensor in it, so it may be a whole model: "
        f"model.load_state_dict(safetensors.torch.load_file({str(path)!r})), or from_pretrained({folder!r}) "
        "of its class"
    )


def what_a_folder_is(folder: Path) -> str:
    """Return what a folder is that is no PEFT adapter, and the call that reads what is in it."""
    if inner := sorted(str(config.parent) for config in folder.glob(f"*/{PEFT_CONFIG}")):
        return f"PEFT adapters are in {quoted(inner)}: minilora.load(model, {inner[0]!r})"
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(CheckpointError, OSError), opened(path) as file:
            if "minilora" in file.metadata():
                return f"A file of minilora's is in it: minilora.load(model, {str(path)!r})"
            return f"{path.name!r} is in it. {what_it_is(path, file.keys())}"
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.pt")]):
        return f"{path.name!r} is in it, a pickle by its name. {_instead_of_pickle(path)}"
    return "Nothing in it is known here: " + (
        quoted(sorted(path.name for path in folder.iterdir())) or "it is empty"
    )


def _instead_of_pickle(path: Path, options: str = "") -> str:
    if whole := re.fullmatch(r"(.+)-\d+-of-\d+(\.\w+)", path.name):
        index = path.with_name(f"{whole[1]}{whole[2]}.index.json")
        if index.exists():
            return (
                f"It is one shard of a whole model, whose index is {str(index)!r}, and no adapter: "
                f"from_pretrained({str(path.parent)!r}) of its class reads them all"
            )
    new = path.with_suffix(".safetensors")
    of_peft = (path.parent / PEFT_CONFIG).exists()
    then = str(path.parent if of_peft else new)
    return f"If you trust it: {conversion(path, new)}, then minilora.load(model, {then!r}{options})"


def conversion(pickle: Path, new: Path) -> str:
    """Return the call that makes a safetensors file of a pickle of tensors, tied ones included.

    It clones, because safetensors takes no tensors that share memory.
    """
    return (
        f"safetensors.torch.save_file({{k: v.clone() for k, v in torch.load({str(pickle)!r}, "
        f"weights_only=True).items()}}, {str(new)!r})"
    )
