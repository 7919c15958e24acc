"""What trains, and what has an effect: `freeze`, `trainable_parameters`, `disabled`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from torch import nn

from .errors import MiniLoRAError
from .sites import Site, Sites, injected_sites, require_injected, require_whole
from .torch_internals import put_shards_back


def freeze(model: nn.Module) -> nn.Module:
    """Set `requires_grad` to False on every parameter that no injection brought. `inject` does this itself.

    What injections brought keeps the `requires_grad` that it has. Inverse: `model.requires_grad_(True)`.

    Returns:
        The model itself.

    Raises:
        MiniLoRAError: when the model is not one, or is wrapped in DDP, FSDP or `torch.compile`.

    Example:
        >>> model = minilora.freeze(nn.Linear(4, 2))
        >>> any(parameter.requires_grad for parameter in model.parameters())
        False
    """
    require_whole(model)
    for parameter in base_parameters(Sites(model)):
        parameter.requires_grad_(False)
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters with `requires_grad`, for an optimizer: `AdamW(trainable_parameters(model))`.

    Raises:
        MiniLoRAError: when there are none, or when a merged layer would train without effect.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(4, 2)), "0", minilora.LoRAConfig(r=1))
        >>> [tuple(parameter.shape) for parameter in minilora.trainable_parameters(model)]
        [(1, 4), (2, 1)]
    """
    if merged := [site for site in injected_sites(model).values() if site.merged]:
        raise MiniLoRAError(
            f"{len(merged)} sites are merged, and a merged layer does not train; "
            "call minilora.unmerge(model) first"
        )
    put_shards_back(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise MiniLoRAError(
            "no parameter of this model requires a gradient; call minilora.inject(model, targets=...) first"
        )
    return parameters


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block, the model computes what the base model does; afterwards all is as before.

    Heads named by `trainable` give way to their originals as well, and merged weights to the originals.
    The merged weights are kept meanwhile, so that nothing needs to be computed, and nothing can fail, on
    the way out.

    Raises:
        MiniLoRAError: when the model carries no injection; or is merged, and was sharded afterwards.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8)), "0")
        >>> _ = nn.init.ones_(model[0].lora_B)
        >>> x = torch.randn(3, 8)
        >>> with minilora.disabled(model):
        ...     torch.equal(model(x), model[0].base(x))
        True
    """
    wrappers = [wrapper for site in require_injected(model).values() for wrapper in site.wrappers]
    enabled = [wrapper for wrapper in wrappers if wrapper.enabled]
    if merged := [wrapper for wrapper in wrappers if wrapper.merged]:
        require_whole(model, "unmerge before fully_shard, which computes with what it met")
    try:
        with contextlib.ExitStack() as stack:
            for wrapper in wrappers:
                stack.enter_context(wrapper.set_aside())
            try:
                for wrapper in enabled:
                    wrapper.enabled = False
                yield model
            finally:
                for wrapper in enabled:
                    wrapper.enabled = True
    finally:
        # What was moved or cast meanwhile is merged anew, for which memory may not suffice: then none is.
        if not all(wrapper.merged for wrapper in merged):
            for wrapper in merged:
                wrapper.unmerge()


def added_tensors(injected: dict[str, Site]) -> set[int]:
    """Return the identities of the tensors that injections brought."""
    return {
        id(tensor)
        for site in injected.values()
        for wrapper in site.wrappers
        for tensor in wrapper.saved_state().values()
    }


def base_parameters(sites: Sites) -> list[nn.Parameter]:
    """Return the parameters of a model that no injection brought."""
    added = added_tensors(sites.injected())
    return [parameter for parameter in sites.model.parameters() if id(parameter) not in added]


def thawed_parameters(model: nn.Module, added: Collection[int]) -> dict[str, nn.Parameter]:
    """Return what trains and no injection brought, by name: `save` leaves it out.

    Args:
        model: injected.
        added: as `added_tensors` returns it.
    """
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: parameter for name, parameter in trained if id(parameter) not in added}
