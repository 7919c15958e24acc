"""accelerate: a run that is resumed ends in the bits of one that is not; the examples in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_examples import EXAMPLES, SAMPLE, TINY_RUN, read_metrics, tiny_bert  # noqa: F401  a fixture
from torch import nn

import minilora
from minilora import LoRAConfig

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("accelerate_anew")

STEPS, SAVED_AT, PROCESSES = 5, 2, 2
FILE = "adapter.safetensors"


def leave_out_the_base(accelerator: accelerate.Accelerator) -> None:
    """Have an adapter file in the place of the model."""

    def write(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            minilora.save(accelerator.unwrap_model(models[0]), f"{folder}/{FILE}")

    def read(models, folder):
        minilora.load(accelerator.unwrap_model(models.pop()), f"{folder}/{FILE}")

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)


def train(folder: Path, *, slim: bool, resume: bool) -> nn.Module:
    """Train for some steps, with a state saved on the way, or from that state on."""
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 3))
    minilora.inject(model, ["0"], LoRAConfig(r=2, dropout=0.2), trainable=["3"])
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if slim:
        leave_out_the_base(accelerator)
    batches = torch.randn(STEPS, 4, 8, generator=torch.Generator().manual_seed(1))
    mine = batches.chunk(accelerator.num_processes, 1)[accelerator.process_index]
    torch.manual_seed(10 * resume + accelerator.process_index)  # of the dropouts, which the state brings back
    if resume:
        accelerator.load_state(str(folder))
    for step in range(SAVED_AT if resume else 0, STEPS):
        accelerator.backward(model(mine[step]).square().mean())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 == SAVED_AT and not resume:
            accelerator.save_state(str(folder))
    return accelerator.unwrap_model(model)


def resumes(folder: Path, *, slim: bool) -> None:
    expected = train(folder, slim=slim, resume=False).state_dict()
    found = train(folder, slim=slim, resume=True).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    names = {path.name for path in folder.iterdir()}
    assert (FILE in names, "model.safetensors" in names) == (slim, not slim)


@pytest.mark.parametrize("slim", [False, True])
def test_a_resumed_run_is_one_that_was_not_interrupted(slim, tmp_path):
    resumes(tmp_path, slim=slim)


def in_one_of_two(rank: int, folder: Path) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)},
        **{"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
    }
    torch.distributed.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=PROCESSES
    )
    for slim in (False, True):
        resumes(folder / f"slim-{slim}", slim=slim)
        assert accelerate.Accelerator(cpu=True).num_processes == PROCESSES
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_so_it_is_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(in_one_of_two, (tmp_path,), PROCESSES)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, PROCESSES])
def test_an_example_under_its_launchers(processes, tiny_bert, tmp_path):  # noqa: F811
    """accelerate starts several processes on CPUs by MPI alone; torchrun needs none."""
    pytest.importorskip("matplotlib")
    launchers = {
        1: ["accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"],
        PROCESSES: ["torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"],
    }
    run = subprocess.run(
        [
            *(sys.executable, "-m", *launchers[processes], str(EXAMPLES / "sst2.py")),
            *("--model", tiny_bert, "--data", str(SAMPLE), *TINY_RUN, "--output", str(tmp_path / "run")),
        ],
        env={
            **os.environ,
            **{"ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"},
            "PYTHONPATH": os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")])),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "run" / FILE).exists()
    assert read_metrics(tmp_path / "run")["final"]
