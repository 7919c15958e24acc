"""The house: public names, light imports, arrows that point one way."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent

# From the ground up: a module may import what stands in the lines above its own, and nothing else.
HOUSE = [
    ["errors"],
    ["config", "files", "functional", "linear", "module"],
    ["adapter", "fingerprint", "head", "lora"],
    ["manifest", "targets"],
    ["merging", "training"],
    ["inject"],
    [
        "base_files",
        "describe",
        "formats.loralib",
        "formats.adapters",
        "formats.native",
        "formats.peft_config",
    ],
    ["formats.peft", "fuse_files"],
    ["checkpoint"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]


def modules():
    """Return the files of the package by dotted name; `formats/__init__.py` holds a docstring alone."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.parent == PACKAGE or path.name != "__init__.py"
    }


def imported(name, path):
    """Return the package's own modules that a file imports, anywhere in it."""
    found = set()
    above = ["minilora", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = above[: len(above) - node.level + 1] if node.level else []
            full = [*base, *(node.module or "").split(".")] if node.module else base
            # `from .formats import peft` names a module, `from .errors import several` what is in one.
            candidates = [".".join([*full, alias.name]) for alias in node.names] + [".".join(full)]
        elif isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        else:
            continue
        own = [c.removeprefix("minilora.") for c in candidates if c.split(".")[0] == "minilora"]
        found |= {c for c in own if c in modules()} or ({"__init__"} if "minilora" in own else set())
    return found


def arrows_that_point_up(house, arrows):
    floor = {name: level for level, names in enumerate(house) for name in names}
    return [(a, b) for a, targets in arrows.items() for b in targets if floor[b] >= floor[a]]


def test_every_module_has_its_place_and_imports_only_from_below():
    files = modules()
    assert sorted(files) == sorted(name for names in HOUSE for name in names)
    arrows = {name: imported(name, path) for name, path in files.items()}
    assert arrows_that_point_up(HOUSE, arrows) == []
    assert arrows["lora"] == {"config", "errors", "functional", "linear", "module"}  # the walk does see them


def test_the_test_of_arrows_sees_an_arrow_that_points_up():
    assert arrows_that_point_up([["a"], ["b"]], {"a": {"b"}, "b": {"a"}}) == [("a", "b")]
    assert arrows_that_point_up([["a", "b"]], {"a": {"b"}, "b": set()}) == [("a", "b")]


def test_no_drawer_for_odds_and_ends():
    assert not {"utils", "util", "helpers", "helper", "common", "misc"} & set(modules())


def test_all_is_sorted_and_complete():
    public = {
        name
        for name, value in vars(minilora).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert minilora.__all__ == sorted(public)


def test_the_public_names():
    assert {
        "AdapterConfig",
        "CheckpointError",
        "LoRAConfig",
        "MergeError",
        "MiniLoRAError",
        "TargetError",
        "adapter_state_dict",
        "disabled",
        "eject",
        "freeze",
        "fuse",
        "inject",
        "load",
        "merge",
        "save",
        "summary",
        "trainable_parameters",
        "unmerge",
    } <= set(minilora.__all__)


def test_version_and_types_are_shipped():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]\w+)?", minilora.__version__)
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("name", minilora.__all__)
def test_every_public_name_is_documented(name):
    """Each has a docstring of its own, and so has each public method that it brings."""
    value = getattr(minilora, name)
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")  # what a dataclass writes by itself
    for member, function in vars(value).items() if inspect.isclass(value) else ():
        if not member.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            assert function.__doc__, f"{name}.{member}"


@pytest.mark.parametrize(
    ("name", "inverse"),
    [
        ("inject", "eject"),
        ("eject", "inject"),
        ("merge", "unmerge"),
        ("unmerge", "merge"),
        ("save", "load"),
        ("load", "save"),
    ],
)
def test_docstrings_name_their_inverse(name, inverse):
    assert f"Inverse: `{inverse}`" in getattr(minilora, name).__doc__


def loaded_on_top(statement, base):
    """Return the modules that a statement loads in a fresh process and `base` alone does not."""
    program = (
        f"import sys\n{base}\nbefore = set(sys.modules)\n{statement}\nprint(*(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,  # which `python -c` searches first
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return {name for name in out.stdout.split() if name.split(".")[0] != "minilora"}


def test_importing_is_light():
    assert loaded_on_top("import minilora", base="import torch, safetensors.torch") == set()


def test_the_test_of_lightness_sees_a_module():
    assert "colorsys" in loaded_on_top("import colorsys", base="import json")
    assert "json" not in loaded_on_top("import colorsys", base="import json")


def test_no_module_level_state_is_changed_by_use():
    """No registries and no patches: torch's classes are as they were."""
    import torch
    from models import MLP

    before = {name: dict(vars(kind)) for name, kind in vars(torch.nn).items() if inspect.isclass(kind)}
    model = minilora.inject(MLP(), "up")
    model(torch.randn(2, 16))
    minilora.fuse(minilora.merge(model))
    after = {name: dict(vars(kind)) for name, kind in vars(torch.nn).items() if inspect.isclass(kind)}
    assert before == after
