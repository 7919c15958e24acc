"""Ties: which weights in a base's files belong to a second module as well.

An output layer often computes with the embedding's weight, which is then stored once, under one of its two
names. An update fused into it would reach both modules, or be lost when a loader ties them again. What is
known of a tie is what the files say and hold; a module's own name is no evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..files.fingerprint import Signature
from ..names import generic
from .base_files import BaseFiles
from .placement import Placement, is_under_own_name

ADVICE = (
    "so the update would reach both, or be lost when they are tied again. Fuse in Python, which unties them: "
    "minilora.fuse(model), then model.config.tie_word_embeddings = False and model.save_pretrained(folder)"
)
"""For what was found to be tied."""

DOUBT = '. If they are two weights all the same, say so: "tie_word_embeddings": false in config.json'
"""Where two names hold equal values, or one is missing, and may be meant to."""


def find_ties(placement: Placement, base: BaseFiles) -> dict[str, str]:
    """Return why the weight of a LoRA site cannot take an update by itself, by site.

    The evidence, for a weight:

    - the header of a file says that another name was left out for it (`safetensors.torch.save_model`);
    - another stored tensor has its values, and they have as many rows as there are words, where config.json
      has a vocabulary (equal weights elsewhere are copies that somebody started from);
    - it has as many rows as there are words, and stands under another module's name; or no other tensor of
      its shape is stored, so that the embedding must be the same one.

    `"tie_word_embeddings": false` in config.json settles it for weights that are stored under their own name.
    """
    sites = {placement.weights[site]: site for site in placement.updates}
    named = {name: other for other, name in base.left_out.items()}
    vocabularies = set(_settings("vocab_size", base.config))
    untied = set(_settings("tie_word_embeddings", base.config)) == {False}
    by_words = {name: None for name in sites if base.tensors[name].shape[0] in vocabularies}
    twins = {} if untied else find_twins(by_words if vocabularies else sites, base)
    shapes = Counter(stored.shape for stored in base.tensors.values())
    found: dict[str, str] = {}
    for name, site in sites.items():
        if name in named:
            found[site] = (
                f"its weight is tied to {generic(named[name])!r}, by the header of the file, {ADVICE}"
            )
        elif name in twins:
            found[site] = (
                f"its weight is tied to {generic(twins[name])!r}, whose values it has, {ADVICE}{DOUBT}"
            )
        elif name in by_words and not is_under_own_name(site, name):
            found[site] = f"its weight is tied to {generic(name)!r}, under whose name it is stored, {ADVICE}"
        elif name in by_words and not untied and shapes[base.tensors[name].shape] == 1:
            other = "output layer" if site in placement.transposed else "embedding"  # which looks rows up
            found[site] = f"its weight is tied to the {other}, which is not stored apart, {ADVICE}{DOUBT}"
    return found


def find_twins(names: Iterable[str], base: BaseFiles) -> dict[str, str]:
    """Return another stored tensor with the same values, for each name that has one.

    Weights of one value throughout, such as zeros to start from, are alike by chance.
    """
    wanted = set(names)
    shapes = {base.tensors[name].shape for name in wanted}
    alike = [name for name, stored in base.tensors.items() if stored.shape in shapes]
    groups: dict[Signature, list[str]] = {}
    for name, signature in base.signatures(alike):
        if not _is_constant(signature):
            groups.setdefault(signature, []).append(name)
    return {
        name: group[0] if group[0] != name else group[1]
        for group in groups.values()
        if len(group) > 1
        for name in group
        if name in wanted
    }


def _is_constant(signature: Signature) -> bool:
    return len(set(signature.sample)) == 1 and abs(signature.total) == signature.magnitude


def _settings(key: str, config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what a config says under a key, at any depth: parts of a model have configs of their own."""
    for name, value in config.items():
        if name == key or name.endswith(f"_{key}"):
            yield from [value] if isinstance(value, (int, bool)) else []
        elif isinstance(value, dict):
            yield from _settings(key, value)
