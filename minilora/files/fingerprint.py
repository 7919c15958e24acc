"""`Fingerprint`: a few numbers by which the base of an adapter is known again, in another dtype too.

An adapter on the wrong base computes nonsense without any error. So a file records, for the weight at
each site, its shape, its dtype, eight of its values, and two sums in float64 over at most 1024 of its
values, at places that depend on nothing but its size. That takes microseconds a site whatever the size of
the base, and 200 to 300 bytes; a base that was trained further differs in nearly every value, and so in
these. A base in which only a few values were changed may pass unseen: this is no hash.

A cast rounds every value by at most half the spacing of the coarser dtype, so bases are compared within
that spacing; in one and the same dtype they must agree to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..distributed.gathering import one_by_one
from ..errors import CheckpointError, listed
from ..linear import linear_shape
from ..lora import LoRA
from ..rows import TrainedRows
from ..sites import Site
from .tensors import FLOAT_DTYPES

SUMMED = 1024
SHOWN = 8


@dataclass(frozen=True)
class Signature:
    """What is recorded of one weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sample: tuple[float, ...]
    """The first of the values at `_places`."""
    total: float
    """The sum, in float64, of all values at `_places`."""
    magnitude: float
    """The sum of their absolute values."""

    @classmethod
    def of(cls, weight: Tensor, places_in: Callable[[int], Tensor] | None = None) -> Signature:
        """Return the signature of a floating-point tensor with values, on any device.

        Args:
            weight: the tensor.
            places_in: `_places`, where it is known for many weights of one size.
        """
        places, values = (places_in or _places)(weight.numel()).to(weight.device), weight.detach()
        if values.is_contiguous():
            values = values.view(-1)[places]
        else:  # flattened, it would be a copy of it all
            values = values[torch.unravel_index(places, weight.shape)].reshape(-1)
        values = values.cpu().double()
        return cls(
            dtype=weight.dtype,
            shape=tuple(weight.shape),
            sample=tuple(_short(value, 9) for value in values[:SHOWN].tolist()),
            total=_short(float(values.sum()), 12),
            magnitude=_short(float(values.abs().sum()), 12),
        )

    def difference(self, other: Signature) -> float:
        """Return by how much two weights differ beyond a cast, relative to their mean size; 0 if they agree.

        Weights of different shapes differ infinitely.
        """
        if self.shape != other.shape or len(self.sample) != len(other.sample):
            return math.inf
        relative, absolute = 0.0, 0.0
        if self.dtype != other.dtype:
            limits = [torch.finfo(dtype) for dtype in (self.dtype, other.dtype)]
            relative = max(limit.eps for limit in limits)
            absolute = max(limit.smallest_normal * limit.eps for limit in limits)  # float16 has a floor
        count = min(math.prod(self.shape), SUMMED)
        scale = max(self.magnitude, other.magnitude) / max(count, 1) or 1.0
        gaps = [
            abs(a - b) / scale
            for a, b in zip(self.sample, other.sample, strict=True)
            if not abs(a - b) <= relative * max(abs(a), abs(b)) + absolute
        ]
        # The order of summation differs between machines: hence 1e-9, far below any change of a value.
        allowed = max(relative, 1e-9) * max(self.magnitude, other.magnitude) + count * absolute
        gap = abs(self.total - other.total)
        if not gap <= allowed or abs(self.magnitude - other.magnitude) > allowed:
            gaps.append(max(gap, abs(self.magnitude - other.magnitude)) / (scale * max(count, 1)))
        return max(gaps, default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values. Inverse: `from_dict`."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "sample": list(self.sample),
            "sum": self.total,
            "abs_sum": self.magnitude,
        }

    @classmethod
    def from_dict(cls, value: object) -> Signature:
        """Build a signature from plain JSON values. Inverse: `to_dict`.

        Raises:
            CheckpointError: for whatever `to_dict` would not have written.
        """
        match value:
            case {
                "dtype": str(dtype),
                "shape": list(shape),
                "sample": list(sample),
                "sum": float(total),
                "abs_sum": float(magnitude),
            } if (
                dtype in FLOAT_DTYPES
                and all(type(n) is int and n >= 0 for n in shape)
                and all(type(x) is float for x in sample)
            ):
                return cls(FLOAT_DTYPES[dtype], tuple(shape), tuple(sample), total, magnitude)
        raise CheckpointError(f"a fingerprint of the base in the header is not valid: {value!r:.200}")


@dataclass(frozen=True)
class Fingerprint:
    """The signatures of the weights at an adapter's sites, by site."""

    signatures: Mapping[str, Signature] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)
    """Sites whose weight has no signature, and why."""
    transposed: frozenset[str] = frozenset()
    """Sites whose weight is stored as (in, out), as transformers' `Conv1D` does."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Sites of LoRA that are no linear layers, with the names of their classes."""

    @classmethod
    def of(cls, injected: Mapping[str, Site]) -> Fingerprint:
        """Return the fingerprint of the base under a model's wrappers, merged or not.

        A site without a weight, such as a dropout that carries a bottleneck, has nothing to compare.
        """
        signatures: dict[str, Signature] = {}
        unchecked: dict[str, str] = {}
        transposed: set[str] = set()
        layers: dict[str, str] = {}
        places_in = cache(_places)  # of a size once
        for owner, site in one_by_one(injected.items()):
            shape = linear_shape(site.bare)
            for wrapper in site.wrappers:
                name = wrapper.placed_at(owner)
                if wrapper.config is None or name in signatures or name in unchecked:
                    continue  # a head of a fresh base is random; and one weight is signed once
                layout = wrapper.layout if isinstance(wrapper, LoRA) else None
                if layout.transposed if layout else shape and shape.transposed:
                    transposed.add(name)
                if layout and (shape is None or name != owner):
                    layers[name] = type(site.bare).__name__
                weight = wrapper.signed_weight()
                if isinstance(weight, Tensor) and (rows := _trained_rows(site, name)):
                    rest = untrained(weight, rows)
                    weight = rest if len(rest) else "all of its rows are trained"
                if isinstance(weight, str):
                    unchecked[name] = weight
                elif weight is not None:
                    signatures[name] = Signature.of(weight, places_in)
        return cls(signatures, unchecked, layers=layers, transposed=frozenset(transposed))

    def renamed(self, rename: Callable[[str], str]) -> Fingerprint:
        """Return the same for a model whose modules have other names."""
        return Fingerprint(
            {rename(site): signature for site, signature in self.signatures.items()},
            {rename(site): reason for site, reason in self.unchecked.items()},
            frozenset(map(rename, self.transposed)),
            {rename(site): kind for site, kind in self.layers.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values. Inverse: `from_dict`."""
        reasons: dict[str, list[str]] = {}
        for site, reason in self.unchecked.items():
            reasons.setdefault(reason, []).append(site)
        return {
            "weights": {site: signature.to_dict() for site, signature in self.signatures.items()},
            "unchecked": reasons,
            "transposed": sorted(self.transposed),
            **({"layers": dict(self.layers)} if self.layers else {}),
        }

    @classmethod
    def from_dict(cls, value: object) -> Fingerprint:
        """Build a fingerprint from plain JSON values. Inverse: `to_dict`.

        Raises:
            CheckpointError: for whatever `to_dict` would not have written.
        """
        match value:
            case {
                "weights": dict(weights),
                "unchecked": dict(reasons),
                "transposed": list(transposed),
            } if all(_are_names(sites) for sites in (*reasons.values(), transposed)):
                return cls(
                    {site: Signature.from_dict(entry) for site, entry in weights.items()},
                    {site: reason for reason, sites in reasons.items() for site in sites},
                    frozenset(transposed),
                    _layers(value),
                )
        raise CheckpointError(f"the fingerprint of the base in the header is not valid: {value!r:.200}")


@dataclass(frozen=True)
class Comparison:
    """How the base that is there relates to the one that was recorded."""

    same: tuple[str, ...] = ()
    """Sites whose weights agree, in the same dtype."""
    cast: tuple[str, ...] = ()
    """Sites whose weights agree as well as their two dtypes allow."""
    different: Mapping[str, str] = field(default_factory=dict)
    """Sites whose weights do not, the worst first, and in what."""
    unchecked: Mapping[str, str] = field(default_factory=dict)
    """Sites that could not be compared, and why."""

    def __str__(self) -> str:
        parts = []
        if self.different:
            worst = listed([f"{site!r} ({text})" for site, text in self.different.items()], limit=5)
            parts.append(f"another base: {len(self.different)} weights differ, the worst first: {worst}")
        if self.cast and not self.different:
            parts.append(
                f"the same base in another dtype ({len(self.cast)} weights agree within its rounding)"
            )
        if self.same and not self.different and not self.cast:
            parts.append(f"the same base ({len(self.same)} weights agree)")
        reasons = sorted(set(self.unchecked.values()))
        if reasons:
            parts.append(f"{len(self.unchecked)} weights not checked: {'; '.join(reasons)}")
        return "; ".join(parts) or "not checked: the file records nothing of its base"


def compare(recorded: Fingerprint, present: Fingerprint) -> Comparison:
    """Return how the base that is there relates to the one that a file recorded."""
    same: list[str] = []
    cast: list[str] = []
    gaps: dict[str, float] = {}
    unchecked = {**recorded.unchecked, **present.unchecked}
    for site, signature in recorded.signatures.items():
        if site in unchecked:
            continue
        if (other := present.signatures.get(site)) is None:
            unchecked[site] = "not among this model's sites"
        elif gap := signature.difference(other):
            gaps[site] = gap
        else:
            (same if signature.dtype == other.dtype else cast).append(site)
    worst = sorted(gaps, key=lambda site: (-gaps[site], site))
    different = {
        site: "another shape" if math.isinf(gaps[site]) else f"by {100 * gaps[site]:.2g} % of its mean size"
        for site in worst
    }
    return Comparison(tuple(same), tuple(cast), different, unchecked)


def untrained(weight: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the longest run of rows of a weight without any of those that are trained; a view.

    What stood in these is not part of the base that is meant: the rows of new tokens begin at random.
    """
    start, stop = max(pairwise([-1, *rows, len(weight)]), key=lambda gap: gap[1] - gap[0])
    return weight[start + 1 : stop] if rows else weight


def _trained_rows(site: Site, name: str) -> Sequence[int]:
    """Return which rows are trained of the weight that a site has under a manifest's name."""
    wrappers = (w for w in site.wrappers if isinstance(w, TrainedRows) and w.placed_at(site.name) == name)
    return next((wrapper.config.rows for wrapper in wrappers), ())


def _places(numel: int) -> Tensor:
    """Return at most SUMMED positions in a flat tensor, spread as if at random, the same at each call."""
    if numel <= SUMMED:
        return torch.arange(numel, device="cpu")
    # Steps of a fixed width would fall on few columns only; Knuth's multiplier scatters them.
    return torch.arange(1, SUMMED + 1, device="cpu") * 2654435761 % numel


def _layers(entries: object) -> dict[str, str]:
    value = entries.get("layers", {}) if isinstance(entries, dict) else None
    if not isinstance(value, dict) or not all(isinstance(kind, str) for kind in value.values()):
        raise CheckpointError(f"the layers in the fingerprint of the base are not valid: {value!r:.200}")
    return dict(value)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _short(value: float, digits: int) -> float:
    """Return a number that prints in few digits; nine tell any two float32 apart."""
    return float(f"{value:.{digits}g}")
