"""A bar in a terminal, a quiet line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

LINE_EVERY = 60.0  # seconds between two lines in a log
LOSS_EVERY = 20  # steps between two looks at the loss: a GPU has to finish before a loss is read


def follow(
    loader: DataLoader[Any], title: str, losses: Sequence[Tensor] = (), *, shown: bool = True
) -> Iterator[Any]:
    """Yields the batches of `loader` and shows on the standard error how far it is.

    Args:
        loader: The batches.
        title: What is being done with them.
        losses: If given, it grows by one at every step, and the last one is shown in the bar.
        shown: Whether to show anything: of several processes, one does.
    """
    terminal = sys.stderr.isatty()
    bar = tqdm(
        loader, desc=title, unit="step", leave=False, mininterval=0.5, disable=not (shown and terminal)
    )
    last_line = time.monotonic()
    for step, batch in enumerate(bar, start=1):
        yield batch
        if losses and step % LOSS_EVERY == 0:
            bar.set_postfix(loss=f"{losses[-1].item():.3f}", refresh=False)
        if shown and not terminal and time.monotonic() - last_line >= LINE_EVERY:
            print(f"{title}: step {step:,} of {len(loader):,}", file=sys.stderr, flush=True)
            last_line = time.monotonic()
