"""The command line run in this process, and the models that its tests fuse and compare."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checks import randomise
from models import CASES
from torch import Tensor, nn

import minilora
from minilora import LoRAConfig
from minilora.cli import main


@dataclass
class Output:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def run(*arguments: object, encoding: str = "utf-8") -> Output:
    """Run a command where stdout takes nothing but what its encoding has."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Output(code, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err)))


def trained(name: str = "bert", trainable: Any = ("classifier",), targets: Any = None) -> nn.Module:
    case = CASES[name]
    model = minilora.inject(
        case.build(), targets or case.targets, LoRAConfig(r=2, alpha=3), trainable=trainable
    )
    return randomise(model)


def logits(name: str, model: nn.Module) -> Tensor:
    return CASES[name].run(model.eval())


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    """Assert equal weights, to what the order of a sum may do to the last bit on some processor."""
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for key in found:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-6, atol=1e-7)


def loaded(name: str, folder: Path, **kwargs: Any) -> nn.Module:
    """Load a folder with transformers, and assert that it found every tensor and no other."""
    owner = type(CASES[name].make())
    model, report = owner.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(report.values()), report
    return model
