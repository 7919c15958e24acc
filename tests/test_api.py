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

# The core from the ground up: a module may import what stands in the lines above its own, and nothing else.
CORE = [
    ["describing", "errors", "followers", "functional", "torch_internals"],
    ["names", "words"],
    ["config", "problems"],
    ["linear"],
    ["module"],
    ["adapter", "frozen", "layout", "sites", "view"],
    ["quantized"],
    ["mergeable", "targets", "ties", "trained", "variants"],
    ["weight"],
    ["lora", "rows"],
    ["lora_linear", "manifest", "training"],
    ["plan", "summary"],
    ["inject", "merging"],
]
# Two rooms are in the core: the variants, and quantised layers. On the core stands that of what processes
# share, on it the room of answers, on that those of files, of trainers and of banks, on all of them the
# package's public face, and on that the command line.
ROOMS = ["variants", "quantized", "distributed", "diagnosis", "files", "trainers", "bank", "cli"]
DOORS = ["__init__", "__main__"]


def modules():
    """Return the files of the package by dotted name; a room's `__init__.py` by the name of the room."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return names


def imported(name, path):
    """Return the package's own modules that a file imports, anywhere in it."""
    found = set()
    here = ["minilora", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            full = [*base, *(node.module or "").split(".")] if node.module else base
            # `from .formats import peft` names a module, `from .errors import several` what is in one.
            named = [".".join([*full, alias.name]) for alias in node.names]
            files = [name for name in named if name.removeprefix("minilora.") in modules()]
            candidates = files or [".".join(full)]
        elif isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        else:
            continue
        own = [c.removeprefix("minilora.") for c in candidates if c.split(".")[0] == "minilora"]
        found |= {c for c in own if c in modules()} or ({"__init__"} if "minilora" in own else set())
    return found


def room_of(name):
    return name.split(".")[0] if name.split(".")[0] in ROOMS else None


def floors(names):
    """Return the floor of each module: the core's one by one, then rooms and doors in turn."""
    floor = {name: level for level, names in enumerate(CORE) for name in names}
    rooms = {room: floor[room] for room in ROOMS if room in floor}
    order = ["distributed", "diagnosis", "files", "trainers", "bank", "__init__", "cli", "__main__"]
    above = rooms | {name: len(CORE) + level for level, name in enumerate(order)}
    return floor | {name: above[room_of(name) or name] for name in names if name not in floor}


def arrows_that_point_up(floor, arrows):
    """Return the imports from a floor that is not below; inside a room, see `round_trips`."""
    return [
        (a, b)
        for a, targets in arrows.items()
        for b in targets
        if floor[b] >= floor[a] and not (room_of(a) and room_of(a) == room_of(b))
    ]


def round_trips(arrows):
    """Return the modules that import themselves by way of others, and what imports those."""
    left = dict(arrows)
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_module_has_its_place_and_imports_only_from_below():
    files = modules()
    core = sorted(name for names in CORE for name in names if name not in ROOMS)
    assert sorted(name for name in files if not room_of(name)) == sorted([*core, *DOORS])
    arrows = {name: imported(name, path) for name, path in files.items()}
    assert arrows_that_point_up(floors(files), arrows) == []
    assert round_trips(arrows) == []
    # The walk does see them:
    assert arrows["linear"] == {"config", "torch_internals"}
    assert "files.saving" in arrows["files.loading"]
    assert arrows["__main__"] == {"cli"}


def test_the_test_of_arrows_sees_an_arrow_that_points_up():
    floor = {"a": 0, "b": 1, "files.c": 2, "cli.d": 3}
    assert arrows_that_point_up(floor, {"a": {"b"}, "b": {"a"}}) == [("a", "b")]
    assert arrows_that_point_up(floor | {"b": 0}, {"a": {"b"}, "b": set()}) == [("a", "b")]
    assert arrows_that_point_up(floor, {"a": {"files.c"}, "files.c": {"a", "cli.d"}}) == [
        ("a", "files.c"),
        ("files.c", "cli.d"),
    ]
    assert round_trips({"a": set(), "files.b": {"files.c", "a"}, "files.c": {"files.b"}}) == [
        "files.b",
        "files.c",
    ]
    assert round_trips({"a": set(), "b": {"a"}}) == []


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_file_is_long(name):
    assert len(modules()[name].read_text().splitlines()) <= 350


def code_lines(source):
    """Return how many lines hold code: no blank ones, comments or docstrings, which make reading quicker."""
    told = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(map(str.strip, source.splitlines()), start=1)
    return sum(bool(text) and text[0] != "#" for n, text in lines if n not in told)


def test_the_core_can_be_read_in_one_sitting():
    """All but the rooms."""
    core = {name: path.read_text() for name, path in modules().items() if not room_of(name)}
    assert sum(map(code_lines, core.values())) < 2900
    assert code_lines('"""Said."""\n\n# said\nx = 1\n\ndef f():\n    """Said."""\n    return x\n') == 3


def test_no_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [name for name in modules() if drawers & set(name.split("."))]


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
    assert loaded_on_top("import minilora", base="import torch") == set()


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
