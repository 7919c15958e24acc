"""`EffectiveWeight`: W + s L R as a value. What is computed with it never forms it, where a rule says how.

    L (..., rows, r) and R (..., r, cols) are B and A, or, where a weight is stored as (in, out), A^T and B^T.

    a rule per function      x (W + s L R)^T = x W^T + s (x R^T) L^T, and likewise for convolutions, look-ups,
                             stacks of experts; indexing and transposing give another EffectiveWeight
    any other function       the whole W + s L R is formed, differentiably, and the function called with it

So a module of any kind computes with a low-rank update by its own code: `view` puts the value in the place
of its parameter. (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1, for any layer.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import add_low_rank, sum_with_product
from .variants.convolution import convolved, low_rank_convolution, stands_in
from .variants.dropout import dropped


class Owner(Protocol):
    """Who an effective weight belongs to: told when it must be formed, since that costs memory."""

    def tell_of_forming(self, function: str) -> None:
        """Note, or refuse, that `function` has no rule."""


class EffectiveWeight:
    """W + s L R, known by its parts; anything that takes a tensor takes it.

    Args:
        weight: W, of any shape that starts with L's leading dimensions and rows.
        left: L, (..., rows, r).
        right: R, (..., r, cols); cols is what remains of W's dimensions, flattened.
        scaling: the factor s.
        owner: told when the whole has to be formed.
        dropout: the probability with which elements of what is multiplied with R are dropped; 0 for none.

    Example:
        >>> from minilora.weight import EffectiveWeight
        >>> W, B, A, x = torch.randn(6, 8), torch.randn(6, 2), torch.randn(2, 8), torch.randn(3, 8)
        >>> y = nn.functional.linear(x, EffectiveWeight(W, B, A, 0.5))     # forms nothing of (6, 8)
        >>> torch.allclose(y, x @ (W + 0.5 * B @ A).T, atol=1e-5)
        True
    """

    def __init__(
        self,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        scaling: float,
        owner: Owner | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.weight = weight
        self.left = left
        self.right = right
        self.scaling = scaling
        self.owner = owner
        self.dropout = dropout

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        rule = RULES.get(function) or RULES_BY_NAME.get(name)
        if rule is not None:
            result = rule(function, *args, **kwargs)
            if result is not NotImplemented:
                return result
        formed = {key: _form(value, name) for key, value in kwargs.items()}
        return function(*(_form(value, name) for value in args), **formed)

    def whole(self, function: str | None = None) -> Tensor:
        """Return W + s L R, formed, in W's dtype.

        Args:
            function: for whose sake, where there is no rule for it; the owner is told.
        """
        if function is not None and self.owner is not None:
            self.owner.tell_of_forming(function)
        return self.formed()

    def formed(self) -> Tensor:
        """Return `whole`, of which nobody is told."""
        return sum_with_product(self.weight, self.left, self.right, self.scaling)

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """Return what a linear layer gives for x, (..., out), where y is what it gives with W."""
        return add_low_rank(y, self.dropped(x), self.right, self.left, self.scaling)

    def looked_up(self, rows: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        """Return what an embedding gives for token ids, (..., cols), where `rows` is what it gives with W.

        A token is a one-hot vector: dropout drops it whole. No gradient comes from the padding token.
        """
        low = F.embedding(ids, self.left, padding_idx)  # (..., r)
        if self.dropout:
            low = low * self.dropped(low.new_ones(*low.shape[:-1], 1))
        return rows + (low @ self.scaled(self.right)).to(rows.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """Return x as the low-rank path sees it: with dropout, while training."""
        return dropped(x, self.dropout)

    def scaled(self, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return s times L or R, which are small, for outputs are not; in a dtype, rounded once."""
        return (factor * self.scaling).to(dtype or factor.dtype)

    def parts(self, take: Callable[[Tensor], Tensor]) -> EffectiveWeight:
        """Return the value whose three parts are taken from this one's in the same way."""
        return self._of(take(self.weight), take(self.left), take(self.right))

    def _of(self, weight: Tensor, left: Tensor, right: Tensor) -> EffectiveWeight:
        return EffectiveWeight(weight, left, right, self.scaling, self.owner, self.dropout)

    @property
    def is_matrix(self) -> bool:
        """Whether W is a matrix, or a stack of them: nothing of its dimensions is flattened in R."""
        return self.weight.dim() == self.left.dim()

    @property
    def requires_grad(self) -> bool:
        """Whether any of the parts does."""
        return self.weight.requires_grad or self.left.requires_grad or self.right.requires_grad

    def contiguous(self) -> EffectiveWeight:
        """Return this value: the product that it stands for is in order by itself."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> EffectiveWeight:
        """Return the value with its parts moved or cast."""
        return self.parts(lambda part: part.to(*args, **kwargs))

    # Indexing and transposing.

    def __getitem__(self, index: Any) -> EffectiveWeight | Tensor:
        if isinstance(index, tuple) or not self.is_matrix:
            return self.whole("indexing")[index]
        if self.ndim > 2:  # of a stack: one matrix, or some of them
            return self.parts(lambda part: part[index])
        W, L = self.weight[index], self.left[index]
        if isinstance(index, slice):
            return self._of(W, L, self.right)
        return W + (L @ self.right * self.scaling).to(W.dtype)  # rows, and no more than was asked for

    def __iter__(self) -> Iterator[EffectiveWeight | Tensor]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.weight)

    def transpose(self, dim0: int, dim1: int) -> EffectiveWeight | Tensor:
        """Return the value with two dimensions swapped: W^T + s R^T L^T for the last two."""
        if not self.is_matrix or {dim0 % self.ndim, dim1 % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            return self.whole("transpose").transpose(dim0, dim1)
        return self._of(self.weight.mT, self.right.mT, self.left.mT)

    @property
    def mT(self) -> EffectiveWeight | Tensor:
        """The value with its last two dimensions swapped."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> EffectiveWeight | Tensor:
        """The value with its dimensions reversed."""
        return self.transpose(-2, -1) if self.ndim == 2 else self.whole("T").T

    def t(self) -> EffectiveWeight | Tensor:
        """Return the value with its two dimensions swapped."""
        return self.transpose(0, 1)

    def __getattr__(self, name: str) -> Any:
        """Return what W says of its shape and place, or what the whole has: right, if costly."""
        if name in DESCRIBING:
            return getattr(self.weight, name)
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.whole(name), name)

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(other, self)  # type: ignore[arg-type]


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: EffectiveWeight, *operands: Any) -> Any:
        return getattr(self.whole(name), name)(*(_form(operand, name) for operand in operands))

    return apply


# Python looks operators up on the class, past __getattr__.
for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        setattr(EffectiveWeight, _side, _operator(_side))
for _name in ("__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(EffectiveWeight, _name, _operator(_name))


def _form(value: Any, function: str) -> Any:
    """Return a value with every effective weight in it formed."""
    if isinstance(value, EffectiveWeight):
        return value.whole(None if function in FORMED_BY_DESIGN else function)
    if isinstance(value, (tuple, list)):
        return type(value)(_form(item, function) for item in value)
    return value


DESCRIBING = frozenset(
    (
        *("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_meta", "dim", "size", "numel"),
        *("stride", "data_ptr", "element_size", "is_contiguous", "is_floating_point", "is_complex"),
        *("is_nested", "is_sparse", "is_quantized"),
    )
)
"""What code asks of a weight before it computes with it."""

FORMED_BY_DESIGN = frozenset({"multi_head_attention_forward"})
"""Functions of many tokens per weight, for which forming it is the cheap way: the weight form."""

RULES: dict[Any, Callable[..., Any]] = {}
"""What it means to call a function with an effective weight. A rule gets the function and its arguments, and
returns NotImplemented where it does not apply."""

RULES_BY_NAME: dict[str, Callable[..., Any]] = {}
"""The same for operators that some library registers, which cannot be named before it is there."""


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule for functions, or for the names of operators."""

    def register(of: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            if isinstance(function, str):
                RULES_BY_NAME[function] = of
            elif function is not None:  # what this torch does not have
                RULES[function] = of
        return of

    return register


@rule(F.linear)
def _linear(linear: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(x, Tensor) or not isinstance(weight, EffectiveWeight) or weight.ndim != 2:
        return NotImplemented
    return weight.outputs(linear(x, weight.weight, bias), x)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def _matmul(product: Any, a: Any, b: Any) -> Any:
    """Multiply from the right, x W + s (x L) R, or from the left, W x + s L (R x)."""
    if isinstance(a, Tensor) and b.is_matrix:
        y, x = product(a, b.weight), b.dropped(a)
        return y + product(product(x, b.left.to(a.dtype)), b.scaled(b.right, a.dtype)).to(y.dtype)
    if isinstance(b, Tensor) and a.is_matrix:
        y, x = product(a.weight, b), a.dropped(b)
        return y + product(a.scaled(a.left, b.dtype), product(a.right.to(b.dtype), x)).to(y.dtype)
    return NotImplemented


@rule(
    getattr(F, "grouped_mm", None),
    getattr(torch, "_grouped_mm", None),
    "grouped_mm_fallback",
    "grouped_mm_fallback.default",
)
def _grouped_mm(grouped_mm: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Multiply the rows of each group with the matrix of a stack that is theirs: (n, in), (E, in, out)."""
    if not isinstance(x, Tensor) or not isinstance(weight, EffectiveWeight) or not weight.is_matrix:
        return NotImplemented
    # The kernel wants every row to begin at a multiple of 16 bytes; a rank of zeros more changes nothing.
    r, step = weight.left.shape[-1], 16 // x.element_size()
    more = -r % step
    left = F.pad(weight.left.to(x.dtype), (0, more)).contiguous()
    right = F.pad(weight.scaled(weight.right, x.dtype), (0, 0, 0, more)).contiguous()
    y = grouped_mm(x, weight.weight, *args, **kwargs)
    h = grouped_mm(weight.dropped(x).contiguous(), left, *args, **kwargs)
    return y + grouped_mm(h.contiguous(), right, *args, **kwargs).to(y.dtype)


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _convolution(
    conv: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    """Convolve with R's r kernels, then mix their channels by L; or by `convolved`, for many points."""
    if not isinstance(x, Tensor) or not isinstance(weight, EffectiveWeight):
        return NotImplemented
    W, steps = weight.weight, (stride, padding, dilation)
    if not weight.dropout and stands_in(x, W, *steps, groups):
        return convolved(conv, x, W, bias, weight.right, weight.left, weight.scaling, *steps)
    y = conv(x, W, bias, *steps, groups)
    left = weight.scaled(weight.left, y.dtype)
    return y + low_rank_convolution(conv, weight.dropped(x), W.shape[1:], weight.right, left, *steps, groups)


@rule(F.embedding)
def _embedding(
    embedding: Any, ids: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    """Look rows up in W, and make of them what the whole has there.

    Where look-ups renormalise, the rows that come out are, and nothing is written into W. Gradients are
    dense whatever `sparse` says, which is about W's. Gradients by frequency need the whole.
    """
    if not isinstance(weight, EffectiveWeight) or scale_grad_by_freq:
        return NotImplemented
    rows = weight.looked_up(embedding(ids, weight.weight, padding_idx), ids, padding_idx)
    if max_norm is None:
        return rows
    with torch.no_grad():  # as torch renormalises, without a share in the gradient
        norms = rows.norm(norm_type, dim=-1, keepdim=True)
        shorter = torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows) - rows
    return rows + shorter
