"""Rows that are compared with one another, and their ratios; `markdown.py` and `plots.py` show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .ratios import Spread, pairwise_ratios


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one contestant, or why it was not."""

    name: str
    """The contestant."""
    point: str | int | None = None
    """Where on the table's axis, if it has one."""
    samples: Sequence[float] = ()
    """Seconds per call, one for each round."""
    memory: int | None = None
    """Bytes; the table says of what."""
    extra: dict[str, float] = field(default_factory=dict)
    """Other figures, by column."""
    reason: str = ""
    """Why it was not measured."""


@dataclass(kw_only=True)
class Table:
    """Rows that are compared with one another."""

    title: str
    """What was measured, with every setting that matters."""
    reference: str
    """Name of the row that times are divided by."""
    rows: list[Row]
    """With an axis, the contestants of each point one after the other."""
    axis: str | None = None
    """What `Row.point` is: tokens per step, an operation; None for a table with one row per contestant."""
    memory_reference: str | None = None
    """Name of the row that memory is divided by; None for the reference itself."""
    memory_label: str = "peak memory"
    """What `Row.memory` is."""
    formats: dict[str, Callable[[float], str]] = field(default_factory=dict)
    """How to print the extra columns, in their order."""

    def ratio(self, row: Row) -> Spread | None:
        """Return a row's time in units of the reference's, from pairs of the same round."""
        reference = self.at(row.point, self.reference)
        if not row.samples or not reference.samples:
            return None
        return Spread.of(pairwise_ratios(row.samples, reference.samples))

    def memory_ratio(self, row: Row) -> float | None:
        """Return a row's memory in units of the memory reference's."""
        reference = self.at(row.point, self.memory_reference or self.reference)
        if row.memory is None or not reference.memory:
            return None
        return row.memory / reference.memory

    def names(self) -> list[str]:
        """Return the contestants."""
        return list(dict.fromkeys(row.name for row in self.rows))

    def points(self) -> list[str | int | None]:
        """Return the places on the axis."""
        return list(dict.fromkeys(row.point for row in self.rows))

    def at(self, point: str | int | None, name: str) -> Row:
        """Return the row of a contestant at a point; an empty one, if it has none there."""
        found = [row for row in self.rows if (row.point, row.name) == (point, name)]
        return found[0] if found else Row(name=name, point=point, reason="no such row")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Table:
        """Return the table of a result's JSON, as far as ratios and plots need it. Inverse: `to_dict`."""
        rows = [
            Row(
                name=row["name"],
                point=row["point"],
                samples=row["samples_seconds"],
                memory=row["memory_bytes"],
                reason=row["not_measured"] or "",
            )
            for row in values["rows"]
        ]
        return cls(title=values["title"], reference=values["reference"], axis=values["axis"], rows=rows)

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values: every sample, and what the tables print."""
        return {
            "title": self.title,
            "reference": self.reference,
            "axis": self.axis,
            "memory": self.memory_label,
            "rows": [self._row_to_dict(row) for row in self.rows],
        }

    def _row_to_dict(self, row: Row) -> dict[str, object]:
        ratio = self.ratio(row)
        return {
            "name": row.name,
            "point": row.point,
            "seconds": Spread.of(row.samples).to_dict() if row.samples else None,
            "ratio": ratio.to_dict() if ratio else None,
            "memory_bytes": row.memory,
            "memory_ratio": self.memory_ratio(row),
            **{name.replace(" ", "_"): value for name, value in row.extra.items()},
            "not_measured": row.reason or None,
            "samples_seconds": list(row.samples),
        }
