"""What `adapter_config.json` tells of the model: PEFT's `AutoPeftModel...` choose the base's class by it."""

from __future__ import annotations

from torch import nn

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
"""PEFT's name for what a model of transformers does, by the end of its class's name."""


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's name for the task of a model of transformers, or None where there is none."""
    kind = type(model)
    if not kind.__module__.startswith("transformers."):
        return None
    for end, task in TASKS.items():
        if kind.__name__.endswith(end):
            return task
    settings = getattr(model, "config", None)
    takes_text = getattr(model, "main_input_name", None) == "input_ids"  # and no sound, as Whisper does
    if kind.__name__.endswith("ForConditionalGeneration") and getattr(settings, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if takes_text else None
    return None


def auto_mapping(model: nn.Module) -> dict[str, str] | None:
    """Return where PEFT finds the class of a model, or None where it cannot load a base of that class."""
    kind = type(model)
    if not hasattr(kind, "from_pretrained"):
        return None
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}
