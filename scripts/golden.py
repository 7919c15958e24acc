"""Digests of what the library computes and writes, to hold a refactoring against.

    python scripts/golden.py > before.json      # then change the code
    python scripts/golden.py > after.json
    diff before.json after.json                 # empty: nothing was computed or written differently

Over the test grid, three dtypes and three set-ups: loss and gradients of a training step, the outputs
disabled, merged and fused, and the bytes of the files in both formats. Bits depend on the processor and
on torch's build, so both files come from one machine; nothing here is stored in the repository.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from models import GRID, Case

import minilora
from minilora import AdapterConfig, LoRAConfig

SETUPS: dict[str, list[minilora.LoRAConfig | minilora.AdapterConfig]] = {
    "lora": [LoRAConfig(r=4)],
    "dropout": [LoRAConfig(r=2, alpha=4, dropout=0.5, rslora=True, init="gaussian")],
    "both": [LoRAConfig(r=4), AdapterConfig(bottleneck=8, activation="relu")],
}


def digest(*parts: torch.Tensor | bytes) -> str:
    content = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            content.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            content.update(part)
    return content.hexdigest()[:16]


def injected(case: Case, dtype: torch.dtype, setup: str) -> nn.Module:
    model = case.build(dtype)
    torch.manual_seed(0)
    for config in SETUPS[setup]:
        # nn.MultiheadAttention computes with out_proj's weight itself: no place for a bottleneck.
        targets = [t for t in case.targets if t != "out_proj" or isinstance(config, LoRAConfig)]
        minilora.inject(model, targets, config, trainable=())
    generator = torch.Generator().manual_seed(0)
    for tensor in minilora.adapter_state_dict(model).values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def digests(case: Case, dtype: torch.dtype, setup: str) -> dict[str, str]:
    found: dict[str, str] = {}
    model = injected(case, dtype, setup).train()
    torch.manual_seed(1)
    output = case.call(model)
    loss = output.float().square().mean()
    loss.backward()
    found["loss"] = digest(output, loss)
    found["gradients"] = digest(*(p.grad for p in minilora.trainable_parameters(model) if p.grad is not None))
    model = injected(case, dtype, setup)
    with minilora.disabled(model):
        found["disabled"] = digest(case.run(model))
    with tempfile.TemporaryDirectory() as folder:
        minilora.save(model, f"{folder}/own")
        found["file"] = digest(Path(folder, "own").read_bytes())
        if setup != "both":
            try:
                minilora.save(model, f"{folder}/peft", format="peft")
            except minilora.CheckpointError as error:
                found["peft"] = digest(str(error).encode())
            else:
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    found[name] = digest(Path(folder, "peft", name).read_bytes())
            loaded = minilora.load(case.build(dtype), f"{folder}/own")
            found["loaded"] = digest(case.run(loaded))
    minilora.merge(model, skip_adapters=True)
    found["merged"] = digest(case.run(model))
    minilora.unmerge(model)
    minilora.fuse(model, skip_adapters=True)
    found["fused"] = digest(*model.state_dict().values())
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = {
        f"{case.name} {str(dtype).removeprefix('torch.')} {setup}": digests(case, dtype, setup)
        for case in GRID
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for setup in SETUPS
        if setup != "both" or case.targets != ("out_proj",)
    }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
