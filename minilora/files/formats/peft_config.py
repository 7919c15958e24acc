r"""`adapter_config.json` of PEFT: which fields are understood, which are refused and why, what they match.

PEFT's rules of matching are followed to the letter, odd ones included, since they decide what a file means:

    target_modules, a list    a module's full name or a whole-segment suffix of it
    target_modules, a string  "all-linear", or a regular expression that the full name matches
    exclude_modules           by the same two rules
    rank_pattern's keys       regular expressions; `(.*\.)?(KEY)$` is matched, the first that fits counts
    modules_to_save           any module whose name ends with the entry, in the middle of a segment too
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ...errors import CheckpointError, quoted, several
from ...linear import linear_shape
from ...sites import Sites
from ...targets import ALL_LINEAR, output_embedding

Number = TypeVar("Number", int, float)

# Fields that say nothing about what is computed.
INFORMATIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",  # how A and B began, which the file replaces
        "inference_mode",
        "megatron_core",  # goes with megatron_config, which is refused
        "peft_type",
        "peft_version",
        "qalora_group_size",  # goes with use_qalora, which is refused
        "revision",
        "runtime_config",
    }
)

# Why a field that is switched on cannot be honoured.
REASONS = {
    "use_dora": "DoRA rescales the weight itself, which minilora does not do yet",
    "lora_bias": "a bias beside lora_B is not part of minilora's LoRA",
    "target_parameters": "LoRA on bare parameters, such as fused experts, is not supported yet",
    "trainable_token_indices": "training single rows of an embedding is not supported",
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

# Initialisations that touch A and B only. All others replace the base's weights when an adapter is loaded.
HARMLESS_INITS: dict[object, str] = {
    True: "kaiming",
    False: "kaiming",
    "gaussian": "gaussian",
    "eva": "kaiming",
    "orthogonal": "kaiming",
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
        fields = _Fields(value)
        task = fields.optional_text("task_type")
        to_save = (*fields.names("modules_to_save"), *HEADS_OF_TASKS.get(task or "", ()))
        layers = value.get("layers_to_transform")
        config = cls(
            r=fields.integer("r", 8),
            lora_alpha=fields.number("lora_alpha", 8),
            lora_dropout=fields.number("lora_dropout", 0.0),
            use_rslora=fields.flag("use_rslora"),
            init=fields.initialisation("init_lora_weights"),
            bias=fields.choice("bias", ("none", "all", "lora_only")),
            fan_in_fan_out=fields.flag("fan_in_fan_out"),
            rank_pattern=fields.pattern("rank_pattern"),
            alpha_pattern=fields.pattern("alpha_pattern"),
            target_modules=fields.names_or_regex("target_modules"),
            exclude_modules=fields.names_or_regex("exclude_modules"),
            layers_to_transform=fields.integers(
                "layers_to_transform", [layers] if _is_int(layers) else layers
            ),
            layers_pattern=fields.regexes("layers_pattern"),
            modules_to_save=tuple(dict.fromkeys(to_save)),
            task_type=task,
        )
        problems = fields.problems
        if not config.target_modules:
            problems.append(
                "target_modules: it is empty, and what PEFT would choose then depends on its version; list "
                "the modules"
            )
        for entry in config.modules_to_save:  # PEFT reads them as regular expressions, too
            fields.require_regex("modules_to_save", rf"(^|.*\.){entry}($|\..*)")
        problems += _refusals(value, known={*cls.__dataclass_fields__, "init_lora_weights"})
        if problems:
            raise CheckpointError(several(problems, outcome="the adapter was not read"))
        return config

    def rank_of(self, site: str) -> int:
        """Return the rank at a site."""
        return _first_match(self.rank_pattern, site, self.r)

    def alpha_of(self, site: str) -> float:
        """Return alpha at a site."""
        return _first_match(self.alpha_pattern, site, self.lora_alpha)

    def names_all_linear(self) -> bool:
        """Return whether the targets depend on the model's layer types, and not on names alone."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def matches(self, name: str, targets: str | tuple[str, ...] | None = None) -> bool:
        """Return whether the config targets a module of that name.

        Args:
            name: of the module, in the base model.
            targets: to use in the place of "all-linear".
        """
        targets = self.target_modules if targets is None else targets
        if _names_match(self.exclude_modules, name) or self.excludes_as_saved(name):
            return False
        if isinstance(targets, str) or name in targets:
            return _names_match(targets, name)
        return _names_match(targets, name) and (not self.layers_to_transform or self._in_layers(name))

    def excludes_as_saved(self, name: str) -> bool:
        """Return whether PEFT leaves a module out of LoRA because of modules_to_save."""
        return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in self.modules_to_save)

    def saves(self, name: str) -> bool:
        """Return whether PEFT trains a module of that name in full."""
        return any(name.endswith(entry) for entry in self.modules_to_save)

    def sites(self, sites: Sites) -> set[str]:
        """Return the modules of a model that the config targets, a shared one under its first name."""
        targets = self._all_linear(sites) if self.names_all_linear() else None
        return {site.name for site in sites.unique() if self.matches(site.name, targets)}

    def saved_modules(self, sites: Sites) -> set[str]:
        """Return the modules of a model that PEFT trains in full, those without any tensor left out."""
        return {
            name for name, site in sites.items() if self.saves(name) and site.bare.state_dict(keep_vars=True)
        }

    def _all_linear(self, sites: Sites) -> tuple[str, ...]:
        spared: object = output_embedding(sites.model)
        if spared is None and self.task_type == "SEQ_CLS":
            heads = (getattr(sites.model, name, None) for name in ("score", "classifier"))
            spared = next((head for head in heads if head is not None), None)
        return tuple(
            site.name
            for site in sites.unique()
            if site.outermost is not spared
            and (
                isinstance(site.bare, nn.Linear) or ((shape := linear_shape(site.bare)) and shape.transposed)
            )
        )

    def _in_layers(self, name: str) -> bool:
        # Without a pattern, the layer's index is the first number below two names: `a.layers.3.`.
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if match := re.match(pattern, name):
                return int(match["idx"]) in self.layers_to_transform
        return False


class _Fields:
    """The fields of a JSON object, each checked as it is taken; what is wrong gathers in `problems`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []

    def flag(self, name: str) -> bool:
        value: bool = self._take(name, False, lambda v: isinstance(v, bool), "true or false")
        return value

    def integer(self, name: str, default: int) -> int:
        value: int = self._take(name, default, lambda v: _is_int(v) and v > 0, "a number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        value: float = self._take(name, default, _is_number, "a number")
        return value

    def integers(self, name: str, value: object) -> tuple[int, ...]:
        if value is None:
            return ()
        if isinstance(value, list) and all(map(_is_int, value)):
            return tuple(value)
        self.problems.append(f"{name}: must be an integer or a list of them, not {value!r:.100}")
        return ()

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value: str = self._take(name, choices[0], lambda v: v in choices, f"one of {quoted(choices)}")
        return value

    def optional_text(self, name: str) -> str | None:
        value: str | None = self._take(name, None, lambda v: isinstance(v, str), "a string")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(self._take(name, (), _is_names, "a list of names"))

    def names_or_regex(self, name: str) -> str | tuple[str, ...]:
        value = self._take(name, (), _is_name_or_names, "a string or a list of names")
        if isinstance(value, str):
            self.require_regex(name, value)
            return value
        return tuple(value)

    def regexes(self, name: str) -> tuple[str, ...]:
        value = self._take(name, (), _is_name_or_names, "a string or a list of names")
        found = (value,) if isinstance(value, str) and value else tuple(value)
        for entry in found:
            self.require_regex(name, entry)
        return found

    def pattern(self, name: str) -> Mapping[str, Any]:
        value: dict[str, Any] = self._take(name, {}, _is_pattern, "an object of names and numbers above 0")
        for key in value:
            self.require_regex(name, key)
        return value

    def initialisation(self, name: str) -> str:
        value = self.values.get(name, True)
        if isinstance(value, (bool, str)) and value in HARMLESS_INITS:
            return HARMLESS_INITS[value]
        self.problems.append(
            f"{name}: {value!r:.100} replaces the base's weights when PEFT loads the adapter, so A and B "
            "belong to another base. Have PEFT convert it: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
        return "kaiming"

    def require_regex(self, name: str, text: str) -> None:
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            self.problems.append(f"{name}: {text!r:.100} is not a valid regular expression: {error}")

    def _take(self, name: str, default: Any, valid: Any, what: str) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if valid(value):
            return value
        self.problems.append(f"{name}: must be {what}, not {value!r:.100}")
        return default


def _refusals(values: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    """Yield each field that is switched on and changes what is computed, in a way that is not ours."""
    for name, value in values.items():
        if name in known or name in INFORMATIVE or value in (None, False, "", [], {}):
            continue
        reason = REASONS.get(name, "this version of minilora does not know the field")
        yield f"{name}: {reason} (it is {value!r:.100})"


def _first_match(patterns: Mapping[str, Number], site: str, default: Number) -> Number:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", site):
            return value
    return default


def _names_match(names: str | tuple[str, ...], name: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, name) is not None
    return name in names or any(name.endswith("." + entry) for entry in names)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_name_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_pattern(value: object) -> bool:
    return isinstance(value, dict) and all(_is_number(number) and number > 0 for number in value.values())
