"""`Differences`: in what two adapter files differ, told without a model: `minilora diff`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..files.contents import Contents
from ..files.fingerprint import Comparison, compare
from ..names import described as names_of
from ..names import generic
from .describe import spread
from .inventory import Inventory, Part
from .terminal import plain


@dataclass(frozen=True)
class Change:
    """A place that both files have, and that is not the same in both."""

    first: Part
    second: Part
    same_values: bool
    """Whether all tensors hold the same bits."""
    distance: float | None
    """How far apart what is trained there lies, relative to the first's size: infinite where the first is
    zero, NaN where a value is not finite; None where names or shapes differ."""

    @property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        """The fields of the config that differ, with both values."""
        one, two = _fields(self.first.config), _fields(self.second.config)
        return {key: (one[key], two[key]) for key in one if one[key] != two[key]}


@dataclass(frozen=True)
class Differences:
    """In what two files differ; false where they hold the same."""

    first_alone: tuple[Part, ...]
    second_alone: tuple[Part, ...]
    changes: tuple[Change, ...]
    bases: Comparison | None
    """Of the weights that they were trained on; None where one of the files does not tell."""

    @classmethod
    def between(cls, first: Contents, second: Contents) -> Differences:
        """Return the differences between two files' contents."""
        one, two = Inventory.of(first).parts, Inventory.of(second).parts
        changes = [_change(part, two[key]) for key, part in one.items() if key in two]
        return cls(
            first_alone=tuple(part for key, part in one.items() if key not in two),
            second_alone=tuple(part for key, part in two.items() if key not in one),
            changes=tuple(change for change in changes if change.fields or not change.same_values),
            bases=None if first.base is None or second.base is None else compare(first.base, second.base),
        )

    def __bool__(self) -> bool:
        different_bases = self.bases is not None and bool(self.bases.different)
        return bool(self.first_alone or self.second_alone or self.changes or different_bases)

    def lines(self) -> Iterator[str]:
        """Yield what a person reads: layers of a stack on one line, what differs most first."""
        for parts, which in ((self.first_alone, "first"), (self.second_alone, "second")):
            titles: dict[str, list[str]] = {}
            for part in parts:
                titles.setdefault(part.title, []).append(part.name)
            for title, names in titles.items():
                yield f"{names_of(names)}: {title} in the {which} alone"
        configs: dict[str, list[str]] = {}
        for change in self.changes:
            if change.fields:
                text = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in change.fields.items())
                configs.setdefault(text, []).append(change.first.name)
        for text, names in configs.items():
            yield f"{names_of(names)}: {text}"
        yield from _distances(change for change in self.changes if not change.same_values)
        if self.bases is not None and self.bases.different:
            yield f"trained on different bases: {self.bases}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, site by site."""
        return {
            "same": not self,
            "first_alone": [_place(part) for part in self.first_alone],
            "second_alone": [_place(part) for part in self.second_alone],
            "changes": [
                {
                    **_place(change.first),
                    "config": {key: list(values) for key, values in change.fields.items()},
                    "same_values": change.same_values,
                    "distance": change.distance,
                }
                for change in self.changes
            ],
            "bases": str(self.bases) if self.bases is not None else None,
        }


def _change(first: Part, second: Part) -> Change:
    if same := _same_bits(first, second):
        same_scale = first.config == second.config
        return Change(first, second, same, 0.0 if same_scale else _distance(first, second))
    return Change(first, second, same, _distance(first, second))


def _distance(first: Part, second: Part) -> float | None:
    one, two = first.update(), second.update()
    gap = one.minus(two) if one is not None and two is not None else None
    if one is None or gap is None:
        return None
    size, difference = one.norm(), gap.norm()
    return difference / size if size else difference and math.inf


def _same_bits(first: Part, second: Part) -> bool:
    one, two = first.tensors, second.tensors
    return one.keys() == two.keys() and all(_are_same(one[key], two[key]) for key in one)


def _are_same(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors hold the same bits, so that a NaN is equal to itself."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def _distances(changes: Iterable[Change]) -> Iterator[str]:
    groups: dict[tuple[str, str, bool], list[Change]] = {}
    for change in changes:
        numbers = change.distance is not None and math.isfinite(change.distance)
        groups.setdefault((generic(change.first.name), change.first.title, numbers), []).append(change)
    for (name, title, _), group in sorted(groups.items(), key=lambda item: -_largest(item[1])):
        one = len(group) == 1
        where = f"{group[0].first.name if one else name} ({title if one else f'x{len(group)}, {title}'})"
        yield f"{plain(where)}: other values, {_apart([change.distance for change in group])}"


def _apart(distances: list[float | None]) -> str:
    """Return in words how far apart values are that can, or cannot, all be told by a percentage."""
    numbers = [100 * distance for distance in distances if distance is not None]
    if len(numbers) < len(distances):
        return "other shapes"
    if any(math.isnan(number) for number in numbers):
        return "not all of them finite"
    return (
        "and zero in the first" if math.inf in numbers else f"{spread(numbers)} % of the first's size apart"
    )


def _largest(changes: list[Change]) -> float:
    distances = [math.inf if change.distance is None else change.distance for change in changes]
    return math.inf if any(math.isnan(distance) for distance in distances) else max(distances)


def _fields(config: Config | None) -> dict[str, Any]:
    return {} if config is None else config.to_dict()


def _place(part: Part) -> dict[str, str]:
    return {"site": part.name, "kind": part.kind}
