"""Texts for a decoder: lines become tokens, tokens become windows; perplexity; what a decoder writes."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.folders import ADAPTER, METRICS
from finetune.sources import EMBEDDED_DATA

QUESTIONS = EMBEDDED_DATA.parent / "film_questions" / "questions.txt"
END = "<end>"  # stands before, between and after the lines
TOKENS = 2500  # of the vocabulary
WINDOW = 48  # tokens


@dataclass(frozen=True)
class Text:
    """Lines to train on, and others to measure on."""

    train: list[str]
    held_out: list[str]


def film_sentences() -> Text:
    """The sentences about films; held out is their validation split."""
    splits = []
    for split in ("train", "validation"):
        with (EMBEDDED_DATA / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            splits.append([row["sentence"] for row in csv.DictReader(file)])
    return Text(*splits)


def film_questions() -> Text:
    """Questions with their answers; held out is every tenth line."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    return Text([line for i, line in enumerate(lines) if i % 10], lines[::10])


def make_tokenizer(lines: Sequence[str]) -> PreTrainedTokenizerFast:
    """Learns pieces of words from `lines`; with the single bytes among them, it can spell any other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=TOKENS, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def make_decoder(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Draws a Llama of three layers that has read nothing yet."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def windows(tokenizer: PreTrainedTokenizerFast, lines: Sequence[str]) -> Tensor:
    """Puts the lines one after another and cuts that into windows of `WINDOW` tokens; the rest is left.

    Returns:
        Tokens, (windows, WINDOW).
    """
    tokens = tokenizer(END + END.join(lines) + END, return_tensors="pt")["input_ids"][0]
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Returns e to the mean cross-entropy of the next token, over `tokens` (windows, WINDOW)."""
    model.eval()
    tokens = tokens.to(model.device)
    return math.exp(model(input_ids=tokens, labels=tokens).loss.item())


@torch.no_grad()
def go_on(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    beginnings: Sequence[str],
    seed: int | None = None,
) -> list[list[int]]:
    """Lets the decoder go on after each beginning, to the end of the line.

    Args:
        model: The decoder.
        tokenizer: Its tokeniser.
        beginnings: What the lines begin with.
        seed: Of the random numbers with which each token is drawn; None takes the likeliest.

    Returns:
        The new tokens of each line.
    """
    model.eval()
    if seed is not None:
        torch.manual_seed(seed)
    drawn = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.5, "top_k": 0}
    lines = []
    for beginning in beginnings:
        inputs = tokenizer(END + beginning, return_tensors="pt", return_token_type_ids=False).to(model.device)
        line = model.generate(**inputs, **drawn, max_new_tokens=WINDOW // 2)[0]
        lines.append(line[inputs["input_ids"].shape[1] :].tolist())
    return lines


def clean(line: str) -> str:
    """Takes what a decoder has written up to its end."""
    return line.partition(END)[0]


def report(metrics: dict[str, Any], folder: Path) -> str:
    """Says what came of it."""
    lines = ["", "Perplexity on held-out lines, before and after:"]
    for name, values in metrics["perplexity"].items():
        lines.append(f"  {name:<9} {values['before']:7.1f} -> {values['after']:.1f}")
    for when in ("before", "after"):
        lines += ["", f"Held-out questions and what the decoder makes of them, {when}:"]
        lines += [f"  {each['question']} |{each[when] or ' (ends there)'}" for each in metrics["written"]]
    same = {
        "off": "LoRA switched off, against the decoder before",
        "reloaded": "the saved file on a fresh base, against the trained model",
        "merged": "the same, merged",
    }
    lines += ["", "The same tokens:"]
    lines += [f"  {'ok' if metrics['checks'][name] else 'FAILED':6} {text}" for name, text in same.items()]
    size = metrics["bytes"]
    lines += ["", f"{metrics['seconds']:.0f} s. In {folder}: {ADAPTER} ({size['adapter'] / 1e6:.2f} MB), "]
    lines[-1] += f"base/ ({size['base'] / 1e6:.2f} MB), {METRICS}"
    return "\n".join(lines)
