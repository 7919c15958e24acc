"""`Announced` and `Contents`: what an adapter file says that it holds, and what it holds.

Every format is read into them and written from them, so that what formats have in common is said once, in
`loading` and `saving`, and what sets them apart stays in the file of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..config import Config, RowsConfig
from ..errors import CheckpointError
from ..manifest import Manifest
from ..names import described, outermost_of
from ..sites import Sites
from .fingerprint import Fingerprint
from .tensors import Entry


@dataclass(frozen=True)
class Contents:
    """All that an adapter file holds."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    """By minilora's names: `<site>.lora_A`, ..., and trainable modules' tensors under their own."""
    base: Fingerprint | None = None
    """Of the base that it was trained on; None where the file says nothing about it."""
    damage: str | None = None
    """How the file is seen not to be what was written; None where it is whole, or cannot tell."""
    notes: tuple[str, ...] = ()
    """What a user should hear about this file, though nothing is wrong with it."""


@dataclass(frozen=True)
class Announced:
    """What an open adapter file says that it holds; of its tensors, no value has been read yet."""

    manifest: Manifest
    entries: Mapping[str, Entry]
    """The tensors, by the names that they have in `Contents`."""
    base: Fingerprint | None = None
    """Of the base that it was trained on; None where the file says nothing about it."""
    base_values: Mapping[str, Entry] = field(default_factory=dict)
    """Tensors of the base itself, which are not the adapter's: the model must have the same values there."""
    disagreements: Callable[[Sites], list[str]] = lambda sites: []
    """What else the file says of the model that it belongs to, and this model contradicts."""
    damage: Callable[[Mapping[str, Tensor]], str | None] = lambda tensors: None
    """How the file is seen not to be what was written, given all its tensors; None where it is whole."""
    rounds_heads: bool = False
    """Whether the format's own library loads modules trained in full into a narrower dtype."""
    notes: tuple[str, ...] = ()
    """What a user should hear about this file, though nothing is wrong with it."""

    def renamed(self, rename: Callable[[str], str]) -> Announced:
        """Return the same for a model whose modules have other names.

        What `disagreements` is asked goes on speaking of the names in the file.
        """
        names = {rename(name): name for name in self.entries}
        manifest = Manifest(
            tuple(
                (_renamed(config, rename), tuple(map(rename, sites)))
                for config, sites in self.manifest.injections
            ),
            tuple(map(rename, self.manifest.trainable)),
        )
        return replace(
            self,
            manifest=manifest,
            entries={new: self.entries[old] for new, old in names.items()},
            base=None if self.base is None else self.base.renamed(rename),
            base_values={rename(name): entry for name, entry in self.base_values.items()},
            damage=lambda tensors: self.damage({names[new]: tensor for new, tensor in tensors.items()}),
        )

    def contents(self) -> Contents:
        """Read the tensors.

        Raises:
            CheckpointError: for tensors, unread, that lie in nothing that the manifest names.
        """
        known = {name for name, _ in self.manifest.placed()}
        if strays := [key for key in self.entries if outermost_of(key, known) is None]:
            raise CheckpointError(f"in the file, but called for by nothing: {described(strays)}")
        tensors = {name: entry.read() for name, entry in self.entries.items()}
        notes = list(self.notes)
        if self.base_values:
            notes.append(
                f"it holds weights of its base, which were not compared: {described(self.base_values)}"
            )
        return Contents(self.manifest, tensors, self.base, self.damage(tensors), tuple(notes))


def _renamed(config: Config, rename: Callable[[str], str]) -> Config:
    """Return a config with the site that it names, if it names one, under another name."""
    if isinstance(config, RowsConfig) and config.of is not None:
        return replace(config, of=rename(config.of))
    return config
