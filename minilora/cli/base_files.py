"""`BaseFiles`: the safetensors files of a base model in a folder, read tensor by tensor, without the model.

A file knows a weight by a name that may differ from the model's by a prefix: a checkpoint of `BertModel` has
"encoder...", one of `BertForSequenceClassification` "bert.encoder...", and transformers loads either into
either. The one prefix that fits all sites of an adapter is found here. Some architectures transformers saves
under older names altogether; there the adapter's fingerprint tells which weight is which.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..config import LoRAConfig
from ..errors import CheckpointError, listed, quoted, several
from ..files.contents import Contents
from ..files.fingerprint import Comparison, Fingerprint, Signature, compare
from ..files.tensors import DTYPE_NAMES, FLOAT_DTYPES, opened, read_json
from ..names import described

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Described(NamedTuple):
    """What a file says of a tensor without its values being read."""

    file: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BaseFiles:
    """Where each tensor of a base model is stored."""

    folder: Path
    tensors: Mapping[str, Described]
    index: Mapping[str, Any] | None
    """The JSON of the index file; None where there is one file only."""
    config: Mapping[str, Any]
    """The JSON of config.json; empty where there is none."""

    @classmethod
    def open(cls, folder: Path) -> BaseFiles:
        """Return the description of a folder's safetensors files, from their headers alone.

        Raises:
            CheckpointError: when there are none, or they are not sound, or not those that the index names.
            OSError: when they cannot be read.
        """
        index: Any = None
        if (folder / INDEX_FILE).exists():
            index = read_json(folder / INDEX_FILE)
            if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
                raise CheckpointError(f"{str(folder / INDEX_FILE)!r} has no weight_map")
            names = sorted({str(name) for name in index["weight_map"].values()})
            if outside := [name for name in names if Path(name).name != name]:
                raise CheckpointError(
                    f"{str(folder / INDEX_FILE)!r} names files elsewhere: {quoted(outside)}"
                )
        elif (folder / SINGLE_FILE).exists():
            names = [SINGLE_FILE]
        else:
            present = sorted(file.name for file in folder.iterdir())
            raise CheckpointError(
                f"{str(folder)!r} has neither {SINGLE_FILE!r} nor {INDEX_FILE!r}, but {listed(present)}. A "
                "base of another format can be saved as safetensors: model.save_pretrained(folder)"
            )
        tensors: dict[str, Described] = {}
        for file_name in names:
            with opened(folder / file_name) as file:
                for name in file.keys():  # noqa: SIM118  a file, not a dictionary
                    view = file.get_slice(name)
                    tensors[name] = Described(file_name, view.get_dtype(), tuple(view.get_shape()))
        if index is not None:
            placed = {name: stored.file for name, stored in tensors.items()}
            if wrong := sorted(set(placed.items()) ^ set(index["weight_map"].items())):
                names = sorted({name for name, _ in wrong})
                raise CheckpointError(
                    f"{str(folder / INDEX_FILE)!r} and the files disagree on {quoted(names)}"
                )
        config: Any = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
        return cls(folder, tensors, index, config if isinstance(config, dict) else {})

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, on the CPU.

        Raises:
            CheckpointError: when the file is not sound.
            OSError: when it cannot be read.
        """
        with opened(self.folder / self.tensors[name].file) as file:
            return file.get_tensor(name)

    def fingerprint(self, weights: Mapping[str, str], transposed: Iterable[str]) -> Fingerprint:
        """Return the fingerprint of weights, given by site as names in the files."""
        signatures = {
            site: Signature.of(self.tensor(name))
            for site, name in weights.items()
            if TORCH_DTYPES.get(self.tensors[name].dtype) in FLOAT_DTYPES.values()
        }
        unchecked = {
            site: "quantised, or otherwise no plain weight" for site in weights if site not in signatures
        }
        return Fingerprint(signatures, unchecked, frozenset(transposed))


@dataclass(frozen=True)
class Fit:
    """How an adapter lies on a base's files."""

    weights: Mapping[str, str]
    """The name in the files of the weight at each site; LoRA sites all have one."""
    heads: Mapping[str, str]
    """The name in the files of each tensor that was trained in full, whether it is there already or not."""
    transposed: frozenset[str]
    """LoRA sites whose weight is stored as (in, out)."""
    comparison: Comparison
    """How the base relates to the one that the adapter was trained on."""


def fit(contents: Contents, base: BaseFiles) -> Fit:
    """Return how an adapter lies on a base's files.

    Raises:
        CheckpointError: listing every site that has no weight there, or one of another shape.
    """
    loras = [site for config, sites in contents.manifest.injections for site in sites if _is_lora(config)]
    others = [
        site for config, sites in contents.manifest.injections for site in sites if not _is_lora(config)
    ]
    named = loras or _with_weight(others, base)
    add, cut, problems = _prefix(named, base)
    renamed = problems and _by_value(named, contents.base or Fingerprint(), base)
    if renamed:
        weights, problems = renamed, []
    else:
        weights = {site: f"{add}{site.removeprefix(cut)}.weight" for site in (*loras, *others)}
        weights = {site: name for site, name in weights.items() if name in base.tensors}
    transposed: set[str] = set()
    for site in loras:
        if site in weights:
            shape = base.tensors[weights[site]].shape
            layout = _layout(site, shape, contents)
            transposed |= {site} if layout is True else set()
            problems += [layout] if isinstance(layout, str) else []
    heads, more = _heads(contents, base, add, cut)
    if renamed:
        more += [
            f"{key!r} was trained in full, and the base, which has names of its own, has none like it"
            for key, name in heads.items()
            if name not in base.tensors and any(site.split(".")[0] == key.split(".")[0] for site in weights)
        ]
    if problems := problems + more:
        raise CheckpointError(several(problems, outcome=f"the adapter does not fit {str(base.folder)!r}"))
    recorded = contents.base or Fingerprint()
    known = {site: name for site, name in weights.items() if site in recorded.signatures}
    comparison = compare(recorded, base.fingerprint(known, transposed))
    return Fit(weights, heads, frozenset(transposed), comparison)


def _is_lora(config: object) -> bool:
    return isinstance(config, LoRAConfig)


def _with_weight(sites: Iterable[str], base: BaseFiles) -> list[str]:
    """Return the sites that some weight in the files may belong to: a dropout has none."""
    return [site for site in sites if any(f".{name}".endswith(f".{site}.weight") for name in base.tensors)]


def _prefix(sites: list[str], base: BaseFiles) -> tuple[str, str, list[str]]:
    """Return what to add in front of every site's name, what to cut there, and problems."""

    def missing(add: str, cut: str) -> list[str]:
        return [
            site
            for site in sites
            if not site.startswith(cut) or f"{add}{site.removeprefix(cut)}.weight" not in base.tensors
        ]

    if not sites or not (absent := missing("", "")):
        return "", "", []
    first = f"{sites[0]}.weight"
    candidates = [(name.removesuffix(first), "") for name in base.tensors if name.endswith("." + first)]
    parts = sites[0].split(".")
    candidates += [("", ".".join(parts[:i]) + ".") for i in range(1, len(parts))]
    fitting = [(add, cut) for add, cut in candidates if not missing(add, cut)]
    if len(fitting) == 1:
        return *fitting[0], []
    if fitting:
        return "", "", [f"its names fit the base's in {len(fitting)} ways, with prefixes {fitting!r:.200}"]
    near = difflib.get_close_matches(f"{absent[0]}.weight", base.tensors, n=1)
    hint = f"; nearest: {near[0]!r}" if near else ""
    tied = (
        ". A weight that is tied to another, as an output layer to the embedding, is stored under one of its "
        "names only, and cannot be fused without untying them first"
    )
    return "", "", [f"{described(absent)}: the base has no weight of that name{hint}{tied}"]


def _by_value(sites: list[str], recorded: Fingerprint, base: BaseFiles) -> dict[str, str]:
    """Return the name in the files of each site's weight, told by its values; empty unless all are clear."""
    found: dict[str, str] = {}
    for name, stored in base.tensors.items():
        alike = [
            s for s in sites if s in recorded.signatures and recorded.signatures[s].shape == stored.shape
        ]
        if alike and TORCH_DTYPES.get(stored.dtype) in FLOAT_DTYPES.values():
            signature = Signature.of(base.tensor(name))
            for site in alike:
                if recorded.signatures[site].difference(signature) == 0:
                    if site in found:
                        return {}  # two weights of the same values
                    found[site] = name
    return found if len(found) == len(set(found.values())) == len(sites) else {}


def _layout(site: str, shape: tuple[int, ...], contents: Contents) -> bool | str:
    """Return whether a weight is stored as (in, out), or what is wrong with it."""
    A, B = contents.tensors.get(f"{site}.lora_A"), contents.tensors.get(f"{site}.lora_B")
    if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return f"{site!r}: the file has no A and B of one rank for it"
    needed = (B.shape[0], A.shape[1])
    if shape not in (needed, needed[::-1]):
        return f"{site!r}: the base's weight is {shape}, the adapter's update {needed}"
    if needed[0] != needed[1]:
        return shape != needed
    if contents.base is None:
        return f"{site!r}: the weight is square, and the file does not tell whether it is stored transposed"
    return site in contents.base.transposed


def _heads(contents: Contents, base: BaseFiles, add: str, cut: str) -> tuple[dict[str, str], list[str]]:
    """Return the files' names of the tensors trained in full, and problems."""
    heads: dict[str, str] = {}
    problems = []
    for module in contents.manifest.trainable:
        for key in (key for key in contents.tensors if key.startswith(module + ".")):
            if cut and not key.startswith(cut):
                problems.append(
                    f"{key!r} was trained in full and lies outside {cut[:-1]!r}, which is all that this base "
                    "holds. Save the base from the class that was trained: "
                    "Auto...From...from_pretrained(base).save_pretrained(folder)"
                )
            elif add and f"{add}{key}" not in base.tensors:
                problems.append(f"{key!r} was trained in full, and the base has no {add + key!r}")
            heads[key] = f"{add}{key.removeprefix(cut)}"
    for key, name in heads.items():
        if name in base.tensors and base.tensors[name].shape != tuple(contents.tensors[key].shape):
            shapes = f"{base.tensors[name].shape}, the adapter's {tuple(contents.tensors[key].shape)}"
            problems.append(f"{key!r}: the base's is {shapes}")
    return heads, problems
