"""The operations around training, one after the other on one model, each brought to where it starts from."""

from __future__ import annotations

import abc
import copy
from pathlib import Path
from typing import ClassVar

from torch import nn

from .setups import Setup
from .timing import Contestant

OPERATIONS = ("inject", "save", "load", "merge", "unmerge", "switch")


class Library(abc.ABC):
    """The operations, by one library.

    Args:
        base: the bare model; copied, never changed.
        setup: rank and targets.
        folder: where to save.
    """

    file: ClassVar[str]
    """Where in the folder."""

    def __init__(self, base: nn.Module, setup: Setup, folder: Path) -> None:
        self.base, self.setup, self.path = base, setup, folder / self.file
        self.merged = False
        self.bring_bare()
        self.inject()
        self.save()

    @abc.abstractmethod
    def inject(self) -> None:
        """Turn `self.bare` into `self.model`."""

    @abc.abstractmethod
    def save(self) -> None:
        """Write the adapter to `self.path`."""

    @abc.abstractmethod
    def load(self) -> None:
        """Turn `self.bare` into `self.model`, with the adapter of the file."""

    @abc.abstractmethod
    def read(self) -> None:
        """Give the adapter of `self.model`, unmerged, the values of the file."""

    @abc.abstractmethod
    def merge(self) -> None: ...

    @abc.abstractmethod
    def unmerge(self) -> None: ...

    def switch(self) -> None:
        """Go over to another adapter of the same form, on a merged model."""
        self.unmerge()
        self.read()
        self.merge()

    def bring_bare(self) -> None:
        self.bare = copy.deepcopy(self.base)

    def contestant(self, name: str, operation: str) -> Contestant:
        """Return an operation together with what brings the model into the state that it starts from."""

        def run() -> None:
            getattr(self, operation)()
            self.merged = operation in ("merge", "switch")

        def prepare() -> None:
            if operation in ("inject", "load"):
                self.bring_bare()
            elif operation == "merge" and self.merged:
                self.unmerge()
            elif operation in ("unmerge", "switch") and not self.merged:
                self.merge()

        return Contestant(name=name, run=run, prepare=prepare)
