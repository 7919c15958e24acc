"""`Place`: where in a PEFT model a site's A and B are, by what names, and of which layout.

PEFT wraps a module that it adapts, and a wrapper's own module is its `base_layer`:

    encoder.query                          encoder.query.lora_A.weight
    attention (nn.MultiheadAttention)      attention.lora_A.weight                      in_proj_weight
                                           attention.base_layer.out_proj.lora_A.weight  out_proj, always
    experts.up, experts.down (parameters)  experts.base_layer.lora_A.weight             up, the first
                                           experts.lora_A.weight                        down, around it

A key never names a parameter: which one a wrapper adapts follows from the order of the module's parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ....names import above
from .packing import Packing

BASE_LAYER = "base_layer"

Kind = Literal["linear", "convolution", "embedding", "attention input", "attention output", "parameter"]

WITHOUT_DROPOUT: frozenset[Kind] = frozenset(
    {"embedding", "attention input", "attention output", "parameter"}
)
"""Where PEFT leaves lora_dropout out: an embedding ignores it, and so does what is done to a whole weight."""


@dataclass(frozen=True)
class Place:
    """Where in a PEFT model the A and B of a site are."""

    site: str
    """minilora's name of it."""
    target: str
    """What PEFT's patterns are held against: a module's name, or a parameter's."""
    module: str
    """The module that PEFT wraps."""
    kind: Kind = "linear"
    depth: int = 0
    """How many wrappers of further parameters of the module stand around this one."""
    packing: Packing = field(default_factory=Packing)

    def keys(self, wrapped: Mapping[str, int]) -> dict[str, str]:
        """Return PEFT's names of A and B, without the prefix.

        Args:
            wrapped: how many wrappers each adapted module has.
        """
        path = within(self.module, wrapped) + f".{BASE_LAYER}" * self.depth
        if self.kind == "embedding":
            return {side: f"{path}.lora_embedding_{side}" for side in ("A", "B")}
        return {side: f"{path}.lora_{side}.weight" for side in ("A", "B")}


def wrappers_of(places: Iterable[Place]) -> dict[str, int]:
    """Return how many wrappers PEFT puts around each module, given all places."""
    counts: dict[str, int] = {}
    for place in places:
        counts[place.module] = counts.get(place.module, 0) + 1
    return counts


def within(name: str, wrapped: Mapping[str, int]) -> str:
    """Return the path of a module in a PEFT model, whose wrappers around it stand in its place.

    >>> within("block.mha.out_proj", {"block.mha": 1, "block.mha.out_proj": 1})
    'block.mha.base_layer.out_proj'
    """
    path = name
    for outer in sorted(above(name), key=len, reverse=True):
        if outer in wrapped:
            path = outer + f".{BASE_LAYER}" * wrapped[outer] + path[len(outer) :]
    return path


def without_wrappers(path: str) -> tuple[str, int]:
    """Return the module's name in the bare model, and how many wrappers' bases the path ends with.

    >>> without_wrappers("mha.base_layer.out_proj.base_layer")
    ('mha.out_proj', 1)
    """
    segments = path.split(".")
    depth = 0
    while segments and segments[-1] == BASE_LAYER:
        segments.pop()
        depth += 1
    return ".".join(segment for segment in segments if segment != BASE_LAYER), depth
