"""LoRAConfig and AdapterConfig: defaults, checks, and the way to JSON and back."""

import dataclasses
import json
import math

import pytest
import torch

from minilora import AdapterConfig, LoRAConfig, MiniLoRAError


def test_lora_defaults():
    config = LoRAConfig()
    assert (config.r, config.alpha, config.dropout, config.rslora) == (8, 16, 0.0, False)
    assert (config.init, config.dtype) == ("kaiming", None)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (LoRAConfig(r=4, alpha=16), 4.0),
        (LoRAConfig(r=16, alpha=8), 0.5),
        (LoRAConfig(r=16, alpha=8, rslora=True), 2.0),
        (LoRAConfig(r=2, alpha=1, rslora=True), 1 / math.sqrt(2)),
    ],
)
def test_scaling(config, scaling):
    assert config.scaling == scaling


def test_bottleneck_defaults_to_64_and_reduction_factor_replaces_it():
    assert AdapterConfig().bottleneck == 64
    assert AdapterConfig(reduction_factor=16).bottleneck is None


@pytest.mark.parametrize("kind", [LoRAConfig, AdapterConfig])
def test_frozen_and_keyword_only(kind):
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().dtype = torch.float16
    with pytest.raises(TypeError):
        kind(4)


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (LoRAConfig, {"r": 0}, "r must be an int from 1 to 2147483647, not 0"),
        (LoRAConfig, {"r": -1}, "not -1"),
        (LoRAConfig, {"r": 2.0}, "not 2.0"),
        (LoRAConfig, {"r": True}, "not True"),
        (LoRAConfig, {"r": 2**31}, "not 2147483648"),
        (LoRAConfig, {"alpha": math.nan}, "alpha must be a finite number, not nan"),
        (LoRAConfig, {"alpha": math.inf}, "not inf"),
        (LoRAConfig, {"alpha": "16"}, "not '16'"),
        (LoRAConfig, {"alpha": 10**400}, "alpha must be a finite number"),  # too large for a float
        (LoRAConfig, {"dropout": 1.1}, r"dropout must be a number in \[0, 1\], not 1.1"),
        (LoRAConfig, {"dropout": -0.1}, "not -0.1"),
        (LoRAConfig, {"rslora": 1}, "rslora must be True or False, not 1"),
        (LoRAConfig, {"init": "kaimin"}, "init must be one of 'kaiming', .* not 'kaimin'"),
        (LoRAConfig, {"dtype": torch.int8}, "dtype must be float16, .* not torch.int8"),
        (LoRAConfig, {"dtype": "float8_e4m3fn"}, "not torch.float8_e4m3fn"),
        (AdapterConfig, {"dtype": "float7"}, "dtype must be .* not 'float7'"),
        (AdapterConfig, {"bottleneck": 0}, "bottleneck must be an int from 1 to 2147483647, not 0"),
        (
            AdapterConfig,
            {"bottleneck": 64, "reduction_factor": 2},
            "bottleneck or reduction_factor, not both",
        ),
        (AdapterConfig, {"reduction_factor": 0}, "reduction_factor must be a finite number above 0"),
        (AdapterConfig, {"activation": "swish"}, "activation must be one of 'gelu', 'relu', 'silu', 'tanh'"),
        (AdapterConfig, {"placement": "behind"}, "placement must be one of 'sequential', 'parallel'"),
        (AdapterConfig, {"scale": math.nan}, "scale must be a finite number"),
        (AdapterConfig, {"hidden_size": 0}, "hidden_size must be an int from 1 to"),
    ],
)
def test_bad_values_are_named(kind, fields, says):
    with pytest.raises(MiniLoRAError, match=says):
        kind(**fields)


def test_all_problems_come_at_once():
    with pytest.raises(MiniLoRAError, match="3 problems; no LoRAConfig was made") as caught:
        LoRAConfig(r=0, alpha=math.inf, dropout=2)
    assert all(field in str(caught.value) for field in ("r must", "alpha must", "dropout must"))


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig(r=3, alpha=0.5, dropout=0.1, rslora=True, init="gaussian", dtype=torch.bfloat16),
        LoRAConfig(dora=True, init="pissa"),
        LoRAConfig(lora_bias=True),
        AdapterConfig(),
        AdapterConfig(
            reduction_factor=2.5, activation="relu", placement="parallel", scale=4.0, hidden_size=9
        ),
    ],
)
def test_to_json_and_back(config):
    fields = config.to_dict()
    names = {field.name for field in dataclasses.fields(config)}
    assert names - set(type(config).later) <= set(fields) <= names
    assert type(config).from_dict(json.loads(json.dumps(fields))) == config


def test_from_dict_refuses_unknown_fields_and_dtypes():
    with pytest.raises(MiniLoRAError, match="2 problems") as caught:
        LoRAConfig.from_dict({"r": 4, "rank": 4, "scale": 1})
    assert str(caught.value).splitlines()[1:] == [
        "  - LoRAConfig has no argument 'rank': here it is LoRAConfig(r=...)",
        "  - LoRAConfig has no argument 'scale'",
        "LoRAConfig takes dtype, r, alpha, dropout, rslora, dora, lora_bias, init",
    ]
    for name in ("no_such", "nn", "int8"):
        with pytest.raises(MiniLoRAError, match="dtype must be"):
            LoRAConfig.from_dict({"dtype": name})


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_given_by_its_name(name):
    config = LoRAConfig(dtype=name)
    assert config == LoRAConfig(dtype=torch.bfloat16)
    assert config.torch_dtype is torch.bfloat16
    assert config.to_dict()["dtype"] == "bfloat16"


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    config = LoRAConfig(r=numpy.int64(4), alpha=numpy.float32(2), dropout=numpy.float64(0.5))
    assert config == LoRAConfig(r=4, alpha=2, dropout=0.5)
    json.dumps(config.to_dict())  # which numpy's own numbers would fail
    assert AdapterConfig(bottleneck=numpy.int32(3), scale=numpy.float16(0.5)).to_dict()["bottleneck"] == 3


def test_an_update_may_be_zero_negative_or_always_dropped():
    """PEFT's files have them, and each can be computed."""
    assert LoRAConfig(alpha=0).scaling == 0
    assert LoRAConfig(r=2, alpha=-4).scaling == -2
    assert LoRAConfig(dropout=1).dropout == 1


@pytest.mark.parametrize(
    ("kind", "word", "ours"),
    [
        (LoRAConfig, "lora_alpha", r"LoRAConfig\(alpha=\.\.\.\)"),
        (LoRAConfig, "lora_dropout", r"LoRAConfig\(dropout=\.\.\.\)"),
        (LoRAConfig, "use_rslora", r"LoRAConfig\(rslora=\.\.\.\)"),
        (LoRAConfig, "target_modules", r"inject\(model, targets=\[\.\.\.\]\)"),
        (LoRAConfig, "modules_to_save", r"inject\(model, \.\.\., trainable=\[\.\.\.\]\)"),
        (AdapterConfig, "non_linearity", r"AdapterConfig\(activation=\.\.\.\)"),
    ],
)
def test_words_of_other_libraries_are_answered_with_ours(kind, word, ours):
    says = rf"{kind.__name__} has no argument '{word}': here it is {ours}\n{kind.__name__} takes dtype, "
    with pytest.raises(MiniLoRAError, match=says):
        kind(**{word: 1})
