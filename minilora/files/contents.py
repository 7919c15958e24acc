"""`Contents`: all that an adapter file holds, whatever its format.

Every format is read into it and written from it, so that what formats have in common is said once, in
`loading` and `saving`, and what sets them apart stays in the file of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..plan import Manifest
from ..sites import Sites
from .fingerprint import Fingerprint


@dataclass(frozen=True)
class Contents:
    """All that an adapter file holds."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    """By minilora's names: `<site>.lora_A`, ..., and trainable modules' tensors under their own."""
    base: Fingerprint | None = None
    """Of the base that it was trained on; None where the file says nothing about it."""
    disagreements: Callable[[Sites], list[str]] = lambda sites: []
    """What else the file says of the model that it belongs to, and this model contradicts."""
    damage: str | None = None
    """How the file is seen not to be what was written; None where it is whole, or cannot tell."""
    notes: tuple[str, ...] = ()
    """What a user should hear about this file, though nothing is wrong with it."""
