"""minilora: low-rank and bottleneck adapters in any PyTorch module.

import minilora

minilora.inject(model, targets=["query", "value"])
...                                                 # train
minilora.save(model, "adapter.safetensors")
minilora.merge(model)                               # the base model's own speed; unmerge() takes it back
"""

from .adapter import Adapter
from .checkpoint import adapter_state_dict, load, save
from .config import AdapterConfig, LoRAConfig
from .errors import CheckpointError, MergeError, MiniLoRAError, TargetError
from .head import TrainableHead
from .inject import eject, inject
from .lora import LoRALinear
from .merging import fuse, merge, unmerge
from .module import InjectedModule
from .training import Summary, SummaryRow, disabled, freeze, summary, trainable_parameters

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "CheckpointError",
    "InjectedModule",
    "LoRAConfig",
    "LoRALinear",
    "MergeError",
    "MiniLoRAError",
    "Summary",
    "SummaryRow",
    "TargetError",
    "TrainableHead",
    "adapter_state_dict",
    "disabled",
    "eject",
    "freeze",
    "fuse",
    "inject",
    "load",
    "merge",
    "save",
    "summary",
    "trainable_parameters",
    "unmerge",
]
