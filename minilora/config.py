"""What an injection is made of: two frozen dataclasses, checked when they are built."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch

from .errors import MiniLoRAError, several

Initialisation = Literal["kaiming", "gaussian"]
Activation = Literal["gelu", "relu", "silu", "tanh"]
Placement = Literal["sequential", "parallel"]

ConfigType = TypeVar("ConfigType", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What both configs share: a check when built, and a way to JSON and back."""

    kind: ClassVar[str]

    dtype: torch.dtype | None = None
    """dtype of the adapter's parameters. None: float32, or float64 on a float64 base."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise MiniLoRAError(several(problems, outcome=f"no {type(self).__name__} was made"))

    def _problems(self) -> Iterator[str]:
        dtype: object = self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            yield f"dtype must be a floating-point torch.dtype or None, not {self.dtype!r}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values. Inverse: `from_dict`."""
        fields = dataclasses.asdict(self)
        if self.dtype is not None:
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
        return fields

    @classmethod
    def from_dict(cls: type[ConfigType], fields: Mapping[str, Any]) -> ConfigType:
        """Build the config from plain JSON values. Inverse: `to_dict`.

        Raises:
            MiniLoRAError: for a field that this version does not know, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise MiniLoRAError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
                f"its fields are {', '.join(sorted(known))}"
            )
        values = dict(fields)
        if isinstance(values.get("dtype"), str):
            values["dtype"] = getattr(torch, values["dtype"], values["dtype"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Low-rank adaptation of a linear layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Raises:
        MiniLoRAError: listing every field that is out of range.
    """

    kind: ClassVar[str] = "lora"

    r: int = 8
    """Rank of the update, from 1 to the smaller side of the layer."""
    alpha: float = 16
    """The update is scaled by alpha / r (paper, section 4.1)."""
    dropout: float = 0.0
    """Probability of dropping an input element on the low-rank path while training; in [0, 1)."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    init: Initialisation = "kaiming"
    """How A is drawn: "kaiming" is U(-1/sqrt(in), 1/sqrt(in)), "gaussian" is N(0, (1/r)^2). B is zero."""

    @property
    def scaling(self) -> float:
        """The factor in W + scaling * B A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if not _is_int(self.r) or self.r < 1:
            yield f"r must be an int of at least 1, not {self.r!r}"
        if not _is_real(self.alpha) or self.alpha <= 0:
            yield f"alpha must be a finite number above 0, not {self.alpha!r}"
        if not _is_real(self.dropout) or not 0 <= self.dropout < 1:
            yield f"dropout must be a number in [0, 1), not {self.dropout!r}"
        if not isinstance(self.rslora, bool):
            yield f"rslora must be True or False, not {self.rslora!r}"
        yield from _choice("init", self.init, get_args(Initialisation))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Config):
    """Bottleneck adapter (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751).

    Give `bottleneck` or `reduction_factor`, not both; with neither, the bottleneck is 64.

    Raises:
        MiniLoRAError: listing every field that is out of range.
    """

    kind: ClassVar[str] = "adapter"

    bottleneck: int | None = None
    """Width m of the bottleneck, at least 1."""
    reduction_factor: float | None = None
    """The bottleneck is the module's output width divided by this, rounded down, at least 1."""
    activation: Activation = "gelu"
    """The function between the two projections; "gelu" is the exact (erf) form."""
    placement: Placement = "sequential"
    """"sequential" reads the module's output (Houlsby et al. 2019, section 2.1), "parallel" its input
    (He et al. 2022, https://arxiv.org/abs/2110.04366, section 3.3)."""
    scale: float = 1.0
    """Factor on what the adapter adds (He et al. 2022 use 4 for the parallel form)."""
    hidden_size: int | None = None
    """Output width of the module. None: read off the module; needed where it does not tell."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck is None and self.reduction_factor is None:
            object.__setattr__(self, "bottleneck", 64)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.bottleneck is not None and self.reduction_factor is not None:
            yield "give bottleneck or reduction_factor, not both"
        if self.bottleneck is not None and (not _is_int(self.bottleneck) or self.bottleneck < 1):
            yield f"bottleneck must be an int of at least 1, not {self.bottleneck!r}"
        factor = self.reduction_factor
        if factor is not None and (not _is_real(factor) or factor <= 0):
            yield f"reduction_factor must be a finite number above 0, not {factor!r}"
        if not _is_real(self.scale):
            yield f"scale must be a finite number, not {self.scale!r}"
        if self.hidden_size is not None and (not _is_int(self.hidden_size) or self.hidden_size < 1):
            yield f"hidden_size must be an int of at least 1, not {self.hidden_size!r}"
        yield from _choice("activation", self.activation, get_args(Activation))
        yield from _choice("placement", self.placement, get_args(Placement))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # math.isfinite fails on an int too large for a float


def _choice(field: str, value: object, choices: tuple[str, ...]) -> Iterator[str]:
    if value not in choices:
        yield f"{field} must be one of {', '.join(map(repr, choices))}, not {value!r}"
