"""README.md beside an adapter: the model card that the hub shows, and finds the base by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from ....config import LoRAConfig, RowsConfig
from ....errors import MiniLoRAError
from ....manifest import Manifest
from ....names import generic

CARD_FILE = "README.md"

Figures: TypeAlias = Mapping[str, float | str]
"""What a run gave, by the words for it."""

OURS = "<!-- Written by minilora, which replaces the file for as long as this line is in it. -->"

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
}
"""The hub's name for each task of PEFT's."""


def may_be_replaced(path: Path) -> bool:
    """Return whether there is no card yet, or one that minilora wrote and nobody has made their own."""
    try:
        return OURS in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def require_figures(figures: Figures) -> None:
    """Raise unless figures are numbers or texts, by words on one line.

    Raises:
        MiniLoRAError: naming what is none.
    """
    right = 'figures={"validation accuracy": 0.91}; the number in a tensor is .item()'
    if not isinstance(figures, Mapping):
        raise MiniLoRAError(f"figures are a mapping, not a {type(figures).__name__}: {right}")
    for name, value in figures.items():
        if not (isinstance(name, str) and isinstance(value, (int, float, str))):
            raise MiniLoRAError(
                f"figures are numbers or texts by name, not {name!r}: {value!r:.100} of type "
                f"{type(value).__name__}: {right}"
            )


def model_card(
    config: Mapping[str, Any], manifest: Manifest, tensors: Mapping[str, Tensor], figures: Figures
) -> str:
    """Return the card of an adapter.

    Args:
        config: what goes into `adapter_config.json`.
        manifest: what stands where.
        tensors: what goes into the file of tensors.
        figures: what the run gave, where the card shall tell it.
    """
    base = config["base_model_name_or_path"]
    # A name of the hub's; a path on somebody's disk would tell nobody anything, and the hub refuses it.
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base or "") and not Path(base).exists()
    base = base if named else None
    text = _text(base, manifest, sum(tensor.numel() for tensor in tensors.values()), figures)
    return "\n".join([*_metadata(base, config), "", OURS, "", *text, ""])


def _metadata(base: str | None, config: Mapping[str, Any]) -> Iterator[str]:
    task = config["task_type"]
    yield "---"
    if base:
        yield f"base_model: {json.dumps(base)}"
    yield "library_name: peft"
    if task in PIPELINES:
        yield f"pipeline_tag: {PIPELINES[task]}"
    yield "tags:"
    if base:
        yield f"- {json.dumps(f'base_model:adapter:{base}')}"
    yield "- lora"
    yield "- minilora"
    if task is not None or config["auto_mapping"] is not None:
        yield "- transformers"
    yield "---"


def _text(base: str | None, manifest: Manifest, parameters: int, figures: Figures) -> Iterator[str]:
    yield "# LoRA adapter"
    yield ""
    of = f" of `{base}`" if base else ""
    yield f"Low-rank adaptation{of}, in PEFT's format: {parameters:,} parameters."
    yield ""
    yield "| modules | number | method |"
    yield "|---|---|---|"
    for lora, sites in manifest.injections:
        if isinstance(lora, LoRAConfig):
            method = f"{'DoRA' if lora.dora else 'LoRA'}, r = {lora.r}, alpha = {lora.alpha:g}" + (
                ", rank-stabilised" if lora.rslora else ""
            )
            for name, number in _counted(sites):
                yield f"| `{name}` | {number} | {method} |"
        elif isinstance(lora, RowsConfig):
            for name, number in _counted(sites):
                yield f"| `{name}` | {number} | {len(lora.rows)} rows trained |"
    for name, number in _counted(manifest.trainable):
        yield f"| `{name}` | {number} | trained in full |"
    if figures:
        yield ""
        yield "| figure | value |"
        yield "|---|---|"
        for name, value in figures.items():
            yield f"| {_cell(name)} | {_cell(value)} |"
    yield ""
    yield "The adapter goes into `base`, the model that it was trained on, from `folder`, a copy of this one"
    yield "on disk, which `huggingface_hub.snapshot_download` makes:"
    yield ""
    yield "```python"
    yield "model = minilora.load(base, folder)"
    yield "model = peft.PeftModel.from_pretrained(base, folder)  # or so"
    yield "```"


def _cell(value: float | str) -> str:
    """Return what stands in a table, on one line."""
    return " ".join(str(value).split()).replace("|", r"\|")


def _counted(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return names with their indices as stars, and how many there are of each."""
    counts: dict[str, int] = {}
    for name in names:
        counts[generic(name)] = counts.get(generic(name), 0) + 1
    return list(counts.items())
