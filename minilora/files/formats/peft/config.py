"""`adapter_config.json` of PEFT: which fields are understood, which are refused and why, what they mean."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ....errors import CheckpointError, several
from ....linear import linear_shape
from ....names import ends, ends_with
from ....sites import Sites
from ....targets import ALL_LINEAR, output_embedding
from ....torch_internals import own_parameters
from . import matching
from .fields import Fields
from .matching import Expressions, LooseEnds, NameMatch, PatternValues
from .tokens import Indices

CONFIG_FILE = "adapter_config.json"

# Fields that say nothing about what is computed.
INFORMATIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",  # how A and B began, which the file replaces
        "inference_mode",
        "megatron_core",  # goes with megatron_config, which is refused
        "peft_type",
        "qalora_group_size",  # goes with use_qalora, which is refused
        "revision",
        "runtime_config",
    }
)

# Why a field that is switched on cannot be honoured.
REASONS = {
    "layer_replication": "it changes the architecture of the base",
    "megatron_config": "Megatron's parallel layers are not supported",
    "alora_invocation_tokens": "activated LoRA, which begins at a token, is not supported",
    "ensure_weight_tying": "it ties adapters of the embedding to those of the output",
    "loftq_config": "LoftQ replaces the base's weights when the adapter is loaded",
    "corda_config": "CorDA replaces the base's weights when the adapter is loaded",
    "lora_ga_config": "LoRA-GA replaces the base's weights when the adapter is loaded",
    "use_qalora": "QA-LoRA pools the input, which is another computation",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "routing between adapters is not supported",
    "kasa_config": "KaSA truncates the base's weights when the adapter is loaded",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
}

# PEFT adds these to modules_to_save by itself, for a model of that task.
HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class PeftLoraConfig:
    """What an `adapter_config.json` says of a LoRA adapter; the fields are PEFT's."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    init: str
    """As minilora's `LoRAConfig.init`."""
    bias: str
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    """With those that PEFT adds for the task."""
    task_type: str | None
    target_parameters: tuple[str, ...]
    """Parameters that LoRA is on, by their full names or whole-segment suffixes of them."""
    trainable_token_indices: Indices
    """Rows that are trained, by the ends of modules' names; see `tokens`."""
    peft_version: str | None
    """Of the PEFT that wrote the file; since 0.18."""

    @classmethod
    def from_dict(cls, value: object) -> PeftLoraConfig:
        """Build the config from the JSON of the file.

        Raises:
            CheckpointError: listing every field that is malformed or cannot be honoured.
        """
        if not isinstance(value, dict) or not isinstance(value.get("peft_type"), str):
            instead = isinstance(value, dict) and "config" in value and "model_type" in value
            hint = '; the adapters library writes such files: pass format="adapters"' if instead else ""
            raise CheckpointError(f"it has no peft_type, so it is not PEFT's{hint}")
        if value["peft_type"] != "LORA":
            raise CheckpointError(f"its peft_type is {value['peft_type']!r}, and only 'LORA' is supported")
        fields = Fields(value)
        task = fields.optional_text("task_type")
        to_save = (*fields.names("modules_to_save"), *HEADS_OF_TASKS.get(task or "", ()))
        config = cls(
            r=fields.integer("r", 8),
            lora_alpha=fields.number("lora_alpha", 8),
            lora_dropout=fields.number("lora_dropout", 0.0),
            use_rslora=fields.flag("use_rslora"),
            use_dora=fields.flag("use_dora"),
            lora_bias=fields.flag("lora_bias"),
            init=fields.initialisation("init_lora_weights"),
            bias=fields.choice("bias", ("none", "all", "lora_only")),
            fan_in_fan_out=fields.flag("fan_in_fan_out"),
            rank_pattern=fields.ranks("rank_pattern"),
            alpha_pattern=fields.numbers("alpha_pattern"),
            target_modules=fields.names_or_expression("target_modules"),
            exclude_modules=fields.names_or_expression("exclude_modules"),
            layers_to_transform=fields.integers("layers_to_transform"),
            layers_pattern=fields.expressions("layers_pattern", matching.around_layers),
            modules_to_save=tuple(dict.fromkeys(to_save)),
            task_type=task,
            target_parameters=fields.names("target_parameters"),
            trainable_token_indices=fields.rows("trainable_token_indices"),
            peft_version=fields.optional_text("peft_version"),
        )
        problems = fields.problems
        if not config.target_modules and not config.target_parameters:
            problems.append(
                "target_modules: it is empty, and what PEFT would choose then depends on its version; list "
                "the modules"
            )
        for entry in config.modules_to_save:  # PEFT reads them as regular expressions, too
            fields.require_expression("modules_to_save", entry, matching.around_left_out)
        if config.lora_bias and config.use_dora:
            problems.append(
                "lora_bias: PEFT has none beside use_dora, so no PEFT wrote or reads such an adapter"
            )
        problems += _refusals(value, known={*cls.__dataclass_fields__, "init_lora_weights"})
        if problems:
            raise CheckpointError(several(problems, outcome="the adapter was not read"))
        return config

    def rank_of(self, site: str) -> int:
        """Return the rank at a site."""
        return self._ranks(site, self.r)

    def alpha_of(self, site: str) -> float:
        """Return alpha at a site."""
        return self._alphas(site, self.lora_alpha)

    def names_all_linear(self) -> bool:
        """Return whether the targets depend on the model's layer types, and not on names alone."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def targets(self, name: str, names: NameMatch | None = None) -> bool:
        """Return whether the config targets a module of that name.

        Args:
            name: of the module, in the base model.
            names: what stands for target_modules where that is "all-linear".
        """
        if self._excluded(name) or self._left_out.first(name) is not None:
            return False
        if names is None and isinstance(self.target_modules, str):
            return self._targeted(name)
        names = names or self._targeted
        return names.lists(name) or (names(name) and (not self.layers_to_transform or self._in_layers(name)))

    def targets_parameter(self, name: str) -> bool:
        """Return whether the config targets a parameter of that full name, whatever excludes modules."""
        return not self._parameters.isdisjoint(ends(name)) and "." in name

    def parameters_of(self, module: str, bare: nn.Module | None) -> tuple[str, ...]:
        """Return which of a module's own parameters the config targets, in the module's order.

        Args:
            module: its name.
            bare: itself; None goes by the names that the config has.
        """
        if bare is not None:
            owned = [name for name, parameter in own_parameters(bare).items() if parameter is not None]
            return tuple(name for name in owned if self.targets_parameter(f"{module}.{name}"))
        split = (target.rpartition(".") for target in self.target_parameters)
        return tuple(leaf for owner, _, leaf in split if not owner or ends_with(module, owner))

    def saves(self, name: str) -> bool:
        """Return whether PEFT trains a module of that name in full."""
        return bool(self._saved.of(name))

    def sites(self, sites: Sites) -> set[str]:
        """Return the modules of a model that the config targets, a shared one under its first name."""
        names = NameMatch(self._all_linear(sites)) if self.names_all_linear() else None
        return {site.name for site in sites.unique() if self.targets(site.name, names)}

    def parameter_sites(self, sites: Sites) -> set[str]:
        """Return the parameters of a model that the config targets, by their full names."""
        if not self.target_parameters:
            return set()
        return {site.name for site in sites.parameters() if self.targets_parameter(site.name)}

    def saved_modules(self, sites: Sites) -> set[str]:
        """Return the modules of a model that PEFT trains in full, those without any tensor left out."""
        return {
            name for name, site in sites.items() if self.saves(name) and site.bare.state_dict(keep_vars=True)
        }

    def meaning(self, targets: Iterable[str]) -> str:
        """Return a digest of what the config says: rank, alpha, dropout, how alpha scales, variants, rows.

        However it says it: an edit of the patterns that comes to the same has the same digest.
        """
        each = [[name, self.rank_of(name), float(self.alpha_of(name))] for name in sorted(targets)]
        variants = ["dora"] * self.use_dora + ["lora_bias"] * self.lora_bias  # plain LoRA keeps its digest
        rows = [sorted(self.trainable_token_indices.items())] if self.trainable_token_indices else []
        said = json.dumps([each, float(self.lora_dropout), self.use_rslora, *variants, *rows])
        return hashlib.sha256(said.encode()).hexdigest()

    @cached_property
    def _ranks(self) -> PatternValues[int]:
        return PatternValues(self.rank_pattern)

    @cached_property
    def _alphas(self) -> PatternValues[float]:
        return PatternValues(self.alpha_pattern)

    @cached_property
    def _targeted(self) -> NameMatch:
        return NameMatch(self.target_modules)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(self.target_parameters)

    @cached_property
    def _excluded(self) -> NameMatch:
        return NameMatch(self.exclude_modules)

    @cached_property
    def _left_out(self) -> Expressions:
        return Expressions(self.modules_to_save, matching.around_left_out, matching.inner_parts)

    @cached_property
    def _saved(self) -> LooseEnds:
        return LooseEnds(self.modules_to_save)

    def _all_linear(self, sites: Sites) -> tuple[str, ...]:
        output: object = output_embedding(sites.model)
        if output is None and self.task_type == "SEQ_CLS":
            heads = (getattr(sites.model, name, None) for name in ("score", "classifier"))
            output = next((head for head in heads if head is not None), None)
        return tuple(
            site.name
            for site in sites.unique()
            if site.outermost is not output
            and (
                isinstance(site.bare, nn.Linear) or ((shape := linear_shape(site.bare)) and shape.transposed)
            )
        )

    def _in_layers(self, name: str) -> bool:
        # Without a pattern, the layer's index is the first number below two names: `a.layers.3.`.
        patterns = [matching.around_layers(pattern) for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if match := re.match(pattern, name):
                return int(match["idx"]) in self.layers_to_transform
        return False


def _refusals(values: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    """Yield each field that is switched on and changes what is computed, in a way that is not ours."""
    for name, value in values.items():
        if name in known or name in INFORMATIVE or value in (None, False, "", [], {}):
            continue
        reason = REASONS.get(name, "this version of minilora does not know the field")
        yield f"{name}: {reason} (it is {value!r:.100})"
