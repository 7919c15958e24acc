"""What an import costs, each in a fresh process, in turn."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

import minilora

from .markdown import time_text
from .tables import Row, Table
from .timing import Contestant, race, wall_clock
from .unmeasured import is_installed

ADDED = "added"
COMPILED = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # as what is installed is: this very minilora, too
SOURCE = Path(minilora.__file__).parents[1]  # so that the fresh processes import this very minilora
CODE = """
import time
start = time.perf_counter()
import torch, safetensors.torch
{more}
seconds = time.perf_counter() - start
import resource, sys
try:
    words = open("/proc/self/status").read().split()
    peak = 1024 * int(words[words.index("VmHWM:") + 1])
except (OSError, ValueError):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(seconds, peak)
"""
"""Linux's `ru_maxrss` begins with what the process held that started this one, so it is the last choice."""


def measure_imports(packages: Mapping[str, str | None], *, rounds: int) -> Table:
    """Return the time and the memory of imports on top of torch's and safetensors'.

    Args:
        packages: by the name of the row, what to import; None for torch and safetensors alone, the first
            row, which the others are compared with.
        rounds: fresh processes for each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in packages}
    memory: dict[str, list[int]] = {name: [] for name in packages}
    reasons = {
        name: f"{package} is not installed"
        for name, package in packages.items()
        if package and not is_installed(package)
    }

    def fresh(name: str) -> None:
        package = packages[name]
        code = CODE.format(more=f"import {package}" if package else "")
        child = subprocess.run(
            [sys.executable, "-c", code],
            cwd=SOURCE,
            env=COMPILED,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            reasons[name] = child.stderr.strip().splitlines()[-1]
            return
        own_seconds, own_memory = child.stdout.split()
        seconds[name].append(float(own_seconds))
        memory[name].append(int(own_memory))

    # The children hold the watch: starting a process is not part of an import.
    race(
        [
            Contestant(name=name, run=lambda name=name: fresh(name))
            for name in packages
            if name not in reasons
        ],
        clock=wall_clock(torch.device("cpu")),
        rounds=rounds,
        warmup=min(1, rounds - 1),
    )
    reference = next(iter(packages))
    rows = []
    for name in packages:
        if name in reasons:
            rows.append(Row(name=name, reason=reasons[name]))
            continue
        own, bare = seconds[name][-rounds:], seconds[reference][-rounds:]  # without the warm-up
        extra = {}
        if name != reference:
            extra[ADDED] = statistics.median(a - b for a, b in zip(own, bare, strict=True))
        rows.append(Row(name=name, samples=own, memory=round(statistics.median(memory[name])), extra=extra))
    return Table(
        title="import, in a fresh process",
        reference=reference,
        rows=rows,
        memory_label="resident memory of the process",
        formats={ADDED: time_text},
    )
