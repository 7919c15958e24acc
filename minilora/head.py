"""`TrainableHead`: a module that is trained in full, as a copy, while the original stays as it was.

model.classifier: TrainableHead
    .base       the original, frozen: what `eject` and `disabled` give back
    .trained    its copy: what is trained, saved, and left behind by `fuse`
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .module import InjectedModule


class TrainableHead(InjectedModule):
    """A trainable copy of a module, in its place. Made by the `trainable` argument of `minilora.inject`.

    Args:
        base: the module to be trained in full; a classifier head, most often.
    """

    kind = "trainable"

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.trained = copy.deepcopy(base)
        for parameter in self.trained.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy, or the original inside `minilora.disabled`."""
        return self._answering()(*args, **kwargs)

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the copy's state under the names that the module itself has."""
        state: dict[str, Tensor] = self.trained.state_dict(keep_vars=True)
        return state

    def load_adapter_state(self, values: dict[str, Tensor], *, assign: bool) -> None:
        """Give the copy the values that a file has for it. Inverse: `adapter_state`.

        Always in place, since assigning would untie weights that are tied inside the module.
        """
        self.trained.load_state_dict(values)

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the trained copy, which takes the original's place."""
        return self.trained

    def description(self) -> str:
        """Return the kind in a few words."""
        return f"trained in full ({type(self.base).__name__})"

    def _answering(self) -> nn.Module:
        return self.trained if self.enabled else self.base

    def _initial(self, name: str, tensor: Tensor, state_dict: dict[str, Any], prefix: str) -> Tensor:
        """Start the copy from the original that a bare checkpoint brings."""
        value: Tensor | None = state_dict.get(prefix + name.removeprefix("trained."))
        # A copy, because load_state_dict(assign=True) would have both share the memory of one tensor.
        return tensor if value is None else value.detach().clone()
