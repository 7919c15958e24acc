"""`trainable_token_indices`: rows of embeddings that PEFT trains, beside LoRA elsewhere.

    [5, 7]                       rows of the model's input embedding
    {"embed_tokens": [5, 7]}     rows of every module whose name ends so, in the middle of a word, too

    <module>.token_adapter.trainable_tokens_delta    (rows, cols): the rows themselves, in the config's order
    <module>.token_adapter.base_layer.weight         the whole weight, where the vocabulary was resized

Where the config of a model of transformers ties its output layer to the input embedding, PEFT computes with
the embedding's rows there, too; a file may have them twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ....config import RowsConfig
from ....errors import MiniLoRAError
from ....linear import call_problem
from ....problems import Problems
from ....sites import Sites
from ....ties import at_all_owners
from ....torch_internals import own_parameters
from ...tensors import Entry
from .computes import runs_code_of
from .places import without_wrappers

ADAPTER = "token_adapter"

ROWS_KEY = re.compile(rf"(?P<path>.+)\.{ADAPTER}\.trainable_tokens_delta", re.DOTALL)

WHOLE_KEY = re.compile(rf"(?P<path>.+)\.{ADAPTER}\.base_layer\.(?P<leaf>[^.]+)", re.DOTALL)

OURS = ".trained_rows"

INPUT_EMBEDDING = ""
"""What stands for a name where the config gives a list of rows alone."""

Indices = Mapping[str, tuple[int, ...]]


@dataclass
class Tokens:
    """The trained rows of a PEFT folder, as they are here."""

    configs: dict[str, RowsConfig] = field(default_factory=dict)
    """By site; with those that share the rows of another."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """By minilora's names, in the order of the rows."""

    def compared(self, base: Mapping[str, Entry], sites: Sites | None) -> dict[str, Entry]:
        """Return tensors of the base as a model must have them: trained rows may be any there."""
        found = dict(base)
        for site, config in self.configs.items():
            name = f"{site}.weight"
            if sites is not None and name in found:
                weight = own_parameters(sites[site].bare)["weight"]
                read = partial(_with_rows_of, found[name], weight, list(config.rows))
                found[name] = found[name]._replace(read=read)
        return found


def key_of(name: str) -> str:
    """Return PEFT's name of a tensor for minilora's, where it is one of trained rows; else the name itself.

    >>> key_of("model.embed_tokens.trained_rows")
    'model.embed_tokens.token_adapter.trainable_tokens_delta'
    """
    if not name.endswith(OURS):
        return name
    return f"{name.removesuffix(OURS)}.{ADAPTER}.trainable_tokens_delta"


def indices_of(configs: Mapping[str, RowsConfig]) -> dict[str, list[int]]:
    """Return what a config says of some sites; those that share rows follow from the model."""
    return {site: list(config.rows) for site, config in configs.items() if config.of is None}


def read_tokens(
    indices: Indices, deltas: Mapping[str, Entry], sites: Sites | None
) -> tuple[Tokens, list[str]]:
    """Return the trained rows of a folder, and every problem with them.

    Args:
        indices: what the config says.
        deltas: the tensors of rows, by the path of the wrapper that has them.
        sites: of the model; None refuses rows, since the model alone tells which modules share them.
    """
    if not indices and not deltas:
        return Tokens(), []
    if sites is None:
        return Tokens(), [
            "trainable_token_indices: which modules share the trained rows depends on the model: "
            "minilora.load(model, folder)"
        ]
    stored = {without_wrappers(path)[0]: entry for path, entry in deltas.items()}
    tokens, problems = Tokens(), Problems()
    named = rows_named(indices, sites)
    for module, rows in named.items():
        try:
            config = RowsConfig(rows=rows, dtype=_dtype(stored.get(module)))
            _add(tokens, module, config, sites)
        except (MiniLoRAError, ValueError) as error:
            problems.add(module, str(error))
    for module, config in tokens.configs.items():
        first = config.of or module
        entry, wanted = stored.pop(module, None), named.get(first) or named.get(module) or ()
        if entry is None:
            if config.of is None:
                problems.add(module, "its rows are trained by trainable_token_indices, and not in the file")
        elif len(entry.shape) != 2 or entry.shape[0] != len(wanted):
            problems.add(module, f"{len(wanted)} rows by the config, and a tensor of {entry.shape}")
        elif config.of is None:
            order = sorted(range(len(wanted)), key=wanted.__getitem__)
            tokens.entries[module + OURS] = entry._replace(read=partial(_ordered, entry, order))
        elif (other := _first_entry(deltas, first)) is None or not torch.equal(entry.read(), other.read()):
            problems.add(module, f"its weight is that of {first!r}, and the file has other rows for it")
    for module in stored.keys() - named.keys():
        problems.add(module, "it has trained rows, and trainable_token_indices does not name it")
    return tokens, problems.lines()


def rows_named(indices: Indices, sites: Sites) -> dict[str, tuple[int, ...]]:
    """Return the rows of each module of a model that a config names, by PEFT's rule: the end of its name."""
    found: dict[str, tuple[int, ...]] = {}
    for end, rows in indices.items():
        name = (input_embedding(sites) or "embed_tokens") if end == INPUT_EMBEDDING else end
        modules = [site.name for site in sites.unique() if site.name.endswith(name)]
        for module in modules or [name]:  # of which `build` says that the model has none
            found.setdefault(module, rows)
    return found


def input_embedding(sites: Sites) -> str | None:
    """Return the name of what transformers calls a model's input embedding, or None."""
    getter = getattr(sites.model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    return next((s.name for s in sites.unique() if embedding in (s.bare, s.outermost)), None)


def tied_by_peft(sites: Sites) -> set[str]:
    """Return the modules at which PEFT computes with the rows of the input embedding as well.

    They are what the model's class calls tied to it, where its config says that they are.
    """
    embedding, config = input_embedding(sites), getattr(sites.model, "config", None)
    if embedding is None or not getattr(config, "tie_word_embeddings", False):
        return set()
    tied = set(_tied_keys(sites, {f"{embedding}.weight"}))
    return {name.rpartition(".")[0] for name in tied} - {embedding}


def _tied_keys(sites: Sites, sources: Iterable[str]) -> Iterator[str]:
    """Yield the parameters that a model's classes tie to some others."""
    for prefix, module in (("", sites.model), *((f"{s.name}.", s.bare) for s in sites.unique())):
        keys = getattr(module, "_tied_weights_keys", None) or {}
        if isinstance(keys, Mapping):
            yield from (prefix + key for key, source in keys.items() if prefix + source in sources)
        elif not prefix:  # of transformers before 5
            yield from keys


def _add(tokens: Tokens, module: str, config: RowsConfig, sites: Sites) -> None:
    """Add what a config comes to at a module and those that share its weight.

    Raises:
        ValueError: saying why PEFT computes, or shares, something else.
    """
    if module not in sites:
        tokens.configs[module] = config
        return
    wanted = at_all_owners(config, sites[module], sites)
    first, *others = wanted
    by_peft = tied_by_peft(sites) if first == input_embedding(sites) else set()
    if set(others) != by_peft & wanted.keys():
        raise ValueError(
            f"its weight is that of {', '.join(wanted)} as well, and PEFT trains rows of it apart; untie the "
            "weights first"
        )
    for name, each in wanted.items():
        if problem := _difference(sites[name].bare):
            raise ValueError(f"PEFT computes something else at {name!r}: {problem}")
        assert isinstance(each, RowsConfig)
        if tokens.configs.setdefault(name, each).rows != each.rows:
            raise ValueError(f"its weight is that of {', '.join(wanted)}, and they have other rows")


def _difference(module: nn.Module) -> str | None:
    """Return why PEFT computes something else with trained rows of a module, or None."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        plain = runs_code_of(module, nn.Embedding) or hasattr(module, "embed_scale")
        return None if plain else f"it looks rows up, and {kind} does more than that"
    if not isinstance(module, nn.Linear):
        return f"it trains rows of nn.Embedding and nn.Linear, and this is a {kind}"
    if module.bias is not None:
        return "it leaves out the bias"
    return call_problem(module)


def _dtype(entry: Entry | None) -> torch.dtype | None:
    return torch.float64 if entry is not None and entry.dtype == torch.float64 else None


def _first_entry(deltas: Mapping[str, Entry], module: str) -> Entry | None:
    return next((entry for path, entry in deltas.items() if without_wrappers(path)[0] == module), None)


def _ordered(entry: Entry, order: list[int]) -> Tensor:
    return entry.read()[order]


def _with_rows_of(entry: Entry, weight: Tensor | None, rows: list[int]) -> Tensor:
    """Read a tensor, with some rows of another in the place of its own, where the shapes are the same."""
    stored = entry.read()
    if weight is None or weight.shape != stored.shape:
        return stored
    stored[rows] = weight.detach()[rows].to(stored)
    return stored
