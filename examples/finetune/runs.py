"""One run from start to end: its folder, its records, what is left after Ctrl-C."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import minilora
from finetune import interrupts, reports
from finetune.arguments import enough_epochs
from finetune.batches import Batches
from finetune.checkpoints import Stateful, restore, write_state
from finetune.curves import plot_curves
from finetune.errors import ExampleError
from finetune.folders import ADAPTER, CURVES, METRICS, STATE, make_folder, require_free, unfinished_run
from finetune.progress import follow
from finetune.sources import Sources


def start(fine_tune: Callable[[Run], int], name: str, title: str, args: argparse.Namespace) -> int:
    """Starts a fine-tune and turns what can go wrong into a message and an exit code.

    Args:
        fine_tune: The script's story.
        name: The script's name without `.py`, and the folder of its results under `runs/`.
        title: Name of the task in the output.
        args: What `arguments.parse` has parsed.

    Returns:
        0 when all went well, 1 when a check failed, 2 when the run could not be done, 130 when it was
        interrupted.
    """
    interrupts.raise_again()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        run = Run(name, title, args)
        code = fine_tune(run)
        run.accelerator.end_training()
    except (ExampleError, minilora.MiniLoRAError) as error:
        print(f"{name}.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'Interrupted.'}", file=sys.stderr)
        return interrupts.EXIT_CODE
    return code


class Run:
    """A run and what is written of it; in all that it does, only the main process writes."""

    def __init__(self, name: str, title: str, args: argparse.Namespace) -> None:
        """Refuses what cannot be done, before anything is loaded.

        Raises:
            ExampleError: The folder for the results holds some already, the run to resume cannot be
                resumed, or the precision needs a device that is not there.
        """
        self.started = time.perf_counter()
        self.name, self.title = name, title
        self.state: dict[str, Any] | None = None
        if args.resume is not None:
            self.state = unfinished_run(args.resume, title)
            args = argparse.Namespace(**self.state["metrics"]["arguments"], resume=args.resume)
            self.started -= self.state["seconds"]
        elif args.output is not None and not args.overwrite:
            require_free(args.output)
        self.args = args
        try:
            self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        except ValueError as error:
            raise ExampleError(f"--mixed-precision {args.mixed_precision}: {error}") from error
        self.folder = Path()
        self.metrics: dict[str, Any] = {}
        self.step_losses: list[float] = []

    @property
    def adapter(self) -> Path:
        """Where the adapter is saved."""
        return self.folder / ADAPTER

    def choose_epochs(self, batches: Batches) -> int:
        """Settles `args.epochs` where the command line says nothing, by the number of batches."""
        steps = math.ceil(len(batches.train) / self.accelerator.num_processes)  # of an epoch
        self.epochs_chosen = self.args.epochs is None
        self.args.epochs = self.args.epochs or enough_epochs(steps)
        return int(self.args.epochs)

    @contextmanager
    def recording(
        self,
        method: str,
        sources: Sources,
        batches: Batches,
        model: nn.Module,
        optimizer: Stateful,
        schedule: Stateful,
    ) -> Iterator[None]:
        """Makes the folder, says what will be done and, resuming, puts everything back.

        If Ctrl-C ends the block, what has been learnt so far is kept, and the KeyboardInterrupt that
        goes on says so.

        Args:
            method: What is injected, in words.
            sources: What was loaded.
            batches: What was made of it.
            model: The injected model; like the next two, as `accelerator.prepare` returned it.
            optimizer: The optimizer.
            schedule: The learning rate's schedule.

        Raises:
            ExampleError: The folder cannot be made, or the run to resume was another one.
        """
        accelerator = self.accelerator
        bare = accelerator.unwrap_model(model)
        summary = minilora.summary(bare)
        self.metrics = reports.describe(self.title, method, self.args, accelerator, sources, batches, summary)
        self.metrics["epochs_chosen"] = self.epochs_chosen
        self.order = batches.order
        self.parts: dict[str, Stateful] = {"optimizer": optimizer, "schedule": schedule}
        if accelerator.scaler is not None:  # of fp16
            self.parts["scaler"] = accelerator.scaler
        if self.state is not None:
            self.folder = self.args.resume
        elif accelerator.is_main_process:
            self.folder = make_folder(self.name, self.args)
        self.say(f"{reports.plan(self.metrics)}\nResults go to {self.folder}\n\n{summary}\n")
        self.say(reports.heading(self.metrics))
        if self.state is not None:
            self._resume(self.state, bare)
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._interrupted(bare)) from None

    def before(self, measure: Callable[[], dict[str, dict[str, float]]]) -> None:
        """Takes down what the new classifier gives untrained, by split; a resumed run has that on record."""
        if self.state is None:
            with torch.random.fork_rng(devices=[]):  # loaders draw; the training shall not depend on it
                self.metrics["before"] = measure()
            self.say(reports.before_line(self.metrics))

    def epochs(self) -> Iterator[int]:
        """Counts the epochs from 1, or from where the run was interrupted."""
        for epoch in range(len(self.metrics["epochs"]) + 1, self.args.epochs + 1):
            self.epoch = epoch
            self.epoch_started = time.perf_counter()
            yield epoch

    def steps(self, loader: DataLoader[Any], losses: Sequence[Tensor]) -> Iterator[Any]:
        """Yields the batches of an epoch and shows how far it is, with the last of `losses`."""
        return follow(loader, self._epoch_title(), losses, shown=self.accelerator.is_main_process)

    def trained(self, losses: Sequence[Tensor]) -> None:
        """Takes down the losses of an epoch's steps, averaged over the processes.

        Raises:
            ExampleError: A loss is no longer a finite number.
        """
        means: list[float] = self.accelerator.reduce(torch.stack(list(losses)), reduction="mean").tolist()
        if not all(map(math.isfinite, means)):
            raise ExampleError(f"the loss is no longer a number in {self._epoch_title()}: try a lower --lr")
        self.record: dict[str, Any] = {
            "epoch": self.epoch,
            "train_loss": sum(means) / len(means),
            "train_seconds": round(time.perf_counter() - self.epoch_started, 1),
        }
        self.means = means

    def evaluated(self, held_out: dict[str, float], reported: dict[str, float] | None) -> None:
        """Takes down what was measured after an epoch, and writes all that there is.

        The adapter's file has been saved before.
        """
        self.record["held_out"] = held_out
        if reported is not None:
            self.record["reported"] = reported
        self.metrics["epochs"].append(self.record)
        self.step_losses += self.means
        self.say(reports.epoch_line(self.record, self.metrics))
        history = {
            "metrics": self.metrics,
            "step_losses": self.step_losses,
            "seconds": time.perf_counter() - self.started,
        }
        write_state(
            self.folder / STATE,
            history,
            adapter=self.adapter,
            parts=self.parts,
            order=self.order,
            accelerator=self.accelerator,
        )
        if self.accelerator.is_main_process:
            self._write()

    def complete(self, checks: dict[str, Any], sentences: list[dict[str, Any]]) -> int:
        """Writes and says what came of the run; for the main process alone. Returns the exit code."""
        last = self.metrics["epochs"][-1]
        self.metrics["final"] = {name: last[name] for name in ("held_out", "reported")}
        self.metrics["checks"] = checks
        self.metrics["sentences"] = sentences
        self.metrics["completed"] = True
        self.metrics["bytes"]["adapter"] = self.adapter.stat().st_size
        self.metrics["seconds"] = round(time.perf_counter() - self.started, 1)
        self._write_metrics()
        (self.folder / STATE).unlink(missing_ok=True)
        self.say(reports.report(self.metrics))
        self.say(f"\n{reports.left_behind(self.folder)}")
        return 0 if all(check["holds"] for check in checks.values() if isinstance(check, dict)) else 1

    def say(self, text: str) -> None:
        """Prints in the main process, at once: a log is read while the run goes on."""
        self.accelerator.print(text, flush=True)

    def _epoch_title(self) -> str:
        return f"epoch {self.epoch}/{self.args.epochs}"

    def _write(self) -> None:
        self._write_metrics()
        if self.metrics["epochs"]:
            plot_curves(self.metrics, self.step_losses, self.folder / CURVES)

    def _write_metrics(self) -> None:
        text = json.dumps(self.metrics, indent=2) + "\n"
        (self.folder / METRICS).write_text(text, encoding="utf-8")

    def _resume(self, state: dict[str, Any], model: nn.Module) -> None:
        then, now = state["metrics"], self.metrics
        before, after = _identity(then), _identity(now)
        differences = [
            f"{name}: {before[name]} then, {after[name]} now"
            for name in before
            if before[name] != after[name]
        ]
        if differences:
            raise ExampleError(f"{self.folder} holds another run; " + "; ".join(differences))
        if any(then[name] != now[name] for name in ("versions", "threads")):
            self.say(
                "NOTICE: packages or threads differ from those that the run began with, and its result\n"
                "        may differ from that of an uninterrupted run.\n"
            )
        if self.accelerator.is_main_process:
            self.adapter.write_bytes(state["adapter"].numpy().tobytes())
        self.accelerator.wait_for_everyone()
        minilora.load(model, self.adapter)
        self.metrics = then
        self.step_losses = state["step_losses"]
        restore(state, parts=self.parts, order=self.order, accelerator=self.accelerator)
        for record in then["epochs"]:
            self.say(f"{reports.epoch_line(record, then)} (before)")

    def _interrupted(self, model: nn.Module) -> str:
        """Writes what there is and says where it is and how to go on."""
        if not self.accelerator.is_main_process:
            return ""
        with interrupts.ignored():
            minilora.save(model, self.adapter)
            self._write()
        message = f"Interrupted. What has been learnt so far is in {self.adapter};\n"
        message += f"minilora.load(model, {str(self.adapter)!r}) reads it.\n"
        if not (self.folder / STATE).exists():
            return f"{message}No epoch was finished, so there is nothing to resume from."
        launcher = "accelerate launch" if self.accelerator.num_processes > 1 else "python"
        command = f"{launcher} {shlex.join([sys.argv[0], '--resume', str(self.folder)])}"
        finished = f"Epochs finished: {len(self.metrics['epochs'])} of {self.args.epochs}"
        return (
            f"{message}{finished}; {METRICS} and {CURVES} are there. To go on after the last:\n    {command}"
        )


def _identity(metrics: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    same = {name: metrics[name] for name in ("method", "model", "data", "parameters", "processes")}
    kind, _, _ = metrics["device"].partition(":")  # each process has one of its own: cuda:0, cuda:1
    return {**same, "device": kind}
