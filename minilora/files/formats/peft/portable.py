"""`made_portable`: an adapter that every server reads alike, since nothing in it is left to be read.

Servers take PEFT's folders, and each reads some of the config's fields alone. So the scaling goes into B,
alpha is r, and all sites have one rank, filled up with zeros: any server's formula for the scale gives 1.
`docs/serving.md` says which server reads what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....config import AdapterConfig, LoRAConfig, RowsConfig
from ....errors import CheckpointError, several
from ....manifest import Manifest
from ....names import described
from ...contents import Contents
from .places import Place

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be (`MaxLoRARanks` in its `vllm/config/lora.py`, 2026)."""

INSTEAD = "minilora.fuse(model), and serve that"
OTHERS = {AdapterConfig.kind: "a bottleneck adapter", RowsConfig.kind: "rows that are trained by themselves"}


def made_portable(contents: Contents) -> Contents:
    """Return the same update in the fewest words: B' = scaling B in float32, alpha = r, one rank.

    Args:
        contents: LoRA alone, which begins at zero.

    Raises:
        CheckpointError: naming what no server takes, with what to do instead.
    """
    if problems := list(_refused(contents)):
        raise CheckpointError(several(problems, outcome="nothing has been written"))
    widest = max(config.r for config, _ in contents.manifest.injections if isinstance(config, LoRAConfig))
    r = next(rank for rank in RANKS if rank >= widest)
    tensors: dict[str, Tensor] = {}
    sites: list[str] = []
    for config, names in contents.manifest.injections:
        assert isinstance(config, LoRAConfig)
        for site in names:
            A, B = (contents.tensors[f"{site}.{name}"] for name in ("lora_A", "lora_B"))
            missing = r - config.r
            tensors[f"{site}.lora_A"] = pad(A.to(torch.float32), (0, 0, 0, missing))
            tensors[f"{site}.lora_B"] = pad((B.double() * config.scaling).to(torch.float32), (0, missing))
            sites.append(site)
    lost = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if lost:
        problem = f"{described(lost)}: not finite in float32 with the scaling in it"
        raise CheckpointError(several([problem], outcome="nothing has been written"))
    config = LoRAConfig(r=r, alpha=r, dropout=0.0)
    return replace(contents, manifest=Manifest(((config, tuple(sites)),), ()), tensors=tensors)


def not_portable(places: Iterable[Place], targets: object) -> Iterator[str]:
    """Yield what PEFT has a place for, but the servers have none.

    Args:
        places: of the sites in a PEFT model.
        targets: the config's `target_modules`.
    """
    if others := [place.site for place in places if place.kind not in ("linear", "embedding")]:
        yield (
            f"{described(others)}: servers take LoRA on linear layers and embeddings alone; leave it out, or "
            f"{INSTEAD}"
        )
    if isinstance(targets, str):
        yield "PEFT would need an expression to tell the sites apart, and servers take lists of names alone"


def _refused(contents: Contents) -> Iterator[str]:
    """Yield what an adapter carries that is not plain LoRA, in words."""
    of_lora: list[str] = []
    for config, names in contents.manifest.injections:
        if not isinstance(config, LoRAConfig):
            instead = f": {INSTEAD}" if config.kind == RowsConfig.kind else ""
            yield f"{described(names)}: {OTHERS[config.kind]}, which no server takes{instead}"
            continue
        of_lora += names
        if config.dora:
            yield f"{described(names)}: DoRA, which servers do not compute: {INSTEAD}"
        elif more := [n for n in config.tensor_names if n not in ("lora_A", "lora_B")]:
            yield f"{described(names)}: {', '.join(more)} beside A and B, which no server takes: {INSTEAD}"
        if config.r > RANKS[-1]:
            yield f"{described(names)}: rank {config.r}, and {RANKS[-1]} is the highest that vLLM takes"
    if contents.manifest.trainable:
        yield (
            f"{described(contents.manifest.trainable)}: trained in full, and servers take LoRA alone: "
            f"{INSTEAD}; or leave out portable for PEFT itself"
        )
    if not of_lora:
        yield "there is no LoRA in it"
