"""State dicts of loralib: `<site>.lora_A` (r, in) and `<site>.lora_B` (out, r), and heads as they are.

What `loralib.lora_state_dict(model)` returns, saved with `safetensors.torch.save_file`; published ones have
the task's head in them, too: `classifier.dense.weight`, ... Neither r nor alpha is in it: the caller gives
them. What is trained in full follows from the model: the outermost modules that are in the file whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ...config import LoRAConfig
from ...errors import CheckpointError, several
from ...manifest import Manifest
from ...names import above, described, natural
from ...problems import Problems
from ...sites import Sites
from ..contents import Announced
from ..tensors import Entry, opened
from .recognise import require_safetensors


@contextlib.contextmanager
def reading(path: Path, config: LoRAConfig, sites: Sites) -> Iterator[Announced]:
    """Open a file and give what it says that it holds.

    Args:
        path: of the `.safetensors` file.
        config: r and alpha (`lora_alpha`) that the model was built with; loralib has no rslora.
        sites: of the model that it is meant for.

    Raises:
        CheckpointError: listing every tensor that is neither LoRA on a linear layer, of that rank, nor
            part of a module that the file has whole.
        OSError: when there is no such file, or it cannot be read.
    """
    given = [
        f"{field}={value!r}"
        for field, value in config.to_dict().items()
        if field in ("r", "alpha") or value != getattr(LoRAConfig, field)
    ]
    require_safetensors(path, f', format="loralib", config=minilora.LoRAConfig({", ".join(given)})')
    with opened(path) as file:
        entries = file.entries()
        pairs: dict[str, dict[str, Entry]] = {}
        others: list[str] = []
        for key, entry in entries.items():
            site, _, side = key.rpartition(".")
            if site and side in ("lora_A", "lora_B"):
                pairs.setdefault(site, {})[side] = entry
            else:
                others.append(key)
        heads = _whole_modules(others, pairs, sites)
        problems = [] if pairs else ["there is no LoRA tensor in it"]
        if left := sorted(key for key in others if heads.isdisjoint(above(key))):
            problems.append(
                f"{described(left)}: neither LoRA nor part of a module that is in the file whole. The base's "
                "biases (bias='all' or 'lora_only') cannot be taken, since minilora does not write to the "
                "base; use lora_state_dict(model, bias='none')"
            )
        misfits = Problems()
        for site, pair in pairs.items():
            if problem := _problem(pair, config.r):
                misfits.add(site, problem)
        if problems := problems + misfits.lines():
            raise CheckpointError(several(problems, outcome=f"{str(path)!r} was not read"))
        placed = tuple(sorted(pairs, key=natural))
        yield Announced(Manifest(((config, placed),), tuple(sorted(heads, key=natural))), entries)


def _whole_modules(keys: Iterable[str], pairs: Mapping[str, object], sites: Sites) -> set[str]:
    """Return the outermost modules of the model whose whole state is among the keys, without LoRA in them."""
    given = set(keys)
    adapted = {name for site in pairs for name in (*above(site), site)}
    whole: dict[str, bool] = {}
    found: set[str] = set()
    for key in given:
        for name in above(key):
            if name not in whole:
                whole[name] = name in sites and name not in adapted and _is_whole(name, sites, given)
            if whole[name]:
                found.add(name)
                break
    return found


def _is_whole(name: str, sites: Sites, given: set[str]) -> bool:
    state = sites[name].bare.state_dict(keep_vars=True)
    return bool(state) and all(f"{name}.{key}" in given for key in state)


def _problem(pair: Mapping[str, Entry], r: int) -> str | None:
    """Return what is wrong with A and B of a site, or None."""
    if missing := {"lora_A", "lora_B"} - set(pair):
        return f"no {missing.pop()} in the file"
    shape_a, shape_b = pair["lora_A"].shape, pair["lora_B"].shape
    if len(shape_a) != 2 or len(shape_b) != 2:
        return f"A and B, {shape_a} and {shape_b}, are no matrices"
    if shape_a[0] != shape_b[1]:
        return (
            f"A and B, {shape_a} and {shape_b}, have no rank in common, as in loralib's MergedLinear, of "
            "which the file does not tell which thirds of the layer it adapts"
        )
    if shape_a[0] != r:
        return f"it has rank {shape_a[0]}, and the config given says r={r}"
    return None
