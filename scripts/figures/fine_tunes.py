"""The fine-tunes: what the example scripts gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sweep
from bench.markdown import grid
from bench.parity import SPLITS, Parity, accuracies, accuracy, gaps
from bench.unmeasured import NOT_MEASURED

from .sources import newest, run


def parity() -> Parity:
    """The newest run of both libraries side by side."""
    return Parity.read(newest("parity-cpu"))


def imdb() -> str:
    """IMDB with each method."""
    lines = []
    for method in ("lora", "adapter", "both"):
        content = run(f"imdb-minilm-{method}")
        final = content["final"]
        lines.append(
            [
                method,
                f"{content['parameters']['trainable']:,}",
                f"{content['arguments']['lr']:g}",
                f"{content['epochs'][-1]['train_loss']:.4f}",
                ", ".join(f"{epoch['held_out']['accuracy']:.4f}" for epoch in content["epochs"]),
                f"{final['reported']['accuracy']:.4f}",
            ]
        )
    counts = content["data"]["examples"]
    columns = (f"held out ({counts['held_out']:,}), by epoch", f"test ({counts['reported']:,})")
    header = ["method", "trainable", "lr", "training loss, last epoch", *columns]
    return f"{grid(header, lines)}\n\n{facts(content)}"


def encoders() -> str:
    """SST-2 on a share of its sentences, with the usual encoder and with a larger one."""
    runs = [run(name) for name in ("sst2-minilm-2000", "sst2-mpnet-2000")]
    lines = [
        [
            content["model"].removesuffix(" (local folder)"),
            f"{content['parameters']['base']:,}",
            f"{content['parameters']['trainable']:,}",
            f"{content['epochs'][-1]['train_loss']:.4f}",
            *(f"{content['final'][split]['accuracy']:.4f}" for split in SPLITS),
            f"{sum(epoch['train_seconds'] for epoch in content['epochs']):,.0f}",
        ]
        for content in runs
    ]
    header = ["encoder", "parameters", "trained", "training loss, last epoch", *splits(runs[0])]
    return f"{grid([*header, 'seconds of training'], lines)}\n\n{facts(runs[1])}"


def full_sst2() -> str:
    """SST-2 in full: one run, epoch by epoch."""
    content = run("sst2-minilm-lora")
    lines = [
        [
            str(epoch["epoch"]),
            f"{epoch['train_loss']:.4f}",
            f"{epoch['held_out']['accuracy']:.4f}",
            f"{epoch['reported']['accuracy']:.4f}",
        ]
        for epoch in content["epochs"]
    ]
    return f"{grid(['after epoch', 'training loss', *splits(content)], lines)}\n\n{facts(content)}"


def sample() -> str:
    """The sentences that come with the project: one run for each seed."""
    runs = [run(f"sample-minilm-lora-{seed}") for seed in range(3)]
    lines = [
        [
            str(content["seed"]),
            f"{content['epochs'][-1]['train_loss']:.4f}",
            *(
                f"{content['before'][split]['accuracy']:.4f} -> {content['final'][split]['accuracy']:.4f}"
                for split in SPLITS
            ),
            f"{content['seconds']:.0f}",
        ]
        for content in runs
    ]
    header = ["seed", "training loss, last epoch", *splits(runs[0]), "seconds, start to end"]
    table = grid(header, lines)
    return f"{table}\n\n{facts(runs[0])}"


def decoder() -> str:
    """The decoder that learns to answer: one run for each seed."""
    runs = [run(f"questions-decoder-{seed}") for seed in range(3)]
    lines = [
        [
            str(content["arguments"]["seed"]),
            f"{content['train_loss']['questions'][-1]:.4f}",
            *(
                f"{content['perplexity'][text]['before']:.1f} -> {content['perplexity'][text]['after']:.1f}"
                for text in ("questions", "sentences")
            ),
            f"{sum(not entry['before'] for entry in content['written'])} of {len(content['written'])}",
            f"{sum(not entry['after'] for entry in content['written'])} of {len(content['written'])}",
        ]
        for content in runs
    ]
    header = ["seed", "training loss, last epoch", "perplexity, questions", "perplexity, sentences"]
    table = grid([*header, "no answer before", "no answer after"], lines)
    checks = {name: [content["checks"][name] for content in runs] for name in runs[0]["checks"]}
    held = ", ".join(f"{name} in {sum(each)} of {len(each)} runs" for name, each in checks.items())
    parameters, versions = runs[0]["parameters"], runs[0]["versions"]
    told = [
        f"trained: {parameters['trainable']:,} of {parameters['base']:,} parameters",
        f"the same tokens again: {held}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "\n".join([table, "", *(f"- {line}" for line in told)])


def answers() -> str:
    """What the decoder of the first seed writes."""
    written = run("questions-decoder-0")["written"]
    lines = [f"| {entry['question']} | {entry['after'].strip()} |" for entry in written]
    return "\n".join(["| question, held out | answer, drawn |", "|---|---|", *lines])


def splits(content: dict[str, Any]) -> list[str]:
    """The splits that a run was measured on, with their sizes, as headers."""
    counts = content["data"]["examples"]
    return [f"{words} ({counts[split]:,})" for split, words in SPLITS.items()]


def facts(content: dict[str, Any]) -> str:
    """What else the record of a run says: parameters, the checks, the software."""
    parameters, checks = content["parameters"], content["checks"]
    share = 100 * parameters["trainable"] / parameters["base"]
    told = [
        f"trained: {parameters['trainable']:,} of {parameters['base']:,} parameters, {share:.2g} %",
        *(
            f"{name}: {check['differ']} of {checks['examples']} predictions differ, largest difference "
            f"between logits {check['largest_difference']:.1e}"
            for name, check in checks.items()
            if isinstance(check, dict)
        ),
        f"gradients clipped to norm {norm:g}"
        if (norm := content["arguments"].get("max_grad_norm"))
        else "gradients not clipped",
        ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
    ]
    return "\n".join(f"- {line}" for line in told)


def fine_tunes() -> str:
    """README: what the two fine-tunes gave."""
    both = parity()
    seeds = f"{len(both.seeds)} seeds" if len(both.seeds) > 1 else "one seed"
    lines = [
        [
            f"SST-2, {both.facts['examples']['train']:,} sentences, LoRA, {seeds}",
            f"{both.facts['trainable']:,}",
            *(
                ", ".join(f"{accuracy(both, name, split)} {words}" for split, words in SPLITS.items())
                for name in ("minilora", "PEFT")
            ),
        ]
    ]
    for method, title in {"lora": "LoRA", "adapter": "bottleneck adapters", "both": "both"}.items():
        content = run(f"imdb-minilm-{method}")
        examples = content["data"]["examples"]
        lines.append(
            [
                f"IMDB, {examples['train']:,} reviews, {title}, one seed",
                f"{content['parameters']['trainable']:,}",
                f"{content['final']['reported']['accuracy']:.4f} test ({examples['reported']:,})",
                NOT_MEASURED,
            ]
        )
    lines.append(["bert-base-uncased", "148,994", NOT_MEASURED, NOT_MEASURED])
    return grid(["fine-tune of all-MiniLM-L6-v2", "trainable", "accuracy", "PEFT, same batches"], lines)


SWEEPS = ("imdb-sweep", "imdb-sweep-lora", "imdb-sweep-warmup")


def imdb_sweeps() -> str:
    """What the held-out part says of methods, rates and warm-ups: all sweeps, on the same reviews."""
    runs = [each for name in SWEEPS for each in run(name)["runs"]]
    for each in runs:
        given = each["arguments"]
        each["options"] = {
            "method": given["method"],
            **{name: f"{given[name]:g}" for name in ("lr", "warmup")},
        }
    return sweep.table(runs)


BLOCKS: dict[str, Callable[[], str]] = {
    "fine-tunes": fine_tunes,
    "parity-accuracies": lambda: accuracies(parity()),
    "parity-gaps": lambda: gaps(parity()),
    "sst2-in-full": full_sst2,
    "sst2-sweep": lambda: sweep.table(run("sst2-sweep")["runs"]),
    "encoders": encoders,
    "sample": sample,
    "decoder": decoder,
    "decoder-answers": answers,
    "imdb": imdb,
    "imdb-sweep": imdb_sweeps,
}
