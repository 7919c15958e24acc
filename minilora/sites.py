"""`Site`: a place in a model. A model is walked once, into `Sites`, and the walk is passed on.

    model.encoder.query: Adapter                 Site(name="encoder.query",
             └── base: LoRALinear                     wrappers=(the Adapter, the LoRALinear),
                    └── base: nn.Linear                bare=the nn.Linear)

Names are those of the bare model, so they are the same before and after an injection.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from .errors import MiniLoRAError, quoted
from .module import InjectedModule
from .names import ends
from .torch_internals import all_modules, children, is_lazy, names_where, own_parameters, put_child, shards_in


@dataclass(frozen=True)
class Site:
    """A place in a model, a module or a parameter of one, and the wrappers around the module."""

    name: str
    """In the bare model."""
    bare: nn.Module
    """The module that was there before any injection."""
    wrappers: tuple[InjectedModule, ...] = ()
    """Outermost first; empty where nothing was injected."""
    parameter: str | None = None
    """The parameter of the module that is meant; None for the module itself."""

    @property
    def owner(self) -> str:
        """The name of the module: the site's own, but for a parameter."""
        return self.name if self.parameter is None else self.name.rpartition(".")[0]

    @property
    def outermost(self) -> nn.Module:
        """What stands in the model under the name at present."""
        return self.wrappers[0] if self.wrappers else self.bare

    @property
    def trains(self) -> bool:
        """Whether something is trained here that an injection brought."""
        return any(wrapper.trains for wrapper in self.wrappers)

    @property
    def trained_in_full(self) -> bool:
        """Whether the module is trained as it is, with all that is inside it."""
        return any(wrapper.trains_whole_module for wrapper in self.wrappers)

    @property
    def merged(self) -> bool:
        """Whether the module computes with a merged weight at present."""
        return any(wrapper.merged for wrapper in self.wrappers)


class Sites(Mapping[str, Site]):
    """Every module in a model by name, in the model's order; a shared module comes under each name.

    The name of a parameter can be looked up like that of a module.

    Args:
        model: injected or bare. What wrappers added is left out, and so is the model itself.

    Raises:
        MiniLoRAError: when the model is not one.
    """

    def __init__(self, model: nn.Module) -> None:
        require_module(model)
        self.model = model
        self._by_name = {site.name: site for site in _walk(model, "")}
        self._first_names: dict[nn.Module, str] = {}
        for name, site in self._by_name.items():
            self._first_names.setdefault(site.bare, name)
        self._owners: dict[int, list[tuple[str, nn.Module]]] | None = None

    def __getitem__(self, name: str) -> Site:
        if name in self._by_name:
            return self._by_name[name]
        owner, _, leaf = name.rpartition(".")
        site = self._by_name[owner] if owner else Site("", self.model)  # or a KeyError
        if own_parameters(site.bare).get(leaf) is None:
            raise KeyError(name)
        return Site(name, site.bare, site.wrappers, leaf)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def first_name(self, site: Site) -> str:
        """Return the name under which a shared module is known: the first that the walk met."""
        first = self._first_names.get(site.bare, "")
        return first if site.parameter is None else f"{first}.{site.parameter}".lstrip(".")

    def unique(self) -> Iterator[Site]:
        """Yield the sites, a shared module under its first name only."""
        return (self._by_name[name] for name in self._first_names.values())

    @functools.cached_property
    def by_end(self) -> dict[str, list[str]]:
        """The modules' names, a shared one's first, by each end of a name in whole segments."""
        return _by_end((name, self.first_name(site)) for name, site in self._by_name.items())

    @functools.cached_property
    def parameters_by_end(self) -> dict[str, list[str]]:
        """The parameters' names by each of their ends in whole segments."""
        return _by_end((site.name, site.name) for site in self.parameters())

    def parameters(self) -> Iterator[Site]:
        """Yield the parameters of the bare model as sites, those of a shared module once."""
        for site in (Site("", self.model), *self.unique()):
            for leaf, parameter in own_parameters(site.bare).items():
                if parameter is not None:
                    yield Site(f"{site.name}.{leaf}".lstrip("."), site.bare, site.wrappers, leaf)

    def owners_of(self, parameter: nn.Parameter) -> list[tuple[str, nn.Module]]:
        """Return the bare modules that own a parameter, each with its name there; several if it is tied."""
        if self._owners is None:
            self._owners = {}
            for site in self.parameters():
                owned = own_parameters(site.bare)[site.parameter or ""]
                self._owners.setdefault(id(owned), []).append((site.name, site.bare))
        return self._owners.get(id(parameter), [])

    def owners(self, site: Site) -> list[str]:
        """Return the names of a parameter, under every module that owns it."""
        parameter = own_parameters(site.bare)[site.parameter or ""]
        return [] if parameter is None else [name for name, _ in self.owners_of(parameter)]

    def shared(self) -> set[str]:
        """Return the names of modules that have several."""
        times = Counter(site.bare for site in self._by_name.values())
        return {name for name, site in self._by_name.items() if times[site.bare] > 1}

    def bare(self) -> Sites:
        """Return the same places, as if nothing stood around any of them."""
        without = copy.copy(self)
        without._by_name = {name: replace(site, wrappers=()) for name, site in self._by_name.items()}
        return without

    def injected(self) -> dict[str, Site]:
        """Return the sites that carry wrappers."""
        return {site.name: site for site in self.unique() if site.wrappers}

    def trained_in_full(self) -> set[str]:
        """Return the names of the modules that are trained as they are, with all that is inside them."""
        return {site.name for site in self.unique() if site.trained_in_full}


def _by_end(names: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for name, known_as in names:
        for end in ends(name):
            found.setdefault(end, {})[known_as] = None
    return {end: list(names_of_end) for end, names_of_end in found.items()}


def _walk(module: nn.Module, prefix: str) -> Iterator[Site]:
    for name, outermost in children(module):
        wrappers, bare = [], outermost
        while isinstance(bare, InjectedModule):
            wrappers.append(bare)
            bare = bare.base
        yield Site(prefix + name, bare, tuple(wrappers))
        yield from _walk(bare, f"{prefix}{name}.")


def injected_sites(model: nn.Module) -> dict[str, Site]:
    """Return the sites of a model that carry wrappers, by name; empty for a bare model."""
    return Sites(model).injected()


def require_injected(model: nn.Module) -> dict[str, Site]:
    """Return `injected_sites`, or raise where there are none.

    Raises:
        MiniLoRAError: when the model carries no injection, or is itself inside a wrapper of torch's.
    """
    require_unwrapped(model)
    found = injected_sites(model)
    if not found:
        raise MiniLoRAError(
            f"this {type(model).__name__} carries no injection (none yet, or ejected or fused): "
            'call minilora.inject(model, targets=["query", "value"]) or minilora.load(model, path) first'
        )
    return found


def require_enabled(model: nn.Module, act: str) -> dict[str, Site]:
    """Return `injected_sites`, or raise where there are none, or where they are disabled at present.

    Raises:
        MiniLoRAError: as `require_injected` does, and inside `minilora.disabled`, naming the act.
    """
    found = require_injected(model)
    if not all(wrapper.enabled for site in found.values() for wrapper in site.wrappers):
        raise MiniLoRAError(f"{act} cannot work inside minilora.disabled; leave its block first")
    return found


def require_unwrapped(model: nn.Module) -> None:
    """Raise where a model is not one, or is inside DDP, FSDP1 or torch.compile, whose names are not ours.

    And where it has lazy modules without a shape yet, whose parameters cannot even be frozen.

    Raises:
        MiniLoRAError: naming the wrapper, or the parameters, and what to write instead.
    """
    require_module(model)
    if lazy := names_where(model, is_lazy):
        raise MiniLoRAError(f"{quoted(lazy)} have no shape yet (lazy modules): call the model once first")
    fixes = {
        "DistributedDataParallel": "work on the model inside, `ddp.module`; wrap in DDP after injecting",
        "DataParallel": "work on the model inside, `parallel.module`; wrap after injecting",
        "FullyShardedDataParallel": "inject or load first, then wrap in FSDP; gather a full model to save",
        "OptimizedModule": "work on the model inside, `compiled._orig_mod`; compile after injecting",
    }
    for kind in set(map(type, all_modules(model))):
        for parent in kind.__mro__:
            # By name: importing torch.distributed.fsdp for an isinstance check takes seconds.
            if parent.__name__ in fixes and parent.__module__.startswith("torch."):
                name = next(name for name, module in model.named_modules() if type(module) is kind)
                where = f"{name!r} is" if name else "the model is"
                raise MiniLoRAError(f"{where} wrapped in {parent.__name__}: {fixes[parent.__name__]}")
    if flat := names_where(model, lambda parameter: getattr(parameter, "_fsdp_flattened", False)):
        raise MiniLoRAError(f"{quoted(flat)} are flattened by FSDP: {fixes['FullyShardedDataParallel']}")


def require_whole(model: nn.Module, instead: str = "call this first, then fully_shard") -> None:
    """Raise where `require_unwrapped` does, or where processes share the values of a model among them.

    Raises:
        MiniLoRAError: naming what is sharded, and what to do instead.
    """
    require_unwrapped(model)
    if shards := [name or "the model" for name in shards_in(model)]:
        raise MiniLoRAError(f"{quoted(shards)}: sharded (fully_shard or DTensor); nothing changed. {instead}")


def require_module(model: object) -> None:
    """Raise where a model is not one, but its class, its path, or something else.

    Raises:
        MiniLoRAError: naming it.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        given = f"the class {model.__name__}: make an instance of it first"
    else:
        given = f"{model!r:.100} of type {type(model).__name__}"
    if isinstance(model, (str, bytes)) or hasattr(model, "__fspath__"):
        given += "; the model comes first, made and with its weights: AutoModel.from_pretrained(...), for one"
    raise MiniLoRAError(f"the model must be an nn.Module, not {given}")


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in the place of the old one, under all of the old one's parents.

    Interrupted, it leaves the model as it was.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in children(parent)
        if child in replacements
    ]
    try:
        for parent, name, new in places:
            while new in replacements:  # a wrapper that gives way to one that gives way
                new = replacements[new]  # noqa: PLW2901
            put_child(parent, name, new)
    except BaseException:
        for parent, name, old in places:
            put_child(parent, name, old)
        raise
