"""What is made of samples: ratios pair by pair, a median, quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the median and the quartiles of one or more values, interpolated between neighbours."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.low, "q3": self.high}


def pairwise_ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return the ratios of samples to the reference's of the same rounds."""
    return [own / other for own, other in zip(samples, reference, strict=True)]
