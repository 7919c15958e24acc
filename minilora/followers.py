"""`Follower`: what stands beside a model and goes with what is injected in it.

Rooms above the core may leave one in `vars(model)`, as `trainers` does. `inject`, `load`, `eject` and `fuse`
tell it when they are done, so it neither goes stale nor stays behind.
"""

from __future__ import annotations

from torch import nn


class Follower:
    """An attribute of a model that wants to hear of every change of its injections."""

    def follow(self, model: nn.Module) -> None:
        """Do what the change asks for; where nothing is injected any more, go. It must not fail."""
        raise NotImplementedError


def tell_followers(model: nn.Module) -> None:
    """Tell whoever follows a model that its injections are others now."""
    for value in list(vars(model).values()):
        if isinstance(value, Follower):
            value.follow(model)
