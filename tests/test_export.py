"""Exported models answer as they do in eager; merged or fused, nothing of LoRA is left to compute."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import distance, randomise
from torch import Tensor, nn

import minilora
from minilora import LoRAConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

states = pytest.mark.parametrize("state", ["fused", "merged", "unmerged"])


class Encoder(nn.Module):
    """A layer of a transformer with what LoRA reaches in one, attention over any length included."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        q, k, v = (
            layer(h).view(*ids.shape, 2, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.down(F.gelu(self.up(attended)))
        return self.classifier(h.mean(1))


def encoder(state: str) -> nn.Module:
    torch.manual_seed(0)
    model = Encoder().requires_grad_(False).eval()
    if state == "bare":
        return model
    minilora.inject(model, ["embed", "query", "value", "up"], LoRAConfig(r=2), trainable=["classifier"])
    randomise(model)
    act = {"fused": minilora.fuse, "merged": minilora.merge, "unmerged": lambda model: model}[state]
    return act(model)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(batch))


def shapes() -> dict[str, Any]:
    Dim = torch.export.Dim
    return {"ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=64)}}


def exported(state: str, *, strict: bool = False) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(encoder(state), (ids(2, 5),), dynamic_shapes=shapes(), strict=strict)


def calls(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@functools.cache
def calls_of_bare(*, strict: bool) -> list[str]:
    return calls(exported("bare", strict=strict))


def assert_answers(run: Any, state: str, within: float = 1e-5) -> None:
    """Assert that what was exported answers as the model does, for other batches and lengths."""
    model = encoder(state)
    with torch.no_grad():
        assert distance(encoder("bare")(ids(2, 5)), model(ids(2, 5))) > 0.01
        for shape in [(2, 5), (4, 9), (1, 2)]:
            assert distance(torch.as_tensor(run(ids(*shape))), model(ids(*shape))) < within


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@states
def test_exported(state: str, strict: bool) -> None:
    program = exported(state, strict=strict)
    assert_answers(program.module(), state)
    of_lora = [n for n in program.graph.nodes if n.op == "placeholder" and "lora" in n.name and n.users]
    assert bool(of_lora) == (state == "unmerged")
    assert (calls(program) == calls_of_bare(strict=strict)) == (state != "unmerged")
    assert any("lora" in name for name in program.state_dict) == (state != "fused")


@pytest.mark.slow
@states
def test_exported_saved_and_loaded(state: str, tmp_path: Path) -> None:
    torch.export.save(exported(state), tmp_path / "model.pt2")
    assert_answers(torch.export.load(tmp_path / "model.pt2").module(), state)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # the exporter's own
@states
def test_onnx(state: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    def converted(state: str) -> Any:
        with torch.no_grad():
            return torch.onnx.export(
                encoder(state), (ids(2, 5),), dynamo=True, dynamic_shapes=shapes(), verbose=False
            )

    program, bare = converted(state), converted("bare")
    named = [name for name in program.model.graph.initializers if "lora" in name]
    assert not named or state == "unmerged"  # where the exporter folds what it can into tensors without names
    operations = [[node.op_type for node in p.model.graph] for p in (program, bare)]
    assert (operations[0] == operations[1]) == (state != "unmerged")
    onnxruntime = pytest.importorskip("onnxruntime")
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert_answers(lambda x: session.run(None, {"ids": x.numpy()})[0], state)


class Together(nn.Module):
    """What is served: a fused and a merged model, compiled at once, which takes a minute as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList(map(encoder, ["fused", "merged"]))

    def forward(self, ids: Tensor) -> list[Tensor]:
        return [model(ids) for model in self.models]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's own
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    with torch.no_grad():
        program = torch.export.export(Together(), (ids(2, 5),), dynamic_shapes=shapes())
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    run = torch._inductor.aoti_load_package(package)
    for i, state in enumerate(["fused", "merged"]):
        assert_answers(lambda x, i=i: run(x)[i], state)
