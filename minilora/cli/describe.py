"""What an adapter file holds, and in what two differ, told without a model: for the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig, Config, LoRAConfig
from ..files.contents import Contents
from ..files.fingerprint import compare
from ..files.formats.native import manifest_to_json
from ..names import described as described_names
from ..names import generic


def described(contents: Contents) -> dict[str, Any]:
    """Return a file's contents as plain JSON values."""
    manifest, tensors = contents.manifest, contents.tensors
    sites = [
        {
            "site": site,
            "kind": config.kind,
            "shapes": _shapes(site, tensors),
            "norm": _norm(site, config, tensors),
        }
        for config, names in manifest.injections
        for site in names
    ]
    base = contents.base
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "injections": manifest_to_json(manifest)["injections"],
        "sites": sites,
        "trainable": {name: _shapes(name, tensors) for name in manifest.trainable},
        "base": base.to_dict() if base is not None else None,
        "damage": contents.damage,
    }


def table(contents: Contents) -> Iterator[str]:
    """Yield the lines of `minilora inspect`: layers of a stack on one line."""
    for config, names in contents.manifest.injections:
        yield f"{_title(config)}:"
        groups: dict[tuple[str, str], list[float]] = {}
        for site in names:
            shapes = " ".join(f"{key} {_by(shape)}" for key, shape in _shapes(site, contents.tensors).items())
            groups.setdefault((generic(site), shapes), []).append(_norm(site, config, contents.tensors))
        width = max((len(name) for name, _ in groups), default=0)
        for (name, shapes), norms in groups.items():
            yield f"  {name:<{width}}  x{len(norms):<3}  {shapes}  norm {_range(norms)}"
    for name in contents.manifest.trainable:
        shapes = " ".join(f"{key} {_by(shape)}" for key, shape in _shapes(name, contents.tensors).items())
        yield f"trained in full: {name}  {shapes}"
    if contents.base is None or not (contents.base.signatures or contents.base.unchecked):
        yield "base: not recorded"
    else:
        dtypes = {str(s.dtype).removeprefix("torch.") for s in contents.base.signatures.values()}
        found = f"({', '.join(sorted(dtypes))})" if dtypes else ""
        yield f"base: {len(contents.base.signatures)} weights recorded {found}".rstrip()
        for reason in sorted(set(contents.base.unchecked.values())):
            sites = [site for site, why in contents.base.unchecked.items() if why == reason]
            yield f"      {described_names(sites)} not recorded: {reason}"
    if contents.damage:
        yield f"damaged: {contents.damage}"


def differences(a: Contents, b: Contents) -> Iterator[str]:
    """Yield the lines of `minilora diff`; none where both hold the same."""
    one, two = a.manifest.placed(), b.manifest.placed()
    for left, right, name in ((one, two, "first"), (two, one, "second")):
        for kind in ("lora", "adapter", "trainable"):
            if only := [site for site, of in left if of == kind and (site, of) not in right]:
                yield f"{described_names(only)}: {kind} in the {name} alone"
    changes: dict[str, list[str]] = {}
    values: dict[str, float] = {}
    for key in (key for key in one if key in two):
        site, kind = key
        first, second = one[key], two[key]
        if first is not None and second is not None and first != second:
            changes.setdefault(_changed(first, second), []).append(site)
        if not _same_tensors(site, a.tensors, b.tensors):
            values[f"{site} ({kind})"] = _distance(site, first, second, a.tensors, b.tensors)
    for change, sites in changes.items():
        yield f"{described_names(sites)}: {change}"
    for name, distance in sorted(values.items(), key=lambda item: -item[1]):
        size = "other shapes" if math.isinf(distance) else f"{100 * distance:.3g} % of the first's size apart"
        yield f"{name}: other values, {size}"
    if a.base is not None and b.base is not None and (comparison := compare(a.base, b.base)).different:
        yield f"trained on different bases: {comparison}"


def _title(config: Config) -> str:
    fields = {key: value for key, value in config.to_dict().items() if value is not None}
    names = {LoRAConfig.kind: "LoRA", AdapterConfig.kind: "bottleneck adapter"}
    return f"{names[config.kind]} {' '.join(f'{key}={value}' for key, value in fields.items())}"


def _own(site: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors below a name, by the rest of their names."""
    return {key[len(site) + 1 :]: t for key, t in sorted(tensors.items()) if key.startswith(f"{site}.")}


def _shapes(site: str, tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in _own(site, tensors).items()}


def _norm(site: str, config: Config, tensors: Mapping[str, Tensor]) -> float:
    """Return the Frobenius norm of s B A, or of a bottleneck's two weights as one vector."""
    own = _own(site, tensors)
    if isinstance(config, LoRAConfig) and {"lora_A", "lora_B"} <= set(own):
        return config.scaling * _product_norm(own["lora_B"], own["lora_A"])
    return math.sqrt(
        sum(float(t.double().square().sum()) for key, t in own.items() if key.endswith("weight"))
    )


def _product_norm(B: Tensor, A: Tensor) -> float:
    """Return the Frobenius norm of B A, (out, r) and (r, in), without forming it: sqrt tr(B'B A A')."""
    A, B = A.double(), B.double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def _same_tensors(site: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    one, two = _own(site, a), _own(site, b)
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


def _distance(
    site: str, first: Config | None, second: Config | None, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> float:
    """Return how far apart the values at a site are, relative to the first's; LoRA by what it adds to W."""
    one, two = _own(site, a), _own(site, b)
    if isinstance(first, LoRAConfig) and isinstance(second, LoRAConfig):
        if one["lora_A"].shape[1] != two["lora_A"].shape[1] or len(one["lora_B"]) != len(two["lora_B"]):
            return math.inf
        B = torch.cat(
            [first.scaling * one["lora_B"].double(), -second.scaling * two["lora_B"].double()], dim=1
        )
        A = torch.cat([one["lora_A"].double(), two["lora_A"].double()])
        gap, size = _product_norm(B, A), first.scaling * _product_norm(one["lora_B"], one["lora_A"])
    elif {key: t.shape for key, t in one.items()} != {key: t.shape for key, t in two.items()}:
        return math.inf
    else:
        gap = math.sqrt(sum(float((one[key].double() - two[key].double()).square().sum()) for key in one))
        size = math.sqrt(sum(float(t.double().square().sum()) for t in one.values()))
    return gap / size if size else math.inf


def _changed(first: Config, second: Config) -> str:
    one, two = first.to_dict(), second.to_dict()
    return ", ".join(f"{key} {one[key]} -> {two[key]}" for key in one if one[key] != two[key])


def _by(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _range(norms: list[float]) -> str:
    low, high = min(norms), max(norms)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g}..{high:.3g}"
