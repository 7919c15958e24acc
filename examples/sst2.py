"""Fine-tune BERT on SST-2 with LoRA: low-rank updates on every query and value projection.

The recipe: r = 4, alpha = 16, LoRA dropout 0.1, the classifier trained in full, everything else
frozen; AdamW, a linear schedule with 6 % warm-up, gradients clipped to norm 1, cross-entropy,
3 epochs. 10 % of the training set is held out (stratified); the data's own validation split is
reported beside it.

    python examples/sst2.py                                 # bert-base-uncased on GLUE SST-2
    python examples/sst2.py --model minilm --limit 2000     # a smaller encoder, a shorter run
    python examples/sst2.py --resume runs/sst2/<time>       # after Ctrl-C, from the last epoch
    accelerate launch examples/sst2.py                      # several GPUs, nothing else changes
"""

from __future__ import annotations

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
from finetune.evaluation import classify, compare, evaluate
from finetune.sources import open_sources
from transformers import get_linear_schedule_with_warmup

import minilora
from minilora import LoRAConfig

DATA = "nyu-mll/glue:sst2"  # name on the hub, and configuration
MAX_LENGTH = 128  # tokens
SENTENCES = (
    "A quiet, generous film that earns every one of its tears.",
    "Two hours of noise in search of a single idea.",
    "The jokes are old, but the cast makes them feel new.",
    "I wanted to like it, and the film gave me no help at all.",
    "Not the disaster I was promised; in fact I would watch it again tonight.",
)


def fine_tune(run: runs.Run) -> int:
    """Loads, injects, trains, measures, checks and classifies. Returns the exit code.

    The checkpoint is the last state, not the best one: a recipe that picks its best epoch on the
    held-out examples has learnt from them.
    """
    args, accelerator = run.args, run.accelerator

    # A pretrained encoder under a new classifier; texts become batches of tokens.
    sources = open_sources(args, accelerator, data=DATA)
    batches = make_batches(sources, args, accelerator, report=["validation"])

    # Every process draws the same classifier and, from the seed and the sites' names, the same LoRA.
    model = sources.model
    minilora.inject(
        model,
        targets=args.targets,
        config=LoRAConfig(r=args.rank, alpha=args.alpha, dropout=args.dropout),
        trainable=["classifier"],
    )
    method = f"LoRA r={args.rank}, alpha={args.alpha:g} on {' and '.join(args.targets)}"

    parameters = minilora.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    steps = run.choose_epochs(batches) * len(batches.train)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(args.warmup * steps), steps)
    model, optimizer, train, schedule, held_out, validation = accelerator.prepare(
        model, optimizer, batches.train, schedule, batches.held_out, batches.reported
    )

    with run.recording(method, sources, batches, model, optimizer, schedule):
        run.before(
            lambda: {
                "held_out": evaluate(accelerator, model, held_out),
                "reported": evaluate(accelerator, model, validation),
            }
        )
        for _ in run.epochs():  # all of them, or those that an interrupted run still lacks
            model.train()
            losses: list[torch.Tensor] = []
            for batch in run.steps(train, losses):
                labels = batch.pop("labels")
                loss = F.cross_entropy(model(**batch).logits, labels)
                accelerator.backward(loss)
                if args.max_grad_norm:
                    accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            run.trained(losses)

            if accelerator.is_main_process:
                minilora.save(accelerator.unwrap_model(model), run.adapter)
            run.evaluated(
                held_out=evaluate(accelerator, model, held_out),
                reported=evaluate(accelerator, model, validation),
            )

        if not accelerator.is_main_process:
            return 0
        # The file in a fresh model gives the trained one's logits; merged and fused, its predictions.
        trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        fresh = sources.fresh_model()
        checks = compare(trained, fresh, run.adapter, batches.compared, accelerator.device)
        return run.complete(checks, classify(fresh, sources.tokenizer, SENTENCES, accelerator.device))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit code."""
    parser = argument_parser("sst2", __doc__, data=DATA, max_length=MAX_LENGTH)
    return runs.start(fine_tune, "sst2", "SST-2", parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
