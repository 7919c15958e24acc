"""What is trained at one place, as something with a size that can be subtracted.

LowRank    s B A, what a LoRA layer adds to its weight: two pairs of A and B may say the same; and s beta,
           what it adds to its bias, where B has one
Rescaled   c (W + s B A), what DoRA makes of a weight: not a sum, since c depends on W
Replaced   rows that take the place of others in a weight
Values     the numbers themselves, of what has no such sum: a bottleneck, a module trained in full
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import effective_weight
from ..variants import dora
from ..variants.bias import effective_bias


@dataclass(frozen=True)
class LowRank:
    """s B A, (out, in), or a stack of them; it is never formed, but for `added_to`. And s beta, if any.

    >>> update = LowRank(torch.ones(1, 3), torch.ones(2, 1), scaling=2.0)
    >>> update.shape, round(update.norm() ** 2)
    ((2, 3), 24)
    """

    A: Tensor  # (..., r, in)
    B: Tensor  # (..., out, r)
    scaling: float
    bias: Tensor | None = None  # (out,), of B

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., out, in)."""
        return *self.B.shape[:-1], self.A.shape[-1]

    def fits(self, weight: tuple[int, ...], *, transposed: bool) -> bool:
        """Return whether a weight of this shape can take it in.

        A matrix goes into a weight of more dimensions, such as a kernel, whose first is the matrix's own.

        >>> update = LowRank(torch.ones(1, 18), torch.ones(4, 1), scaling=1.0)
        >>> update.fits((4, 2, 3, 3), transposed=False), update.fits((18, 4), transposed=True)
        (True, True)
        """
        *leading, out, inputs = self.shape
        rows, columns = (inputs, out) if transposed else (out, inputs)
        if leading:
            return weight == (*leading, rows, columns)
        return len(weight) > 1 and weight[0] == rows and math.prod(weight[1:]) == columns

    def norm(self) -> float:
        """Return the Frobenius norm, in float64: that of R_B R_A', where B = Q R_B and A' = Q R_A."""
        left = torch.linalg.qr(self.B.double(), mode="r").R  # (..., min(out, r), r)
        right = torch.linalg.qr(self.A.double().mT, mode="r").R
        bias = 0.0 if self.bias is None else float(torch.linalg.vector_norm(self.bias.double()))
        return abs(self.scaling) * math.hypot(float(torch.linalg.vector_norm(left @ right.mT)), bias)

    def minus(self, other: Update) -> LowRank | None:
        """Return the difference, of rank r + r'; None where the shapes differ."""
        if not isinstance(other, LowRank) or self.shape != other.shape:
            return None
        B = torch.cat([self.scaling * self.B.double(), -other.scaling * other.B.double()], dim=-1)
        bias, others = self._moved(), other._moved()
        if len({*bias.shape, *others.shape}) > 1:
            return None
        return LowRank(torch.cat([self.A.double(), other.A.double()], dim=-2), B, 1.0, bias - others)

    def added_to(self, weight: Tensor, *, transposed: bool, dtype: torch.dtype) -> Tensor:
        """Return W_eff = W + s B A in the weight's layout, rounded once to `dtype`."""
        return effective_weight(weight, self.A, self.B, self.scaling, transposed=transposed, dtype=dtype)

    def added_to_bias(self, bias: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return b + s beta, rounded once to `dtype`. Only where B has a bias."""
        assert self.bias is not None
        return effective_bias(bias, self.bias, self.scaling, dtype)

    def _moved(self) -> Tensor:
        """Return s beta, (out,), in float64; a single zero where B has no bias."""
        return torch.zeros(()).double() if self.bias is None else self.scaling * self.bias.double()


@dataclass(frozen=True)
class Values:
    """Tensors, seen as one long vector.

    >>> Values({"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])}).norm()
    5.0
    """

    tensors: Mapping[str, Tensor]

    def norm(self) -> float:
        """Return the Euclidean norm, in float64."""
        return float(sum(float(t.double().square().sum()) for t in self.tensors.values()) ** 0.5)

    def minus(self, other: Update) -> Values | None:
        """Return the difference; None where names or shapes differ."""
        if not isinstance(other, Values) or _shapes(self) != _shapes(other):
            return None
        return Values({key: t.double() - other.tensors[key].double() for key, t in self.tensors.items()})


@dataclass(frozen=True)
class Rescaled:
    """c (W + s B A) in the place of W; its size and its difference from another are those of the tensors."""

    low_rank: LowRank
    magnitude: Tensor  # (out,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.low_rank.shape

    def fits(self, weight: tuple[int, ...], *, transposed: bool) -> bool:
        """Return whether a weight of this shape can take it in."""
        return self.low_rank.fits(weight, transposed=transposed)

    def norm(self) -> float:
        """Return the Euclidean norm of the tensors, in float64."""
        return self._values().norm()

    def minus(self, other: Update) -> Values | None:
        """Return the difference of the tensors; None where the shapes differ."""
        return self._values().minus(other._values()) if isinstance(other, Rescaled) else None

    def added_to(self, weight: Tensor, *, transposed: bool, dtype: torch.dtype) -> Tensor:
        """Return W_eff = c (W + s B A) in the weight's layout, rounded once to `dtype`."""
        A, B, s = self.low_rank.A, self.low_rank.B, self.low_rank.scaling
        return dora.effective_weight(weight, A, B, s, self.magnitude, transposed=transposed, dtype=dtype)

    def _values(self) -> Values:
        scaled = self.low_rank.scaling * self.low_rank.B.double()
        return Values(
            {"A": self.low_rank.A, "B": scaled, "m": self.magnitude, "bias": self.low_rank._moved()}
        )


@dataclass(frozen=True)
class Replaced:
    """Rows in the place of some rows of a weight.

    >>> Replaced((1,), torch.ones(1, 2)).added_to(torch.zeros(2, 2), transposed=False, dtype=torch.float32)
    tensor([[0., 0.],
            [1., 1.]])
    """

    rows: tuple[int, ...]
    values: Tensor  # (rows, cols)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols)."""
        return tuple(self.values.shape)

    def fits(self, weight: tuple[int, ...], *, transposed: bool) -> bool:
        """Return whether a weight of this shape has all of the rows."""
        return not transposed and weight[1:] == self.shape[1:] and weight[0] > self.rows[-1]

    def norm(self) -> float:
        """Return the Euclidean norm, in float64."""
        return Values({"": self.values}).norm()

    def minus(self, other: Update) -> Values | None:
        """Return the difference; None where they are not the same rows."""
        if not isinstance(other, Replaced) or self.rows != other.rows:
            return None
        return Values({"": self.values}).minus(Values({"": other.values}))

    def added_to(self, weight: Tensor, *, transposed: bool, dtype: torch.dtype) -> Tensor:
        """Return the weight with the rows in their places, rounded once to `dtype`."""
        rows = torch.tensor(self.rows, device="cpu")
        return weight.to(dtype, copy=True).index_copy_(0, rows, self.values.to(dtype))


OfWeight = LowRank | Rescaled | Replaced
"""What makes another weight of a weight."""

Update = OfWeight | Values


def with_bias(update: OfWeight) -> LowRank | None:
    """Return what an update adds to a weight and to a bias; None where it adds nothing to a bias."""
    low_rank = update.low_rank if isinstance(update, Rescaled) else update
    return low_rank if isinstance(low_rank, LowRank) and low_rank.bias is not None else None


def _shapes(values: Values) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in values.tensors.items()}
