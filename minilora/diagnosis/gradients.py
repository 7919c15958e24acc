"""`check_gradients`: does it train?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..distributed.gathering import whole
from ..errors import MiniLoRAError, quoted
from ..module import InjectedModule
from ..names import outermost_of
from ..problems import Problems
from ..sites import require_injected, require_unwrapped
from ..torch_internals import put_shards_back

CHECKPOINTING = (
    "Re-entrant checkpointing needs an input with a gradient: give it use_reentrant=False, or call "
    "model.enable_input_require_grads() before the forward pass"
)


def check_gradients(model: nn.Module) -> list[str]:
    """Return what is wrong with the gradients of what was injected; an empty list where nothing is.

    Call it after `loss.backward()` and before `optimizer.zero_grad()`, once, when a run begins. A gradient of
    zeros where it must be so, as that of LoRA's A while B is zero, is nothing wrong.

    Args:
        model: an injected model; of DDP the one inside; of a sharded one (FSDP2), every process calls.

    Returns:
        A line for each thing that is wrong, with the sites and, where it can be known, why and what to do.

    Raises:
        MiniLoRAError: when nothing has a gradient, so that no backward was run, or what it left is gone; when
            nothing trains or nothing is injected; and for a model inside DDP, FSDP1 or `torch.compile`.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "all-linear")
        >>> model[1](torch.ones(1, 8)).sum().backward()    # past the first layer
        >>> for line in minilora.check_gradients(model):
        ...     print(line)
        '0': no gradient: the layer was not called, or nothing that it gave reached the loss
    """
    require_unwrapped(model)
    put_shards_back(model)
    injected = require_injected(model)
    checkpointed = _checkpointed(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained and all(parameter.grad is None for parameter in trained):
        raise MiniLoRAError(
            "nothing in this model has a gradient: call check_gradients after loss.backward() and before "
            "optimizer.zero_grad()" + (f". {CHECKPOINTING}" if checkpointed else "")
        )
    problems = Problems()
    for name, site in injected.items():
        for wrapper in site.wrappers:
            if wrapper.trains:
                place = wrapper.placed_at(name)
                for problem in _problems(wrapper, outermost_of(place, checkpointed) is not None):
                    problems.add(place, problem)
    return problems.lines()


def _problems(wrapper: InjectedModule, checkpointed: bool) -> Iterator[str]:
    own = {key: t for key, t in wrapper.saved_state().items() if isinstance(t, nn.Parameter)}
    trained = {key: parameter for key, parameter in own.items() if parameter.requires_grad}
    if not own:
        return  # it computes with what another site holds
    if not trained:
        yield "frozen: requires_grad is False on all that it holds"
        return
    gradients = {key: whole(p.grad) for key, p in trained.items() if p.grad is not None}
    if not gradients:
        yield _why_none(wrapper, checkpointed)
        return
    if missing := [key for key in trained if key not in gradients]:
        yield f"no gradient for {quoted(missing)}, and one for {quoted(list(gradients))}"
    if wrong := [key for key, gradient in gradients.items() if not torch.isfinite(gradient).all()]:
        yield f"NaN or inf in the gradient of {quoted(wrong)}: look at the loss and the learning rate"
        return
    zero = {key for key, gradient in gradients.items() if not gradient.any()}
    if zero == gradients.keys():
        yield "only zeros in its gradients: nothing that it gave had a part in the loss"
    else:
        yield from _idle_experts(gradients)


def _why_none(wrapper: InjectedModule, checkpointed: bool) -> str:
    if wrapper.merged:
        return "no gradient: it is merged; call minilora.unmerge(model) before training"
    if not wrapper.enabled:
        return "no gradient: it is disabled; train outside of minilora.disabled"
    if checkpointed:
        return f"no gradient. {CHECKPOINTING}"
    return "no gradient: the layer was not called, or nothing that it gave reached the loss"


def _idle_experts(gradients: Mapping[str, Tensor]) -> Iterator[str]:
    """Say which of a stack of experts no token reached: those whose share of every gradient is zero."""
    stacked = [gradient for gradient in gradients.values() if gradient.dim() == 3]
    if stacked and len({len(gradient) for gradient in stacked}) == 1:
        reached = torch.stack([gradient.flatten(1).any(1) for gradient in stacked]).any(0)
        if idle := [i for i, yes in enumerate(reached.tolist()) if not yes]:
            yield f"no token reached the experts {', '.join(map(str, idle))} of {len(reached)}"


def _checkpointed(model: nn.Module) -> set[str]:
    """Return the names of the modules that transformers was told to checkpoint."""
    modules = model.named_modules()
    return {name for name, module in modules if getattr(module, "gradient_checkpointing", False) is True}
