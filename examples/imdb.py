"""Fine-tune BERT on IMDB reviews with LoRA, with bottleneck adapters, or with both at once.

    lora      low-rank updates on every query and value projection
    adapter   a bottleneck after both output projections of each block (Houlsby et al., 2019)
    both      the two together (default)

The classifier is trained in full and everything else is frozen. Reviews are truncated to
--max-length tokens, padded per batch and masked. 10 % of the training set is held out (stratified)
and followed at every epoch; the test split is measured once, at the end.

    python examples/imdb.py                                      # bert-base-uncased on IMDB
    python examples/imdb.py --method lora --limit 2000           # one method, a shorter run
    python examples/imdb.py --resume runs/imdb/<time>            # after Ctrl-C, from the last epoch
    accelerate launch examples/imdb.py --mixed-precision bf16    # several GPUs
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
from finetune.arguments import argument_parser, parse, positive_int
from finetune.batches import make_batches
from finetune.evaluation import classify, compare, evaluate
from finetune.sources import open_sources
from transformers import get_linear_schedule_with_warmup

import minilora
from minilora import AdapterConfig, LoRAConfig

DATA = "stanfordnlp/imdb"  # name on the hub
REVIEWS = (
    "I went in tired and came out wide awake. The script trusts its audience, the camera never "
    "shows off, and the last half hour is as tense as anything I have seen this year.",
    "Somebody spent a great deal of money on this and forgot to buy a story. By the second "
    "chase I was counting the exits.",
    "The first act drags and one subplot goes nowhere. Still, the two leads are so good "
    "together that I forgave all of it.",
    "My father loved the original. We turned this one off after forty minutes and did the dishes instead.",
)


def fine_tune(run: runs.Run) -> int:
    """Loads, injects, trains, measures, checks and classifies. Returns the exit code.

    The checkpoint is the last state, not the best one: a recipe that picks its best epoch on the
    held-out examples has learnt from them.
    """
    args, accelerator = run.args, run.accelerator

    # A pretrained encoder under a new classifier; texts become batches of tokens.
    sources = open_sources(args, accelerator, data=DATA)
    batches = make_batches(sources, args, accelerator, report=["test", "validation"])

    # Every process draws the same classifier and, from the seed and the sites' names, the same rest.
    model, method = sources.model, []
    if args.method in ("lora", "both"):
        lora = LoRAConfig(r=args.rank, alpha=args.alpha, dropout=args.dropout)
        minilora.inject(model, targets=args.targets, config=lora, trainable=["classifier"])
        method.append(f"LoRA r={args.rank}, alpha={args.alpha:g} on {' and '.join(args.targets)}")
    if args.method in ("adapter", "both"):
        minilora.inject(
            model,
            targets=["output.dense"],  # attention.output.dense and output.dense of each block
            config=AdapterConfig(bottleneck=args.bottleneck),
            trainable=[] if args.method == "both" else ["classifier"],
        )
        method.append(f"adapters of width {args.bottleneck} on both output projections")

    parameters = minilora.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    steps = run.choose_epochs(batches) * len(batches.train)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(args.warmup * steps), steps)
    model, optimizer, train, schedule, held_out, test = accelerator.prepare(
        model, optimizer, batches.train, schedule, batches.held_out, batches.reported
    )

    with run.recording(" + ".join(method), sources, batches, model, optimizer, schedule):
        run.before(lambda: {"held_out": evaluate(accelerator, model, held_out)})
        for epoch in run.epochs():  # all of them, or those that an interrupted run still lacks
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
                reported=evaluate(accelerator, model, test) if epoch == args.epochs else None,
            )

        if not accelerator.is_main_process:
            return 0
        # The file in a fresh model gives the trained one's logits; merged and fused, its predictions.
        trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        fresh = sources.fresh_model()
        checks = compare(trained, fresh, run.adapter, batches.compared, accelerator.device)
        return run.complete(checks, classify(fresh, sources.tokenizer, REVIEWS, accelerator.device))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit code."""
    parser = argument_parser("imdb", __doc__, data=DATA, max_length=256)
    parser.set_defaults(lr=5e-4)  # chosen with both, which 1e-3 sends to chance on few reviews
    add = parser.add_argument_group("method").add_argument
    method = "what is injected (default: %(default)s)"
    add("--method", choices=("lora", "adapter", "both"), default="both", help=method)
    width = "width of the adapters (default: %(default)s)"
    add("--bottleneck", type=positive_int, default=64, metavar="N", help=width)
    return runs.start(fine_tune, "imdb", "IMDB", parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
