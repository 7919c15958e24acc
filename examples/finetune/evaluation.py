"""Loss and accuracy; the saved adapter against the trained one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

import minilora
from finetune.progress import follow
from finetune.sources import LABELS


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any]) -> dict[str, float]:
    """Measures the mean cross-entropy and the accuracy over all processes."""
    model.eval()
    losses, hits = [], []
    for batch in follow(loader, "evaluation", shown=accelerator.is_main_process):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits, labels, reduction="none")  # (batch,)
        hit = (logits.argmax(dim=-1) == labels).float()  # (batch,)
        loss, hit = accelerator.gather_for_metrics((loss, hit))
        losses.append(loss)
        hits.append(hit)
    return {"loss": torch.cat(losses).mean().item(), "accuracy": torch.cat(hits).mean().item()}


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> Tensor:
    """Computes the logits of every example, in float32, in the loader's order."""
    model.eval()
    logits = []
    for batch in follow(loader, "comparison"):
        batch.pop("labels", None)
        logits.append(model(**batch.to(device)).logits.float().cpu())
    return torch.cat(logits)  # (examples, 2)


def compare(
    trained: nn.Module, fresh: nn.Module, path: Path, loader: DataLoader[Any], device: torch.device
) -> dict[str, Any]:
    """Reloads the adapter's file into a fresh base, merges and fuses it, and compares the predictions.

    Args:
        trained: The model as it was trained.
        fresh: The same base model, newly loaded. It ends fused: plain layers again, but for bottlenecks,
            which cannot be merged into a weight.
        path: The adapter's file.
        loader: Examples to compare on.
        device: Where to compute.

    Returns:
        The number of `examples`; for "reloaded", "merged" and "fused", how many predictions `differ` from
        the trained model's, the largest absolute difference between logits and whether the comparison
        `holds`. A reloaded model must give the very same logits, merged and fused ones the same
        predictions. "merged" and "fused" are None where the file holds nothing that can be merged.
    """
    expected = predict(trained, loader, device)

    def against_trained(*, exact: bool) -> dict[str, Any]:
        logits = predict(fresh, loader, device)
        differ = int((logits.argmax(dim=-1) != expected.argmax(dim=-1)).sum())
        return {
            "holds": torch.equal(logits, expected) if exact else differ == 0,
            "differ": differ,
            "largest_difference": (logits - expected).abs().max().item(),
        }

    minilora.load(fresh, path).to(device)
    results: dict[str, Any] = {"examples": len(expected), "reloaded": against_trained(exact=True)}
    if not any(isinstance(module, minilora.LoRALinear) for module in fresh.modules()):
        return {**results, "merged": None, "fused": None}
    minilora.merge(fresh, skip_adapters=True)
    results["merged"] = against_trained(exact=False)
    minilora.unmerge(fresh)
    minilora.fuse(fresh, skip_adapters=True)
    results["fused"] = against_trained(exact=False)
    return results


@torch.no_grad()
def classify(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """Classifies a few texts.

    Returns:
        For each its `text`, the `label` and the `probability` of that label.
    """
    model.eval()
    batch = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    probabilities = model(**batch.to(device)).logits.float().softmax(dim=-1)  # (sentences, 2)
    best = probabilities.max(dim=-1)
    return [
        {"text": text, "label": LABELS[index], "probability": probability}
        for text, index, probability in zip(
            sentences, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
