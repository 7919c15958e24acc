"""The key-value cache of decoding."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import Tensor


class Cache(transformers.StaticCache):
    """transformers' cache of a fixed length, which CUDA graphs need, for keys and values of two dtypes.

    Under autocast a model hands it keys in float32, rotated, beside values in bfloat16, and it has one dtype
    for both. Attention brings the two to one dtype in any case; here that happens before they are stored.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values, (batch, heads, tokens, width), and return all that are stored."""
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def decoding_options(cache: Cache) -> dict[str, object]:
    """Return the options of a call that reads and extends a cache; transformers 5.24 renamed the argument."""
    taken = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
