"""From texts to the batches of the training, held-out and reported splits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler

from finetune.errors import ExampleError
from finetune.sources import LABELS, Sources

HELD_OUT = 0.1  # share of the training set that is never trained on
COMPARED = 512  # examples on which the reloaded, merged and fused models are compared


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The loaders of a run; a batch has `input_ids`, `attention_mask`, `labels` and so on."""

    train: DataLoader[Any]
    held_out: DataLoader[Any]
    reported: DataLoader[Any]
    compared: DataLoader[Any]
    """The first examples of the reported split, `COMPARED` at most."""
    reported_split: str
    """Name of the reported split in the data: "validation" or "test"."""
    order: torch.Generator
    """Draws the order of the training batches, anew in every epoch."""

    def counts(self) -> dict[str, int]:
        """Numbers of examples by split."""
        splits = {"train": self.train, "held_out": self.held_out, "reported": self.reported}
        return {name: _size(loader) for name, loader in splits.items()}


def _size(loader: DataLoader[Any]) -> int:
    assert isinstance(loader.dataset, Dataset)
    return len(loader.dataset)


def make_batches(
    sources: Sources, args: argparse.Namespace, accelerator: Accelerator, *, report: Sequence[str]
) -> Batches:
    """Splits, shortens, tokenises and batches a data set.

    Args:
        sources: The data, with a split `train` and one of those to report; the tokeniser; the model, for
            the longest text that it can read.
        args: `seed`, `limit`, `report_all`, `max_length` and `batch_size` are read.
        accelerator: Lets the main process go first; the others find its work in the cache.
        report: Splits to report beside the held-out one, in order of preference; the first found is used.

    Raises:
        ExampleError: A split or a column is missing, a label is neither 0 nor 1, or the texts are longer
            than the model can read.
    """
    positions = getattr(sources.model.config, "max_position_embeddings", args.max_length)
    if args.max_length > positions:
        raise ExampleError(f"--max-length: {sources.model_source.name} reads {positions} tokens at most")
    with accelerator.main_process_first():
        train, held_out, reported, split = _tokenised(sources, args, report)

    collate = DataCollatorWithPadding(sources.tokenizer)
    order = torch.Generator().manual_seed(args.seed)
    # Sentences of like length together, in random order: little padding, few wasted steps.
    sampler = LengthGroupedSampler(args.batch_size, lengths=_lengths(train), generator=order)

    def evaluation(data: Dataset) -> DataLoader[Any]:
        """Larger batches, longest first: nothing depends on the order, and memory runs out early."""
        lengths = _lengths(data)
        longest_first = data.select(sorted(range(len(data)), key=lambda i: -lengths[i]))
        return DataLoader(longest_first, batch_size=4 * args.batch_size, collate_fn=collate)

    return Batches(
        train=DataLoader(train, batch_size=args.batch_size, sampler=sampler, collate_fn=collate),
        held_out=evaluation(held_out),
        reported=evaluation(reported),
        compared=evaluation(reported.select(range(min(COMPARED, len(reported))))),
        reported_split=split,
        order=order,
    )


def _lengths(data: Dataset) -> list[int]:
    return [len(tokens) for tokens in data["input_ids"]]


def _tokenised(
    sources: Sources, args: argparse.Namespace, report: Sequence[str]
) -> tuple[Dataset, Dataset, Dataset, str]:
    """The splits to train on, to hold out and to report, as tokens, and the name of the last."""
    raw, name = sources.raw, sources.data_source.name
    reported_split = next((split for split in report if split in raw), None)
    if "train" not in raw or reported_split is None:
        raise ExampleError(
            f"the data {name!r} needs the splits train and {' or '.join(report)}; it has {', '.join(raw)}"
        )
    columns = raw["train"].column_names
    text = next((column for column in ("sentence", "text") if column in columns), None)
    if text is None or "label" not in columns:
        raise ExampleError(
            f"the data {name!r} needs a column 'sentence' or 'text' and a column 'label'; it has "
            f"{', '.join(columns)}"
        )

    # The cache knows earlier work by all that the function refers to: by nothing that changes with the run.
    tokenizer, max_length = sources.tokenizer, args.max_length

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch[text], truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"]}

    def prepare(split: Dataset, limit: int | None = args.limit) -> Dataset:
        if limit is not None:
            split = split.select(range(min(limit, len(split))))
        return split.map(tokenise, batched=True, remove_columns=split.column_names)

    labelled = _labelled(DatasetDict({split: raw[split] for split in ("train", reported_split)}), text, name)
    try:
        halves = labelled["train"].train_test_split(
            test_size=HELD_OUT, stratify_by_column="label", seed=args.seed
        )
    except ValueError as error:  # too few examples
        raise ExampleError(f"the data {name!r} cannot be split: {error}") from error
    # The reported split is shuffled always alike: runs with different seeds report on the same examples.
    reported = labelled[reported_split].shuffle(seed=0)
    reported = prepare(reported, None if args.report_all else args.limit)
    return prepare(halves["train"]), prepare(halves["test"]), reported, reported_split


def _labelled(data: DatasetDict, text: str, name: str) -> DatasetDict:
    """The same data with labels that are known to be 0 or 1, beside texts that are known to be texts."""
    try:
        labelled = data.cast_column("label", ClassLabel(names=list(LABELS)))
    except (ValueError, TypeError) as error:
        raise ExampleError(f"the data {name!r} needs the labels 0 and 1: {error}") from error
    for split, examples in labelled.items():
        if others := sorted({str(label) for label in examples.unique("label")} - {"0", "1"}):
            raise ExampleError(
                f"the data {name!r} needs the labels 0 and 1; its split {split} also has {', '.join(others)}"
            )
        if examples.features[text].dtype not in ("string", "large_string"):
            raise ExampleError(
                f"the data {name!r} needs texts in its column {text!r}; its split {split} has "
                f"{examples.features[text].dtype}"
            )
        if missing := examples.data.column(text).null_count:
            raise ExampleError(f"the data {name!r} has no text in {missing:,} examples of its split {split}")
    return labelled
