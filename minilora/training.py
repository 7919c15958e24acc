"""What trains, what has an effect, and what stands where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .errors import MiniLoRAError
from .module import InjectedModule, injected_modules, require_injected
from .targets import generic_name


def freeze(model: nn.Module) -> nn.Module:
    """Set `requires_grad` to False on every parameter that no injection brought. `inject` does this itself.

    What injections brought keeps the `requires_grad` that it has. Inverse: `model.requires_grad_(True)`.

    Returns:
        The model itself.
    """
    added = {
        id(tensor)
        for wrappers in injected_modules(model).values()
        for wrapper in wrappers
        for tensor in wrapper.adapter_state().values()
    }
    for parameter in model.parameters():
        if id(parameter) not in added:
            parameter.requires_grad_(False)
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters with `requires_grad`, for an optimizer: `AdamW(trainable_parameters(model))`.

    Raises:
        MiniLoRAError: when there are none, or when a merged layer would train without effect.
    """
    merged = [
        site
        for site, wrappers in injected_modules(model).items()
        if any(wrapper.merged for wrapper in wrappers)
    ]
    if merged:
        raise MiniLoRAError(
            f"{len(merged)} sites are merged, and a merged layer does not train; "
            "call minilora.unmerge(model) first"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise MiniLoRAError(
            "no parameter of this model requires a gradient; call minilora.inject(model, targets=...) first"
        )
    return parameters


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block, the model computes what the base model does; afterwards all is as before.

    Heads named by `trainable` give way to their originals as well, and merged weights to the originals.

    Raises:
        MiniLoRAError: when the model carries no injection.
    """
    layers = [wrapper for wrappers in require_injected(model).values() for wrapper in wrappers]
    merged = [layer for layer in layers if layer.merged]
    enabled = [layer for layer in layers if layer.enabled]
    try:
        for layer in merged:
            layer.unmerge()
        for layer in enabled:
            layer.enabled = False
        yield model
    finally:
        for layer in enabled:
            layer.enabled = True
        for layer in merged:
            layer.merge()


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One line of a summary: sites that differ in their indices only."""

    sites: str
    """The generic name of the sites, indices as stars."""
    count: int
    """Number of sites."""
    description: str
    """Kind and settings."""
    parameters: int
    """Number of parameters added at these sites, all together."""
    state: str
    """"active", "merged" or "disabled"."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is injected in a model, and what of it is trained. Prints as a table."""

    model: str
    """Class name of the model."""
    rows: tuple[SummaryRow, ...]
    """Groups of sites."""
    trainable: int
    """Number of parameters with `requires_grad`."""
    base: int
    """Number of parameters of the base model."""

    def __str__(self) -> str:
        header = ("site", "", "kind", "parameters", "state")
        cells = [
            (row.sites, f"x{row.count}", row.description, f"{row.parameters:,}", row.state)
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
        lines = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in [header, *cells]
        ]
        rule = "-" * max(map(len, lines))
        share = 100 * self.trainable / self.base if self.base else 0.0
        total = f"trainable: {self.trainable:,} parameters, {share:.3g} % of the base's {self.base:,}"
        return "\n".join([self.model, rule, lines[0], rule, *lines[1:], rule, total])


def summary(model: nn.Module) -> Summary:
    """Return what is injected and what is trained, for `print` and for code.

    Works on any model; a bare one has no rows.
    """
    groups: dict[tuple[str, str, str], list[InjectedModule]] = {}
    added: set[int] = set()
    for site, wrappers in injected_modules(model).items():
        for wrapper in wrappers:
            state = "merged" if wrapper.merged else "active" if wrapper.enabled else "disabled"
            groups.setdefault((generic_name(site), wrapper.description(), state), []).append(wrapper)
            added |= {id(tensor) for tensor in wrapper.adapter_state().values()}
    rows = tuple(
        SummaryRow(
            sites=sites,
            count=len(members),
            description=description,
            parameters=sum(
                tensor.numel()
                for member in members
                for tensor in member.adapter_state().values()
                if isinstance(tensor, nn.Parameter)
            ),
            state=state,
        )
        for (sites, description, state), members in groups.items()
    )
    return Summary(
        model=type(model).__name__,
        rows=rows,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        base=sum(p.numel() for p in model.parameters() if id(p) not in added),
    )
