"""`Placement`: how an adapter lies on a base's files.

A file knows a weight by a name that may differ from the model's by a prefix: a checkpoint of `BertModel` has
"encoder...", one of `BertForSequenceClassification` "bert.encoder...", and transformers loads either into
either. The one prefix that fits all sites of an adapter is found here. Some architectures transformers saves
under older names altogether; there the adapter's fingerprint tells which weight is which.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError, listed, several
from ..files.contents import Contents
from ..files.fingerprint import Comparison, Fingerprint, Signature, compare
from ..names import above, ends_with, nearest
from ..plan import WRAPPERS
from ..problems import Problems
from .base_files import BaseFiles
from .inventory import Inventory, Part
from .updates import LowRank, OfWeight, Replaced, Rescaled, with_bias


class MisfitError(CheckpointError):
    """An adapter does not lie on a base's files: it is another model's."""


@dataclass(frozen=True)
class Placement:
    """How an adapter lies on a base's files."""

    updates: Mapping[str, OfWeight]
    """What is made of the weight at each site of LoRA or of rows."""
    weights: Mapping[str, str]
    """The name in the files of the weight at each site; those with an update all have one."""
    shared: frozenset[str]
    """Sites with an update that is meant for all modules that share the weight."""
    heads: Mapping[str, str]
    """The name in the files of each tensor that was trained in full, whether it is there already or not."""
    transposed: frozenset[str]
    """LoRA sites whose weight is stored as (in, out)."""
    comparison: Comparison
    """How the base relates to the one that the adapter was trained on."""

    @property
    def biases(self) -> dict[str, str]:
        """The name in the files of the bias at each site that moves it, whether it is there or not."""
        moved = (site for site, update in self.updates.items() if with_bias(update))
        return {site: f"{self.weights[site].removesuffix('weight')}bias" for site in moved}


@dataclass(frozen=True)
class Prefix:
    """How names in the files differ from the model's: something is put in front, or left out there.

    >>> Prefix(added="bert.").stored("encoder.query"), Prefix(cut="bert.").stored("bert.encoder.query")
    ('bert.encoder.query', 'encoder.query')
    """

    added: str = ""
    cut: str = ""

    def __str__(self) -> str:
        return f"with {self.added!r} in front" if self.added else f"without {self.cut!r}"

    def stored(self, name: str) -> str | None:
        """Return a name as the files have it; None where it lies outside all that they hold."""
        return self.added + name.removeprefix(self.cut) if name.startswith(self.cut) else None


@dataclass(frozen=True)
class Found:
    """Where the weights at some sites are stored."""

    weights: Mapping[str, str]
    """The name in the files, by site."""
    prefix: Prefix
    by_value: bool = False
    """Whether names told nothing, so that names of other tensors tell nothing either."""


def place(contents: Contents, base: BaseFiles) -> Placement:
    """Return how an adapter lies on a base's files.

    Raises:
        MisfitError: listing every site that has no weight there, or one of another shape.
        CheckpointError: when the base's files are not sound.
    """
    parts = Inventory.of(contents).parts.values()
    merged = {part.name: part for part in parts if part.config and WRAPPERS[part.kind].mergeable}
    sharing = {name: part.of for name, part in merged.items() if part.of is not None}
    others = [part.name for part in parts if part.config and not WRAPPERS[part.kind].mergeable]
    recorded, problems = contents.base or Fingerprint(), Problems()
    named = [name for name in merged if name not in sharing]  # a shared weight may be stored once
    found = _find(named or _with_weight(others, base), recorded, base, problems)
    weights = dict(found.weights)
    if not found.by_value:
        weights |= _by_name([*others, *sharing], found.prefix, base).weights
    updates = _updates({n: p for n, p in merged.items() if n in weights or n not in sharing}, problems)
    transposed = _transposed(updates, weights, contents, base, problems)
    heads = _heads([part for part in parts if part.config is None], found, base, problems)
    if problems:
        raise MisfitError(several(problems.lines(), outcome=f"the adapter does not fit {str(base.path)!r}"))
    known = {site: name for site, name in weights.items() if site in recorded.signatures}
    rows = {weights[site]: update.rows for site, update in updates.items() if isinstance(update, Replaced)}
    comparison = compare(recorded, base.fingerprint(known, transposed, rows))
    shared = frozenset({*sharing, *sharing.values()}) & updates.keys()
    return Placement(updates, weights, shared, heads, transposed, comparison)


def _find(sites: list[str], recorded: Fingerprint, base: BaseFiles, problems: Problems) -> Found:
    """Return where the weights at some sites are: by name where names fit, else by value."""
    votes = prefix_votes(sites, base)
    fitting = [prefix for prefix, count in votes.items() if count == len(set(sites))]
    if not sites or Prefix() in fitting:
        fitting = [Prefix()]
    if len(fitting) == 1:
        return _by_name(sites, fitting[0], base)
    if found := find_by_value(sites, recorded, base):
        return Found(found, Prefix(), by_value=True)
    if fitting:
        ways = listed([str(prefix) for prefix in fitting])
        for site in sites:
            problems.add(site, f"the names fit the base's in {len(fitting)} ways: {ways}")
        return Found({}, Prefix())
    best = max(votes, key=lambda prefix: (votes[prefix], prefix == Prefix()), default=Prefix())
    found_by_name = _by_name(sites, best, base)
    _add_missing(found_by_name, sites, base, problems)
    return found_by_name


def prefix_votes(sites: Iterable[str], base: BaseFiles) -> Counter[Prefix]:
    """Return for how many of some sites the files have a weight, under each prefix that fits any.

    The time it takes grows with the number of sites and of tensors, not with their product.
    """
    wanted, votes = dict.fromkeys(sites), Counter[Prefix]()
    stored = dict.fromkeys(name.removesuffix(".weight") for name in base.tensors)
    for name in stored:
        for front in ("", *(f"{outer}." for outer in above(name))):
            if name[len(front) :] in wanted:
                votes[Prefix(added=front)] += 1
    for site in wanted:
        for outer in above(site):
            if site[len(outer) + 1 :] in stored:
                votes[Prefix(cut=f"{outer}.")] += 1
    return votes


def find_by_value(sites: Iterable[str], recorded: Fingerprint, base: BaseFiles) -> dict[str, str]:
    """Return the name in the files of each site's weight, told by its values; empty unless all are clear.

    Only beside a config.json: it is transformers that saves under other names than the model's, and in any
    other file a weight under another name is another weight, or one that is tied to it.
    """
    wanted = set(sites)
    if not base.config or not wanted <= recorded.signatures.keys():
        return {}
    # By shape and dtype, and in the order of their first values, so that few have to be compared in full.
    rows: dict[tuple[int, ...], dict[torch.dtype, list[tuple[float, str]]]] = {}
    for site in wanted:
        signature = recorded.signatures[site]
        if signature.sample and not math.isnan(signature.sample[0]):
            row = rows.setdefault(signature.shape, {}).setdefault(signature.dtype, [])
            insort(row, (signature.sample[0], site))
    found: dict[str, str] = {}
    alike = [name for name, stored in base.tensors.items() if stored.shape in rows]
    for name, signature in base.signatures(alike):
        for site in _near(signature, rows[signature.shape]):
            if recorded.signatures[site].difference(signature) == 0:
                if site in found:
                    return {}  # two weights of the same values
                found[site] = name
    return found if len(found) == len(set(found.values())) == len(wanted) else {}


def _near(signature: Signature, rows: Mapping[torch.dtype, list[tuple[float, str]]]) -> Iterator[str]:
    """Yield the sites whose first value may be the signature's own, or that value cast."""
    first = signature.sample[0]
    for dtype, row in rows.items():
        margin = 0.0
        if dtype != signature.dtype:  # wider than what `Signature.difference` allows
            margin = 2 * abs(first) * max(torch.finfo(d).eps for d in (dtype, signature.dtype)) + 1e-6
        start = bisect_left(row, first - margin, key=lambda entry: entry[0])
        end = bisect_right(row, first + margin, key=lambda entry: entry[0])
        yield from (site for _, site in row[start:end])


def _by_name(sites: Iterable[str], prefix: Prefix, base: BaseFiles) -> Found:
    """Return where the weights are: a site is a module, for its `weight`, or a parameter's own name."""
    found: dict[str, str] = {}
    for site in sites:
        stored = prefix.stored(site)
        for name in () if stored is None else (f"{stored}.weight", stored):
            if name in base.tensors:
                found.setdefault(site, name)
    return Found(found, prefix)


def _with_weight(sites: list[str], base: BaseFiles) -> list[str]:
    """Return the sites that some weight in the files may belong to: a dropout has none."""
    ends = {
        name[len(front) :].removesuffix(".weight")
        for name in base.tensors
        if name.endswith(".weight")
        for front in ("", *(f"{outer}." for outer in above(name)))
    }
    return [site for site in sites if site in ends]


def _add_missing(found: Found, sites: list[str], base: BaseFiles, problems: Problems) -> None:
    missing = [site for site in sites if site not in found.weights]
    apart = next((name for name in base.tensors if re.search(r"\bexperts\.\d+\.", name)), None)
    near = nearest(f"{missing[0]}.weight", base.tensors, limit=1)  # slow, and the next would tell no more
    text = "the base has no weight of that name" + (f"; nearest: {near[0]!r}" if near else "")
    if found.weights:
        text += (
            ". A weight that is tied to another, as an output layer to the embedding, is stored under one of "
            "its names only: fuse in Python instead, minilora.fuse(model)"
        )
    for site in missing:
        if (name := base.left_out.get(f"{site}.weight")) is not None:
            problems.add(site, f"the base has its weight as {name!r} only, to which it is tied")
        elif apart is not None and "experts" in site.split("."):
            problems.add(
                site,
                f"the base's files keep each expert by itself, as {apart!r}, which the model puts together "
                "as it loads: fuse in Python instead, minilora.fuse(model), then "
                "model.save_pretrained(folder)",
            )
        else:
            problems.add(site, text)


def _updates(parts: Mapping[str, Part], problems: Problems) -> dict[str, OfWeight]:
    updates: dict[str, OfWeight] = {}
    for site, part in parts.items():
        update = part.update()
        if isinstance(update, (LowRank, Rescaled, Replaced)):
            updates[site] = update
        else:
            what = "as many rows as its config names" if part.kind == "rows" else "A and B of one rank"
            problems.add(site, f"the file does not have {what} for it")
    return updates


def _transposed(
    updates: Mapping[str, OfWeight],
    weights: Mapping[str, str],
    contents: Contents,
    base: BaseFiles,
    problems: Problems,
) -> frozenset[str]:
    """Return the sites whose weight is stored as (in, out)."""
    transposed = set()
    for site, update in updates.items():
        if site not in weights:
            continue
        stored, recorded = base.tensors[weights[site]].shape, contents.base or Fingerprint()
        signature = recorded.signatures.get(site)
        ways = [way for way in (False, True) if update.fits(stored, transposed=way)]
        if not ways:
            problems.add(site, f"the base's weight is {stored}, the adapter's update {update.shape}")
        elif isinstance(update, Replaced):
            continue  # the signature is of other rows
        elif signature is not None and signature.shape != stored:  # a kernel of as many values
            problems.add(site, f"the base's weight is {stored}, and it was trained on {signature.shape}")
        elif len(ways) == 1:
            transposed |= {site} if ways[0] else set()
        elif contents.base is None:
            problems.add(site, "the weight is square, and the file does not tell whether it is transposed")
        else:
            transposed |= {site} & recorded.transposed
    return frozenset(transposed)


def _heads(parts: list[Part], found: Found, base: BaseFiles, problems: Problems) -> dict[str, str]:
    """Return the files' names of the tensors that were trained in full."""
    heads: dict[str, str] = {}
    beginnings = {site.partition(".")[0] for site in found.weights}
    for part in parts:
        for key, tensor in part.tensors.items():
            full = f"{part.name}.{key}" if key else part.name
            name = found.prefix.stored(full)
            if name is None:
                problems.add(
                    full,
                    f"trained in full, and outside {found.prefix.cut[:-1]!r}, which is all that this "
                    "base holds. Save the base from the class that was trained: "
                    "Auto...From...from_pretrained(base).save_pretrained(folder)",
                )
                continue
            heads[full] = name
            if name in base.tensors:
                stored, shape = base.tensors[name].shape, tuple(tensor.shape)
                if stored != shape:
                    problems.add(full, f"the base's is {stored}, the adapter's {shape}")
            elif found.prefix.added:
                problems.add(full, f"trained in full, and the base has no {name!r}")
            elif found.by_value and full.partition(".")[0] in beginnings:
                problems.add(
                    full,
                    "trained in full, and the base, which has names of its own, has none like it",
                )
    return heads


def is_under_own_name(site: str, stored: str) -> bool:
    """Return whether the files have a weight under its site's own name, a prefix more or less.

    >>> is_under_own_name("lm_head", "model.lm_head.weight"), is_under_own_name("lm_head", "wte.weight")
    (True, False)
    """
    name = stored.removesuffix(".weight")
    return ends_with(name, site) or ends_with(site, name)
