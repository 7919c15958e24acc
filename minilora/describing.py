"""`DescribedWeight`: a weight that tells what it is, and refuses to be computed with.

Where no single weight does what a layer does, code that asks for the dtype (T5) is served, and code that
would compute with the weight past the layer is stopped, or, like the fused path of
`nn.TransformerEncoderLayer`, sees that it must call the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor


class DescribedWeight(Tensor):
    """A weight that tells its dtype, device and shape, and raises a TypeError where it is computed with."""

    refusal: ClassVar[str]
    """What follows "was called on the `.weight` ", in the error: whose it is, and what to do instead."""

    _DESCRIBING = frozenset(
        {Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point}
    ).union(
        getattr(Tensor, name).__get__
        for name in ("dtype", "device", "shape", "layout", "ndim", "requires_grad", "is_cuda", "is_meta")
    )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in cls._DESCRIBING:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise TypeError(f"{getattr(func, '__name__', func)} was called on the `.weight` {cls.refusal}")
