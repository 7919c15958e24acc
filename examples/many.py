"""Fine-tune three LoRA adapters side by side on one encoder, then serve a batch that mixes them.

The recipe is that of `sst2.py`, thrice: of rank 8, 4 and 2 (--rank is the largest), each with a
classifier and an optimizer of its own. Every step is one pass over the encoder: the sentences of a batch
stand in it once for each adapter.

    python examples/many.py                                 # bert-base-uncased on GLUE SST-2
    python examples/many.py --model minilm --limit 2000     # a smaller encoder, a shorter run
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

if __name__ == "__main__":  # the imports that follow take seconds; Ctrl-C ends them without a traceback
    from finetune import interrupts

    interrupts.exit_at_once()

import torch
import torch.nn.functional as F
from finetune import runs
from finetune.arguments import argument_parser, parse
from finetune.batches import make_batches
from finetune.evaluation import classify, evaluate, predict
from finetune.folders import METRICS, make_folder
from finetune.progress import follow
from finetune.sources import open_sources
from sst2 import DATA, SENTENCES
from transformers import get_linear_schedule_with_warmup

import minilora
from minilora import LoRAConfig


def fine_tune(run: runs.Run) -> int:
    """Loads, trains the three, measures and saves each, checks the files, and serves a mixed batch."""
    args, accelerator = run.args, run.accelerator
    sources = open_sources(args, accelerator, data=DATA)
    batches = make_batches(sources, args, accelerator, report=["validation"])

    ranks = {"small": max(1, args.rank // 4), "medium": max(1, args.rank // 2), "large": args.rank}

    # One encoder with room for three adapters; what is new begins as it would on a model of its own.
    model = sources.model.to(accelerator.device)
    bank = minilora.Bank(model, targets=args.targets, trainable=["classifier"], slots=len(ranks), r=args.rank)
    steps = run.choose_epochs(batches) * len(batches.train)
    optimizers, schedules = {}, {}
    for name, rank in ranks.items():
        bank.add(name, LoRAConfig(r=rank, alpha=args.alpha, dropout=args.dropout))
        optimizers[name] = torch.optim.AdamW(bank.parameters(name), lr=args.lr)
        warmup = math.ceil(args.warmup * steps)
        schedules[name] = get_linear_schedule_with_warmup(optimizers[name], warmup, steps)
    run.say(f"{minilora.summary(model)}\n")

    for epoch in range(1, args.epochs + 1):
        model.train()
        losses: list[torch.Tensor] = []
        for batch in follow(batches.train, f"epoch {epoch}/{args.epochs}", losses):
            labels = batch.pop("labels").repeat(len(ranks)).to(accelerator.device)
            many = {key: value.repeat(len(ranks), 1).to(accelerator.device) for key, value in batch.items()}
            rows = [name for name in ranks for _ in range(len(labels) // len(ranks))]
            with bank.rows(rows), accelerator.autocast():
                each = F.cross_entropy(model(**many).logits, labels, reduction="none")  # (rows,)
            loss = each.view(len(ranks), -1).mean(dim=1).sum()  # each adapter's own mean, added up
            accelerator.backward(loss)
            for name, optimizer in optimizers.items():
                if args.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(bank.parameters(name), args.max_grad_norm)
                optimizer.step()
                schedules[name].step()
                optimizer.zero_grad()
            losses.append(loss.detach() / len(ranks))

    # Each is an ordinary adapter file; alone in a fresh model it gives what its rows gave in the bank.
    folder, device = make_folder(run.name, args), accelerator.device
    results, holds = {}, True
    for name, rank in ranks.items():
        bank.freeze(name)
        bank.save(name, folder / f"{name}.safetensors")
        held_out, validation = batches.held_out, batches.reported
        with bank.rows(name):
            in_bank = predict(model, batches.compared, device)
            results[name] = {
                "rank": rank,
                "held_out": evaluate(accelerator, model, accelerator.prepare(held_out)),
                "reported": evaluate(accelerator, model, accelerator.prepare(validation)),
            }
        alone = minilora.load(sources.fresh_model(), folder / f"{name}.safetensors").to(device)
        difference = (predict(alone, batches.compared, device) - in_bank).abs().max().item()
        holds = holds and difference < 1e-3
        accuracies = (results[name][split]["accuracy"] for split in ("held_out", "reported"))
        run.say(
            "{:8} rank {}: accuracy {:.3f} held out, {:.3f} reported; alone, logits differ by {:.1e}".format(
                name, rank, *accuracies, difference
            )
        )
    metrics = {
        "adapters": results,
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "completed": True,
    }
    (folder / METRICS).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    run.say(f"Results are in {folder}\n\nOne batch, each row by another:")

    rows = [[*ranks, None][i % 4] for i in range(len(SENTENCES))]
    with bank.rows(rows):
        answers = classify(model, sources.tokenizer, SENTENCES, device)
    for row, answer in zip(rows, answers, strict=True):
        run.say(f"  {row or 'the base':8}  {answer['label']} {answer['probability']:.2f}  {answer['text']}")
    return 0 if holds else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit code."""
    parser = argument_parser("many", __doc__, data=DATA, max_length=128)
    parser.set_defaults(rank=8)
    return runs.start(fine_tune, "many", "SST-2, three adapters", parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
