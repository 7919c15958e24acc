"""Where minilora differs from PEFT and loralib in what comes out, not in how fast: the README's table.

python benchmarks/contrasts.py

Nothing is timed.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from bench.unmeasured import NOT_MEASURED, NotMeasured, import_optional
from torch import Tensor, nn

import minilora

CYCLES = 10


def changed(weight: Tensor, before: Tensor) -> str:
    """Return the share of values that are not what they were."""
    return f"{(weight != before).double().mean():.1%} of the base's weights changed"


def cycles_with_minilora() -> str:
    """Merge and unmerge a bfloat16 layer of minilora's."""
    model = nn.Sequential(nn.Linear(256, 256)).bfloat16()
    before = model[0].weight.detach().clone()
    minilora.inject(model, "0")
    nn.init.normal_(model[0].lora_B, std=0.1)
    for _ in range(CYCLES):
        minilora.merge(model)
        minilora.unmerge(model)
    return changed(model[0].base.weight, before)


def cycles_with_peft() -> str:
    """The same with PEFT."""
    peft = import_optional("peft")
    model = nn.Sequential(nn.Linear(256, 256)).bfloat16()
    before = model[0].weight.detach().clone()
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for _ in range(CYCLES):
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    return changed(adapted.base_model.model[0].base_layer.weight, before)


def cycles_with_loralib() -> str:
    """The same with loralib, which merges in eval() and unmerges in train()."""
    loralib = import_optional("loralib")
    layer = loralib.Linear(256, 256, r=8).bfloat16()
    nn.init.normal_(layer.lora_B, std=0.1)
    before = layer.weight.detach().clone()
    for _ in range(CYCLES):
        layer.eval()
        layer.train()
    return changed(layer.weight, before)


def encoder() -> tuple[nn.TransformerEncoderLayer, Tensor]:
    """Return an encoder layer in eval mode, and an input."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    return layer, torch.randn(2, 5, 16)


@torch.no_grad()
def encoder_with_minilora() -> str:
    """How far LoRA on both linear layers moves the output in eval mode."""
    layer, x = encoder()
    before = layer(x)
    minilora.inject(layer, ["linear1", "linear2"], minilora.LoRAConfig(r=4))
    for parameter in minilora.trainable_parameters(layer):
        nn.init.normal_(parameter, std=0.3)
    return f"output moved by {(layer(x) - before).abs().max():.3f}"


@torch.no_grad()
def encoder_with_peft() -> str:
    """The same with PEFT."""
    peft = import_optional("peft")
    layer, x = encoder()
    before = layer(x)
    config = peft.LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False)
    adapted = peft.get_peft_model(layer, config).base_model.model.eval()
    return f"output moved by {(adapted(x) - before).abs().max():.3f}"


class Block(nn.Module):
    """Two layers with names."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)


def typo_with_minilora() -> str:
    """One wrong name of two."""
    try:
        minilora.inject(Block(), ["qery", "value"])
    except minilora.TargetError as error:
        return str(error).splitlines()[1].strip(" -")
    return "nothing said"


def typo_with_peft() -> str:
    """The same with PEFT."""
    peft = import_optional("peft")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft.get_peft_model(Block(), peft.LoraConfig(target_modules=["qery", "value"]))
    return f"{len(said)} warnings"


def half_a_file_with_minilora() -> str:
    """A file without the tensors of one of its two layers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        minilora.save(minilora.inject(Block(), ["query", "value"]), path)
        with safetensors.safe_open(path, framework="pt") as file:
            kept = {key: file.get_tensor(key) for key in file.keys() if "query" in key}  # noqa: SIM118
            safetensors.torch.save_file(kept, path, metadata=file.metadata())
        try:
            minilora.load(Block(), path)
        except minilora.CheckpointError as error:
            return str(error).splitlines()[1].strip(" -")
    return "nothing said"


def half_a_file_with_peft() -> str:
    """The same with PEFT."""
    peft = import_optional("peft")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft.get_peft_model(Block(), peft.LoraConfig(target_modules=["query", "value"])).save_pretrained(
            folder
        )
        path = Path(folder) / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({k: t for k, t in tensors.items() if "query" in k}, path)
        said.clear()
        peft.PeftModel.from_pretrained(Block(), folder)
        return "; ".join(sorted({str(w.message)[:80] for w in said})) or "0 warnings"


CONTRASTS: dict[str, dict[str, Callable[[], str]]] = {
    f"{CYCLES} merge/unmerge cycles in bfloat16": {
        "minilora": cycles_with_minilora,
        "PEFT": cycles_with_peft,
        "loralib": cycles_with_loralib,
    },
    "nn.TransformerEncoderLayer in eval mode": {
        "minilora": encoder_with_minilora,
        "PEFT": encoder_with_peft,
    },
    "a typo among two targets": {"minilora": typo_with_minilora, "PEFT": typo_with_peft},
    "a file with half of its keys": {"minilora": half_a_file_with_minilora, "PEFT": half_a_file_with_peft},
}


def main() -> None:
    """Print what comes out."""
    for what, contestants in CONTRASTS.items():
        print(what)
        for name, run in contestants.items():
            torch.manual_seed(0)
            try:
                outcome = run()
            except NotMeasured as reason:
                outcome = f"{NOT_MEASURED}, {reason}"
            print(f"  {name:<9} {outcome}")


if __name__ == "__main__":
    main()
