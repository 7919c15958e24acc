"""TRL's SFTTrainer, unmodified, on an injected Llama: bfloat16, checkpointed activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import raw
from torch import nn

import minilora
from minilora import LoRAConfig

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("accelerate")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("accelerate_anew"),
]

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[no-any-return]


def tokenizer() -> object:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def train(model: nn.Module, out: Path, resume: Path | None = None) -> None:
    texts = [" ".join("abcdefgh"[(i + j) % 8] for j in range(6)) for i in range(16)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(out),
            max_steps=4,
            save_steps=2,
            learning_rate=0.05,
            per_device_train_batch_size=4,
            gradient_checkpointing=True,
            bf16=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=1,
            data_seed=1,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)


def slim() -> nn.Module:
    return minilora.slim_checkpoints(minilora.inject(llama(), "all-linear", LoRAConfig(r=2)))


def test_it_trains_the_adapter_alone_and_resumes(tmp_path: Path) -> None:
    model = slim()
    before = {name: raw(p) for name, p in model.named_parameters()}
    train(model, tmp_path / "run")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    after = {name: raw(p) for name, p in model.named_parameters()}
    assert {name for name in after if after[name] != before[name]} == trained
    assert {p.dtype for name, p in model.named_parameters() if name in trained} == {torch.float32}
    stored = safetensors_torch.load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert set(stored) == trained
    again = slim()
    train(again, tmp_path / "again", tmp_path / "run" / "checkpoint-2")
    assert {name: raw(p) for name, p in again.named_parameters()} == after
    # What a server is sent: the bare model's names, or PEFT's.
    assert [name for name, _ in minilora.merged_weights(model)] == list(llama().state_dict())
    assert len(minilora.adapter_state_dict(model, format="peft")) == len(trained)
