"""What is said before, during and after a run."""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import minilora
from finetune.arguments import ENOUGH_STEPS, EPOCHS
from finetune.batches import Batches
from finetune.folders import ADAPTER, CURVES, METRICS
from finetune.sources import Sources, embedded_data

NOT_RECORDED = ("overwrite", "resume")  # arguments that have no part in the result


def describe(
    title: str,
    method: str,
    args: argparse.Namespace,
    accelerator: Accelerator,
    sources: Sources,
    batches: Batches,
    summary: minilora.Summary,
) -> dict[str, Any]:
    """Starts the content of `metrics.json`: what is run, on what and with what."""
    arguments = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}
    return {
        "task": title,
        "completed": False,
        "method": method,
        "model": sources.model_source.name,
        "data": {
            "name": sources.data_source.name,
            "embedded": sources.data_source == embedded_data(),
            "reported_split": batches.reported_split,
            "examples": batches.counts(),
        },
        "parameters": {"trainable": summary.trainable, "base": summary.base},
        "bytes": {"base": summary.base * sources.model.dtype.itemsize},
        "arguments": {**arguments, "output": args.output and str(args.output)},
        "seed": args.seed,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "epochs": [],
    }


def versions() -> dict[str, str]:
    """What a run was made with."""
    packages = ("torch", "transformers", "datasets", "accelerate")
    own = {"python": platform.python_version(), "minilora": minilora.__version__}
    return own | {name: version(name) for name in packages}


def steps_per_epoch(metrics: dict[str, Any]) -> int:
    """Number of steps that each process takes in an epoch."""
    per_step = metrics["arguments"]["batch_size"] * metrics["processes"]
    return math.ceil(metrics["data"]["examples"]["train"] / per_step)


def plan(metrics: dict[str, Any]) -> str:
    """Says before a run what it will do."""
    args, data = metrics["arguments"], metrics["data"]
    counts = data["examples"]
    per_epoch = steps_per_epoch(metrics)
    norm = args["max_grad_norm"]
    clipping = f"gradients clipped to norm {norm:g}" if norm else "gradients not clipped"
    lines = [
        f"{metrics['task']}: {metrics['method']}",
        f"  model    {metrics['model']}; its classifier is new and is trained in full",
        f"  data     {data['name']}: {counts['train']:,} to train on, {counts['held_out']:,} held out, "
        f"{counts['reported']:,} for {data['reported_split']}",
        f"  recipe   epochs: {args['epochs']}, batch size: {args['batch_size']}, AdamW, "
        f"learning rate {args['lr']:g} with a linear schedule,",
        f"           {args['warmup']:.0%} of it warm-up; {clipping}; up to {args['max_length']} tokens; "
        f"seed {args['seed']}",
        f"  steps    {args['epochs'] * per_epoch:,}: {per_epoch:,} in each epoch",
        f"  device   {metrics['device']}, mixed precision: {args['mixed_precision']}, "
        f"processes: {metrics['processes']}",
    ]
    if metrics["epochs_chosen"] and args["epochs"] > EPOCHS:
        lines[-2] += f" ({EPOCHS} epochs would be {EPOCHS * per_epoch:,}, too few; see --epochs)"
    if data["embedded"]:
        note = f"a small sample that comes with the project; it is not {metrics['task']}"
        lines.insert(3, f"           {note}")
    if notice := short_run(metrics):
        lines += ["", f"NOTICE: {notice}"]
    return "\n".join(lines) + "\n"


def short_run(metrics: dict[str, Any]) -> str | None:
    """Says of a run of few steps what to expect of it; None of a longer one."""
    steps = metrics["arguments"]["epochs"] * steps_per_epoch(metrics)
    if steps >= ENOUGH_STEPS:
        return None
    return (
        f"{steps} {'step is' if steps == 1 else 'steps are'} few. They show that everything works, not how "
        "good the model becomes:\n        its accuracy may stay near that of guessing."
    )


def heading(metrics: dict[str, Any]) -> str:
    """Names the columns of the lines that follow, one for each epoch."""
    names = "".join(f"{name:20}" for _, name in _splits(metrics))
    return f"{'':13}{'training':10}{names}\n{'':13}{'loss':10}{'loss':8}{'accuracy':12}{'loss':8}accuracy"


def before_line(metrics: dict[str, Any]) -> str:
    """Says in one line what the classifier gives before it is trained."""
    return f"{'untrained':23}{_figures(metrics['before'], metrics)}".rstrip()


def epoch_line(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Says in one line what came of an epoch."""
    epoch = f"epoch {record['epoch']}/{metrics['arguments']['epochs']}"
    figures = _figures(record, metrics)
    return f"{epoch:13}{record['train_loss']:<10.4f}{figures}{record['train_seconds']:.0f} s of training"


def _figures(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    measured = [record.get(key) for key, _ in _splits(metrics)]
    return "".join(f"{m['loss']:<8.4f}{m['accuracy']:<12.4f}" if m else f"{'':20}" for m in measured)


def _splits(metrics: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """Key and name of each split that is measured."""
    return ("held_out", "held out"), ("reported", metrics["data"]["reported_split"])


def report(metrics: dict[str, Any]) -> str:
    """Says after a run what came of it."""
    measured_on = f"{metrics['model']} on {metrics['data']['name']}"
    checks = metrics["checks"]
    lines = ["", *_gains(metrics), ""]
    lines.append(
        f"The saved file in a fresh model, against the trained one, on {checks['examples']:,} examples:"
    )
    for name in ("reloaded", "merged", "fused"):
        if checks[name] is None:
            lines.append(f"  {name:<9} does not apply: bottleneck adapters cannot be merged into a weight")
            continue
        verdict = "ok" if checks[name]["holds"] else "FAILED"
        lines.append(
            f"  {name:<9} {verdict}: {checks[name]['differ']} predictions differ; "
            f"largest difference between logits {checks[name]['largest_difference']:.1e}"
        )
    last = "reloaded" if checks["fused"] is None else "fused"
    lines += ["", f"Some sentences, by the {last} model ({measured_on}):"]
    for sentence in metrics["sentences"]:
        lines.append(f"  {sentence['label']} {sentence['probability']:.0%}  {sentence['text']}")
    return "\n".join(lines)


def _gains(metrics: dict[str, Any]) -> list[str]:
    """Accuracy before and after, and what it took."""
    steps = metrics["arguments"]["epochs"] * steps_per_epoch(metrics)
    of = {"held_out": " of the training set, which were not trained on", "reported": ""}
    lines = [
        f"Accuracy of {metrics['model']} on {metrics['data']['name']}, untrained and after {steps:,} steps:"
    ]
    for key, name in _splits(metrics):
        before = metrics.get("before", {}).get(key)
        was = f"{before['accuracy']:.4f} -> " if before else ""
        count = f"({metrics['data']['examples'][key]:,} examples{of[key]})"
        lines.append(f"  {name:<10}  {was}{metrics['final'][key]['accuracy']:.4f}  {count}")
    parameters, size = metrics["parameters"], metrics["bytes"]
    training = sum(record["train_seconds"] for record in metrics["epochs"])
    return [
        *lines,
        "",
        "What it took:",
        f"  trained     {parameters['trainable']:,} parameters, "
        f"{parameters['trainable'] / parameters['base']:.2%} of the model's {parameters['base']:,}",
        f"  file        {size['adapter'] / 1e6:.2f} MB; the model's weights have {size['base'] / 1e6:.1f} MB",
        f"  time        {metrics['seconds']:.0f} s, {training:.0f} s of them training",
    ]


def left_behind(folder: Path) -> str:
    """Says after a run where its results are."""
    return (
        f"In {folder}:\n"
        f"  {CURVES:<20} loss and accuracy, drawn\n"
        f"  {ADAPTER:<20} what was trained; minilora.load(model, path) puts it on the base\n"
        f"  {METRICS:<20} every figure"
    )
