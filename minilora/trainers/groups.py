"""`parameter_groups`: what trains, as an optimizer wants it where not all of it learns alike."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..errors import MiniLoRAError, several
from ..lora import LoRA
from ..sites import injected_sites
from ..training import trainable_parameters


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, lora_plus_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Return the parameters with `requires_grad` in groups, for any optimizer of torch's kind.

    With a ratio above 1, LoRA's B, its bias included, learns faster than A (LoRA+, Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354, section 4; they use 16). Biases, norms and DoRA's magnitudes, all of
    fewer than two dimensions, are not decayed.

    Args:
        model: an injected model.
        lr: the learning rate, of all but LoRA's B.
        weight_decay: of matrices and larger tensors.
        lora_plus_ratio: the learning rate of LoRA's B, divided by `lr`.

    Returns:
        A dictionary with "params", "lr" and "weight_decay" for each group that has parameters.

    Raises:
        MiniLoRAError: as `trainable_parameters` does; and for a rate, a decay or a ratio that is none.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(4, 2)), "0", minilora.LoRAConfig(r=1))
        >>> optimizer = torch.optim.AdamW(minilora.parameter_groups(model, lr=1e-3, lora_plus_ratio=16))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.016]
    """
    wrong = [
        f"{name} must be a number of at least 0, not {value!r}"
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("lora_plus_ratio", lora_plus_ratio))
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf
    ]
    if wrong:
        raise MiniLoRAError(several(wrong, outcome="no groups were made"))
    trained = trainable_parameters(model)
    wrappers = [wrapper for site in injected_sites(model).values() for wrapper in site.wrappers]
    of_lora = (wrapper.own_state().items() for wrapper in wrappers if isinstance(wrapper, LoRA))
    faster = {id(tensor) for own in of_lora for name, tensor in own if name in ("lora_B", "lora_bias")}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trained:
        rate = lr * lora_plus_ratio if id(parameter) in faster else lr
        groups.setdefault((rate, weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
