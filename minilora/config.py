"""What an injection is made of: three frozen dataclasses, checked when they are built."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch

from .errors import MiniLoRAError, listed, several
from .words import foreign_words

Initialisation = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
Activation = Literal["gelu", "relu", "silu", "tanh"]
Placement = Literal["sequential", "parallel"]

ConfigType = TypeVar("ConfigType", bound="Config")

WIDEST = 2**31 - 1
"""The largest rank or width: a layer of it is beyond any memory, and its size still fits torch's integers."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all configs share: a check when built, and a way to JSON and back."""

    kind: ClassVar[str]
    """What files call a config of this class."""
    later: ClassVar[tuple[str, ...]] = ()
    """Fields that came after the first release."""

    dtype: torch.dtype | str | None = None
    """dtype of the new parameters, or its name, "bfloat16". None: float32, or float64 on a float64 base."""

    def __new__(cls, *args: Any, **fields: Any) -> Config:
        """Make the object; before the generated `__init__` can raise a bare TypeError for a foreign word."""
        known = [field.name for field in dataclasses.fields(cls)]
        if message := foreign_words(fields, known, caller=cls.__name__):
            raise MiniLoRAError(message)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(
                self, field.name, plain_dtype(value) if field.name == "dtype" else _plain(value)
            )
        if problems := list(self._problems()):
            raise MiniLoRAError(several(problems, outcome=f"no {type(self).__name__} was made"))

    def _problems(self) -> Iterator[str]:
        if self.dtype is not None and not is_float_dtype(self.dtype):
            yield (
                "dtype must be float16, bfloat16, float32 or float64, torch's own or its name, or None, "
                f"not {self.dtype!r}"
            )

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the tensors of a site, below its own, as files have them."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values. Inverse: `from_dict`.

        Those that came after the first release are left out where they have their default, so that an older
        version reads what it can honour.
        """
        fields = dataclasses.asdict(self)
        for name in self.later:
            if fields[name] == self.__dataclass_fields__[name].default:
                del fields[name]
        if self.dtype is not None:
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
        return fields

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype as torch's own object, whichever way it was given."""
        return self.dtype if isinstance(self.dtype, torch.dtype) else None

    @classmethod
    def from_dict(cls: type[ConfigType], fields: Mapping[str, Any]) -> ConfigType:
        """Build the config from plain JSON values. Inverse: `to_dict`.

        Raises:
            MiniLoRAError: for a field that this version does not know, or a value out of range.
        """
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Low-rank adaptation of a linear layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Raises:
        MiniLoRAError: listing every field that is out of range.

    Example:
        >>> minilora.LoRAConfig(r=4, alpha=16).scaling
        4.0
    """

    kind: ClassVar[str] = "lora"
    later: ClassVar[tuple[str, ...]] = ("dora", "lora_bias")

    r: int = 8
    """Rank of the update, at least 1. Above the smaller side of a layer it is honoured, with a warning."""
    alpha: float = 16
    """The update is scaled by alpha / r (paper, section 4.1). A negative one takes away what was learnt."""
    dropout: float = 0.0
    """Probability of dropping an input element on the low-rank path while training; in [0, 1]."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Train the norm of each output's weights beside its direction (DoRA, Liu et al. 2024,
    https://arxiv.org/abs/2402.09353): linear layers, convolutions and embeddings."""
    lora_bias: bool = False
    """Give B a bias beta, zero at first: the layer's bias b becomes b + scaling * beta. Layers that can have
    one: linear layers and convolutions, with a bias or without."""
    init: Initialisation = "kaiming"
    """How A and B begin: "kaiming" draws A from U(-1/sqrt(in), 1/sqrt(in)), "gaussian" from N(0, (1/r)^2),
    and B is zero. "orthogonal" draws both, so that B A is zero, to rounding. "pissa" (Meng et al. 2024,
    https://arxiv.org/abs/2404.02948) and "olora" (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775) take
    both from the weight, and the update is the change since then."""

    @property
    def scaling(self) -> float:
        """The factor in W + scaling * B A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def begins_at_weight(self) -> bool:
        """Whether A and B begin at A0 and B0 taken from W, and the update is the change since."""
        return self.init in ("pissa", "olora")

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the tensors of a layer, as files have them."""
        start = ("lora_A_start", "lora_B_start") if self.begins_at_weight else ()
        more = ("lora_magnitude",) * self.dora + ("lora_bias",) * self.lora_bias
        return ("lora_A", "lora_B", *start, *more)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from _width("r", self.r)
        if not _is_real(self.alpha):
            yield f"alpha must be a finite number, not {self.alpha!r}"
        if not _is_real(self.dropout) or not 0 <= self.dropout <= 1:
            yield f"dropout must be a number in [0, 1], not {self.dropout!r}"
        for field in ("rslora", "dora", "lora_bias"):
            if not isinstance(value := getattr(self, field), bool):
                yield f"{field} must be True or False, not {value!r}"
        yield from _choice("init", self.init, get_args(Initialisation))
        if self.init == "orthogonal" and isinstance(self.r, int) and self.r % 2:
            yield f"r must be even with init='orthogonal', which gives half to A and half to B, not {self.r}"
        if self.init == "pissa" and _is_real(self.alpha) and self.alpha <= 0:
            yield f"alpha must be above 0 with init='pissa', which divides by it, not {self.alpha}"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Config):
    """Bottleneck adapter (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751).

    Give `bottleneck` or `reduction_factor`, not both; with neither, the bottleneck is 64.

    Raises:
        MiniLoRAError: listing every field that is out of range.

    Example:
        >>> minilora.AdapterConfig().bottleneck
        64
        >>> minilora.AdapterConfig(bottleneck=0)
        Traceback (most recent call last):
            ...
        minilora.errors.MiniLoRAError: 1 problem; no AdapterConfig was made:
          - bottleneck must be an int from 1 to 2147483647, not 0
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

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the tensors of an adapter, as files have them."""
        return tuple(f"adapter_{way}.{name}" for way in ("down", "up") for name in ("weight", "bias"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck is None and self.reduction_factor is None:
            object.__setattr__(self, "bottleneck", 64)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.bottleneck is not None and self.reduction_factor is not None:
            yield "give bottleneck or reduction_factor, not both"
        if self.bottleneck is not None:
            yield from _width("bottleneck", self.bottleneck)
        factor = self.reduction_factor
        if factor is not None and (not _is_real(factor) or factor <= 0):
            yield f"reduction_factor must be a finite number above 0, not {factor!r}"
        if not _is_real(self.scale):
            yield f"scale must be a finite number, not {self.scale!r}"
        if self.hidden_size is not None:
            yield from _width("hidden_size", self.hidden_size)
        yield from _choice("activation", self.activation, get_args(Activation))
        yield from _choice("placement", self.placement, get_args(Placement))


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Config):
    """Some rows of a weight, trained by themselves: those of new tokens in an embedding.

    Raises:
        MiniLoRAError: listing every field that is out of range.

    Example:
        >>> minilora.RowsConfig(rows=range(100, 103)).rows
        (100, 101, 102)
    """

    kind: ClassVar[str] = "rows"

    rows: Sequence[int]
    """Which rows, each once, in any order: a list, a range, ...; kept as a tuple in ascending order."""
    of: str | None = None
    """The site whose rows these are, at a further module that computes with the same weight, as a tied
    output layer does. `inject` fills it in."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the tensors of a site, as files have them; they are below `of` where that is given."""
        return ("trained_rows",)

    def __post_init__(self) -> None:
        if isinstance(self.rows, Iterable):
            object.__setattr__(self, "rows", tuple(map(_plain, self.rows)))
        super().__post_init__()
        object.__setattr__(self, "rows", tuple(sorted(self.rows)))

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.of is not None and (not isinstance(self.of, str) or not self.of):
            yield f"of must be the name of a site, or None, not {self.of!r:.100}"
        if not isinstance(self.rows, tuple) or not self.rows:
            yield f"rows must be a list of ints, of one at least, not {self.rows!r:.100}"
            return
        if wrong := [f"{row!r:.100}" for row in self.rows if type(row) is not int or row < 0]:
            yield f"rows must be ints from 0 on, not {listed(wrong)}"
        if twice := [row for row, count in Counter(map(repr, self.rows)).items() if count > 1]:
            yield f"rows has {listed(twice)} more than once"


def plain_dtype(value: object) -> Any:
    """Return torch's dtype for its name, with or without "torch."; anything else as it is.

    >>> plain_dtype("bfloat16")
    torch.bfloat16
    """
    found = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) else value


def is_float_dtype(value: object) -> bool:
    """Return whether a value is one of torch's dtypes for weights: 16, 32 or 64 bits wide, floating-point."""
    return value in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _plain(value: object) -> object:
    """Return Python's own number for one of another library, such as numpy's; anything else as it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value


def _width(field: str, value: object) -> Iterator[str]:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= WIDEST:
        yield f"{field} must be an int from 1 to {WIDEST}, not {value!r:.100}"


def _is_real(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # math.isfinite fails on an int too large for a float


def _choice(field: str, value: object, choices: tuple[str, ...]) -> Iterator[str]:
    if value not in choices:
        yield f"{field} must be one of {', '.join(map(repr, choices))}, not {value!r}"
