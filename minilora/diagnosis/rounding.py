"""`merge_loss`: what did merging cost?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import is_float_dtype, plain_dtype
from ..distributed.gathering import one_by_one, stand_in
from ..errors import MergeError, MiniLoRAError, several
from ..lora import LoRA
from ..problems import Problems
from ..sites import injected_sites, require_injected


@torch.no_grad()
def merge_loss(model: nn.Module, *, dtype: torch.dtype | str | None = None) -> dict[str, float]:
    """Return the share of each update that rounding takes when it is merged, the largest first.

    A merged weight is W + s B A rounded to the weight's dtype. What of s B A is smaller than half a step of
    that dtype at W is lost, which is why a merged 16-bit model answers differently. The share is
    |D - D'| / |D| in the Frobenius norm: D = W_eff - W as the unmerged layer has it, and D' what is left of
    it between the rounded W_eff and the rounded W. Above 1, rounding brings more noise than the update has
    size.

    Args:
        model: an injected model, merged or not; it is only read. Of a sharded one, every process calls.
        dtype: a floating-point dtype or its name: that of `fuse`. None is each weight's own: that of `merge`.

    Returns:
        The share by site, 0.0 for an update of zeros.

    Raises:
        MergeError: naming each site that cannot be merged.
        MiniLoRAError: when the model carries no injection, or the dtype is not a floating-point one.

    Example:
        >>> model = minilora.inject(nn.Sequential(nn.Linear(4, 4)).bfloat16(), "0", minilora.LoRAConfig(r=1))
        >>> _ = nn.init.constant_(model[0].lora_B, 1e-6)
        >>> minilora.merge_loss(model)["0"] > 0.5, minilora.merge_loss(model, dtype="float32")["0"] < 1e-3
        (True, True)
    """
    to: torch.dtype | None = plain_dtype(dtype)
    if to is not None and not is_float_dtype(to):
        raise MiniLoRAError(f"merge_loss rounds to floating-point dtypes, not to {dtype!r}")
    require_injected(model)
    problems, shares = Problems(), {}
    for name, site in one_by_one(injected_sites(stand_in(model)).items()):
        for wrapper in site.wrappers:
            if not isinstance(wrapper, LoRA):
                continue
            place = wrapper.placed_at(name)
            if problem := wrapper.merge_problem(to):
                problems.add(place, problem)
                continue
            weight = wrapper.unmerged_weight()
            shares[place] = share_lost(
                weight, wrapper.effective_weight(exact_dtype(weight)), to or weight.dtype
            )
    if problems:
        raise MergeError(several(problems.lines(), outcome="nothing was measured"))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def share_lost(weight: Tensor, effective: Tensor, dtype: torch.dtype) -> float:
    """Return |D - D'| / |D| for D = W_eff - W and D' the same of both rounded to a dtype.

    Args:
        weight: W.
        effective: W_eff, in a dtype of at least 32 bits.
        dtype: that both are rounded to.
    """
    exact = effective.dtype
    update = effective - weight.to(exact)
    left = effective.to(dtype).to(exact) - weight.to(dtype).to(exact)
    size = update.norm().item()
    return (update - left).norm().item() / size if size else 0.0


def exact_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which W_eff is formed before it is rounded."""
    return torch.promote_types(weight.dtype, torch.float32)
