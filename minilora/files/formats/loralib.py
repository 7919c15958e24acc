"""State dicts of loralib: `<site>.lora_A` (r, in) and `<site>.lora_B` (out, r), and nothing else.

What `loralib.lora_state_dict(model)` returns, saved with `safetensors.torch.save_file`. Neither r nor
alpha is in it: the caller gives them.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...config import LoRAConfig
from ...errors import CheckpointError, quoted, several
from ...names import natural
from ...plan import Manifest
from ..contents import Contents
from ..tensors import read_tensors


def read(path: Path, config: LoRAConfig) -> Contents:
    """Return what a file holds.

    Args:
        path: of the `.safetensors` file.
        config: r and alpha (`lora_alpha`) that the model was built with; loralib has no rslora.

    Raises:
        CheckpointError: listing every tensor that is not LoRA on a linear layer, or not of that rank.
        OSError: when there is no such file, or it cannot be read.
    """
    _, tensors = read_tensors(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    strangers: list[str] = []
    for key, tensor in tensors.items():
        site, _, side = key.rpartition(".")
        if site and side in ("lora_A", "lora_B"):
            pairs.setdefault(site, {})[side] = tensor
        else:
            strangers.append(key)
    problems = ["there is no LoRA tensor in it"] if not pairs else []
    if strangers:
        problems.append(
            f"{quoted(sorted(strangers))}: not LoRA. The base's biases (bias='all' or 'lora_only') cannot "
            "be taken, since minilora does not write to the base; use lora_state_dict(model, bias='none')"
        )
    for site, pair in pairs.items():
        problems += _problems(site, pair, config.r)
    if problems:
        raise CheckpointError(several(problems, outcome=f"{str(path)!r} was not read"))
    sites = tuple(sorted(pairs, key=natural))
    return Contents(Manifest(((config, sites),), ()), tensors)


def _problems(site: str, pair: dict[str, Tensor], r: int) -> list[str]:
    if missing := {"lora_A", "lora_B"} - set(pair):
        return [f"{site!r} has no {missing.pop()}"]
    shape_a, shape_b = tuple(pair["lora_A"].shape), tuple(pair["lora_B"].shape)
    if len(shape_a) != 2 or len(shape_b) != 2:
        return [f"{site!r}: A and B, {shape_a} and {shape_b}, are no matrices"]
    if shape_a[0] != shape_b[1]:
        return [
            f"{site!r}: A and B, {shape_a} and {shape_b}, have no rank in common, as in loralib's "
            "MergedLinear, of which the file does not tell which thirds of the layer it adapts"
        ]
    if shape_a[0] != r:
        return [f"{site!r} has rank {shape_a[0]}, and the config given says r={r}"]
    return []
