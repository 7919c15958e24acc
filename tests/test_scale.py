"""Ten thousand sites: what it takes to save, load or refuse them grows with their number, not its square.

Steps are counted, not seconds: the lines of the library that run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import minilora
from minilora import LoRAConfig, MiniLoRAError
from minilora.files.formats import native
from minilora.files.formats.peft import config as peft_config
from minilora.files.formats.peft.config import PeftLoraConfig
from minilora.files.tensors import digest, entries_of, read_tensors, write_tensors
from minilora.manifest import Manifest
from minilora.plan import build
from minilora.sites import Sites

LIBRARY = str(Path(minilora.__file__).parent)
FEW, MANY = 40, 160  # four times as many: four times the steps, or sixteen


def steps(act: Callable[[], object]) -> int:
    """Return how many lines of the library an act runs; it may be refused."""
    count = 0

    def lines(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += 1
        return lines

    def calls(frame: FrameType, event: str, argument: object) -> Any:
        return lines(frame, event, argument) if frame.f_code.co_filename.startswith(LIBRARY) else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        act()
    except MiniLoRAError:
        pass
    finally:
        sys.settrace(before)
    return count


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)


def bare(n: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict((f"block_{i}", Block()) for i in range(n)))


def irregular(n: int) -> nn.Module:
    """Return a model with another config at each site, and a head at each block."""
    model = bare(n)
    configs = tuple((LoRAConfig(r=1 + i % 3, alpha=i + 1), (f"block_{i}.up",)) for i in range(n))
    plan, problems = build(Manifest(configs, tuple(f"block_{i}.norm" for i in range(n))), Sites(model))
    assert not problems
    plan.put_in_place()
    return minilora.freeze(model)


def regular(n: int) -> nn.Module:
    return minilora.inject(bare(n), "up", LoRAConfig(r=2))


class Echoes(nn.Module):
    """Full names, "block_0.up" and so on, that are the ends of longer ones."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for i in range(n):
            self.add_module(f"block_{i}", Block())
        self.inner = bare(n)


def wide(n: int) -> nn.Module:
    model = bare(n)
    for block in model:
        block.up = nn.Linear(5, 5)
    return model


def saved(model: nn.Module, format: Any = "minilora") -> Path:
    path = Path(tempfile.mkdtemp()) / "a"
    minilora.save(model, path, format=format)
    return path


def saving(make: Callable[[int], nn.Module], format: Any) -> Callable[[int], Callable[[], object]]:
    def prepared(n: int) -> Callable[[], object]:
        model = make(n)
        return lambda: saved(model, format)

    return prepared


def loading(
    make: Callable[[int], nn.Module],
    format: Any,
    spoil: Callable[[Path], object] = lambda path: None,
    into: Callable[[int], nn.Module] = bare,
) -> Callable[[int], Callable[[], object]]:
    def prepared(n: int) -> Callable[[], object]:
        path, model = saved(make(n), format), into(n)
        spoil(path)
        return lambda: minilora.load(model, path)

    return prepared


def with_tensors(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)

    return spoil


def with_config(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        with_tensors(dict)(path)  # without the record of what the config was
        file = path / "adapter_config.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return spoil


def with_manifest(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        metadata, tensors = read_tensors(path)
        del metadata[native.DIGEST_KEY]
        metadata["minilora"] = json.dumps(change(json.loads(metadata["minilora"])))
        write_tensors(path, entries_of(tensors), metadata | {native.DIGEST_KEY: digest(tensors, metadata)})

    return spoil


def echoing(n: int) -> nn.Module:
    model = Echoes(n)
    sites = tuple(f"block_{i}.up" for i in range(n))
    plan, _ = build(Manifest(((LoRAConfig(r=2), sites),), ()), Sites(model))
    plan.put_in_place()
    return minilora.freeze(model)


def nan(n: int) -> nn.Module:
    model = regular(n)
    for tensor in minilora.adapter_state_dict(model).values():
        tensor.fill_(torch.nan)
    return model


ACTS: dict[str, Callable[[int], Callable[[], object]]] = {
    "save": saving(irregular, "minilora"),
    "load": loading(irregular, "minilora"),
    "load anew": loading(irregular, "minilora", into=irregular),
    "save what is not finite": saving(nan, "minilora"),
    "load into other widths": loading(regular, "minilora", into=wide),
    "load into other sites": loading(regular, "minilora", into=lambda n: nn.Sequential(nn.Linear(4, 4))),
    "save for PEFT": saving(irregular, "peft"),
    "save for PEFT, one config": saving(regular, "peft"),
    "save for PEFT, names that end others": saving(echoing, "peft"),
    "load PEFT's": loading(irregular, "peft"),
    "load PEFT's, names that end others": loading(echoing, "peft", into=Echoes),
    "load PEFT's, dots that are any character": loading(
        irregular,
        "peft",
        with_config(
            lambda c: (
                c
                | {
                    "rank_pattern": {
                        key.replace("\\", ""): value for key, value in c["rank_pattern"].items()
                    },
                    "alpha_pattern": {
                        key.replace("\\", ""): value for key, value in c["alpha_pattern"].items()
                    },
                }
            )
        ),
    ),
    "load PEFT's, every B missing": loading(
        irregular, "peft", with_tensors(lambda t: {k: v for k, v in t.items() if "lora_B" not in k})
    ),
    "load PEFT's, every head missing": loading(
        irregular, "peft", with_tensors(lambda t: {k: v for k, v in t.items() if "lora" in k})
    ),
    "load PEFT's, no head named": loading(
        irregular, "peft", with_config(lambda c: c | {"modules_to_save": None})
    ),
    "load PEFT's, no site named": loading(
        irregular, "peft", with_config(lambda c: c | {"target_modules": ["x"]})
    ),
    "load PEFT's, all ranks wrong": loading(
        irregular, "peft", with_config(lambda c: c | {"rank_pattern": {}, "r": 9})
    ),
    "load PEFT's, into other sites": loading(
        irregular, "peft", into=lambda n: nn.Sequential(nn.Linear(4, 4))
    ),
}


@pytest.mark.parametrize("act", ACTS)
def test_the_steps_grow_with_the_number_of_sites(act: str) -> None:
    few, many = (steps(ACTS[act](n)) for n in (FEW, MANY))
    assert 100 < few < many < 6 * few


def test_the_steps_are_counted() -> None:
    def quadratic(n: int) -> Callable[[], object]:
        model = regular(n)
        return lambda: [Sites(model) for _ in range(n)]

    assert steps(quadratic(MANY)) > 10 * steps(quadratic(FEW))


def test_names_repeated_a_hundred_thousand_times(tmp_path: Path) -> None:
    """As many as a header has room for; were they held against each other, this would take hours."""
    path = saved(irregular(1))
    with_manifest(lambda m: m | {"trainable": ["block_0.norm"] * 100_000})(path)
    with pytest.raises(MiniLoRAError, match=r"'block_0\.norm': listed twice to be trained in full"):
        minilora.load(bare(1), path)
    with_manifest(lambda m: m | {"trainable": [], "injections": m["injections"] * 3})(path)
    with pytest.raises(MiniLoRAError, match="listed twice for lora"):
        minilora.load(bare(1), path)


@pytest.mark.parametrize(
    "expression",
    [r"layer\.\d+\.query", "a|b", "[ab]", "query$", "a.b", "^a.b", r"^a\.b", "", ".", "a.", "x(y)?"],
)
def test_what_is_looked_up_is_what_the_expressions_match(expression: str) -> None:
    """Against `re`, for names with dots in all places."""
    import re

    from minilora.files.formats.peft import matching

    names = [
        "a.b",
        "axb",
        "x.a.b",
        "a.b.a.b",
        "a.bx.a.b",
        "x.axb",
        "a.b.c",
        "query",
        "layer.3.query",
        "a",
        "b",
        "x",
        "xy",
        "",
        "a\n",
        "a.b\n",
    ]
    for around, parts in (
        (matching.around_pattern, matching.end_parts),
        (matching.around_left_out, matching.inner_parts),
    ):
        for others in ([expression], ["zzz", expression], [expression, "a.b"], ["a.b", expression]):
            found = matching.Expressions(others, around, parts)
            for name in names:
                expected = next((i for i, text in enumerate(others) if re.match(around(text), name)), None)
                assert found.first(name) == expected, (others, name)
    for name in names:
        matched = bool(expression) and re.fullmatch(expression, name) is not None
        assert matching.NameMatch(expression)(name) == matched
        ended = name == expression or name.endswith(f".{expression}")
        assert matching.NameMatch([expression])(name) == ended
        assert (matching.LooseEnds([expression]).of(name) == [expression]) == name.endswith(expression)


def test_what_a_config_means_does_not_depend_on_how_it_says_it() -> None:
    def meaning(**fields: Any) -> str:
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"], **fields}
        return PeftLoraConfig.from_dict(config).meaning(["0.query", "1.query"])

    assert meaning() == meaning(target_modules=".*query", base_model_name_or_path="x", lora_alpha=8.0)
    assert meaning() == meaning(r=2, rank_pattern={"query": 4})
    for other in (
        {"r": 5},
        {"lora_alpha": 9},
        {"lora_dropout": 0.5},
        {"use_rslora": True},
        {"rank_pattern": {"0.query": 5}},
    ):
        assert meaning() != meaning(**other)
    assert peft_config.CONFIG_FILE == "adapter_config.json"
