"""`combine`: a weighted sum of adapters is an adapter.

    w1 s1 B1 A1 + w2 s2 B2 A2  =  [w1 s1 B1, w2 s2 B2] [A1; A2]        of rank r1 + r2, with scaling 1

and biases of B are summed likewise.

Exact, however many there are. A smaller rank is that of the nearest matrix, by the singular values, and
what is lost is told.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig, Config, LoRAConfig, RowsConfig
from ..errors import CheckpointError, MiniLoRAError, quoted, several
from ..files.contents import Contents
from ..files.fingerprint import Fingerprint, compare
from ..files.loading import read
from ..files.paths import path_for
from ..files.saving import WriteFormat, require_format, write
from ..manifest import Manifest, grouped
from ..names import described, natural, outermost_of
from ..variants.initial import change_since
from .bank import Bank


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What `combine` wrote, and what was lost on the way.

    Example:
        >>> minilora.Combination(path="sum.safetensors", ranks={"up": 2}, lost={"up": 0.0}, loss=0.0).loss
        0.0
    """

    path: str
    """Of the file or folder."""
    ranks: Mapping[str, int]
    """The rank at each site."""
    lost: Mapping[str, float]
    """At each site, the Frobenius norm of what was left out, as a share of the whole update's."""
    loss: float
    """The same over all sites together."""


def combine(
    weights: Mapping[str | os.PathLike[str], float],
    out: str | os.PathLike[str],
    *,
    bank: Bank | None = None,
    r: int | None = None,
    heads: str | os.PathLike[str] | None = None,
    format: WriteFormat = "minilora",
) -> Combination:
    """Write the adapter that does what several do together, each by its weight.

    Args:
        weights: by the path of each adapter, or its name in `bank`; any numbers, negative ones included.
        out: path of the new file or folder.
        bank: where names are looked up; what is no name there is a path.
        r: the largest rank of the result. None keeps all, exact to one rounding of the scaled B's.
        heads: the adapter whose modules trained in full are taken, since there is no sum of such modules.
        format: "minilora" or "peft".

    Returns:
        The ranks, and how much was lost; nothing without `r`.

    Raises:
        CheckpointError: when a file is not sound, or has what cannot be summed; the adapters were trained on
            different bases; or a module is trained in full and `heads` does not tell whose. Nothing is
            written.
        MiniLoRAError: when an argument is wrong.
        OSError: when a file cannot be read or written.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0", minilora.LoRAConfig(r=2))
        >>> minilora.save(model, "legal")
        >>> minilora.save(model, "formal")
        >>> minilora.combine({"legal": 0.7, "formal": 0.3}, "both").ranks
        {'0': 4}
    """
    require_format(format)
    target = path_for(out, None, call="combine({path: weight}, out)")
    if problems := _argument_problems(weights, r, heads):
        raise MiniLoRAError(several(problems, outcome="nothing has been written"))
    adapters = {name: _contents(name, bank) for name in weights}
    problems = [f"{str(name)!r}: {text}" for name, each in adapters.items() for text in _refusals(each)]
    problems += _of_several_bases(adapters)
    of_heads = {name: each.manifest.trainable for name, each in adapters.items() if each.manifest.trainable}
    if of_heads and heads is None:
        found = "; ".join(f"{str(name)!r} has {described(trained)}" for name, trained in of_heads.items())
        problems.append(f"modules trained in full have no sum: give heads=..., the adapter to take ({found})")
    if problems:
        raise CheckpointError(several(problems, outcome="nothing has been written"))

    sums = {site: _Sum.of(site, weights, adapters) for site in _sites(adapters)}
    placed: list[tuple[Config, str]] = []
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    norms: dict[str, tuple[float, float]] = {}
    for site, whole in sums.items():
        A, B, norms[site] = whole.A, whole.B, (0.0, 0.0)
        if r is not None and r < A.shape[-2]:
            A, B, norms[site] = nearest_of_rank(A, B, r)
        elif r is not None:
            norms[site] = (0.0, _norm(A, B))
        ranks[site] = A.shape[-2]
        tensors |= {f"{site}.lora_A": A.to(whole.dtype), f"{site}.lora_B": B.to(whole.dtype)}
        if whole.bias is not None:
            tensors[f"{site}.lora_bias"] = whole.bias.to(whole.dtype)
        rank, biased = ranks[site], whole.bias is not None
        placed.append((LoRAConfig(r=rank, alpha=rank, dropout=whole.dropout, lora_bias=biased), site))
    trained: tuple[str, ...] = ()
    if heads is not None:
        source = adapters[heads]
        trained = source.manifest.trainable
        tensors |= {k: t for k, t in source.tensors.items() if outermost_of(k, set(trained)) is not None}
    bases = [each.base for each in adapters.values() if each.base is not None]
    manifest = Manifest(grouped(placed), trained)
    write(target, Contents(manifest, tensors, base=_union(bases) if bases else None), None, format)
    left, all_of_it = (math.sqrt(sum(pair[i] ** 2 for pair in norms.values())) for i in (0, 1))
    lost = {site: gone / whole if whole else 0.0 for site, (gone, whole) in norms.items()}
    return Combination(path=str(target), ranks=ranks, lost=lost, loss=left / all_of_it if left else 0.0)


@dataclass(frozen=True)
class _Sum:
    """The sum at a site, in float64."""

    A: Tensor  # (..., r, in)
    B: Tensor  # (..., out, r)
    dtype: torch.dtype
    """The widest of the adapters'."""
    dropout: float
    bias: Tensor | None = None  # (out,), of B

    @classmethod
    def of(cls, site: str, weights: Mapping[Any, float], adapters: Mapping[Any, Contents]) -> _Sum:
        parts: list[tuple[Tensor, Tensor, LoRAConfig, float]] = []
        biases: list[Tensor] = []
        for name, weight in weights.items():
            contents = adapters[name]
            config = contents.manifest.placed().get((site, LoRAConfig.kind))
            if isinstance(config, LoRAConfig):
                own = {key: contents.tensors[f"{site}.{key}"] for key in config.tensor_names}
                A, B = own["lora_A"], own["lora_B"]
                if config.begins_at_weight:
                    A, B = change_since(A, B, own["lora_A_start"], own["lora_B_start"])
                parts.append((A, B, config, float(weight)))
                if config.lora_bias:
                    biases.append(weight * config.scaling * own["lora_bias"].double())
        dtype = parts[0][0].dtype
        for A, *_ in parts:
            dtype = torch.promote_types(dtype, A.dtype)
        dropouts = {config.dropout for _, _, config, _ in parts}
        return cls(
            torch.cat([A.double() for A, *_ in parts], dim=-2),
            torch.cat([weight * config.scaling * B.double() for _, B, config, weight in parts], dim=-1),
            dtype,
            dropouts.pop() if len(dropouts) == 1 else 0.0,
            sum(biases[1:], biases[0]) if biases else None,
        )


def nearest_of_rank(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Return A and B of rank r whose product is nearest to B A, in the Frobenius norm.

    By the singular values of B A, which is not formed: with B = Q_B R_B and A^T = Q_A R_A they are those of
    R_B R_A^T, a matrix of the rank only.

    Args:
        A: (..., R, in), in float64.
        B: (..., out, R).
        r: below R.

    Returns:
        A (..., r, in), B (..., out, r), and the norms of what was left out and of the whole.
    """
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, sigma, Vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    root = sigma[..., :r].sqrt()
    new_A = root[..., None] * (Vh[..., :r, :] @ right.Q.mT)
    new_B = (left.Q @ U[..., :, :r]) * root[..., None, :]
    missing = r - root.shape[-1]
    if missing > 0:  # a layer of fewer outputs than r
        new_A = torch.nn.functional.pad(new_A, (0, 0, 0, missing))
        new_B = torch.nn.functional.pad(new_B, (0, missing))
    return new_A, new_B, (float(sigma[..., r:].norm()), float(sigma.norm()))


def _norm(A: Tensor, B: Tensor) -> float:
    """Return the Frobenius norm of B A, which is not formed."""
    return float(torch.linalg.norm(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT))


def _argument_problems(weights: object, r: object, heads: object) -> list[str]:
    if not isinstance(weights, Mapping) or not weights:
        return ["give each adapter its weight: minilora.combine({path: 0.7, other: 0.3}, out)"]
    problems = [
        f"the weight of {str(name)!r} must be a finite number, not {weight!r:.100}"
        for name, weight in weights.items()
        if not isinstance(weight, numbers.Real) or isinstance(weight, bool) or not math.isfinite(weight)
    ]
    if r is not None and (type(r) is not int or r < 1):
        problems.append(f"r must be an int from 1 on, or None, not {r!r:.100}")
    if heads is not None and heads not in weights:
        problems.append(f"heads must be one of {quoted([str(name) for name in weights])}, not {heads!r:.100}")
    return problems


def _contents(name: str | os.PathLike[str], bank: Bank | None) -> Contents:
    if bank is not None and name in bank:
        return bank.contents(str(name))
    path = Path(path_for(name, None, call="combine({path: weight}, out)"))
    if bank is not None and not path.exists():
        raise MiniLoRAError(
            f"{str(name)!r} is neither an adapter of the bank nor a path; it holds {quoted(bank.names)}"
        )
    return read(path)


def _refusals(contents: Contents) -> list[str]:
    problems = [f"it is damaged: {contents.damage}"] if contents.damage else []
    reasons = {
        AdapterConfig: "a bottleneck adapter is not linear, and has no sum",
        RowsConfig: "trained rows take the place of others, and have no sum",
    }
    for kind, reason in reasons.items():
        if sites := [s for c, names in contents.manifest.injections for s in names if isinstance(c, kind)]:
            problems.append(f"{described(sites)}: {reason}")
    if rescaled := [
        s for c, sites in contents.manifest.injections for s in sites if getattr(c, "dora", False)
    ]:
        problems.append(f"{described(rescaled)}: DoRA scales the weight itself, and has no sum")
    missing = [
        f"{site}.{name}"
        for config, sites in contents.manifest.injections
        for site in sites
        for name in config.tensor_names
        if isinstance(config, LoRAConfig) and f"{site}.{name}" not in contents.tensors
    ]
    if missing:
        problems.append(f"missing from the file: {described(missing)}")
    return problems


def _of_several_bases(adapters: Mapping[Any, Contents]) -> list[str]:
    bases = {name: each.base for name, each in adapters.items() if each.base is not None}
    problems = []
    for first, other in zip(list(bases), list(bases)[1:], strict=False):
        comparison = compare(bases[first], bases[other])
        if comparison.different:
            problems.append(f"{str(other)!r} was trained on another base than {str(first)!r}: {comparison}")
    return problems


def _sites(adapters: Mapping[Any, Contents]) -> list[str]:
    found = {
        site
        for each in adapters.values()
        for config, sites in each.manifest.injections
        for site in sites
        if isinstance(config, LoRAConfig)
    }
    return sorted(found, key=natural)


def _union(bases: list[Fingerprint]) -> Fingerprint:
    return Fingerprint(
        {site: signature for base in bases for site, signature in base.signatures.items()},
        {site: reason for base in bases for site, reason in base.unchecked.items()},
        frozenset(site for base in bases for site in base.transposed),
        {site: kind for base in bases for site, kind in base.layers.items()},
    )
