"""What cannot be measured here: its row stays in the table, and says why."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch

NOT_MEASURED = "not measured"


class NotMeasured(Exception):
    """A row that cannot be measured here; the message is the reason, and goes into the table."""


def is_installed(package: str) -> bool:
    """Return whether a package is there to be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def import_optional(package: str) -> ModuleType:
    """Return a package, or raise `NotMeasured` where it is not installed or does not work."""
    if not is_installed(package):
        raise NotMeasured(f"{package} is not installed")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise NotMeasured(f"{package} cannot be imported ({error})") from error


@contextlib.contextmanager
def noting_why_not(name: str, reasons: dict[str, str]) -> Iterator[None]:
    """Note why a contestant cannot be measured, if it cannot, and go on without it.

    Reasons are `NotMeasured`, too little memory, and what torch.compile cannot compile. Anything else is a
    mistake and ends the run.

    Args:
        name: the contestant.
        reasons: gets the reason, by the contestant's name.
    """
    try:
        yield
    except NotMeasured as reason:
        reasons[name] = str(reason)
    except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
        reasons[name] = type(error).__name__
