"""Make the files of tests/fixtures: what other libraries and earlier versions write, and compute with it.

    python scripts/make_fixtures.py adapters     # in an environment with `pip install torch adapters`
    python scripts/make_fixtures.py 0.1.0        # in one with minilora of that version

The adapters library pins an old transformers, so it needs an environment of its own, and the tests read
what this script stored. Each folder of it is one adapter of a tiny BERT, filled with random values as if it
had been trained. Beside them lie the base's weights and, in expected.safetensors, the inputs and each
adapter's outputs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


def adapters_library(folder: Path) -> None:
    import adapters
    from transformers import BertConfig, BertForSequenceClassification

    configs = {
        "lora": adapters.LoRAConfig(r=4, alpha=6),
        "lora_everywhere": adapters.LoRAConfig(
            r=2,
            alpha=8,
            attn_matrices=["q", "k", "v"],
            intermediate_lora=True,
            output_lora=True,
            leave_out=[0],
        ),
        "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
        "houlsby_varied": adapters.DoubleSeqBnConfig(
            reduction_factor={"1": 2, "default": 8}, non_linearity="gelu", scaling=2.0, dropout=0.1
        ),
        "output_only": adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False),
        "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
        "parallel": adapters.ParBnConfig(reduction_factor=4),
    }
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPE)).eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters.init(model)
    ids = torch.randint(1, 32, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = {"input_ids": ids, "attention_mask": mask}
    for name, config in configs.items():
        model.add_adapter(name, config=config)
        model.train_adapter(name)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    scale = 0.3 if "classifier" not in parameter_name else 0.5
                    parameter.copy_(torch.randn(parameter.shape) * scale)
            model.set_active_adapters(name)
            expected[f"logits.{name}"] = model.eval()(input_ids=ids, attention_mask=mask).logits.clone()
        # The weights are learned numbers, not code: no pickles.
        model.save_adapter(folder / name, name, with_head=True, use_safetensors=True)
        model.delete_adapter(name)
    save_file(base, folder / "base.safetensors")
    save_file(expected, folder / "expected.safetensors")
    (folder / "base_config.json").write_text(json.dumps(SHAPE, indent=2) + "\n")


def earlier_version(folder: Path) -> None:
    """Both of minilora's own formats, of the MLP that tests/models.py has."""
    sys.path.insert(0, str(ROOT / "tests"))
    from models import CASES

    import minilora
    from minilora import AdapterConfig, LoRAConfig

    if minilora.__version__ != folder.name:
        raise SystemExit(f"this is minilora {minilora.__version__}, and {folder.name} is to write its files")
    case = CASES["mlp"]
    base = case.build()
    save_file(base.state_dict(), folder / "base.safetensors")
    expected = {}
    for name, format in (("adapter.safetensors", "minilora"), ("peft", "peft")):
        model = case.build()
        minilora.inject(model, "up", LoRAConfig(r=4, alpha=3, rslora=True), trainable="classifier")
        minilora.inject(model, "down", LoRAConfig(r=2, alpha=8, rslora=True), trainable=())
        if format == "minilora":
            minilora.inject(model, "down", AdapterConfig(reduction_factor=4, activation="relu", scale=2.0))
        generator = torch.Generator().manual_seed(0)
        for tensor in minilora.adapter_state_dict(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        minilora.save(model, folder / name, format=format)
        expected[name] = case.run(model)
    save_file(expected, folder / "expected.safetensors")


def main(what: str) -> None:
    folder = ROOT / "tests" / "fixtures" / what
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (adapters_library if what == "adapters" else earlier_version)(folder)


if __name__ == "__main__":
    main(sys.argv[1])
