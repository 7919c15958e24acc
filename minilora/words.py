"""Words that people bring from other libraries, and what they are called here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec, TypeVar

from .errors import MiniLoRAError, several

P = ParamSpec("P")
R = TypeVar("R")

OURS = {
    "lora_alpha": "LoRAConfig(alpha=...)",
    "lora_r": "LoRAConfig(r=...)",
    "rank": "LoRAConfig(r=...)",
    "r": "LoRAConfig(r=...)",
    "alpha": "LoRAConfig(alpha=...)",
    "dropout": "LoRAConfig(dropout=...)",
    "lora_dropout": "LoRAConfig(dropout=...)",
    "rslora": "LoRAConfig(rslora=...)",
    "use_rslora": "LoRAConfig(rslora=...)",
    "init_lora_weights": 'LoRAConfig(init="kaiming") or "gaussian"',
    "target_modules": "inject(model, targets=[...])",
    "exclude_modules": "inject(model, ..., exclude=[...])",
    "modules_to_save": "inject(model, ..., trainable=[...])",
    "peft_config": "inject(model, targets, config=LoRAConfig(...))",
    "lora_config": "inject(model, targets, config=LoRAConfig(...))",
    "fan_in_fan_out": "nothing: the layout of a layer is read off it",
    "bias": "inject(model, ..., trainable=[...])",
    "trainable_token_indices": 'inject(model, ..., config={..., "embed_tokens": RowsConfig(rows=[...])})',
    "token_indices": "RowsConfig(rows=[...])",
    "task_type": "inject(model, ..., trainable=[...]), which names the head",
    "bottleneck_size": "AdapterConfig(bottleneck=...)",
    "non_linearity": "AdapterConfig(activation=...)",
}


def foreign_words(words: Iterable[str], known: Iterable[str], *, caller: str) -> str | None:
    """Return the message for keyword arguments that `caller` does not take; None where it takes them all.

    >>> print(foreign_words(["lora_alpha", "r"], ["r", "alpha"], caller="LoRAConfig"))
    1 problem; nothing was done:
      - LoRAConfig has no argument 'lora_alpha': here it is LoRAConfig(alpha=...)
    LoRAConfig takes r, alpha
    """
    known = list(known)
    problems = [
        f"{caller} has no argument {word!r}" + (f": here it is {OURS[word]}" if word in OURS else "")
        for word in words
        if word not in known
    ]
    footer = f"{caller} takes {', '.join(known)}"
    return several(problems, outcome="nothing was done", footer=footer) if problems else None


def meant(config: object) -> str:
    """Return what to write in place of something that is no config, as the end of a message; or nothing.

    >>> meant({"r": 8})
    '; write config=minilora.LoRAConfig(r=..., alpha=...), or a config for each target'
    """
    if isinstance(config, type):
        return f"; make one: {config.__name__}(...)"
    if hasattr(config, "peft_type"):
        values = ("r", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("rslora", "use_rslora")
        given = [f"{ours}={getattr(config, theirs)!r}" for ours, theirs in values if hasattr(config, theirs)]
        return f", which is PEFT's; write config=minilora.LoRAConfig({', '.join(given)})"
    if isinstance(config, Mapping):
        return "; write config=minilora.LoRAConfig(r=..., alpha=...), or a config for each target"
    return ""


def explains_foreign_words(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that a keyword from another library is an error that names ours.

    Raises:
        MiniLoRAError: for each keyword argument that the function does not take.
    """
    names = function.__code__.co_varnames[
        : function.__code__.co_argcount + function.__code__.co_kwonlyargcount
    ]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if message := foreign_words(kwargs, names, caller=function.__name__):
            raise MiniLoRAError(message)
        return function(*args, **kwargs)

    return call
