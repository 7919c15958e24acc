"""`summary`: what stands where in a model, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .mergeable import Mergeable
from .module import InjectedModule
from .names import generic, outermost_of
from .quantized.weights import matrix_size, weight_count
from .sites import Sites, require_unwrapped
from .torch_internals import own_parameters, put_shards_back
from .trained import TrainedParameter
from .training import added_tensors, thawed_parameters
from .view import Substitution


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One line of a summary: sites that differ in their indices only.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "all-linear")
        >>> row = minilora.summary(model).rows[0]
        >>> row.sites, row.count, row.description, row.state
        ('*', 2, 'LoRA r=8 alpha=16', 'active')
    """

    sites: str
    """The generic name of the sites, indices as stars."""
    count: int
    """Number of sites."""
    description: str
    """Kind and settings."""
    parameters: int
    """Number of parameters added at these sites, all together."""
    state: str
    """"active", "merged" or "disabled"; "not saved" for parameters that train and no injection brought."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is injected in a model, and what of it is trained. Prints as a table.

    Example:
        >>> minilora.summary(nn.Linear(4, 2)).rows
        ()
    """

    model: str
    """Class name of the model."""
    rows: tuple[SummaryRow, ...]
    """Groups of sites."""
    trainable: int
    """Number of parameters with `requires_grad`."""
    base: int
    """Number of parameters of the base model."""
    reached: float | None = None
    """The share of the base's matrix weights under LoRA, from 0 to 1, but for what is trained in full; None
    where there is no LoRA."""
    left_out: tuple[tuple[str, int], ...] = ()
    """The modules whose matrix weights LoRA does not reach, by size: generic name and number."""

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
        lines = [self.model, rule, lines[0], rule, *lines[1:], rule, total]
        if self.reached is not None:
            lines.append(f"LoRA reaches {100 * self.reached:.3g} % of the base's matrix weights")
            lines += [f"    not {name} x{n}" for name, n in self.left_out[:4]]
            lines += [f"    and {len(self.left_out) - 4} more"] if len(self.left_out) > 4 else []
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Return what is injected and what is trained, for `print` and for code.

    Works on any model; a bare one has no rows but for what trains in it.

    Raises:
        MiniLoRAError: when the model is not one, or is wrapped in DDP, FSDP1 or `torch.compile`.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0", minilora.LoRAConfig(r=2))
        >>> minilora.summary(model).trainable
        32
    """
    require_unwrapped(model)
    put_shards_back(model)
    sites = Sites(model)
    injected = sites.injected()
    added = added_tensors(injected)
    groups: dict[tuple[str, str, str], list[InjectedModule]] = {}
    for name, site in injected.items():
        for wrapper in site.wrappers:
            state = "merged" if wrapper.merged else "active" if wrapper.enabled else "disabled"
            row = (generic(wrapper.placed_at(name)), wrapper.description(), state)
            groups.setdefault(row, []).append(wrapper)
    rows = [
        SummaryRow(
            sites=sites,
            count=len(members),
            description=description,
            parameters=sum(member.parameter_count() for member in members),
            state=state,
        )
        for (sites, description, state), members in groups.items()
    ]
    if injected:
        thawed: dict[str, list[int]] = {}
        for name, parameter in thawed_parameters(model, added).items():
            thawed.setdefault(generic(name), []).append(parameter.numel())
        told = {"description": "trains, not injected", "state": "not saved"}
        rows += [SummaryRow(sites=s, count=len(n), parameters=sum(n), **told) for s, n in thawed.items()]
    reached, left_out = _reach(sites)
    return Summary(
        model=type(model).__name__,
        rows=tuple(rows),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        base=weight_count(model, without=added),
        reached=reached,
        left_out=left_out,
    )


def _reach(sites: Sites) -> tuple[float | None, tuple[tuple[str, int], ...]]:
    """Return the share of the bare model's matrix weights under LoRA, and whose are not.

    A matrix that several modules share counts once, and is reached where any of them has LoRA on it.
    """
    trained = sites.trained_in_full()
    sizes: dict[int, int] = {}
    names: dict[int, str] = {}
    under: set[int] = set()
    for site in sites.parameters():
        matrix = own_parameters(site.bare)[site.parameter or ""]
        over = [w for w in site.wrappers if isinstance(w, Substitution) and w.parameter == site.parameter]
        lora = [w for w in over if isinstance(w, Mergeable)]
        if lora:  # merged, another one stands there
            matrix = lora[0].replaced_by_merging().get(lora[0].parameter, matrix)
        if matrix is None or not (size := matrix_size(site.bare, site.parameter or "")):
            continue
        in_full = any(isinstance(w, TrainedParameter) for w in over)
        if in_full or outermost_of(site.owner, trained) is not None:
            continue  # trained in full
        sizes[id(matrix)] = size
        names.setdefault(id(matrix), generic(site.owner if site.parameter == "weight" else site.name))
        if lora:
            under.add(id(matrix))
    if not under:
        return None, ()
    left: dict[str, list[int]] = {}
    for key, size in sizes.items():
        if key not in under:
            left.setdefault(names[key], []).append(size)
    largest_first = sorted(left.items(), key=lambda item: -sum(item[1]))
    reached = sum(sizes[key] for key in under) / sum(sizes.values())
    return reached, tuple((name, len(members)) for name, members in largest_first)
