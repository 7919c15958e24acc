"""Every test starts from the same seed. And the files that tests of the command line work with."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return what loads a file of scripts/ as a module, and skips the test where there are no scripts."""

    def load(name: str) -> ModuleType:
        path = SCRIPTS / f"{name}.py"
        if not path.exists():
            pytest.skip("the scripts are not there")
        spec = importlib.util.spec_from_file_location(f"scripts.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def accelerate_anew() -> None:
    """accelerate keeps its settings for the life of a process; here a test begins without any."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return an adapter of BERT with random values."""
    from command_line import trained

    import minilora

    minilora.save(trained(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return the folder of that BERT."""
    from models import CASES

    CASES["bert"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"
