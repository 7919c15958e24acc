"""`FrozenStatistics`: a frozen module whose buffers would go on changing in training, kept in evaluation.

A BatchNorm counts: in training mode its running mean and variance move with every batch, whatever
`requires_grad` says. Frozen means frozen, so injection puts this wrapper around each of them.

model.bn1: FrozenStatistics
    .base       the BatchNorm, in evaluation mode even where the model is in training mode
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .module import InjectedModule
from .torch_internals import SpectralNorm, children, own_tensors, put_child


class FrozenStatistics(InjectedModule):
    """A module of the base that keeps statistics, in evaluation mode for as long as it is frozen.

    It brings nothing to train and nothing to save. `eject` and `fuse` take it away, and `trainable` trains a
    copy of the module, statistics included, in its place.

    Args:
        base: a module for which `keeps_statistics` holds.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
        >>> model = minilora.inject(model, "0")
        >>> _ = model(torch.randn(4, 8))
        >>> model[1].running_mean
        tensor([0., 0., 0., 0., 0., 0., 0., 0.])
    """

    kind = "statistics"
    position = 0
    trains = False

    def begin(self) -> None:
        """Put the base in evaluation mode."""
        self.base.train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base."""
        return self.base(*args, **kwargs)

    def train(self, mode: bool = True) -> FrozenStatistics:
        """Remember the mode of the model around, and stay in evaluation."""
        super().train(mode)
        self.base.train(False)
        return self

    def fused(self, dtype: object = None) -> nn.Module:
        """Return the base, which may count again."""
        return self.ejected()

    def ejected(self) -> nn.Module:
        """Return the base, in the mode of the model around."""
        return self.base.train(self.training)

    def description(self) -> str:
        """Return the kind in a few words."""
        return f"frozen statistics ({type(self.base).__name__})"


def keeps_statistics(module: nn.Module) -> bool:
    """Return whether calling a module in training mode changes its buffers: BatchNorm and its like."""
    if isinstance(module, SpectralNorm):  # power iteration
        return True
    tensors = own_tensors(module)
    return "running_mean" in tensors and "running_var" in tensors


def thaw(module: nn.Module) -> nn.Module:
    """Take every `FrozenStatistics` inside a module away, so that it can be trained in full.

    Returns:
        The module itself, or, where it is such a wrapper, what stood there.
    """
    for parent in list(module.modules()):
        for name, child in list(children(parent)):
            if isinstance(child, FrozenStatistics):
                put_child(parent, name, child.ejected())
    return module.ejected() if isinstance(module, FrozenStatistics) else module
