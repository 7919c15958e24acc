"""The models, by their sizes: built from configs, with random weights; nothing is downloaded."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and PEFT read it: nobody shall time the network

import transformers

# PEFT reads a property that transformers renamed.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model by its sizes."""

    kind: type[transformers.PreTrainedModel]
    config: transformers.PreTrainedConfig
    head: tuple[str, ...]
    """Modules to be trained in full."""
    targets: dict[str, tuple[str, ...]]
    """Suffixes of names of modules, or of parameters, by what `--targets` calls them; all libraries here read
    them alike."""
    quick: str
    """Name of the tiny shape that stands in for this one in a quick run."""

    @property
    def takes_images(self) -> bool:
        return bool(self.kind.main_input_name == "pixel_values")


def _bert(quick: str, **sizes: int) -> Shape:
    return Shape(
        kind=transformers.BertForSequenceClassification,
        config=transformers.BertConfig(
            **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2
        ),
        head=("classifier",),
        targets={
            "qv": ("query", "value"),
            "all-linear": ("query", "key", "value", "output.dense", "intermediate.dense"),
            "embedding": ("word_embeddings",),
        },
        quick=quick,
    )


def _llama(quick: str, **sizes: int) -> Shape:
    return Shape(
        kind=transformers.LlamaForCausalLM,
        config=transformers.LlamaConfig(**sizes, tie_word_embeddings=True),
        head=(),
        targets={
            "qv": ("q_proj", "v_proj"),
            "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        },
        quick=quick,
    )


def _resnet(**sizes: Any) -> Shape:
    return Shape(
        kind=transformers.ResNetForImageClassification,
        config=transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=2),
        head=("classifier.1",),
        targets={"convolutions": ("convolution",)},
        quick="resnet-tiny",
    )


def _qwen_moe(**sizes: int) -> Shape:
    return Shape(
        kind=transformers.Qwen3MoeForCausalLM,
        config=transformers.Qwen3MoeConfig(**sizes, tie_word_embeddings=True),
        head=(),
        targets={"experts": ("experts.gate_up_proj", "experts.down_proj")},
        quick="qwen-moe-tiny",
    )


SHAPES = {
    "bert-base": _bert("bert-tiny"),  # the config's defaults: 12 layers of 768, 110 million parameters
    "bert-tiny": _bert(
        "bert-tiny",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    ),
    "bert-narrow": _bert(  # next to nothing to compute, in as many layers as one likes
        "bert-tiny", vocab_size=128, hidden_size=16, num_attention_heads=2, intermediate_size=32
    ),
    "minilm": _bert(  # the sizes of all-MiniLM-L6-v2: the encoder of the examples
        "bert-tiny",
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    ),
    "llama-135m": _llama(  # the sizes of SmolLM 135M
        "llama-tiny",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
    ),
    "llama-1b": _llama(  # the sizes of Llama 3.2 1B: 1.24 billion parameters
        "llama-tiny",
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32_768,
    ),
    "llama-tiny": _llama(
        "llama-tiny",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    ),
    "resnet-18": _resnet(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]),
    "resnet-tiny": _resnet(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "qwen-moe": _qwen_moe(  # 16 experts, of which a token takes 4; 0.16 billion parameters
        vocab_size=8192,
        hidden_size=768,
        moe_intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
    ),
    "qwen-moe-tiny": _qwen_moe(
        vocab_size=128,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}
