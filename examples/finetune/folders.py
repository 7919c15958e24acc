"""The folder of a run's results, and what may lie in it beforehand."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.checkpoints import read_state
from finetune.errors import ExampleError

ADAPTER, METRICS, CURVES, STATE = "adapter.safetensors", "metrics.json", "curves.png", "resume.pt"


def make_folder(name: str, args: argparse.Namespace) -> Path:
    """Makes the folder for the results of a new run.

    Raises:
        ExampleError: It cannot be made, or another run has just taken it.
    """
    folder: Path = args.output or Path("runs", name, datetime.now().strftime("%Y%m%d-%H%M%S"))
    try:
        folder.mkdir(parents=True, exist_ok=args.output is not None)
    except OSError as error:
        raise ExampleError(
            f"cannot make the folder {folder} for the results ({error.strerror}); name another with --output"
        ) from error
    for result in _results(folder):  # of --overwrite; parts of two runs must not lie side by side
        result.unlink()
    return folder


def _results(folder: Path) -> list[Path]:
    return [path for path in (folder / name for name in (ADAPTER, METRICS, CURVES, STATE)) if path.exists()]


def require_free(folder: Path) -> None:
    """Refuses a folder that holds results already.

    Raises:
        ExampleError: It holds some, or is not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ExampleError(f"{folder} is not a folder; name another with --output")
    if results := _results(folder):
        found = ", ".join(path.name for path in results)
        resume = f", or continue that run with --resume {folder}" if folder / STATE in results else ""
        raise ExampleError(
            f"{folder} holds results already ({found}): name another folder with --output, or replace them "
            f"with --overwrite{resume}"
        )


def unfinished_run(folder: Path, title: str) -> dict[str, Any]:
    """Reads the state of the run that was interrupted in `folder`.

    Args:
        folder: Where its results are.
        title: Name of the task that it must be of.

    Raises:
        ExampleError: There is no run, or none that can be continued.
    """
    if not (folder / STATE).exists():
        if not (folder / METRICS).exists():
            raise ExampleError(f"--resume: there is no run in {folder}")
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        if metrics["completed"]:
            raise ExampleError(f"--resume: the run in {folder} is complete")
        raise ExampleError(
            f"--resume: no epoch of the run in {folder} was finished; start it again, with --output {folder} "
            "--overwrite if its results are to go to the same folder"
        )
    state = read_state(folder / STATE)
    task = state["metrics"]["task"]
    if task != title:
        raise ExampleError(f"--resume: the run in {folder} is one of {task}, not of {title}")
    return state
