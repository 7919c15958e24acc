"""The grid: small models of every shape that the laws are tested on, with inputs that never change."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn


def transformers_major() -> int:
    """Return which transformers is installed; 5 where it is none, and nothing asks."""
    try:
        return int(importlib.metadata.version("transformers").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 5


VIT_MLP = ("fc1", "fc2") if transformers_major() >= 5 else ("intermediate.dense", "layer.0.output.dense")
"""The two linear layers of a ViT's MLP, which had other names before transformers 5."""


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.down(torch.tanh(self.up(x)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Shared(nn.Module):
    """One linear layer under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.stack = nn.ModuleList([nn.Linear(16, 16), self.first])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, *self.stack, self.again):
            x = torch.tanh(layer(x))
        return x


class Tied(nn.Module):
    """A head that uses the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


class Convolutional(nn.Module):
    """A residual network: BatchNorm throughout, whose statistics every call in training mode would move."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.norm = nn.BatchNorm1d(16)
        self.project = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 3)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):  # as if it had been trained
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.stem(images))
        x = (x + self.block(x)).mean((2, 3))
        return self.classifier(torch.tanh(self.project(self.norm(x))))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)


BERT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(
        **shape, dropout_rate=0.0, initializer_factor=0.7, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **no_dropout, **special))


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = {key: BERT[key] for key in BERT if key not in ("vocab_size", "max_position_embeddings")}
    shape["num_hidden_layers"] = 1
    config = transformers.ViTConfig(**shape, image_size=8, patch_size=4, num_channels=3)
    return transformers.ViTForImageClassification(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = {key: BERT[key] for key in BERT if "dropout" not in key and key != "num_labels"}
    shape["num_hidden_layers"] = 1
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_key_value_heads=1))


def _random(model: nn.Module, *shape: int) -> Tensor:
    """Return values that are always the same, in the dtype of the base."""
    dtypes = [
        p.dtype for name, p in model.named_parameters() if "lora_" not in name and "adapter_" not in name
    ]
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtypes[0])


def _ids() -> Tensor:
    return torch.randint(1, 11, (3, 8), generator=torch.Generator().manual_seed(1))


def on_features(model: nn.Module) -> Tensor:
    return model(_random(model, 3, 8, 16))


def on_ids(model: nn.Module) -> Tensor:
    output = model(_ids())
    return output if isinstance(output, Tensor) else output.logits


def on_ids_twice(model: nn.Module) -> Tensor:
    return model(input_ids=_ids(), decoder_input_ids=_ids()).logits


def on_images(model: nn.Module) -> Tensor:
    output = model(_random(model, 5, 3, 8, 8))
    return output if isinstance(output, Tensor) else output.logits


@dataclass(frozen=True)
class Case:
    """A model of the grid, how to call it, and where LoRA goes."""

    name: str
    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    targets: tuple[str, ...]
    n_linear: int
    """Number of sites of "all-linear"."""

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model in eval mode, the same values at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(dtype).eval()

    def run(self, model: nn.Module) -> Tensor:
        """Return the model's output. Without gradients: torch picks its kernels by what requires them."""
        with torch.no_grad():
            return self.call(model)


GRID = [
    Case("mlp", MLP, on_features, ("up", "down"), 3),
    Case("encoder", encoder_layer, on_features, ("out_proj", "linear1", "linear2"), 4),
    Case("mha", Attention, on_features, ("out_proj",), 2),
    Case("shared", Shared, on_features, ("first", "stack.0"), 2),
    Case("tied", Tied, on_ids, ("body", "head"), 2),
    Case("cnn", Convolutional, on_images, ("project",), 2),
    Case("bert", bert, on_ids, ("query", "value", "output.dense"), 13),
    Case("t5", t5, on_ids_twice, ("q", "v", "wo", "lm_head"), 16),
    Case("gpt2", gpt2, on_ids, ("c_attn", "c_fc", "lm_head"), 4),
    Case("vit", vit, on_images, VIT_MLP, 6),
    Case("llama", llama, on_ids, ("q_proj", "v_proj", "down_proj"), 7),
]
CASES = {case.name: case for case in GRID}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


on_grid = on(GRID)
on_heads = on([CASES[name] for name in ("mlp", "cnn", "bert", "vit")])
"""The models with a task head, "classifier"."""
on_adapter_sites = on([case for case in GRID if case.name != "mha"])
"""The models with a site for a bottleneck: nn.MultiheadAttention computes with out_proj's weight itself."""
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
