"""The errors of minilora, and the one way in which several problems become one message."""

from __future__ import annotations

from collections.abc import Sequence


class MiniLoRAError(ValueError):
    """Root of every error that minilora raises on purpose. When it is raised, nothing has changed.

    Example:
        >>> minilora.LoRAConfig(r=0)
        Traceback (most recent call last):
            ...
        minilora.errors.MiniLoRAError: 1 problem; no LoRAConfig was made:
          - r must be an int from 1 to 2147483647, not 0
    """


class TargetError(MiniLoRAError):
    """A target, an exclusion or a trainable module cannot be honoured on this model.

    Example:
        >>> minilora.inject(nn.ModuleDict({"query": nn.Linear(8, 8)}), "qeury")
        Traceback (most recent call last):
            ...
        minilora.errors.TargetError: 1 problem; the model has not been changed:
          - targets: 'qeury' matches no module; nearest: 'query' (x1)
        To choose from, the linear layers of this model (* is any index):
            query  Linear 8 -> 8  x1
    """


class CheckpointError(MiniLoRAError):
    """A file is not a sound minilora adapter, or does not fit this model.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0")
        >>> _ = nn.init.constant_(model[0].lora_A, float("nan"))
        >>> try:
        ...     minilora.save(model, "adapter.safetensors")
        ... except minilora.CheckpointError as error:
        ...     "0.lora_A" in str(error)
        True
    """


class MergeError(MiniLoRAError, TypeError):
    """A layer of this type has no merged form. Also a `TypeError`: its type is what does not fit.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0", minilora.AdapterConfig())
        >>> try:
        ...     minilora.merge(model)
        ... except minilora.MergeError as error:
        ...     "skip_adapters=True" in str(error)
        True
    """


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
