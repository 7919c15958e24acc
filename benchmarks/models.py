"""What the benchmarks run: models with random weights, built from configs, and the ways to put LoRA in.

Nothing is downloaded. Every method of `TRAINING_METHODS` takes a bare model and returns it ready to be
trained: what shall be trained requires a gradient, and nothing else does.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import NotMeasured
from torch import Tensor, nn

import minilora

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and PEFT read it: nobody shall time the network

import transformers

# PEFT reads a property that transformers renamed.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

TARGETS = ("qv", "all-linear")
"""Query and value projections; every linear layer of the encoder or decoder."""

PRECISIONS = ("fp32", "bf16-autocast", "bf16")
"""float32; float32 weights under bfloat16 autocast; weights stored in bfloat16, adapters in float32.

Training runs under autocast in both bfloat16 precisions, inference in the first of them only."""


# Models


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model by its sizes."""

    config: transformers.PreTrainedConfig
    head: tuple[str, ...]
    """Modules to be trained in full."""
    targets: dict[str, tuple[str, ...]]
    """Suffixes of module names, for each of `TARGETS`; all libraries here read them alike."""
    quick: str
    """Name of the tiny shape that stands in for this one in a quick run."""


def _bert(quick: str, **sizes: int) -> Shape:
    return Shape(
        config=transformers.BertConfig(
            **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2
        ),
        head=("classifier",),
        targets={
            "qv": ("query", "value"),
            "all-linear": ("query", "key", "value", "output.dense", "intermediate.dense"),
        },
        quick=quick,
    )


def _llama(quick: str, **sizes: int) -> Shape:
    return Shape(
        config=transformers.LlamaConfig(**sizes, tie_word_embeddings=True),
        head=(),
        targets={
            "qv": ("q_proj", "v_proj"),
            "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        },
        quick=quick,
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
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model, where it runs, and the updates that it gets."""

    model: str
    device: torch.device
    targets: str = "all-linear"
    rank: int = 8
    precision: str = "fp32"
    layers: int | None = None
    """Number of layers; None for the shape's own."""
    dropout: float = 0.0
    """On the low-rank path. The model itself has none: its random numbers would be timed."""
    seed: int = 0

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def target_names(self) -> list[str]:
        return list(self.shape.targets[self.targets])

    @property
    def alpha(self) -> int:
        return 2 * self.rank

    def build(self) -> nn.Module:
        """Return the bare model with random weights, the same at each call."""
        config = copy.deepcopy(self.shape.config)
        if self.layers:
            config.num_hidden_layers = self.layers
        kind = (
            transformers.BertForSequenceClassification if self.shape.head else transformers.LlamaForCausalLM
        )
        torch.manual_seed(self.seed)
        with self.device:
            model = kind(config)
        return model.to(torch.bfloat16) if self.precision == "bf16" else model

    def tokens(self, batch: int, length: int) -> Tensor:
        """Return random tokens, (batch, length)."""
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = self.shape.config.vocab_size
        return torch.randint(vocabulary, (batch, length), generator=generator).to(self.device)

    def training_batch(self, batch: int, length: int) -> dict[str, Tensor]:
        """Return tokens, and as labels a class for each sequence, or the tokens themselves."""
        tokens = self.tokens(batch, length)
        labels = torch.arange(batch, device=self.device) % 2 if self.shape.head else tokens
        return {"input_ids": tokens, "labels": labels}

    def autocast(self, *, training: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context that this precision runs in."""
        on = self.precision == "bf16-autocast" or (training and self.precision == "bf16")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def lora_config(self) -> minilora.LoRAConfig:
        return minilora.LoRAConfig(r=self.rank, alpha=self.alpha, dropout=self.dropout)


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Return whether a module's name is one of the targets, or ends in one as a whole segment."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def target_layers(model: nn.Module, setup: Setup) -> dict[str, nn.Linear]:
    """Return the linear layers to be adapted, by name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_target(name, setup.target_names)
    }


# Methods


TrainingMethod = Callable[[nn.Module, Setup], nn.Module]


def frozen_bound(model: nn.Module, setup: Setup) -> nn.Module:
    """Train the head and one bias of the first adapted layer: the least that a LoRA step can cost.

    The gradient has to come down to that layer, as it does in any LoRA step; no weight gradient is taken.
    """
    _freeze_all_but_head(model, setup)
    first = next(iter(target_layers(model, setup).values()))
    if first.bias is None:
        first.bias = nn.Parameter(first.weight.new_zeros(first.out_features))
    first.bias.requires_grad_(True)
    return model


def full_fine_tuning(model: nn.Module, setup: Setup) -> nn.Module:
    """Train everything."""
    return model.requires_grad_(True)


class PlainLoRA(nn.Module):
    """The textbook form, y = base(x) + s (x A^T) B^T, left to autograd.

    Args:
        base: the layer beside which the update is put.
        setup: rank, scale and dropout.
    """

    def __init__(self, base: nn.Linear, setup: Setup) -> None:
        super().__init__()
        self.base = base
        self.scaling = setup.alpha / setup.rank
        self.dropout = setup.dropout
        options: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.randn(setup.rank, base.in_features, **options) / setup.rank)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, setup.rank, **options))

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.base(x) + self.scaling * F.linear(F.linear(low, self.lora_A), self.lora_B)


def plain_form(model: nn.Module, setup: Setup) -> nn.Module:
    """Put a `PlainLoRA` around each target."""
    _freeze_all_but_head(model, setup)
    for name, layer in target_layers(model, setup).items():
        model.set_submodule(name, PlainLoRA(layer, setup))
    return model


def with_minilora(model: nn.Module, setup: Setup) -> nn.Module:
    """Call `minilora.inject`."""
    return minilora.inject(model, setup.target_names, setup.lora_config(), trainable=setup.shape.head)


def with_peft(model: nn.Module, setup: Setup) -> nn.Module:
    """Call `peft.get_peft_model`."""
    peft = import_optional("peft")
    return peft.get_peft_model(model, peft_config(setup))


def peft_config(setup: Setup) -> Any:
    """Return PEFT's form of the setup."""
    return import_optional("peft").LoraConfig(
        r=setup.rank,
        lora_alpha=setup.alpha,
        lora_dropout=setup.dropout,
        target_modules=setup.target_names,
        modules_to_save=list(setup.shape.head) or None,
    )


def with_loralib(model: nn.Module, setup: Setup) -> nn.Module:
    """Replace each target by a `loralib.Linear` with the same weight."""
    loralib = import_optional("loralib")
    _freeze_all_but_head(model, setup)
    for name, layer in target_layers(model, setup).items():
        new = loralib.Linear(
            layer.in_features,
            layer.out_features,
            r=setup.rank,
            lora_alpha=setup.alpha,
            lora_dropout=setup.dropout,
            bias=layer.bias is not None,
            merge_weights=False,
            device=layer.weight.device,
        )
        new.weight, new.bias = layer.weight, layer.bias
        model.set_submodule(name, new)
    return model


def with_adapters(model: nn.Module, setup: Setup) -> nn.Module:
    """Add a LoRA of the `adapters` library, which needs a transformers of its own and so an environment."""
    adapters = import_optional("adapters")
    if setup.targets != "qv":
        raise NotMeasured("its LoRA has no name for the attention's output projection")
    adapters.init(model)
    config = adapters.LoRAConfig(
        r=setup.rank, alpha=setup.alpha, dropout=setup.dropout, attn_matrices=["q", "v"]
    )
    model.add_adapter("lora", config=config)
    model.train_adapter("lora")
    return model


TRAINING_METHODS: dict[str, TrainingMethod] = {
    "frozen-bound": frozen_bound,
    "full fine-tuning": full_fine_tuning,
    "plain form": plain_form,
    "minilora": with_minilora,
    "PEFT": with_peft,
    "loralib": with_loralib,
    "adapters": with_adapters,
}


def import_optional(package: str) -> Any:
    """Return a package, or raise `NotMeasured` where it is not installed."""
    try:
        return __import__(package)
    except ImportError as error:
        raise NotMeasured(f"{package} cannot be imported ({error})") from error


def copy_adapter_to_peft(source: nn.Module, peft_model: nn.Module) -> None:
    """Give a PEFT model the update of one of minilora's, so that the two compute the same."""
    bare = peft_model.get_base_model()
    with torch.no_grad():
        for key, value in minilora.adapter_state_dict(source).items():
            site, _, part = key.rpartition(".")
            if part in ("lora_A", "lora_B"):
                getattr(bare.get_submodule(site), part)["default"].weight.copy_(value)


def randomise_update(model: nn.Module) -> None:
    """Give every B of minilora's random values: it starts at zero, and a merge of zero proves nothing."""
    with torch.no_grad():
        for key, value in minilora.adapter_state_dict(model).items():
            if key.endswith(".lora_B"):
                value.normal_(std=0.1)  # an update of about half the weights' own size


def _freeze_all_but_head(model: nn.Module, setup: Setup) -> None:
    model.requires_grad_(False)
    for name in setup.shape.head:
        model.get_submodule(name).requires_grad_(True)
