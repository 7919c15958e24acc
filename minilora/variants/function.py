"""`Function`: torch's own, at less cost for each call."""

from __future__ import annotations

from typing import Any

import torch

from ..torch_internals import applied, is_deriving


class Function(torch.autograd.Function):
    """A function with a backward of its own, which is called by `run`."""

    @classmethod
    def run(cls, *arguments: Any) -> Any:
        """Return what `apply` returns, for all the arguments of `forward` in their order.

        On few tokens it is such calls that cost, and not the products. So nothing is recorded where nothing
        can be derived, and the arguments are bound to no signature.
        """
        return applied(cls, arguments) if is_deriving() else cls.forward(*arguments)
