"""What is said before, during and after a run."""

from __future__ import annotations

import argparse
import math
import platform
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

import minilora
from finetune.batches import Batches
from finetune.sources import Sources, embedded_data

FEW_STEPS = 200
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
    packages = ("torch", "transformers", "datasets", "accelerate")
    versions = {"python": platform.python_version(), "minilora": minilora.__version__}
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
        "arguments": {**arguments, "output": args.output and str(args.output)},
        "seed": args.seed,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "versions": versions | {name: version(name) for name in packages},
        "epochs": [],
    }


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
    if data["embedded"]:
        note = f"a small sample that comes with the project; it is not {metrics['task']}"
        lines.insert(3, f"           {note}")
    if notice := short_run(metrics):
        lines += ["", f"NOTICE: {notice}"]
    return "\n".join(lines) + "\n"


def short_run(metrics: dict[str, Any]) -> str | None:
    """Says of a run of few steps what to expect of it; None of a longer one."""
    steps = metrics["arguments"]["epochs"] * steps_per_epoch(metrics)
    if steps >= FEW_STEPS:
        return None
    return (
        f"{steps} {'step is' if steps == 1 else 'steps are'} few. They show that everything works, not how "
        "good the model becomes:\n        its accuracy may stay near that of guessing."
    )


def epoch_line(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Says in one line what came of an epoch."""
    line = (
        f"epoch {record['epoch']}/{metrics['arguments']['epochs']}  training loss {record['train_loss']:.4f}"
    )
    for key, name in (("held_out", "held out"), ("reported", metrics["data"]["reported_split"])):
        if key in record:
            line += f"  {name}: loss {record[key]['loss']:.4f}, accuracy {record[key]['accuracy']:.4f}"
    return f"{line}  ({record['train_seconds']:.0f} s of training)"


def report(metrics: dict[str, Any]) -> str:
    """Says after a run what came of it."""
    measured_on = f"{metrics['model']} on {metrics['data']['name']}"
    steps = metrics["arguments"]["epochs"] * steps_per_epoch(metrics)
    counts, final, checks = metrics["data"]["examples"], metrics["final"], metrics["checks"]
    lines = [
        "",
        f"Accuracy of {measured_on}, after {steps:,} steps:",
        f"  held out    {final['held_out']['accuracy']:.4f}  "
        f"({counts['held_out']:,} examples of the training set)",
        f"  {metrics['data']['reported_split']:<10}  {final['reported']['accuracy']:.4f}  "
        f"({counts['reported']:,} examples)",
        "",
        f"The saved file in a fresh model, against the trained one, on {checks['examples']:,} examples:",
    ]
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
