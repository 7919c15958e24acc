"""`Packing`: PEFT's layout of A and B at one site, and the way from there to minilora's matrices and back.

    at                     PEFT's A            PEFT's B             here
    linear, attention      (r, in)             (out, r)             the same
    embedding              (r, rows)           (dim, r)             the same, A reads a one-hot row
    convolution            (r, in, k, ...)     (out, r, 1, ...)     (r, in k ...) and (out, r)
    stack of E matrices    (E r, .)            (., r E)             (E, r, .) and (E, ., r)

In a stack's A the matrices come one after the other; in its B, one after the other within each rank. What
is A to PEFT may be B^T here: at a parameter PEFT has its own idea of which side is the input, and
B A = (A^T B^T)^T is one product under both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...tensors import Entry

OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True)
class Packing:
    """How PEFT lays out the A and B of a site."""

    kernel: tuple[int, ...] = ()
    """The size of a convolution's kernel."""
    experts: int | None = None
    """How many matrices a stack has; None where there is one matrix, without a dimension for their number."""
    crossed: bool = False
    """Whether PEFT's A is minilora's B, transposed."""
    factor: float = 1.0
    """What minilora's B is multiplied by on its way to PEFT; a power of two, so that no bit is lost."""

    def theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return PEFT's A and B for minilora's. Inverse: `ours`."""
        scaled = {"A": ours["A"], "B": ours["B"] * self.factor}
        return {side: self._packed(side, scaled[self._source(side)]) for side in ("A", "B")}

    def ours(self, theirs: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return minilora's A and B for PEFT's, unread. Inverse: `theirs`, with a factor of 1.

        Raises:
            ValueError: when PEFT's are not of this layout.
        """
        for side, entry in theirs.items():
            points = self.kernel if side == "A" else (1,) * len(self.kernel)
            if len(entry.shape) < 2 or entry.shape[2:] != points:
                wanted = ("r", "in", *points) if side == "A" else ("out", "r", *points)
                raise ValueError(f"{side} has the shape {entry.shape}, not ({', '.join(map(str, wanted))})")
            if self.experts is not None and entry.shape["AB".index(side)] % self.experts:
                raise ValueError(f"{side}, {entry.shape}, cannot be shared out among {self.experts} matrices")
        if self == Packing():
            return dict(theirs)
        found = {}
        for side in ("A", "B"):
            entry = theirs[self._source(side)]
            unpack = partial(self._unpacked, self._source(side))
            shape = tuple(unpack(torch.empty(entry.shape, device="meta")).shape)
            found[side] = Entry(entry.dtype, shape, partial(_read, entry, unpack))
        return found

    def _source(self, side: str) -> str:
        return OTHER[side] if self.crossed else side

    def _packed(self, side: str, matrix: Tensor) -> Tensor:
        """Lay a matrix, or a stack of them, out as PEFT's A or B."""
        matrix = matrix.mT if self.crossed else matrix
        if self.experts is not None:
            stack = matrix if side == "A" else matrix.movedim(0, -1)  # (., r, E)
            return stack.flatten(0, 1) if side == "A" else stack.flatten(1)
        if self.kernel:
            points = self.kernel if side == "A" else (1,) * len(self.kernel)
            return matrix.reshape(len(matrix), -1, *points)
        return matrix

    def _unpacked(self, side: str, laid_out: Tensor) -> Tensor:
        """Return the matrix, or the stack of them, in PEFT's A or B. Inverse: `_packed`."""
        matrix = laid_out
        if self.experts is not None:
            if side == "A":
                matrix = laid_out.reshape(self.experts, -1, laid_out.shape[1])  # (E, r, .)
            else:
                matrix = laid_out.reshape(len(laid_out), -1, self.experts).movedim(-1, 0)  # (E, ., r)
        elif self.kernel:
            matrix = laid_out.flatten(1)  # of B, with kernels of one point, (out, r)
        return (matrix.mT if self.crossed else matrix).contiguous()


def _read(entry: Entry, unpack: Callable[[Tensor], Tensor]) -> Tensor:
    return unpack(entry.read())
