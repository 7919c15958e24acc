"""`Inventory`: whose the tensors of an adapter file are, site by site and module by module.

What the command line knows of each kind of injection stands here, in `KINDS`, and nowhere else in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..adapter import Adapter
from ..config import Config, LoRAConfig, RowsConfig
from ..errors import quoted
from ..files.contents import Contents
from ..lora import LoRA
from ..names import outermost_of
from ..rows import TrainedRows
from ..trained import TrainableHead
from ..variants.initial import change_since
from .updates import LowRank, Replaced, Rescaled, Update, Values


@dataclass(frozen=True)
class Part:
    """What a file holds for one site, or for one module that is trained in full."""

    name: str
    kind: str
    """As files name it."""
    config: Config | None
    """None for a module that is trained in full."""
    of: str | None
    """The site whose tensors these are, at one that shares them; else None."""
    tensors: Mapping[str, Tensor]
    """By their names below the part's own, which for a parameter that is trained in full is ""."""

    @property
    def title(self) -> str:
        """The kind, as a sentence names it."""
        return KINDS[self.kind].title

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The tensors' shapes, by their names in alphabetical order."""
        return {key: list(self.tensors[key].shape) for key in sorted(self.tensors)}

    def update(self) -> Update | None:
        """Return what is trained here as something with a size; None where the tensors make no such thing."""
        return KINDS[self.kind].update(self)


@dataclass(frozen=True)
class Inventory:
    """Whose the tensors of a file are.

    >>> from minilora.manifest import Manifest
    >>> contents = Contents(Manifest(((LoRAConfig(r=1), ("up",)),), ()), {"up.lora_A": torch.ones(1, 2)})
    >>> Inventory.of(contents).problems()
    ["missing from the file: 'up.lora_B'"]
    """

    parts: Mapping[tuple[str, str], Part]
    """By name and kind, as in `Manifest.placed`."""
    missing: tuple[str, ...]
    """Tensors that the manifest calls for and the file does not have."""
    unclaimed: tuple[str, ...]
    """Tensors that belong to nothing in the manifest."""

    @classmethod
    def of(cls, contents: Contents) -> Inventory:
        """Return the inventory of a file's contents."""
        unclaimed = dict(contents.tensors)
        parts: dict[tuple[str, str], Part] = {}
        missing: list[str] = []
        for config, sites in contents.manifest.injections:
            for site in sites:
                of = config.of if isinstance(config, RowsConfig) else None
                keys = {key: f"{of or site}.{key}" for key in config.tensor_names}
                missing += [full for full in keys.values() if full not in contents.tensors]
                own = {key: contents.tensors[full] for key, full in keys.items() if full in contents.tensors}
                parts[site, config.kind] = Part(site, config.kind, config, of, own)
                for full in keys.values():
                    unclaimed.pop(full, None)
        whole: dict[str, dict[str, Tensor]] = {name: {} for name in contents.manifest.trainable}
        for full in list(unclaimed):
            if (name := outermost_of(full, whole)) is not None:
                whole[name][full[len(name) + 1 :]] = unclaimed.pop(full)
        for name, tensors in whole.items():
            parts[name, TrainableHead.kind] = Part(name, TrainableHead.kind, None, None, tensors)
        return cls(parts, tuple(missing), tuple(unclaimed))

    def problems(self) -> list[str]:
        """Return in what a file's tensors are not those that its own manifest calls for."""
        problems = [f"missing from the file: {quoted(self.missing)}"] if self.missing else []
        if self.unclaimed:
            problems.append(f"in the file, but called for by nothing: {quoted(self.unclaimed)}")
        return problems


@dataclass(frozen=True)
class Kind:
    """What the command line knows of a kind of injection."""

    title: str
    update: Callable[[Part], Update | None]


def _low_rank(part: Part) -> LowRank | Rescaled | None:
    tensors, config = part.tensors, part.config
    assert isinstance(config, LoRAConfig)  # a manifest keeps kinds and configs together
    if not tensors.keys() >= set(config.tensor_names):
        return None
    A, B = tensors["lora_A"], tensors["lora_B"]
    if min(A.ndim, B.ndim) < 2 or A.shape[-2] != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
        return None
    if config.begins_at_weight:
        A0, B0 = tensors["lora_A_start"], tensors["lora_B_start"]
        if (A0.shape, B0.shape) != (A.shape, B.shape):
            return None
        A, B = change_since(A, B, A0, B0)
    low_rank = LowRank(A, B, config.scaling, tensors.get("lora_bias"))
    if not config.dora:
        return low_rank
    m = tensors["lora_magnitude"]
    return Rescaled(low_rank, m) if m.shape == low_rank.shape[:-1] else None


def _rows(part: Part) -> Replaced | None:
    config, rows = part.config, part.tensors.get("trained_rows")
    assert isinstance(config, RowsConfig)
    fitting = rows is not None and rows.ndim == 2 and len(rows) == len(config.rows)
    return Replaced(tuple(config.rows), rows) if rows is not None and fitting else None


def _values(part: Part) -> Values:
    return Values(part.tensors)


KINDS: dict[str, Kind] = {
    LoRA.kind: Kind("LoRA", _low_rank),
    TrainedRows.kind: Kind("rows", _rows),
    Adapter.kind: Kind("bottleneck adapter", _values),
    TrainableHead.kind: Kind("trained in full", _values),
}
"""By the kind's name in files."""
