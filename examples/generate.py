"""Teach a decoder to answer, with LoRA on every linear layer.

A small Llama of random weights is trained in full, for about a minute, on the sentences about films that come
with the project. It can go on with a sentence, and nothing else. Then it is frozen, and LoRA learns from
questions and their answers. Of both texts, lines are held out; the answers to held-out questions are drawn
before and after. It is far too small to be clever, and real: the same calls fine-tune a decoder of any size.

    python examples/generate.py
    python examples/generate.py --rank 4 --seed 1
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":  # the imports that follow take seconds; Ctrl-C ends them without a traceback
    from finetune import interrupts

    interrupts.exit_at_once()

import torch
from finetune import runs
from finetune.arguments import positive_float, positive_int, seed_number
from finetune.folders import ADAPTER, METRICS, make_folder
from finetune.progress import follow
from finetune.reports import versions
from finetune.writing import (
    clean,
    film_questions,
    film_sentences,
    go_on,
    make_decoder,
    make_tokenizer,
    perplexity,
    report,
    windows,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, get_linear_schedule_with_warmup

import minilora
from minilora import LoRAConfig

ASKED = 8  # questions, of those held out


def train(
    model: LlamaForCausalLM,
    parameters: Iterable[nn.Parameter],
    text: Tensor,
    *,
    title: str,
    epochs: int,
    lr: float,
) -> list[float]:
    """Trains `parameters` to foretell each token of `text` (windows, tokens). Returns the loss by epoch."""
    parameters, means = list(parameters), []
    loader = DataLoader(text, batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    steps = epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.06 * steps), steps)
    model.train()
    for epoch in range(1, epochs + 1):
        losses: list[Tensor] = []
        for batch in follow(loader, f"{title}, epoch {epoch}/{epochs}", losses):
            tokens = batch.to(model.device)
            loss = model(input_ids=tokens, labels=tokens).loss  # of each token, given those before it
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean().item())
    return means


def fine_tune(run: runs.Run) -> int:
    """Pre-trains, injects, trains, measures, asks, saves and checks. Returns the exit code."""
    args, device = run.args, run.accelerator.device
    folder = make_folder(run.name, args)
    base, adapter = folder / "base", folder / ADAPTER
    films, talk = film_sentences(), film_questions()
    tokenizer = make_tokenizer(films.train)
    held_out = {
        "sentences": windows(tokenizer, films.held_out),
        "questions": windows(tokenizer, talk.held_out),
    }
    questions = [line[: line.index("?") + 1] for line in talk.held_out[:ASKED]]

    # A decoder that has read sentences about films, and nothing else.
    torch.manual_seed(args.seed)
    model = make_decoder(tokenizer).to(device)
    text = windows(tokenizer, films.train)
    run.say(f"Pre-training all {model.num_parameters():,} parameters on {text.numel():,} tokens of sentences")
    losses = {}
    losses["sentences"] = train(
        model, model.parameters(), text, title="sentences", epochs=args.pretraining, lr=5e-3
    )
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    before = {name: perplexity(model, tokens) for name, tokens in held_out.items()}
    rambling = go_on(model, tokenizer, questions, args.seed)

    # From here on it is frozen, and LoRA learns to answer.
    minilora.inject(model, targets="all-linear", config=LoRAConfig(r=args.rank, alpha=2 * args.rank))
    text = windows(tokenizer, talk.train)
    run.say(
        f"\n{minilora.summary(model)}\n\nTraining LoRA on {text.numel():,} tokens of questions and answers"
    )
    losses["questions"] = train(
        model, minilora.trainable_parameters(model), text, title="questions", epochs=args.epochs, lr=args.lr
    )
    minilora.save(model, adapter)
    after = {name: perplexity(model, tokens) for name, tokens in held_out.items()}
    answers = go_on(model, tokenizer, questions, args.seed)

    # Switched off, LoRA leaves what was before; the file on a fresh base, or merged, gives the answers.
    likeliest = go_on(model, tokenizer, questions)
    with minilora.disabled(model):
        checks = {"off": go_on(model, tokenizer, questions, args.seed) == rambling}
    fresh = minilora.load(LlamaForCausalLM.from_pretrained(base).to(device), adapter)
    checks["reloaded"] = go_on(fresh, tokenizer, questions) == likeliest
    minilora.merge(fresh)
    checks["merged"] = go_on(fresh, tokenizer, questions) == likeliest

    summary = minilora.summary(model)
    written = zip(questions, tokenizer.batch_decode(rambling), tokenizer.batch_decode(answers), strict=True)
    metrics = {
        "task": run.title,
        "completed": True,
        "arguments": {name: getattr(args, name) for name in ("pretraining", "epochs", "lr", "rank", "seed")},
        "versions": versions(),
        "parameters": {"trainable": summary.trainable, "base": summary.base},
        "train_loss": losses,
        "perplexity": {name: {"before": before[name], "after": after[name]} for name in held_out},
        "written": [{"question": q, "before": clean(b), "after": clean(a)} for q, b, a in written],
        "checks": checks,
        "bytes": {"adapter": adapter.stat().st_size, "base": (base / "model.safetensors").stat().st_size},
        "seconds": round(time.perf_counter() - run.started, 1),
    }
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    run.say(report(metrics, folder))
    return 0 if all(checks.values()) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    pretraining = "epochs on the sentences (default: %(default)s)"
    add("--pretraining", type=positive_int, default=14, metavar="N", help=pretraining)
    add("--epochs", type=positive_int, default=20, metavar="N", help="LoRA's (default: %(default)s)")
    add("--lr", type=positive_float, default=7e-3, metavar="X", help="LoRA's (default: %(default)s)")
    add(
        "--rank", type=positive_int, default=8, metavar="N", help="alpha is twice that (default: %(default)s)"
    )
    add("--seed", type=seed_number, default=0, metavar="N", help="(default: %(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="for the results (default: runs/generate/<time>)")
    add("--overwrite", action="store_true", help="replace the results that are there already")
    parser.set_defaults(resume=None, mixed_precision="no")
    return runs.start(fine_tune, "generate", "questions about films", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
