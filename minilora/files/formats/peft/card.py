"""README.md beside an adapter: the model card that the hub shows, and finds the base by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....config import LoRAConfig, RowsConfig
from ....manifest import Manifest
from ....names import generic

CARD_FILE = "README.md"

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


def model_card(config: Mapping[str, Any], manifest: Manifest) -> str:
    """Return the card of an adapter.

    Args:
        config: what goes into `adapter_config.json`.
        manifest: what stands where.
    """
    return "\n".join([*_metadata(config), "", OURS, "", *_text(config, manifest), ""])


def _metadata(config: Mapping[str, Any]) -> Iterator[str]:
    base, task = config["base_model_name_or_path"], config["task_type"]
    # A name of the hub's; a path on somebody's disk would tell nobody anything, and the hub refuses it.
    named = (
        base is not None and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base) and not Path(base).exists()
    )
    yield "---"
    if named:
        yield f"base_model: {json.dumps(base)}"
    yield "library_name: peft"
    if task in PIPELINES:
        yield f"pipeline_tag: {PIPELINES[task]}"
    yield "tags:"
    if named:
        yield f"- {json.dumps(f'base_model:adapter:{base}')}"
    yield "- lora"
    yield "- minilora"
    if task is not None or config["auto_mapping"] is not None:
        yield "- transformers"
    yield "---"


def _text(config: Mapping[str, Any], manifest: Manifest) -> Iterator[str]:
    base = config["base_model_name_or_path"]
    yield "# LoRA adapter"
    yield ""
    yield f"Low-rank adaptation{f' of `{base}`' if base else ''}, in PEFT's format."
    yield ""
    yield "| modules | number | method |"
    yield "|---|---|---|"
    for lora, sites in manifest.injections:
        if isinstance(lora, LoRAConfig):
            method = f"LoRA, r = {lora.r}, alpha = {lora.alpha:g}" + (
                ", rank-stabilised" if lora.rslora else ""
            )
            for name, number in _counted(sites):
                yield f"| `{name}` | {number} | {method} |"
        elif isinstance(lora, RowsConfig):
            for name, number in _counted(sites):
                yield f"| `{name}` | {number} | {len(lora.rows)} rows trained |"
    for name, number in _counted(manifest.trainable):
        yield f"| `{name}` | {number} | trained in full |"
    yield ""
    yield "It goes into the base with either of"
    yield ""
    yield "```python"
    yield "model = minilora.load(base, folder)"
    yield "model = peft.PeftModel.from_pretrained(base, folder)"
    yield "```"


def _counted(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return names with their indices as stars, and how many there are of each."""
    counts: dict[str, int] = {}
    for name in names:
        counts[generic(name)] = counts.get(generic(name), 0) + 1
    return list(counts.items())
