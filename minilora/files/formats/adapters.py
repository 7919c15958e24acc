"""Folders of the adapters library, for BERT: LoRA, and bottlenecks behind the sub-layers (Houlsby).

    adapter_config.json      {"config": {...}, "model_type": "bert", "hidden_size": 768, "name": "task", ...}
    adapter.safetensors      <site>.loras.<name>.lora_A (r, in), .lora_B (out, r)
                             <block>.adapters.<name>.adapter_down.0.weight (m, d), .adapter_up.weight (d, m)
    model_head.safetensors   the task head, where it was saved: classifier.weight, ...

The library adds a bottleneck to a block's output after the dropout and before the residual connection and
LayerNorm, so it stands around the block's dropout here. What it calls Pfeiffer's ("seq_bn") runs the
block's own LayerNorm a second time in front of the bottleneck, and its parallel form reads the block's
second argument: neither is what a wrapper around one module can do, and both are refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...config import AdapterConfig, Config, LoRAConfig
from ...errors import CheckpointError, MiniLoRAError, quoted, several
from ...manifest import Manifest, grouped
from ...names import described, natural
from ...sites import Sites
from ..contents import Announced
from ..tensors import Entry, opened, read_json

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter.safetensors"
HEAD_FILE = "model_head.safetensors"
PICKLES = {"pytorch_adapter.bin": TENSOR_FILE, "pytorch_model_head.bin": HEAD_FILE}

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh"}

# What a field must be for the computation to be ours, and what any other value means.
LORA_MUST_BE = {
    "composition_mode": ("add", "(IA)^3, which multiplies, is not supported"),
    "use_gating": (False, "a gate on the update is not supported"),
    "use_dora": (False, "DoRA is not supported yet"),
    "vera_d": (None, "VeRA is not supported"),
    "vera_b": (None, "VeRA is not supported"),
}
BOTTLENECK_MUST_BE = {
    "is_parallel": (False, "it reads the second argument of the block, not the input of one module"),
    "original_ln_before": (
        False,
        "this is Pfeiffer's form (seq_bn), which runs the block's LayerNorm twice: before the bottleneck and "
        "after it; a wrapper around one module cannot. Houlsby's form (double_seq_bn) can be loaded",
    ),
    "original_ln_after": (True, "it leaves out the LayerNorm of the block"),
    "ln_before": (False, "a LayerNorm inside the bottleneck is not supported"),
    "ln_after": (False, "a LayerNorm inside the bottleneck is not supported"),
    "use_gating": (False, "a gate on the bottleneck is not supported"),
    "phm_layer": (False, "hypercomplex layers (Compacter) are not supported"),
    "inv_adapter": (None, "invertible adapters at the embedding are not supported"),
    "cross_adapter": (False, "adapters at cross-attention are not supported"),
    "stochastic_depth": (0.0, "stochastic depth is not supported"),
}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Announced]:
    """Open a folder saved with `save_adapter(..., use_safetensors=True)` and give what it says that it holds.

    Raises:
        CheckpointError: listing every field and tensor that is unsound or cannot be honoured.
        OSError: when there is no such folder, or its files cannot be read.
    """
    _require_files(path)
    outcome = f"{str(path)!r} was not read"
    description: Any = read_json(path / CONFIG_FILE)
    if problems := list(_description_problems(description)):
        raise CheckpointError(several(problems, outcome=outcome))
    fields: dict[str, Any] = description["config"]
    lora = fields.get("architecture") == "lora"
    with contextlib.ExitStack() as stack:
        stored = stack.enter_context(opened(path / TENSOR_FILE)).entries()
        entries, others = _renamed(stored, description["name"], lora)
        if others:
            kind = "LoRA" if lora else "bottleneck"
            problems.append(f"{quoted(others)}: not a tensor of the {kind} adapter {description['name']!r}")
        configs: dict[str, Config] = {}
        try:
            configs = dict(_configs(entries, description, lora))
        except MiniLoRAError as error:
            problems.append(str(error))
        heads: dict[str, Entry] = {}
        if (path / HEAD_FILE).exists():
            heads = stack.enter_context(opened(path / HEAD_FILE)).entries()
            if flexible := sorted(key for key in heads if key.startswith("heads.")):
                problems.append(
                    f"{quoted(flexible)}: heads of the library's own models have no place in transformers'"
                )
        if problems:
            raise CheckpointError(several(problems, outcome=outcome))
        sites = sorted(configs, key=natural)
        trainable = tuple(dict.fromkeys(key.split(".")[0] for key in heads))
        drops = fields.get("dropout") if not lora else 0.0
        note = (
            f"{str(path)!r} was trained with dropout {drops} behind its bottlenecks, which further training "
            "here will not apply"
        )
        yield Announced(
            Manifest(grouped((configs[site], site) for site in sites), trainable),
            {**entries, **heads},
            disagreements=lambda present: _disagreements(fields, set(sites), present),
            notes=(note,) if drops else (),
        )


def _require_files(path: Path) -> None:
    if not path.is_dir():
        path.stat()  # FileNotFoundError where there is nothing at all
        raise CheckpointError(f"{str(path)!r} is a file; an adapter of the adapters library is a folder")
    present = {file.name for file in path.iterdir()}
    if pickles := sorted(name for name, good in PICKLES.items() if name in present and good not in present):
        raise CheckpointError(
            f"{str(path)!r} has its tensors in pickles ({quoted(pickles)}), which can run code when read and "
            "are never opened here; save it again with save_adapter(..., use_safetensors=True)"
        )
    if missing := sorted({CONFIG_FILE, TENSOR_FILE} - present):
        raise CheckpointError(
            f"{str(path)!r} has no {quoted(missing)}, so it is no folder of the adapters library"
        )


def _description_problems(description: object) -> Iterator[str]:
    match description:
        case {"config": dict(fields), "name": str(), "model_type": str(model_type), "hidden_size": int()}:
            pass
        case _:
            yield f"{CONFIG_FILE} does not have config, name, model_type and hidden_size"
            return
    if model_type != "bert":
        yield f"model_type is {model_type!r}; the names of its modules are known for 'bert' alone"
    architecture = fields.get("architecture")
    if architecture not in (None, "lora"):
        yield f"architecture is {architecture!r}; LoRA and bottleneck adapters are supported"
        return
    for name, kind in (("leave_out", int), ("attn_matrices", str)):
        value = fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
            yield f"{name} is {value!r:.100}, and not a list of {kind.__name__}"
    must_be = LORA_MUST_BE if architecture == "lora" else BOTTLENECK_MUST_BE
    for name, (needed, reason) in must_be.items():
        if (value := fields.get(name, needed)) != needed:
            yield f"{name} is {value!r:.100}: {reason}"
    if architecture is None:
        activation = fields.get("non_linearity")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            yield f"non_linearity is {activation!r:.100}; supported are {quoted(sorted(ACTIVATIONS))}"
        if not isinstance(fields.get("scaling", 1.0), float):
            yield f"scaling is {fields['scaling']!r:.100}; a learned scale is not supported"


def _renamed(stored: Mapping[str, Entry], name: str, lora: bool) -> tuple[dict[str, Entry], list[str]]:
    """Return the tensors by minilora's names, and the keys that do not belong to the adapter."""
    own = re.escape(name)
    pattern = (
        rf"(?P<site>.+)\.loras\.{own}\.(?P<part>lora_[AB])"
        if lora
        else rf"(?P<site>.+)\.adapters\.{own}\.adapter_(?P<part>down\.0|up)\.(?P<kind>weight|bias)"
    )
    entries: dict[str, Entry] = {}
    others = []
    for key, entry in stored.items():
        if not (match := re.fullmatch(pattern, key)):
            others.append(key)
        elif lora:
            entries[f"{match['site']}.{match['part']}"] = entry
        else:
            part = match["part"].removesuffix(".0")
            entries[f"{match['site']}.dropout.adapter_{part}.{match['kind']}"] = entry
    return entries, sorted(others)


def _configs(
    entries: Mapping[str, Entry], description: Mapping[str, Any], lora: bool
) -> Iterator[tuple[str, Config]]:
    """Yield each site with its config.

    Raises:
        MiniLoRAError: for a value that no config can have.
    """
    fields = description["config"]
    if lora:
        r = fields.get("r")
        # Before 1.1.0 the library forgot alpha when it scaled, and now loads such files with alpha = r.
        alpha = r if _before_1_1(description.get("version")) else fields.get("alpha")
        config = LoRAConfig(r=r, alpha=alpha, dropout=fields.get("dropout", 0.0))
        for key in entries:
            yield key.rpartition(".")[0], config
        return
    for key, entry in entries.items():
        site, is_down, _ = key.partition(".adapter_down.weight")
        if is_down:
            yield (
                site,
                AdapterConfig(
                    bottleneck=entry.shape[0] if entry.shape else None,
                    activation=ACTIVATIONS[fields["non_linearity"]],  # type: ignore[arg-type]
                    scale=fields.get("scaling", 1.0),
                    hidden_size=description["hidden_size"],
                ),
            )


def _before_1_1(version: object) -> bool:
    match = re.match(r"adapters\.(\d{1,9})\.(\d{1,9})\.", str(version))
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)


def _disagreements(fields: Mapping[str, Any], sites: set[str], present: Sites) -> list[str]:
    """Return the sites that the config asks for on this model and the file lacks, and the other way round."""
    left_out, places = set(map(str, fields.get("leave_out", ()))), _places(fields)
    matches = {name: re.fullmatch(r"(?:.*\.)?encoder\.layer\.(\d+)\.(.+)", name) for name in present}
    expected = {
        name for name, match in matches.items() if match and match[1] not in left_out and match[2] in places
    }
    found = {
        "asked for by the config on this model, but without tensors in the file": expected - sites,
        "with tensors in the file, but not asked for by the config on this model": sites - expected,
    }
    return [f"{described(sorted(names, key=natural))}: {text}" for text, names in found.items() if names]


def _places(fields: Mapping[str, Any]) -> set[str]:
    """Return where in a layer the config puts adapters."""
    if fields.get("architecture") == "lora":
        attention = {"q": "query", "k": "key", "v": "value"}
        matrices = fields.get("attn_matrices", ["q", "v"]) if fields.get("selfattn_lora", True) else []
        places = {f"attention.self.{attention.get(matrix, matrix)}" for matrix in matrices}
        places |= {"intermediate.dense"} if fields.get("intermediate_lora") else set()
        return places | ({"output.dense"} if fields.get("output_lora") else set())
    places = {"attention.output.dropout"} if fields.get("mh_adapter") else set()
    return places | ({"output.dropout"} if fields.get("output_adapter") else set())
