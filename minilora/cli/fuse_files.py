"""`fuse_files`: a base on disk and an adapter become a checkpoint on disk, one tensor in memory at a time.

Shard by shard the base is copied, with W_eff in the place of each adapted weight and the trained modules in
the place of the originals. No model is built and transformers is not needed, so a base may be larger than
the memory; the result is what `minilora.fuse` and `save_pretrained` would give.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..diagnosis.rounding import exact_dtype, share_lost
from ..errors import CheckpointError, quoted, several
from ..files.atomic import new_folder, write_whole
from ..files.contents import Contents
from ..files.tensors import Entry, is_finite, opened, write_tensors
from ..plan import WRAPPERS
from ..problems import Problems
from .base_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, SUFFIX, BaseFiles
from .inventory import KINDS, Inventory
from .placement import Placement, place
from .ties import find_ties
from .updates import LowRank, with_bias

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


@dataclass(frozen=True)
class Fusion:
    """What each tensor of the result is made of."""

    base: BaseFiles
    contents: Contents
    placement: Placement
    dtype: torch.dtype | None
    """Of all floating-point tensors in the result; None keeps each tensor's own."""
    lost: dict[str, float] = field(default_factory=dict)
    """The share of each update that rounding took, by site, as far as the tensors are made."""

    def files(self) -> dict[str, list[str]]:
        """Return the names of the tensors in each file of the result: those of the base, and new heads."""
        files, only = self.base.files(), SINGLE_FILE if self.base.path.is_dir() else self.base.path.name
        files.setdefault(next(reversed(files), only), []).extend(self.added())
        return files

    def added(self) -> list[str]:
        """Return the names of trained tensors that the base does not have."""
        return sorted(name for name in self.placement.heads.values() if name not in self.base.tensors)

    def entries(self, names: list[str], stored_values: Callable[[str], Tensor]) -> dict[str, Entry]:
        """Return how the tensors of one file are made, given what reads those of the base's file."""
        entries: dict[str, Entry] = {}
        for name in names:
            read: Callable[[], Tensor]
            if name in self._heads:
                own, shape = self._heads[name].dtype, tuple(self._heads[name].shape)
                read = partial(self._heads.__getitem__, name)
            else:
                stored = self.base.tensors[name]
                assert stored.dtype is not None  # `_unfusable` refuses what cannot be copied
                own, shape = stored.dtype, stored.shape
                read = partial(stored_values, name)
            to = self.dtype if self.dtype is not None and own.is_floating_point else own
            entries[name] = Entry(to, shape, partial(self._made, name, read, to))
        return entries

    @cached_property
    def _heads(self) -> dict[str, Tensor]:
        """What was trained in full, by the names in the files."""
        return {name: self.contents.tensors[key] for key, name in self.placement.heads.items()}

    @cached_property
    def _sites(self) -> dict[str, str]:
        """The sites with an update, by the names in the files of their weights."""
        return {self.placement.weights[site]: site for site in self.placement.updates}

    @cached_property
    def _moved(self) -> dict[str, LowRank]:
        """What is added to biases, by their names in the files."""
        found = {
            name: with_bias(self.placement.updates[site]) for site, name in self.placement.biases.items()
        }
        return {name: update for name, update in found.items() if update is not None}

    def _made(self, name: str, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        """Return a tensor of the result, rounded once.

        Raises:
            CheckpointError: when that makes values infinite that were finite.
        """
        tensor, site = read(), self._sites.get(name)
        if name in self._moved:
            made = self._moved[name].added_to_bias(tensor, dtype=dtype)
        elif site is None:
            made = tensor.to(dtype)
        else:
            transposed = site in self.placement.transposed
            added_to = partial(self.placement.updates[site].added_to, tensor, transposed=transposed)
            made = added_to(dtype=dtype)
            exact = exact_dtype(tensor)
            # In the dtype that it is formed in nothing is rounded, and it need not be formed again.
            self.lost[site] = 0.0 if dtype == exact else share_lost(tensor, added_to(dtype=exact), dtype)
        if not is_finite(made) and (lost := int((torch.isfinite(tensor) & ~torch.isfinite(made)).sum())):
            raise CheckpointError(
                f"{name!r}: {lost} of {made.numel()} values are too large for {_short(dtype)}; nothing has "
                "been written. Give another --dtype: bfloat16 and float32 reach up to 3e38"
            )
        return made


def fuse_files(
    base: BaseFiles,
    contents: Contents,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the base with the adapter in its weights, whole or not at all.

    Args:
        base: a folder's files, or one file.
        contents: of an adapter file; LoRA and modules trained in full.
        out: a folder that does not exist or is empty, to hold what the base's holds; a file that does not
            exist where the base is one file.
        dtype: of all floating-point tensors in the result; None keeps each tensor's own.
        check_base: refuse a base other than the one that the adapter was trained on.
        say: told a line about each step.

    Raises:
        CheckpointError: listing everything in which the adapter does not fit the base, or cannot be fused;
            or, once it writes, for the first tensor that the dtype cannot hold.
        OSError: when a file cannot be read or written.
    """
    _require_place(out, base)
    if problems := list(_unfusable(contents, base)):
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    placement = place(contents, base)
    problems = _without_a_weight_of_their_own(placement, base)
    if check_base and placement.comparison.different:
        problems.append(
            f"this is not the base that the adapter was trained on: {placement.comparison}. Give that one, "
            "or --no-check-base"
        )
    if problems:
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    say(f"base: {placement.comparison}")
    fusion = Fusion(base, contents, placement, dtype)
    if base.path.is_dir():
        with new_folder(out) as folder:
            _write_files(fusion, {name: folder / name for name in fusion.files()}, say)
            _carry_along(base, folder, dtype, say)
    else:
        _write_files(fusion, {base.path.name: out}, say)
    if fusion.lost:
        worst = max(fusion.lost, key=fusion.lost.__getitem__)
        say(
            f"lost to rounding: {fusion.lost[worst]:.2%} of the update of {worst!r}, where it is most; "
            f"{median(fusion.lost.values()):.2%} in the median"
        )
    if added := fusion.added():
        say(f"new in this checkpoint: {quoted(added)}; config.json is as it was, so mind num_labels")


def _require_place(out: Path, base: BaseFiles) -> None:
    """Raise where the result cannot get its name, before hours of work rather than after."""
    if base.path.is_dir():
        if out.suffix == SUFFIX:
            raise CheckpointError(
                f"{str(base.path)!r} is a folder, and so is the result: give --out a folder's name, or "
                f"--base a file, to get one file {out.name!r}"
            )
        if out.resolve().is_relative_to(base.folder.resolve()):
            raise CheckpointError(f"{str(out)!r} lies inside the base's own folder; choose another place")
    elif out.suffix != SUFFIX:
        raise CheckpointError(
            f"{str(base.path)!r} is a file, and so is the result: give --out a name that ends with {SUFFIX}, "
            "or --base a folder, to carry config and tokenizer along"
        )
    elif out.exists():
        raise CheckpointError(f"{str(out)!r} exists already; choose another name, or remove it first")


def _unfusable(contents: Contents, base: BaseFiles) -> list[str]:
    """Return what can be told without looking at the base's weights."""
    problems = Problems()
    for config, sites in contents.manifest.injections:
        if not WRAPPERS[config.kind].mergeable:
            for site in sites:
                problems.add(site, f"a {KINDS[config.kind].title} is not linear; no weight can take it in")
    lines = problems.lines() + Inventory.of(contents).problems()
    if infinite := [key for key, tensor in contents.tensors.items() if not is_finite(tensor)]:
        lines.append(f"{quoted(infinite)} of the adapter: not finite, so W + scaling B A is not either")
    if unknown := [name for name, stored in base.tensors.items() if stored.dtype is None]:
        kinds = sorted({base.tensors[name].dtype_name for name in unknown})
        lines.append(f"{quoted(unknown)} of the base: of {quoted(kinds)}, which cannot be copied")
    return lines


def _without_a_weight_of_their_own(placement: Placement, base: BaseFiles) -> list[str]:
    """Return why weights that are there cannot take an update, and which biases are not there."""
    problems = Problems()
    ties = find_ties(placement, base)
    for site in placement.updates:
        stored = base.tensors[placement.weights[site]]
        if not stored.is_float:
            problems.add(site, f"the base's weight is {stored.dtype_name}, quantised")
        elif site in ties and site not in placement.shared:
            problems.add(site, ties[site])
    for site, name in placement.biases.items():
        if name not in {*base.tensors, *placement.heads.values()}:
            problems.add(
                site,
                "B has a bias, and the base's files have none of the layer's to take it in. Fuse in Python, "
                "minilora.fuse(model), and give the layer a bias wherever the result is loaded",
            )
    return problems.lines()


def _write_files(fusion: Fusion, targets: Mapping[str, Path], say: Callable[[str], None]) -> None:
    """Write each file of the result, and the index where there is one."""
    base, written = fusion.base, {}
    for number, (file_name, names) in enumerate(fusion.files().items(), start=1):
        say(f"[{number}/{len(targets)}] {file_name}: {len(names)} tensors")
        with opened(base.folder / file_name) as source:
            entries = fusion.entries(names, source.get_tensor)
            write_tensors(targets[file_name], entries, {"format": "pt", **(source.metadata() or {})})
        written[file_name] = entries
    if base.index is not None:
        folder = next(iter(targets.values())).parent
        _write_json(folder / INDEX_FILE, _new_index(base.index, written))


def _new_index(index: Mapping[str, Any], written: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    entries = [entry for file in written.values() for entry in file.values()]
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
        "weight_map": {name: file_name for file_name, file in written.items() for name in sorted(file)},
    }


def _carry_along(
    base: BaseFiles, folder: Path, dtype: torch.dtype | None, say: Callable[[str], None]
) -> None:
    """Copy what is not weights: the config, the tokenizer, and whatever else stands there."""
    left: list[str] = []
    files = base.files()
    for source in sorted(base.folder.rglob("*")):
        relative = source.relative_to(base.folder)
        if any(part.startswith(".") for part in relative.parts) or relative.name == INDEX_FILE:
            continue
        if source.suffix in WEIGHT_SUFFIXES or relative.name.endswith(".index.json"):
            left += [] if relative.as_posix() in files else [relative.as_posix()]
        elif source.is_file():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / relative)
    if left:
        say(f"not carried along, being the unfused weights in other forms: {quoted(left)}")
    if dtype is not None and base.config:
        _write_json(folder / CONFIG_FILE, _with_dtype(dict(base.config), _short(dtype)))


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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
