"""`slim_checkpoints`: transformers' Trainer and `save_pretrained` write what trains, and leave the base out.

No trainer is patched or subclassed. A model of transformers has three places that these two read:

    model._keys_to_ignore_on_save   names that `save_pretrained` leaves out, and that a Trainer expects to be
                                    missing when it resumes: here, a view of what does not train
    model._weight_conversions       how names change between model and file. A Trainer resumes without
                                    changing them back, so here none does
    model.config                    goes into config.json: here, with an entry that says what the tensors are
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Set
from typing import Any

from torch import Tensor, nn

from ..errors import MiniLoRAError
from ..files.fingerprint import Fingerprint
from ..files.formats import trainer
from ..files.saving import saveable, saved_tensors
from ..followers import Follower
from ..manifest import Manifest
from ..sites import Sites, injected_sites, require_injected, require_whole
from ..torch_internals import own_parameters
from ..training import added_tensors
from ..view import Substitution

IGNORED = "_keys_to_ignore_on_save"
CONVERSIONS = "_weight_conversions"

NO_TYING = "(an embedding is tied and has an injection: tie_weights would fail)"
"""No tensor has this name, so what is missing on resuming is never quite what was expected."""


def slim_checkpoints(model: nn.Module) -> nn.Module:
    """Let transformers' Trainer and `save_pretrained` write what trains, and leave the base out.

    A checkpoint then holds the tensors of the injections and what else has `requires_grad` when it is
    written. A Trainer resumes from it, and finds its best model again, in a model that was made and injected
    in the same way and on which this was called, too. `minilora.load(model, "checkpoint-500")` reads it, and
    `minilora convert` makes an adapter file of it. `from_pretrained` cannot: it has no base.

    The call may come before or after further injections. `eject` and `fuse` undo it, as soon as nothing is
    injected: what is saved then is whole again.

    Args:
        model: an injected model of transformers, or one with the same attributes; changed in place.

    Returns:
        The model itself.

    Raises:
        MiniLoRAError: when the model carries no injection, is wrapped in DDP, FSDP or `torch.compile`, or is
            not a model of transformers.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> base = BertModel(tiny)
        >>> model = minilora.inject(copy.deepcopy(base), ["query"], minilora.LoRAConfig(r=1))
        >>> minilora.slim_checkpoints(model).save_pretrained("checkpoint")
        >>> model = minilora.load(base, "checkpoint")
    """
    require_whole(model)
    saveable(require_injected(model))
    if not hasattr(model, IGNORED) or not hasattr(model, "config"):
        raise MiniLoRAError(
            "slim_checkpoints is for models of transformers, whose save_pretrained and Trainer leave out the "
            f"names in {IGNORED!r} and write config.json; this {type(model).__name__} has no such list. "
            "minilora.save(model, path) writes the adapter of any model"
        )
    keys = vars(model).get(IGNORED)
    if not isinstance(keys, FrozenKeys):
        keys = FrozenKeys(model)
        setattr(model, IGNORED, keys)
        setattr(model, CONVERSIONS, [])
    keys.follow(model)
    return model


class FrozenKeys(Follower, Set[str]):
    """The names in a model's `state_dict` that a slim checkpoint leaves out, as they are at each look.

    These are the names of what neither trains nor was brought by an injection, and of what stands under
    another name already. It holds the model weakly: a cycle would keep the weights in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._before = {name: vars(model)[name] for name in (IGNORED, CONVERSIONS) if name in vars(model)}

    def follow(self, model: nn.Module) -> None:
        """Say in the model's config what is injected; or put everything back where nothing is."""
        config: Any = model.config
        if injected := injected_sites(model):
            names = _names_by_identity(model)
            stored = {file: names[id(tensor)] for file, tensor in saved_tensors(injected).items()}
            entry = trainer.entry(Manifest.of(injected), Fingerprint.of(injected), stored)
            setattr(config, trainer.ENTRY, entry)
            return
        vars(config).pop(trainer.ENTRY, None)
        for name in (IGNORED, CONVERSIONS):
            vars(model).pop(name, None)
        vars(model).update(self._before)

    def _now(self) -> list[str]:
        model = self._model()
        if model is None:
            return []
        sites = Sites(model)
        if not (injected := sites.injected()):
            return list(self._before.get(IGNORED) or ())
        added, first = added_tensors(injected), _names_by_identity(model)
        state: dict[str, object] = model.state_dict(keep_vars=True)
        out = [
            key
            for key, value in state.items()
            if not isinstance(value, Tensor)
            or not (value.requires_grad or id(value) in added)
            or first[id(value)] != key
        ]
        return [*out, NO_TYING] if _tying_would_fail(sites) else out

    def __contains__(self, key: object) -> bool:
        return key in self._now()

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._now()})"

    def __getstate__(self) -> dict[str, Any]:  # copied and pickled with its model
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=weakref.ref(state["_model"]))


def _names_by_identity(model: nn.Module) -> dict[int, str]:
    """Return the first name in `state_dict` of each tensor in it."""
    state: dict[str, object] = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for key, value in state.items():
        names.setdefault(id(value), key)
    return names


def _tying_would_fail(sites: Sites) -> bool:
    """Return whether `tie_weights`, which follows on a complete resumption, would read a substituted weight.

    It takes nothing but a parameter, and an injection's weight is computed.
    """
    for site in sites.unique():
        for wrapper in site.wrappers:
            if isinstance(wrapper, Substitution):
                parameter = own_parameters(site.bare).get(wrapper.parameter)
                if parameter is not None and len(sites.owners_of(parameter)) > 1:
                    return True
    return False
