"""The errors of minilora, and the one way in which several problems become one message."""

from __future__ import annotations

from collections.abc import Sequence


class MiniLoRAError(ValueError):
    """Root of every error that minilora raises on purpose. When it is raised, nothing has changed."""


class TargetError(MiniLoRAError):
    """A target, an exclusion or a trainable module cannot be honoured on this model."""


class CheckpointError(MiniLoRAError):
    """A file is not a sound minilora adapter, or does not fit this model."""


class MergeError(MiniLoRAError, TypeError):
    """A layer of this type has no merged form. Also a `TypeError`: its type is what does not fit."""


def several(problems: Sequence[str], *, outcome: str, footer: str = "") -> str:
    """Return one message that lists every problem, says what became of the work, and ends with a footer."""
    head = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}; {outcome}:"
    return "\n".join([head, *(f"  - {problem}" for problem in problems), *([footer] if footer else [])])


def listed(items: Sequence[str], limit: int = 8) -> str:
    """Return the items, comma-separated, the tail of a long list as a count."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def quoted(names: Sequence[str]) -> str:
    """Return names in quotes, as `listed` lists them."""
    return listed([repr(name) for name in names])
