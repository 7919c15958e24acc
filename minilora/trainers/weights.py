"""`merged_weights`: what a server that knows the bare model alone is to compute with, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..distributed.gathering import at_hand, one_by_one, stand_in, whole
from ..merging import mergeable
from ..module import InjectedModule
from ..rows import TrainedRows
from ..sites import Site, Sites, require_enabled
from ..torch_internals import children, put_child, put_parameter, shadow


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what `state_dict` would hold after `fuse`, one tensor at a time, and leave the model as it is.

    This is what reinforcement learning sends to its server after each step: names are those of the bare
    model, weights with LoRA are W_eff = W + scaling B A, rounded once to W's dtype, and what was trained in
    full is as it is trained. Where nothing was injected, the tensor is the model's own, detached; what is
    made is let go with the next. Merged or not, the same bits come. Of a model that FSDP2 has sharded, every
    process calls and takes all of them, and each is gathered at its turn.

    Args:
        model: an injected model. It may be in training.

    Yields:
        The name and the tensor, on the model's device, in the order of the bare model's `state_dict`.

    Raises:
        MergeError: at the call, naming each site that cannot be fused, bottleneck adapters among them.
        MiniLoRAError: when the model carries no injection, is wrapped in DDP, FSDP1 or `torch.compile`, or is
            inside `minilora.disabled`.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(4, 2)), "0", minilora.LoRAConfig(r=1))
        >>> [(name, tuple(tensor.shape)) for name, tensor in minilora.merged_weights(model)]
        [('0.weight', (2, 4)), ('0.bias', (2,))]
    """
    require_enabled(model, "merged_weights")
    sites = Sites(stand_in(model))
    mergeable(one_by_one(sites.injected().items()), skip_adapters=False)
    return _tensors(sites)


def _tensors(sites: Sites) -> Iterator[tuple[str, Tensor]]:
    yield from _own(sites.model, "")
    given: str | None = None
    for name, site in sites.items():
        if given is not None and name.startswith(given):
            continue  # inside what is trained in full, and has been given
        given = f"{name}." if site.trained_in_full else None
        with at_hand(site):
            fused = _fused(site)
        if given is None:
            yield from _own(fused, f"{name}.")
        else:
            yield from _state(fused, f"{name}.")


def _fused(site: Site) -> nn.Module:
    """Return what `fuse` would leave at a site, made of stand-ins; nothing of the model is touched."""
    if not site.wrappers:
        return site.bare
    bare = inside = _childless(site.bare)  # what `fused` does to children reaches none
    for wrapper in reversed(site.wrappers):
        if isinstance(wrapper, TrainedRows):  # whose weight may be another's, and fused at that one's turn
            put_parameter(bare, wrapper.parameter, nn.Parameter(wrapper.substituted().detach()))
            continue
        outside = shadow(wrapper)
        put_child(outside, "base", inside)
        inside = outside
    while isinstance(inside, InjectedModule):
        inside = inside.fused()
    return inside


def _own(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what a module without its children has in `state_dict`."""
    yield from _state(_childless(module), prefix)


def _childless(module: nn.Module) -> nn.Module:
    """Return a stand-in for a module, which has its parameters and buffers and no children with any."""
    alone = shadow(module)
    for name, _ in list(children(alone)):
        put_child(alone, name, nn.Identity())
    return alone


def _state(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state: dict[str, object] = module.state_dict(prefix=prefix)
    yield from ((name, whole(value)) for name, value in state.items() if isinstance(value, Tensor))
