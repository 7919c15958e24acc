"""Does minilora train like PEFT? The SST-2 recipe with both, step by step, on the same batches.

    python benchmarks/parity.py --model minilm --data FOLDER --seeds 0 1 2

For each seed, `examples/sst2.py`'s recipe begins once: minilora injects, and PEFT loads the very same initial
values from the folder that `save(format="peft")` writes. Then every batch is given to both, in turn, with the
same elements dropped (PEFT's dropout draws as minilora's does, here, and so costs as little); each step is
timed, and the two change places from step to step. At the end both are measured on the held-out examples and
on the validation split.

A seed that `--output` holds already, with the same recipe, is not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the recipe is that of the example

import datasets
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from bench.machine import describe_environment
from bench.parity import Parity, Seed, draw_parity, parity_text
from bench.reports import RESULTS
from finetune.arguments import EPOCHS, argument_parser, positive_float, positive_int, seed_number
from finetune.batches import Batches, make_batches
from finetune.evaluation import evaluate
from finetune.progress import follow
from finetune.sources import Sources, open_sources
from peft import PeftModel
from sst2 import DATA, MAX_LENGTH
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

import minilora
from minilora.variants.dropout import dropped

LIBRARIES = ("minilora", "PEFT")
RECIPE = (
    "epochs",
    "batch_size",
    "max_length",
    "lr",
    "warmup",
    "max_grad_norm",
    "rank",
    "alpha",
    "dropout",
    "limit",
)


class Dropped(nn.Module):
    """PEFT's dropout, drawn as minilora draws, so that both libraries drop the same elements."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropped(x, self.p if self.training else 0.0)


class Contestant:
    """One library's model, its optimizer and its schedule; what it did so far."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, steps: int) -> None:
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr)
        warmup = math.ceil(args.warmup * steps)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, warmup, steps)
        self.max_grad_norm = args.max_grad_norm
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: dict[str, Tensor], seed: int) -> None:
        """Take one step of the recipe; `seed` decides what dropout drops."""
        torch.manual_seed(seed)
        started = time.perf_counter()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        loss = F.cross_entropy(self.model(**inputs).logits, batch["labels"])
        loss.backward()
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # on a GPU, waits for the step to end
        self.seconds.append(time.perf_counter() - started)


def contestants(
    sources: Sources, args: argparse.Namespace, steps: int, device: torch.device
) -> dict[str, Contestant]:
    """Return both libraries' models with equal values everywhere, on `device`."""
    ours = sources.model
    minilora.inject(
        ours,
        targets=args.targets,
        config=minilora.LoRAConfig(r=args.rank, alpha=args.alpha, dropout=args.dropout),
        trainable=["classifier"],
    )
    with tempfile.TemporaryDirectory() as folder:
        minilora.save(ours, folder, format="peft")
        theirs = PeftModel.from_pretrained(sources.fresh_model(), folder, is_trainable=True)
    for name, module in list(theirs.named_modules()):
        if isinstance(module, nn.Dropout) and "lora_dropout" in name:
            theirs.set_submodule(name, Dropped(module.p))
    both = {
        name: Contestant(model.to(device), args, steps)
        for name, model in zip(LIBRARIES, (ours, theirs), strict=True)
    }
    sizes = [sum(parameter.numel() for parameter in each.parameters) for each in both.values()]
    if sizes[0] != sizes[1]:
        raise SystemExit(f"not the same work: minilora trains {sizes[0]:,} values, PEFT {sizes[1]:,}")
    return both


def run_seed(args: argparse.Namespace, seed: int, accelerator: Accelerator) -> tuple[Seed, dict[str, Any]]:
    """Train both from one seed. Return what came of it, and what it was run on."""
    args.seed = seed
    sources = open_sources(args, accelerator, data=DATA)
    batches = make_batches(sources, args, accelerator, report=["validation"])
    steps = args.epochs * len(batches.train)
    both = contestants(sources, args, steps, accelerator.device)
    loaders = {"held_out": batches.held_out, "reported": batches.reported}
    loaders = {name: accelerator.prepare(loader) for name, loader in loaders.items()}
    for epoch in range(args.epochs):
        title = f"seed {seed}, epoch {epoch + 1}"
        train(both, batches, accelerator, first=epoch * len(batches.train), title=title)
    final = {
        name: {split: evaluate(accelerator, each.model, loader) for split, loader in loaders.items()}
        for name, each in both.items()
    }
    facts = {
        "model": sources.model_source.name,
        "data": sources.data_source.name,
        "examples": batches.counts(),
        "trainable": sum(parameter.numel() for parameter in both["minilora"].parameters),
    }
    losses = {name: each.losses for name, each in both.items()}
    seconds = {name: each.seconds for name, each in both.items()}
    environment = describe_environment(accelerator.device)
    return Seed.of(seed, losses=losses, seconds=seconds, final=final, environment=environment), facts


def train(
    both: dict[str, Contestant], batches: Batches, accelerator: Accelerator, *, first: int, title: str
) -> None:
    """Give every batch of one epoch to both; `first` is the number of the first step."""
    for each in both.values():
        each.model.train()
    for step, encoded in enumerate(follow(batches.train, title), start=first):
        batch = {name: value.to(accelerator.device) for name, value in encoded.items()}
        order = LIBRARIES if step % 2 == 0 else LIBRARIES[::-1]
        for name in order:
            both[name].step(batch, seed=step)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the few options there are; all else is as `examples/sst2.py` has it by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as for examples/sst2.py (default: its default)")
    parser.add_argument("--data", help="folder or hub name of the data set (default: GLUE SST-2)")
    parser.add_argument("--limit", type=positive_int, help="train and evaluate on this many examples at most")
    parser.add_argument("--epochs", type=positive_int, help=f"(default: {EPOCHS})")
    parser.add_argument("--batch-size", type=positive_int, help="(default: the recipe's)")
    parser.add_argument("--lr", type=positive_float, help="(default: the recipe's)")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=positive_int, help="of the CPU (default: torch's choice)")
    parser.add_argument("--output", type=Path, help="where to write the .json, .md and .png")
    recipe = argument_parser("sst2", None, data=DATA, max_length=MAX_LENGTH).parse_args(
        [f"--epochs={EPOCHS}"]  # however few the examples are
    )
    return parser.parse_args(argv, namespace=recipe)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the seeds that are not there yet, and write the results after each."""
    args = arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    accelerator = Accelerator()
    recipe = {name: getattr(args, name) for name in RECIPE}
    output = args.output or RESULTS / f"{date.today().isoformat()}-parity-{accelerator.device.type}"
    path = output.with_suffix(".json")
    parity = Parity.read(path) if path.exists() else Parity(recipe=recipe)
    if parity.recipe != recipe:
        raise SystemExit(f"{path} holds runs of another recipe; name another --output")
    for seed in args.seeds:
        if any(done.seed == seed for done in parity.seeds):
            continue
        result, facts = run_seed(args, seed, accelerator)
        parity.seeds.append(result)
        parity.facts = facts
        parity.write(path)
        output.with_suffix(".md").write_text(parity_text(parity), encoding="utf-8")
        draw_parity(parity).savefig(output.with_suffix(".png"))
    print(parity_text(parity))


if __name__ == "__main__":
    main()
