"""Every test starts from the same seed. And the files that tests of the command line work with."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
