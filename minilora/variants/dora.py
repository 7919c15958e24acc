"""DoRA: magnitude and direction apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353, section 4).

    V = W + s B A            n = |V|, the norm of each output's weights            c = m / n

    W_eff = c V              y = c (x V^T) + b = c (x V^T + b) + (1 - c) b

m, one number for each output, starts at |W| and is trained beside A and B; n is taken as a constant by the
gradient (section 4.3). So a layer whose output is linear in its weight, channel by channel, computes as
`LoRA` does, and what comes out is scaled. Dropout acts where it does in LoRA, on what A reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..linear import call_problem, plain_weight


def direction(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, transposed: bool = False
) -> Tensor:
    """Return V = W + s B A in W's layout, in float32 at least; the arguments are those of `norms`."""
    exact = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    return functional.effective_weight(weight, lora_A, lora_B, scaling, transposed=transposed, dtype=exact)


def effective_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return W_eff = c V in W's layout, accumulated in at least float32 and rounded once.

    Args:
        weight: as for `norms`, like the next three and `transposed`.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.
        magnitude: m, (out,).
        transposed: whether the weight is stored as (in, out).
        dtype: of the result; None means the weight's.
    """
    V = direction(weight, lora_A, lora_B, scaling, transposed=transposed)
    c = factors(magnitude, lengths(V, transposed))
    return (along(c, V, int(transposed)) * V).to(dtype or weight.dtype)


@torch.no_grad()
def norms(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, transposed: bool = False
) -> Tensor:
    """Return the norm of each output's weights in V = W + s B A.

    Args:
        weight: (out, ...), or (in, out) where `transposed`; floating point.
        lora_A: (r, in), with all but the first of W's dimensions flattened.
        lora_B: (out, r).
        scaling: the factor s.
        transposed: whether the weight is stored as (in, out).

    Returns:
        (out,), in float32 at least, without a gradient.
    """
    return lengths(direction(weight, lora_A, lora_B, scaling, transposed=transposed), transposed)


def lengths(V: Tensor, transposed: bool) -> Tensor:
    """Return the norm of each output's weights, (out,), as a constant."""
    found: Tensor = V.norm(dim=0) if transposed else V.flatten(1).norm(dim=1)
    return found.detach()  # which forward-mode differentiation heeds; for it no_grad does not suffice


def factors(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return c = m / n, (out,). An output whose weights are all zero has no direction: it stays zero."""
    return magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def along(factors: Tensor, like: Tensor, dim: int) -> Tensor:
    """Return one factor for each index of a dimension as a view that broadcasts over a tensor."""
    return factors.view([-1 if i == dim % like.dim() else 1 for i in range(like.dim())])


def rescaled(y: Tensor, factors: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """Return c y + (1 - c) b: what a layer with bias b gives, its weight scaled by c.

    Args:
        y: of any shape; what the layer gave with the weight as it was, bias included.
        factors: c, one for each index of y's dimension `dim`.
        bias: b, like the factors; None where there is none.
        dim: of y, in which the outputs lie.

    Returns:
        Like y. The product is formed in the wider of y's dtype and the factors', and rounded once.
    """
    c = along(factors, y, dim)
    if bias is None:
        return (c * y).to(y.dtype)
    return torch.addcmul((1 - c) * along(bias, y, dim), c, y).to(y.dtype)  # one pass over y


def dimension_of_outputs(layer: nn.Module) -> int | None:
    """Return the dimension, from the end, in which a layer's outputs lie, each scaled with its weights.

    None for what DoRA is not known for: whose output is not linear in its weight, channel by channel.
    """
    if plain_weight(layer) is None:
        return None
    if call_problem(layer) is None:
        return -1
    for kind, dims in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3), (nn.Embedding, 0)):
        if type(layer).forward is kind.forward and getattr(layer, "max_norm", None) is None:
            return -1 - dims
    return None
