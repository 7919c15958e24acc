"""What PEFT's versions did differently with the same A and B. `peft_version` is in the config since 0.18."""

from __future__ import annotations

import re

WRITTEN_AS = "0.21.2"
"""The version whose layout is written, said in the config where another's would differ."""


def times_added_at_out_proj(version: str | None) -> int:
    """Return how often PEFT adds B A to the out_proj of `nn.MultiheadAttention`: twice, up to 0.21.2.

    It merges B A into the weight for each call, and then merges it once more.

    Raises:
        ValueError: for a version of which that is not known.
    """
    if version is not None and _numbers(version) > _numbers(WRITTEN_AS):
        raise ValueError(
            f"PEFT up to {WRITTEN_AS} adds the update of out_proj twice, and whether {version} does is not "
            "known to this minilora: upgrade it"
        )
    return 2


def reads_first_side(version: str | None, transposed: bool) -> bool:
    """Return whether A reads d1 of a stack (E, d1, d2) of square matrices.

    Up to 0.18 it read d1 always, but where transformers 5 changed that; since 0.19.1 it reads what the
    module's `is_transposed` says is the input; 0.19.0 had the two the wrong way round.

    Raises:
        ValueError: where the version does not tell.
    """
    numbers = _numbers(version or "")
    if numbers >= (0, 19, 1):
        return transposed
    if numbers == (0, 19, 0):
        return not transposed
    raise ValueError(
        f"its matrices are square, and peft_version, {version!r}, does not tell which side A reads: below "
        "0.19 that depended on transformers. Load it into PEFT as it was trained, save it with a newer one"
    )


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", version)
    return tuple(map(int, match.groups())) if match else (0, 0, 0)
