"""What an adapter file holds, told without a model: `minilora inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..config import Config
from ..errors import listed
from ..files.contents import Contents
from ..files.fingerprint import Fingerprint
from ..files.formats.native import manifest_to_json
from ..names import described as names_of
from ..names import generic
from .inventory import KINDS, Inventory, Part
from .terminal import plain


def described(contents: Contents) -> dict[str, Any]:
    """Return a file's contents as plain JSON values."""
    inventory = Inventory.of(contents)
    parts = inventory.parts.values()
    return {
        "parameters": sum(tensor.numel() for tensor in contents.tensors.values()),
        "dtypes": sorted({_short(tensor.dtype) for tensor in contents.tensors.values()}),
        "injections": manifest_to_json(contents.manifest)["injections"],
        "sites": [
            {"site": part.name, "kind": part.kind, "shapes": part.shapes, "norm": _norm(part)}
            for part in parts
            if part.config is not None
        ],
        "trainable": {part.name: part.shapes for part in parts if part.config is None},
        "base": contents.base.to_dict() if contents.base is not None else None,
        "damage": contents.damage,
        "problems": inventory.problems(),
    }


def table(contents: Contents) -> Iterator[str]:
    """Yield the lines of `minilora inspect`: layers of a stack on one line."""
    inventory = Inventory.of(contents)
    for config, sites in contents.manifest.injections:
        yield f"{_heading(config)}:"
        yield from _rows([inventory.parts[site, config.kind] for site in sites])
    whole = _stacks(part for part in inventory.parts.values() if part.config is None)
    for (name, columns), stack in whole.items():
        one = len(stack) == 1
        yield f"trained in full: {plain(stack[0].name) if one else f'{name}  x{len(stack)}'}  {columns}"
    yield from _base(contents.base or Fingerprint())
    if contents.damage:
        yield f"damaged: {contents.damage}"
    for problem in inventory.problems():
        yield f"damaged: {problem}"


def spread(numbers: Sequence[float]) -> str:
    """Return the smallest and the largest of some numbers, to three digits.

    >>> spread([2.0, 10.0]), spread([0.5, 0.5001])
    ('2..10', '0.5')
    """
    low, high = f"{min(numbers):.3g}", f"{max(numbers):.3g}"
    return low if low == high else f"{low}..{high}"


def _heading(config: Config) -> str:
    fields = {key: value for key, value in config.to_dict().items() if value is not None}
    shown = {
        key: listed(list(map(str, v))) if isinstance(v, tuple) else plain(str(v)) for key, v in fields.items()
    }
    return f"{KINDS[config.kind].title} {' '.join(f'{key}={value}' for key, value in shown.items())}"


def _rows(parts: Iterable[Part]) -> Iterator[str]:
    stacks = _stacks(parts)
    width = max((len(name) for name, _ in stacks), default=0)
    for (name, columns), stack in stacks.items():
        norms = [norm for part in stack if (norm := _norm(part)) is not None]
        size = spread(norms) if len(norms) == len(stack) else "unknown"
        yield f"  {name:<{width}}  x{len(stack):<3}  {columns}  norm {size}"


def _stacks(parts: Iterable[Part]) -> dict[tuple[str, str], list[Part]]:
    """Return the parts that differ in their indices alone, by what they share: a name, and shapes."""
    stacks: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        columns = (f"{plain(key)} {_by(shape)}".lstrip() for key, shape in part.shapes.items())
        stacks.setdefault((plain(generic(part.name)), " ".join(columns)), []).append(part)
    return stacks


def _base(base: Fingerprint) -> Iterator[str]:
    if not base.signatures and not base.unchecked:
        yield "base: not recorded"
        return
    dtypes = sorted({_short(signature.dtype) for signature in base.signatures.values()})
    yield f"base: {len(base.signatures)} weights recorded" + (f" ({', '.join(dtypes)})" if dtypes else "")
    reasons: dict[str, list[str]] = {}
    for site, reason in base.unchecked.items():
        reasons.setdefault(reason, []).append(site)
    for reason, sites in sorted(reasons.items()):
        yield f"      {names_of(sites)} not recorded: {plain(reason)}"


def _norm(part: Part) -> float | None:
    update = part.update()
    return None if update is None else update.norm()


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
