"""PEFT's LoRA on every kind of layer, crossed with what else its config says, and everything checked of each.

A setting is a file that the installed PEFT wrote. A check is one thing that must be the same on both sides:
`python scripts/peft_product.py` counts them, for `docs/peft-settings.md`; `test_peft_product.py` holds that.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from checks import nn_dropout_draws_alike, raw, state
from kinds import InOut
from peft_settings import Attended, Net, convolved, experts, looked_up, mlp, stack, without_bias
from torch import Tensor, nn

import minilora
from minilora import MiniLoRAError


@dataclass(frozen=True)
class Kind:
    """A model with layers of one kind, and what PEFT is told to adapt of it."""

    name: str
    make: Callable[[], nn.Module]
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    head: str = "lin"
    """A linear layer that is not adapted."""
    shape: tuple[int, ...] = (2, 8)
    ids: bool = False
    more: dict[str, Any] = field(default_factory=dict)


IDS: dict[str, Any] = {"shape": (4, 3), "ids": True, "head": "head"}
IMAGE: dict[str, Any] = {"modules": ("conv",), "shape": (2, 6, 7, 7)}
TOKENS: dict[str, Any] = {"shape": (2, 3, 8)}
BOTH = ("experts.up", "experts.down")


def wide() -> nn.Module:
    return Net(lin0=nn.Linear(8, 12), lin1=nn.Linear(12, 8), lin=nn.Linear(8, 4))


def in_out() -> nn.Module:
    return Net(own=InOut(), lin=nn.Linear(12, 4))


KINDS = [
    Kind("linear", wide, ("lin0", "lin1")),
    Kind("linear, many tokens", wide, ("lin0", "lin1"), shape=(4, 12, 8)),
    Kind("linear, one of two", mlp, ("lin0",), head="lin1"),
    Kind("linear, no bias", without_bias, ("lin0",), head="lin1"),
    Kind("linear, of a stack", lambda: Net(stack=stack(), lin=nn.Linear(8, 4)), ("stack.layers.1.0",)),
    Kind("Conv1D", looked_up(), ("c",), more={"fan_in_fan_out": True}, **IDS),
    Kind("embedding", looked_up(), ("emb",), **IDS),
    Kind("embedding, padding_idx", looked_up(padding_idx=1), ("emb",), **IDS),
    Kind("embedding and Conv1D", looked_up(), ("emb", "c"), more={"fan_in_fan_out": True}, **IDS),
    Kind("conv1d", convolved(nn.Conv1d, 6, 8, 3, width=56), ("conv",), shape=(2, 6, 9)),
    Kind("conv2d", convolved(nn.Conv2d, 6, 8, 3, width=200), **IMAGE),
    Kind("conv2d, no bias", convolved(nn.Conv2d, 6, 8, 3, bias=False, width=200), **IMAGE),
    Kind("conv2d, strided", convolved(nn.Conv2d, 6, 8, (3, 2), 2, padding=(1, 0), width=96), **IMAGE),
    Kind("conv2d, a kernel of one", convolved(nn.Conv2d, 6, 8, 1, width=392), **IMAGE),
    Kind("conv2d, groups", convolved(nn.Conv2d, 6, 8, 3, groups=2, width=200), **IMAGE),
    Kind("conv2d, dilation", convolved(nn.Conv2d, 6, 8, 3, dilation=2, width=72), **IMAGE),
    Kind("conv3d", convolved(nn.Conv3d, 2, 4, 2, width=108), ("conv",), shape=(2, 2, 4, 4, 4)),
    Kind("attention", Attended, ("mha",), **TOKENS),
    Kind("experts", experts(), (), BOTH, **TOKENS),
    Kind("experts, transposed", experts(transposed=True), (), BOTH, **TOKENS),
    Kind("a matrix of one's own", in_out, (), ("own.weight",)),
]


def _patterns(kind: Kind) -> dict[str, Any]:
    first = (*kind.modules, *kind.parameters)[0]
    return {"rank_pattern": {first: 2}, "alpha_pattern": {first: 5}}


def _rounded(kind: Kind) -> dict[str, Any]:
    alpha = 24 if kind.ids else 6  # what is looked up is small here, and rounding would hide it
    return {"dtype": torch.bfloat16, "lora_alpha": alpha}


Fields = dict[str, Any] | Callable[[Kind], dict[str, Any]]

VARIANTS: dict[str, Fields] = {
    "plain": {},
    "r=10": {"r": 10},
    "rslora": {"use_rslora": True},
    "patterns": _patterns,
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "a head": lambda kind: {"modules_to_save": [kind.head]},
    "a head, bias all": lambda kind: {"modules_to_save": [kind.head], "bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no initial values": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "DoRA, rslora": {"use_dora": True, "use_rslora": True},
    "DoRA, patterns": lambda kind: {"use_dora": True, **_patterns(kind)},
    "DoRA, bias lora_only": {"use_dora": True, "bias": "lora_only"},
    "DoRA, a head": lambda kind: {"use_dora": True, "modules_to_save": [kind.head]},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.1},
    "lora_bias": {"lora_bias": True},
    "lora_bias, rslora": {"lora_bias": True, "use_rslora": True},
    "lora_bias, patterns": lambda kind: {"lora_bias": True, **_patterns(kind)},
    "lora_bias, a head": lambda kind: {"lora_bias": True, "modules_to_save": [kind.head]},
    "lora_bias, dropout": {"lora_bias": True, "lora_dropout": 0.1},
    "lora_bias, bias lora_only": {"lora_bias": True, "bias": "lora_only"},
    "float32": {"dtype": torch.float32},
    "bfloat16": _rounded,
    "DoRA, bfloat16": lambda kind: {"use_dora": True, **_rounded(kind)},
    "lora_bias, bfloat16": lambda kind: {"lora_bias": True, **_rounded(kind)},
}

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Setting:
    """A kind of layer and a variant of the config."""

    kind: Kind
    variant: str

    @property
    def name(self) -> str:
        return f"{self.kind.name}; {self.variant}"

    @cached_property
    def fields(self) -> dict[str, Any]:
        found = VARIANTS[self.variant]
        return found(self.kind) if callable(found) else dict(found)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.fields.get("dtype", torch.float64)
        return dtype

    def config(self) -> Any:
        fields = {key: value for key, value in self.fields.items() if key != "dtype"}
        targets = {"target_modules": list(self.kind.modules)}
        targets |= {"target_parameters": list(self.kind.parameters)} if self.kind.parameters else {}
        return peft.LoraConfig(
            **{"r": 4, "lora_alpha": 6, **targets, **self.kind.more, **copy.deepcopy(fields)}
        )

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.kind.make()
            for module in model.modules():
                if type(module).__name__ == "Conv1D":  # whose own values are small beside 16 bits' rounding
                    nn.init.normal_(module.weight, std=0.5)
            return model.to(self.dtype).eval()

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.kind.ids:
            return torch.randint(0, 10, self.kind.shape, generator=generator)
        return torch.randn(self.kind.shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval()(self.input())
            return found.double()

    def after_steps(self, model: nn.Module, lr: float) -> Tensor:
        """Return what a model computes after two steps of gradient descent, the same elements dropped."""
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
        torch.manual_seed(2)
        with nn_dropout_draws_alike():
            for _ in range(2):
                optimizer.zero_grad()
                model(self.input()).double().square().mean().backward()
                optimizer.step()
        return self.output(model)


def settings() -> list[Setting]:
    """Return all settings, those that PEFT refuses itself included."""
    return [Setting(kind, variant) for kind in KINDS for variant in VARIANTS]


class Trial:
    """A file of PEFT's, what PEFT computes with it, and the checks, each on a model of its own."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.file, self.ours = setting, folder / "theirs", folder / "ours"
        theirs = peft.get_peft_model(setting.build(), setting.config())
        generator = torch.Generator().manual_seed(3)
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:  # as if it had been trained
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
                parameter.data.copy_(parameter * (1 + values) if "magnitude" in name else values)
        theirs.save_pretrained(self.file)
        self.plain = setting.output(setting.build())
        self.expected = setting.output(theirs)
        for self.lr in (0.1, 0.5, 2.5, 12.5):  # the first whose steps rounding does not hide
            self.stepped = setting.after_steps(copy.deepcopy(theirs), self.lr)
            with contextlib.suppress(AssertionError):
                self.apart(self.stepped, self.expected)
                break

    def loaded(self, path: Path | None = None) -> nn.Module:
        return minilora.load(self.setting.build(), path or self.file)

    def saved_for_peft(self) -> Path:
        if not self.ours.exists():
            minilora.save(self.loaded(), self.ours, format="peft")
        return self.ours

    def read_by_peft(self) -> nn.Module:
        model: nn.Module = peft.PeftModel.from_pretrained(
            self.setting.build(), self.saved_for_peft(), is_trainable=True
        )
        return model

    def same(self, found: Tensor, expected: Tensor) -> None:
        distance, tolerance = (found - expected).abs().max(), self.tolerance(expected)
        assert distance <= tolerance, f"{distance:.1e} apart, and {tolerance:.0e} is allowed"

    def apart(self, one: Tensor, other: Tensor) -> None:
        """Raise unless two outputs differ by more than what passes for the same."""
        distance, tolerance = (one - other).abs().max(), self.tolerance(other)
        assert distance > 2 * tolerance, f"{distance:.1e} apart, which says nothing"

    def tolerance(self, expected: Tensor) -> float:
        return TOLERANCE[self.setting.dtype] * max(1.0, float(expected.abs().max()))

    # The checks.

    def outputs(self) -> None:
        """The outputs are PEFT's, and not the base's."""
        self.apart(self.expected, self.plain)
        self.same(self.setting.output(self.loaded()), self.expected)

    def disabled(self) -> None:
        """Disabled, they are the base's."""
        with minilora.disabled(self.loaded()) as model:
            self.same(self.setting.output(model), self.plain)

    def merge(self) -> None:
        """Merged, they are the same."""
        self.same(self.setting.output(minilora.merge(self.loaded())), self.expected)

    def unmerge(self) -> None:
        """Unmerged, the parameters are the very same objects."""
        model = self.loaded()
        before = {name: id(p) for name, p in model.named_parameters()}
        minilora.merge(model)
        merged = {name: id(p) for name, p in model.named_parameters()}
        assert merged != before
        minilora.unmerge(model)
        assert {name: id(p) for name, p in model.named_parameters()} == before

    def fuse(self) -> None:
        """Fused, the model is plain, and the outputs are the same."""
        model = minilora.fuse(self.loaded())
        assert not minilora.summary(model).rows
        self.same(self.setting.output(model), self.expected)

    def eject(self) -> None:
        """Ejected, it is the base to the bit, after training steps, too."""
        model = self.loaded()
        self.setting.after_steps(model, self.lr)
        assert state(minilora.eject(model)) == state(self.setting.build())

    def minilora_file(self) -> None:
        """Saved in minilora's format and loaded, it gives the same bits."""
        model, file = self.loaded(), self.ours.with_suffix(".safetensors")
        minilora.save(model, file)
        assert raw(self.setting.output(self.loaded(file))) == raw(self.setting.output(model))

    def peft_file(self) -> None:
        """Saved in PEFT's format and loaded, it gives the same outputs."""
        self.same(self.setting.output(self.loaded(self.saved_for_peft())), self.expected)

    def peft_reads(self) -> None:
        """Saved in PEFT's format, it gives the same outputs in PEFT."""
        self.same(self.setting.output(self.read_by_peft()), self.expected)

    def steps(self) -> None:
        """Two training steps are PEFT's."""
        self.apart(self.stepped, self.expected)
        self.same(self.setting.after_steps(self.loaded(), self.lr), self.stepped)

    def peft_steps(self) -> None:
        """Saved in PEFT's format, two training steps in PEFT are the same."""
        self.same(self.setting.after_steps(self.read_by_peft(), self.lr), self.stepped)


CHECKS: dict[str, Callable[[Trial], None]] = {
    "outputs": Trial.outputs,
    "disabled": Trial.disabled,
    "merge": Trial.merge,
    "unmerge": Trial.unmerge,
    "fuse": Trial.fuse,
    "eject": Trial.eject,
    "minilora's file": Trial.minilora_file,
    "PEFT's file": Trial.peft_file,
    "read by PEFT": Trial.peft_reads,
    "steps": Trial.steps,
    "steps in PEFT": Trial.peft_steps,
}


def known_difference(setting: Setting, check: str) -> str:
    """Return why a check is known not to hold, as `docs/coming-from-peft.md` tells it; or nothing."""
    if check != "steps":
        return ""
    if "mha" in setting.kind.modules:
        return "PEFT adds the update of attention's out_proj twice, and takes the gradient of one"
    if setting.variant == "DoRA, dropout" and setting.kind.modules != ("emb",):
        return "PEFT's DoRA drops elements of what the base reads, too"
    return ""


@dataclass
class Outcome:
    """What came of a setting."""

    setting: Setting
    none: str = ""
    """Why PEFT has no such adapter."""
    refused: str = ""
    """Why `load` refuses its file."""
    differs: dict[str, str] = field(default_factory=dict)
    """The checks that are known not to hold, and why."""
    failed: dict[str, str] = field(default_factory=dict)
    """The checks that should hold and do not, and how."""

    @property
    def holding(self) -> int:
        return 0 if self.none or self.refused else len(CHECKS) - len(self.differs) - len(self.failed)


def tried(setting: Setting, folder: Path) -> Outcome:
    """Return what comes of a setting, in a folder of its own."""
    outcome = Outcome(setting)
    with _quiet():
        try:
            trial = Trial(setting, folder)
        except Exception as error:  # whatever PEFT raises
            outcome.none = _first_line(error)
            return outcome
        try:
            trial.loaded()
        except MiniLoRAError as error:
            outcome.refused = _reason(error)
            return outcome
        for name, check in CHECKS.items():
            try:
                check(trial)
            except Exception as error:
                known = known_difference(setting, name)
                (outcome.differs if known else outcome.failed)[name] = known or _first_line(error)
    return outcome


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, and those of ranks and of weights that are formed
        yield


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _reason(error: MiniLoRAError) -> str:
    """Return the first problem of an error, without the names that it is about."""
    line = next(line for line in str(error).splitlines() if line.startswith("  - "))
    return line.removeprefix("  - ").partition(": ")[2]
