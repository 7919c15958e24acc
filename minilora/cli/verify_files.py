"""`Verdict`: whether an adapter is whole and belongs to a base on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import several
from ..files.contents import Contents
from ..files.fingerprint import Comparison
from .base_files import BaseFiles
from .inventory import Inventory
from .placement import MisfitError, place


@dataclass(frozen=True)
class Verdict:
    """Whether an adapter belongs to a base."""

    answer: Literal["yes", "no", "not checked"]
    reason: str
    comparison: Comparison = field(default_factory=Comparison)
    """Of the weights; empty where it did not come to that."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, site by site."""
        return {
            "answer": self.answer,
            "reason": self.reason,
            "same": list(self.comparison.same),
            "cast": list(self.comparison.cast),
            "different": dict(self.comparison.different),
            "unchecked": dict(self.comparison.unchecked),
        }


def verify_files(contents: Contents, base: BaseFiles) -> Verdict:
    """Return whether an adapter belongs to a base: yes only if a value of it was compared.

    Raises:
        CheckpointError: when the base's files are not sound.
        OSError: when they cannot be read.
    """
    if contents.damage:
        return Verdict("no", contents.damage)
    if problems := Inventory.of(contents).problems():
        return Verdict("no", several(problems, outcome="the file is not what its own header says"))
    try:
        comparison = place(contents, base).comparison
    except MisfitError as error:
        return Verdict("no", str(error))
    if comparison.different:
        return Verdict("no", str(comparison), comparison)
    if comparison.same or comparison.cast:
        return Verdict("yes", str(comparison), comparison)
    reason = str(comparison).removeprefix("not checked: ")
    return Verdict("not checked", f"names and shapes fit, but no value was compared: {reason}", comparison)
