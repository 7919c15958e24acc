"""Everything that is to be known of a GPU, in one command: does it work there, and how fast is it?

    python benchmarks/gpu_report.py                          # an hour or so; all of it needs some 60 GiB
    python benchmarks/gpu_report.py --only train_speed       # a part of it
    python benchmarks/gpu_report.py --device cpu --quick     # shows that the commands are right, no more

The tests on devices come first, then every benchmark in its set-ups, each in a process of its own; what fails
stops nothing else. Results go where the benchmarks put them, by name; a table of what ran comes last.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).parent
BERT, LLAMA = ("--layers", "12", "--batch", "32"), ("--model", "llama-1b", "--batch", "4", "--length", "512")
BF16 = ("--precision", "bf16-autocast", "bf16")
RUNS: dict[str, tuple[str, ...]] = {
    "train_speed-bert": ("train_speed", *BERT, "--precision", "fp32", "bf16-autocast", "bf16"),
    "train_speed-bert-dropout": ("train_speed", *BERT, *BF16, "--dropout", "0.1"),
    "train_speed-bert-dora": ("train_speed", *BERT, "--precision", "bf16-autocast", "--dora"),
    "train_speed-bert-compiled": ("train_speed", *BERT, "--precision", "bf16-autocast", "--compile"),
    "train_speed-llama-1b": ("train_speed", *LLAMA, *BF16),
    "train_speed-kinds": ("train_speed", "--precision", "fp32", *BF16[1:], "--kinds"),
    "train_speed-tokens": ("train_speed", "--sweep", "tokens"),
    "merge_speed-bert": ("merge_speed", "--batch", "32"),
    "merge_speed-llama-1b": ("merge_speed", *LLAMA),
    "merge_speed-llama-1b-bf16": ("merge_speed", *LLAMA, "--precision", "bf16"),
    "merge_speed-llama-1b-decode": ("merge_speed", "--model", "llama-1b", "--batch", "1", "--decode"),
    "many_adapters-llama-135m": ("many_adapters",),
    "overhead-bert": ("overhead",),
    "skinny_products": ("skinny_products",),
}
"""The benchmark and its options, by the name of its results."""


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return what is to be run, by name."""
    found = {}
    if "tests".startswith(args.only):
        found["tests"] = ["-m", "pytest", "-q", str(HERE.parent / "tests" / "test_devices.py")]
    stamp, kind = date.today().isoformat(), args.device
    folder = args.output or (Path("runs") / "benchmarks" if args.quick else HERE / "results")
    for name, (script, *options) in RUNS.items():
        if name.startswith(args.only):
            where = ["--device", kind, "--output", str(folder / f"{stamp}-{name}-{kind}.json")]
            quick = ["--quick", "--rounds", "1"] if args.quick else []
            found[name] = [str(HERE / f"{script}.py"), *options, *where, *quick]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run all; return 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models: the figures mean nothing")
    parser.add_argument("--only", default="", metavar="NAME", help="what begins so: tests, train_speed, ...")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: benchmarks/results)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu --quick shows that the commands are right")
    chosen = commands(args)
    if not chosen:
        parser.error(f"--only {args.only}: begins none of tests, {', '.join(RUNS)}")
    print(torch.cuda.get_device_name() if args.device == "cuda" else "CPU")
    outcome = {}
    for name, command in chosen.items():
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        started = time.monotonic()
        code = subprocess.run([sys.executable, *command], check=False).returncode
        outcome[name] = code, time.monotonic() - started
    print("\n| run | outcome | seconds |\n|---|---|---:|")
    for name, (code, seconds) in outcome.items():
        print(f"| {name} | {'done' if code == 0 else f'failed, exit code {code}'} | {seconds:.0f} |")
    return int(any(code for code, _ in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
