"""`Renaming`: from the names in a file to those of a model whose modules are called something else by now.

in the file     vit.encoder.layer.0.attention.attention.query
in the model    vit.layers.0.attention.q_proj
rename          {"encoder.layer": "layers", "attention.query": "q_proj"}
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ..errors import CheckpointError, MiniLoRAError
from ..names import described, generic
from ..sites import Sites
from ..torch_internals import own_parameters
from .formats import peft
from .tensors import opened

Segments = tuple[str, ...]


@dataclass(frozen=True)
class Renaming:
    """Two functions from names to names, inverse to each other on the names that they change."""

    to_model: Callable[[str], str]
    to_file: Callable[[str], str]

    @classmethod
    def of(cls, rename: Mapping[str, str]) -> Renaming:
        """Return the renaming that puts one run of whole segments in the place of another.

        Raises:
            MiniLoRAError: when it is no mapping of names to names, or cannot be undone.

        >>> renaming = Renaming.of({"encoder.query": "q_proj"})
        >>> renaming.to_model("0.encoder.query"), renaming.to_file("0.q_proj")
        ('0.q_proj', '0.encoder.query')
        """
        good = isinstance(rename, Mapping) and all(
            isinstance(name, str) and name for pair in rename.items() for name in pair
        )
        if not good or len(set(rename.values())) < len(rename):
            raise MiniLoRAError(
                "rename maps names in the file to names in the model, each in whole segments, none twice and "
                f'none empty: {{"query": "q_proj", "encoder.layer": "layers"}}; not {rename!r:.200}'
            )
        pairs = _pairs(rename)
        back = [(new, old) for old, new in pairs]
        return cls(lambda name: _replaced(name, pairs), lambda name: _replaced(name, back))

    @classmethod
    def of_model(cls, model: nn.Module) -> Renaming | None:
        """Return what transformers has written down of a model's own renamings; None where there is none.

        Regular expressions, of which the first that is found in a name counts. Their inverse is found as
        transformers finds it when it saves: without what an expression only looks ahead to.
        """
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        if not isinstance(mapping, Mapping) or not mapping:
            return None
        back = {f"^{new}": re.sub(r"\(.*\)", "", old.lstrip("^")) for old, new in mapping.items()}
        return cls(lambda name: _substituted(name, mapping), lambda name: _substituted(name, back))

    def file_sites(self, sites: Sites) -> Sites:
        """Return a model's sites by the names that the file would have for them.

        Raises:
            MiniLoRAError: when two of them would have one name.
        """
        counts = Counter(self.to_file(name) for name, site in sites.items() if own_parameters(site.bare))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise MiniLoRAError(
                f"rename gives several modules one name: {described(twice)}; write longer names"
            )
        return SitesByFile(sites.model, self.to_file)

    def problems(self, names: Iterable[str]) -> list[str]:
        """Return that no name in a file is another in the model, where that is so."""
        return [] if self.changes(names) else ["rename: it changes none of the names in the file"]

    def changes(self, names: Iterable[str]) -> bool:
        """Return whether any of some names in a file is another in the model."""
        return any(self.to_model(name) != name for name in names)


class SitesByFile(Sites):
    """The places in a model, by the names that a file has for them."""

    def __init__(self, model: nn.Module, naming: Callable[[str], str]) -> None:
        super().__init__(model)
        sites = [replace(site, name=naming(name)) for name, site in self._by_name.items()]
        self._by_name = {site.name: site for site in sites}
        self._first_names = {}
        for site in sites:
            self._first_names.setdefault(site.bare, site.name)


def renaming_for(rename: Mapping[str, str] | None, model: nn.Module, path: Path) -> Renaming | None:
    """Return how the names in a file become a model's, where they are others.

    Args:
        rename: what the caller says; None asks the model itself.
        model: that the file is for.
        path: of the file or folder.

    Raises:
        MiniLoRAError: when `rename` is no mapping of names.
    """
    if rename is not None:
        return Renaming.of(rename)
    if (known := Renaming.of_model(model)) is not None:
        with contextlib.suppress(CheckpointError, OSError), opened(peft.tensor_file(path)) as file:
            names = [name.removeprefix(peft.PREFIX) for name in file.keys()]  # noqa: SIM118  not a dict
            return known if known.changes(names) else None
    return None


def proposal(names: Iterable[str], sites: Sites) -> str:
    """Return the call that loads a file whose names the model lacks, or nothing."""
    missing = [name for name in names if name not in sites]
    if not missing or not (rename := proposed(missing, sites)):
        return ""
    return f"Under other names the model has all of them: minilora.load(..., rename={rename!r})"


def proposed(missing: Iterable[str], sites: Sites) -> dict[str, str]:
    """Return a renaming under which a model has all of some names that it lacks; empty where none is found.

    Each name is held against the most similar one of the model; what differs between the two is a run of
    segments that was renamed.
    """
    names = list(dict.fromkeys(missing))
    has = {generic(name) for name, site in sites.items() if own_parameters(site.bare)}
    rename: dict[str, str] = {}
    for name in dict.fromkeys(map(generic, names)):
        if _replaced(name, _pairs(rename)) in has:
            continue
        near = difflib.get_close_matches(_replaced(name, _pairs(rename)), has, n=1, cutoff=0.5)
        rename |= _runs(name, near[0]) if near else {}
    found = [_replaced(name, _pairs(rename)) for name in names]
    fits = all(name in sites for name in found) and len(set(found)) == len(found)
    return rename if fits and len(set(rename.values())) == len(rename) else {}


def _runs(old: str, new: str) -> dict[str, str]:
    """Return the runs of segments in which two names differ.

    >>> _runs("vit.encoder.layer.*.attention.query", "vit.layers.*.q_proj")
    {'encoder.layer': 'layers', 'attention.query': 'q_proj'}
    """
    a, b = old.split("."), new.split(".")
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    found = {".".join(a[i:j]): ".".join(b[k:m]) for what, i, j, k, m in blocks if what == "replace"}
    whole = all(what in ("equal", "replace") for what, *_ in blocks)
    return found if whole and not any("*" in run for pair in found.items() for run in pair) else {}


def _pairs(rename: Mapping[str, str]) -> list[tuple[Segments, Segments]]:
    return [(tuple(old.split(".")), tuple(new.split("."))) for old, new in rename.items()]


def _replaced(name: str, pairs: Iterable[tuple[Segments, Segments]]) -> str:
    """Return a name with every run of segments replaced, the longest that fits first."""
    ordered = sorted(pairs, key=lambda pair: -len(pair[0]))
    segments, at = tuple(name.split(".")), 0
    made: list[str] = []
    while at < len(segments):
        old, new = next(
            (pair for pair in ordered if segments[at : at + len(pair[0])] == pair[0]),
            (segments[at : at + 1], segments[at : at + 1]),
        )
        made += new
        at += len(old)
    return ".".join(made)


def _substituted(name: str, expressions: Mapping[str, str]) -> str:
    for expression, new in expressions.items():
        made, count = re.subn(expression, new, name)
        if count:
            return made
    return name
