"""Tensors of the base in an adapter's file: they are the model's own, or the file is refused."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..problems import Problems
from ..sites import Sites
from ..torch_internals import own_tensors
from .tensors import Entry


def other_base_values(entries: Mapping[str, Entry], sites: Sites) -> list[str]:
    """Return which tensors of the base a file holds that the model lacks, or has other values of."""
    others = Problems()
    for name, entry in entries.items():
        owner, _, leaf = name.rpartition(".")
        bare = sites[owner].bare if owner in sites else sites.model if not owner else None
        tensor = own_tensors(bare).get(leaf) if bare is not None else None
        if tensor is None:
            others.add(name, "neither LoRA nor part of a module that is trained in full, nor of the base")
        elif entry.shape != tuple(tensor.shape):
            others.add(
                name,
                f"a weight of the base, {entry.shape} in the file and {tuple(tensor.shape)} here; was the "
                "vocabulary resized? Resize the model's first",
            )
        elif not torch.equal(entry.read().to(tensor.dtype), tensor.detach().cpu()):
            others.add(
                name,
                "neither LoRA nor part of a module that is trained in full, but a weight of the base with "
                "other values than the model's, which `load` does not replace; if the file is right, copy "
                "them into the model first",
            )
    return others.lines()
