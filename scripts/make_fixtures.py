"""Make the files of tests/fixtures/adapters: what the adapters library writes, and what it computes with it.

The library pins an old transformers, so it needs an environment of its own, and the tests read what this
script stored. In that environment:

    pip install torch adapters safetensors
    python scripts/make_fixtures.py tests/fixtures/adapters

Each folder is one adapter of a tiny BERT, filled with random values as if it had been trained. Beside them
lie the base's weights and, in expected.safetensors, the inputs and each adapter's logits.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "num_labels": 3,
}

ADAPTERS = {
    "lora": adapters.LoRAConfig(r=4, alpha=6),
    "lora_everywhere": adapters.LoRAConfig(
        r=2, alpha=8, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, leave_out=[0]
    ),
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "houlsby_varied": adapters.DoubleSeqBnConfig(
        reduction_factor={"1": 2, "default": 8}, non_linearity="gelu", scaling=2.0, dropout=0.1
    ),
    "output_only": adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
    "parallel": adapters.ParBnConfig(reduction_factor=4),
}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPE)).eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters.init(model)
    ids = torch.randint(1, 32, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = {"input_ids": ids, "attention_mask": mask}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, config in ADAPTERS.items():
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


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/adapters"))
