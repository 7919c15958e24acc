"""Does the fast form train as well as the plain one? The same fine-tune with both, step by step.

    python benchmarks/loss_curves.py --model FOLDER --data FOLDER

For each precision, the plain formula left to autograd and minilora start from the same values and see the
same batches; dropout is off, so that nothing but rounding sets them apart. The model is a BERT-like
encoder with a new classifier, the data a folder with a `train` split of `sentence` or `text`, and `label`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench.arguments import positive
from bench.curves import Curves, curves_text, draw_curves
from bench.machine import describe_environment
from bench.plain import PlainLoRA
from bench.reports import RESULTS
from datasets import load_dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

import minilora

PRECISIONS = ("fp32", "bf16-autocast", "bf16")
"""float32; the same under bfloat16 autocast; a base stored in bfloat16, adapters in float32, no autocast."""


def injected_model(args: argparse.Namespace, precision: str) -> nn.Module:
    """Return the model with LoRA on every linear layer of the encoder, the same at each call."""
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    config = minilora.LoRAConfig(r=args.rank, alpha=4 * args.rank)
    return minilora.inject(model, "all-linear", config, trainable=["classifier"])


def with_plain_form(model: nn.Module) -> nn.Module:
    """Replace each of minilora's layers by the plain formula, in float32, with the same values."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, minilora.LoRALinear):
            plain = PlainLoRA(layer.base, layer.lora_A, layer.lora_B, scaling=layer.scaling, in_float32=True)
            model.set_submodule(name, plain)
    return model


def losses(
    model: nn.Module, steps: Sequence[dict[str, Any]], args: argparse.Namespace, *, autocast: bool
) -> list[float]:
    """Train for one pass over the batches and return the loss at each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    model.train()
    curve = []
    for batch in tqdm(steps, unit="step", leave=False):
        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def batches(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Return the tokenised batches, one for each step, the same at each call."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_dataset(args.data)["train"].shuffle(seed=args.seed)
    text = "sentence" if "sentence" in data.column_names else "text"
    collate = DataCollatorWithPadding(tokenizer)
    chosen = []
    for step in range(args.steps):
        rows = data.select([(step * args.batch + i) % len(data) for i in range(args.batch)])
        encoded = tokenizer(list(rows[text]), truncation=True, max_length=args.max_length)
        features = [
            {"input_ids": ids, "label": label}
            for ids, label in zip(encoded["input_ids"], rows["label"], strict=True)
        ]
        chosen.append(dict(collate(features)))
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a BERT-like encoder, or a name on the hub")
    parser.add_argument("--data", required=True, help="folder or hub name of the data set")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--max-length", type=positive, default=64)
    parser.add_argument("--rank", type=positive, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--output", type=Path, help="where to write the .json, .md and .png")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    steps = batches(args)
    started = time.perf_counter()
    curves: Curves = {}
    for precision in args.precision:
        autocast = precision == "bf16-autocast"
        plain = with_plain_form(injected_model(args, precision))
        curves[precision] = {
            "plain form": losses(plain, steps, args, autocast=autocast),
            "minilora": losses(injected_model(args, precision), steps, args, autocast=autocast),
        }
    sizes = AutoConfig.from_pretrained(args.model)
    title = (
        f"{sizes.model_type}, {sizes.num_hidden_layers} x {sizes.hidden_size}; {Path(args.data).name}; "
        f"LoRA r = {args.rank} on every linear layer; {args.steps} steps of {args.batch}"
    )
    report = {
        "benchmark": "loss_curves",
        "date": date.today().isoformat(),
        "title": title,
        "seconds": round(time.perf_counter() - started, 1),
        "environment": describe_environment(torch.device("cpu")),
        "curves": curves,
    }
    output = args.output or RESULTS / f"{date.today().isoformat()}-loss_curves-cpu"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(f"# {title}\n\n{curves_text(curves)}\n", encoding="utf-8")
    draw_curves(curves, title).savefig(output.with_suffix(".png"))
    print(curves_text(curves))


if __name__ == "__main__":
    main()
