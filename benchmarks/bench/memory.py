"""Memory, as what tensors hold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from .profiling import quiet_profile
from .timing import no_garbage_collection


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors held during a call, above what they held before it.

    On CUDA, from `torch.cuda.max_memory_allocated`. On a CPU, the same quantity from the allocation events
    of torch's profiler: exact and repeatable, unlike the size of the process. Scratch memory inside
    oneDNN and memory that is not torch's are in neither. The CPU's figure takes no notice of the freeing
    of tensors that are older than the call.
    """
    with no_garbage_collection():
        return _cuda_peak(run) if device.type == "cuda" else _cpu_peak(run)


def _cuda_peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(run: Callable[[], object]) -> int:
    with quiet_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Addr"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    # By address, since the profiler still knows sizes from calls that it watched before: when an older tensor
    # is freed, it may take it for another one, which once lay there.
    held: dict[int, int] = {}
    total = peak = 0
    for _, address, change in changes:
        if change > 0:
            held[address] = change
            total += change
            peak = max(peak, total)
        else:
            total -= held.pop(address, 0)
    return peak


def resident_memory(tensors: Iterable[Tensor]) -> int:
    """Return the bytes behind some tensors, those shared counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
