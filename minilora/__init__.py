"""minilora: low-rank and bottleneck adapters in any PyTorch module.

import minilora

minilora.inject(model, targets=["query", "value"])
...                                                 # train
minilora.save(model, "adapter.safetensors")
minilora.merge(model)                               # the base model's own speed; unmerge() takes it back
"""

from .adapter import Adapter
from .bank import Bank, Combination, combine
from .config import AdapterConfig, LoRAConfig, RowsConfig
from .diagnosis.gradients import check_gradients
from .diagnosis.rounding import merge_loss
from .errors import CheckpointError, MergeError, MiniLoRAError, TargetError
from .files.loading import load
from .files.saving import adapter_state_dict, save
from .frozen import FrozenStatistics
from .inject import eject, inject
from .lora import LoRA
from .lora_linear import LoRALinear
from .merging import fuse, merge, unmerge
from .module import InjectedModule
from .rows import TrainedRows
from .summary import Summary, SummaryRow, summary
from .trained import TrainableHead, TrainedParameter
from .trainers.checkpoints import slim_checkpoints
from .trainers.groups import parameter_groups
from .trainers.weights import merged_weights
from .training import disabled, freeze, trainable_parameters

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Bank",
    "CheckpointError",
    "Combination",
    "FrozenStatistics",
    "InjectedModule",
    "LoRA",
    "LoRAConfig",
    "LoRALinear",
    "MergeError",
    "MiniLoRAError",
    "RowsConfig",
    "Summary",
    "SummaryRow",
    "TargetError",
    "TrainableHead",
    "TrainedParameter",
    "TrainedRows",
    "adapter_state_dict",
    "check_gradients",
    "combine",
    "disabled",
    "eject",
    "freeze",
    "fuse",
    "inject",
    "load",
    "merge",
    "merge_loss",
    "merged_weights",
    "parameter_groups",
    "save",
    "slim_checkpoints",
    "summary",
    "trainable_parameters",
    "unmerge",
]
