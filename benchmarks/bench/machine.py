"""The machine that a benchmark ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import minilora

PACKAGES = ("minilora", "torch", "safetensors", "transformers", "peft", "loralib", "adapters")
MATRIX_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def describe_environment(device: torch.device) -> dict[str, object]:
    """Return what a reader needs to judge the figures: hardware, threads, versions. No names of machines."""
    return {
        "device": _gpu() if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    precision = torch.get_float32_matmul_precision()
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
        f"float32 matmul precision {precision!r}"
    )


def _cpu() -> str:
    name, flags = platform.processor(), set()
    with contextlib.suppress(OSError):
        information = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^model name\s*:\s*(.+)$", information, re.MULTILINE):
            name = found[1]
        if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", information, re.MULTILINE):
            flags = set(found[1].split())
    features = [flag for flag in MATRIX_FEATURES if flag in flags]
    return ", ".join([name or platform.machine(), f"{os.cpu_count()} cores", *features])


def _version(package: str) -> str | None:
    if package == "minilora":
        return minilora.__version__  # also where it is run from a checkout
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
