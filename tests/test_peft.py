"""PEFT's files both ways, against PEFT itself. Warnings are errors here, PEFT's included."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from checks import randomise, unchanged
from models import BERT, CASES, VIT_MLP, Shared
from torch import Tensor, nn

import minilora
from minilora import AdapterConfig, CheckpointError, LoRAConfig, TrainableHead
from minilora.files.formats import peft as peft_format

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peft

# Tensors come through bit by bit. Logits are compared in float64, since the two libraries multiply in another
# order (minilora adds in the product's own kernel, or forms W_eff): what is left is the last digits.
EXACT = {"rtol": 0.0, "atol": 1e-11}
SINGLE = {"rtol": 0.0, "atol": 2e-5}


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**{**BERT, "max_position_embeddings": 20})
    return transformers.RobertaForSequenceClassification(config)


def distilbert() -> nn.Module:
    shape = {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "num_labels": 3}
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    config = transformers.DistilBertConfig(**shape, **no_dropout, max_position_embeddings=16)
    return transformers.DistilBertForSequenceClassification(config)


def whisper() -> nn.Module:
    stacks = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    lengths = {"max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 4}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    config = transformers.WhisperConfig(
        vocab_size=32, d_model=16, **stacks, **lengths, **special, dropout=0.0
    )
    return transformers.WhisperForConditionalGeneration(config)


def on_sound(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sound = torch.randn(2, 4, 16, generator=generator).to(model.dtype)
    ids = torch.randint(1, 11, (2, 5), generator=generator)
    return model(input_features=sound, decoder_input_ids=ids).logits


Make = Callable[[], nn.Module]
Run = Callable[[nn.Module], Tensor]

MODELS: dict[str, tuple[Make, Run, list[str], list[str]]] = {
    "bert": (CASES["bert"].make, CASES["bert"].run, ["query", "output.dense"], ["classifier"]),
    "roberta": (roberta, CASES["bert"].run, ["query", "value"], ["classifier"]),
    "distilbert": (distilbert, CASES["bert"].run, ["q_lin", "lin2"], ["pre_classifier", "classifier"]),
    "gpt2": (CASES["gpt2"].make, CASES["gpt2"].run, ["c_attn", "c_fc", "c_proj"], []),
    "t5": (CASES["t5"].make, CASES["t5"].run, ["q", "v", "wo"], []),
    "vit": (CASES["vit"].make, CASES["vit"].run, list(VIT_MLP), ["classifier"]),
    "llama": (CASES["llama"].make, CASES["llama"].run, ["q_proj", "down_proj"], []),
    "whisper": (whisper, on_sound, ["q_proj", "out_proj"], []),
}
on_models = pytest.mark.parametrize("name", MODELS)


def fresh(name: str) -> nn.Module:
    """Return the same bare model at each call, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name][0]().eval().double()


def by_peft(name: str, folder: Path) -> Tensor:
    """Return what PEFT computes with a folder."""
    with torch.no_grad():
        return MODELS[name][1](peft.PeftModel.from_pretrained(fresh(name), folder).eval())


def by_minilora(name: str, folder: Path, **kwargs: Any) -> Tensor:
    """Return what minilora computes with a folder."""
    with torch.no_grad():
        return MODELS[name][1](minilora.load(fresh(name), folder, **kwargs))


def trained_by_peft(name: str, folder: Path, **fields: Any) -> Tensor:
    """Save a random PEFT adapter, as if it had been trained; return what PEFT computes with it."""
    model = peft.get_peft_model(fresh(name), peft.LoraConfig(**fields))
    generator = torch.Generator().manual_seed(3)
    for tensor in peft.get_peft_model_state_dict(model).values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return MODELS[name][1](model)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **fields}))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


@on_models
def test_peft_computes_what_minilora_wrote(name: str, tmp_path: Path) -> None:
    _, run, targets, trainable = MODELS[name]
    model = minilora.inject(fresh(name), targets, LoRAConfig(r=4, alpha=8), trainable=trainable)
    randomise(model)
    minilora.save(model, tmp_path / "peft", format="peft")
    with torch.no_grad():
        expected = run(model)
        assert not torch.equal(expected, run(fresh(name)))
    torch.testing.assert_close(by_peft(name, tmp_path / "peft"), expected, **EXACT)
    assert torch.equal(by_minilora(name, tmp_path / "peft"), expected)


@on_models
def test_minilora_computes_what_peft_wrote(name: str, tmp_path: Path) -> None:
    _, _, targets, trainable = MODELS[name]
    conv1d = {"fan_in_fan_out": True} if name == "gpt2" else {}
    fields = {"r": 4, "lora_alpha": 8, "target_modules": targets, **conv1d}
    expected = trained_by_peft(name, tmp_path, **fields, modules_to_save=trainable or None)
    torch.testing.assert_close(by_minilora(name, tmp_path), expected, **EXACT)
    theirs = tensors_of(tmp_path)
    for key, tensor in minilora.adapter_state_dict(minilora.load(fresh(name), tmp_path)).items():
        ending = ".weight" if key.endswith((".lora_A", ".lora_B")) else ""
        assert torch.equal(tensor, theirs.pop(f"base_model.model.{key}{ending}"))
    assert not theirs


# Of a tiny BERT: bert.encoder.layer.{0,1}.attention.self.{query,key,value}, ...
OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "alpha": {"lora_alpha": 5},
    "rank_pattern": {"rank_pattern": {"value": 2}},
    "rank_pattern, exact": {"rank_pattern": {"^bert.encoder.layer.1.attention.self.query": 7}},
    "the first pattern wins": {"rank_pattern": {r"layer\.0\..*": 3, "value": 5}},
    "alpha_pattern": {"alpha_pattern": {"value": 32, r"1\.attention\.self\.query": 3}},
    "both patterns and rslora": {
        "rank_pattern": {"value": 2},
        "alpha_pattern": {"value": 32},
        "use_rslora": True,
    },
    "dropout": {"lora_dropout": 0.25},
    "a regular expression": {"target_modules": r".*layer\.1.*(query|key)"},
    "a suffix of two segments": {"target_modules": ["output.dense"]},
    "a full name": {"target_modules": ["bert.encoder.layer.0.attention.self.key"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear of a classifier": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "exclude_modules": {"exclude_modules": ["layer.0.attention.self.query"]},
    "exclude_modules, a regular expression": {"exclude_modules": r".*layer\.0.*"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_to_transform, one": {"layers_to_transform": 0},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layer"},
    "layers_pattern, several": {"layers_to_transform": [0], "layers_pattern": ["blocks", "layer"]},
    "modules_to_save": {"modules_to_save": ["classifier"]},
    "modules_to_save inside": {"modules_to_save": ["pooler.dense", "classifier"]},
    "a task with a head": {"task_type": "SEQ_CLS"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no initial values": {"init_lora_weights": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_both_ways(option: str, tmp_path: Path) -> None:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **OPTIONS[option]}
    if option == "all-linear":
        fields["r"] = fields["lora_alpha"] = 2  # the classifier has three outputs
    expected = trained_by_peft("bert", tmp_path / "a", **fields)
    torch.testing.assert_close(by_minilora("bert", tmp_path / "a"), expected, **EXACT)
    minilora.save(minilora.load(fresh("bert"), tmp_path / "a"), tmp_path / "b", format="peft")
    torch.testing.assert_close(by_peft("bert", tmp_path / "b"), expected, **EXACT)
    assert {k: v.tolist() for k, v in tensors_of(tmp_path / "a").items()} == {
        k: v.tolist() for k, v in tensors_of(tmp_path / "b").items()
    }


def test_a_config_with_patterns_that_peft_would_have_resolved(tmp_path: Path) -> None:
    expected = trained_by_peft(
        "bert", tmp_path, r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS"
    )
    assert len(config_of(tmp_path)["target_modules"]) > 1
    edit(tmp_path, target_modules="all-linear")
    torch.testing.assert_close(by_minilora("bert", tmp_path), expected, **EXACT)
    edit(tmp_path, target_modules=["all-linear"])  # in a list it is a name like any other
    with pytest.raises(CheckpointError, match="the config does not target it"):
        by_minilora("bert", tmp_path)


def test_all_linear_leaves_the_output_layer_alone(tmp_path: Path) -> None:
    model = minilora.inject(fresh("llama"), ["q_proj", "lm_head"], LoRAConfig(r=2))
    minilora.save(model, tmp_path, format="peft")
    edit(tmp_path, target_modules="all-linear")
    with pytest.raises(
        CheckpointError, match=r"(?s)up_proj.*without tensors.*'lm_head': with tensors in the file"
    ):
        by_minilora("llama", tmp_path)


def test_a_config_of_few_words(tmp_path: Path) -> None:
    expected = trained_by_peft("bert", tmp_path, target_modules=["query"])
    short = {"peft_type": "LORA", "target_modules": ["query"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(short))
    torch.testing.assert_close(by_minilora("bert", tmp_path), expected, **EXACT)


def test_adapters_in_the_precision_of_the_base(tmp_path: Path) -> None:
    case = CASES["bert"]
    for dtype, tolerance in ((torch.float32, SINGLE), (torch.bfloat16, {"rtol": 0.0, "atol": 2e-2})):
        model = peft.get_peft_model(
            case.build(dtype),
            peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"], init_lora_weights=False),
            autocast_adapter_dtype=False,
        )
        model.save_pretrained(tmp_path)
        assert {tensor.dtype for tensor in tensors_of(tmp_path).values()} == {dtype}
        with torch.no_grad():
            expected = case.run(peft.PeftModel.from_pretrained(case.build(dtype), tmp_path).eval())
            found = case.run(minilora.load(case.build(dtype), tmp_path))
        torch.testing.assert_close(found, expected, **tolerance)


def test_a_double_precision_adapter_keeps_its_bits(tmp_path: Path) -> None:
    case = CASES["bert"]
    model = minilora.inject(case.build(torch.float64), ["query"], LoRAConfig(r=4, alpha=8), trainable=())
    minilora.save(randomise(model), tmp_path / "a", format="peft")
    loaded = minilora.load(case.build(torch.float64), tmp_path / "a")
    for key, tensor in minilora.adapter_state_dict(model).items():
        assert torch.equal(minilora.adapter_state_dict(loaded)[key], tensor)


# Refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_bias", True),
        ("target_parameters", "experts.up"),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [5]),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1}),
        ("a_field_of_the_future", {"on": True}),
        ("r", 0),
        ("r", "4"),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("lora_dropout", 1.5),
        ("use_rslora", "yes"),
        ("bias", "some"),
        ("target_modules", None),
        ("target_modules", "("),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", {"query": "2"}),
        ("exclude_modules", [1]),
        ("layers_to_transform", ["1"]),
        ("modules_to_save", "classifier"),
    ],
)
def test_what_cannot_be_honoured_is_named(field: str, value: object, tmp_path: Path) -> None:
    trained_by_peft("bert", tmp_path, r=4, target_modules=["query"])
    edit(tmp_path, **{field: value})
    if (field, value) == ("lora_alpha", None):
        minilora.load(fresh("bert"), tmp_path)  # PEFT's default
        return
    model = fresh("bert")
    with unchanged(model), pytest.raises(CheckpointError, match=field.removeprefix("lora_")):
        minilora.load(model, tmp_path)


def test_every_problem_of_a_config_is_in_one_error(tmp_path: Path) -> None:
    trained_by_peft("bert", tmp_path, r=4, target_modules=["query"])
    edit(tmp_path, layer_replication=[[0, 1]], init_lora_weights="olora", lora_dropout="much")
    with pytest.raises(CheckpointError, match=r"(?s)3 problems.*lora_dropout.*init_lora.*layer_replication"):
        minilora.load(fresh("bert"), tmp_path)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "IA3", "ADALORA", None])
def test_other_methods_are_refused(kind: str | None, tmp_path: Path) -> None:
    trained_by_peft("bert", tmp_path, r=4, target_modules=["query"])
    edit(tmp_path, peft_type=kind)
    with pytest.raises(CheckpointError, match=kind or "no peft_type"):
        minilora.load(fresh("bert"), tmp_path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    trained_by_peft("bert", tmp_path, r=4, target_modules=["query"])
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        minilora.load(fresh("bert"), tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        minilora.load(fresh("bert"), tmp_path)
    with pytest.raises(FileNotFoundError):
        minilora.load(fresh("bert"), tmp_path / "none", format="peft")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["query"]}')
    with pytest.raises(CheckpointError, match=r"no 'adapter_model\.safetensors'"):
        minilora.load(fresh("bert"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        minilora.load(fresh("bert"), tmp_path)


# Half a file, or another model


def test_what_peft_passes_over_in_silence_is_an_error_here(tmp_path: Path) -> None:
    model = randomise(minilora.inject(fresh("bert"), ["query"], LoRAConfig(r=4), trainable=()))
    minilora.save(model, tmp_path, format="peft")
    other = fresh("bert")
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.mul_(2.0)
    peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    with (
        unchanged(other),
        pytest.raises(CheckpointError, match="not the base that the adapter was trained on"),
    ):
        minilora.load(other, tmp_path)
    stray = {"base_model.model.bert.encoder.layer.7.attention.self.query.lora_A.weight": torch.ones(4, 16)}
    rewrite(tmp_path, {**tensors_of(tmp_path), **stray})
    peft.PeftModel.from_pretrained(fresh("bert"), tmp_path)
    with pytest.raises(CheckpointError, match=r"layer\.7\.attention\.self\.query': no lora_B"):
        minilora.load(fresh("bert"), tmp_path)


def test_tensors_and_config_must_say_the_same(tmp_path: Path) -> None:
    trained_by_peft("bert", tmp_path, r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    good = tensors_of(tmp_path)
    cases = {
        r"'bert\.encoder\.layer\.\*\.attention\.self\.value' \(x2\): targeted by the config": {
            key: tensor for key, tensor in good.items() if "value" not in key
        },
        r"layer\.0\.attention\.self\.query': no lora_B": {
            key: tensor for key, tensor in good.items() if "0.attention.self.query.lora_B" not in key
        },
        r"key'.*the config does not target it": {
            **good,
            **{key.replace("query", "key"): tensor.clone() for key, tensor in good.items() if "query" in key},
        },
        r"'classifier': caught by modules_to_save on this model, but without tensors": {
            key: tensor for key, tensor in good.items() if "classifier" not in key
        },
        r"missing from the file: 'classifier\.bias'": {
            k: t for k, t in good.items() if "classifier.bias" not in k
        },
        r"'bert\.pooler\.dense\.weight': neither LoRA.*a weight of the base with other values": {
            **good,
            "base_model.model.bert.pooler.dense.weight": torch.zeros(16, 16),
        },
        r"the key does not begin": {**good, "query.lora_A.weight": torch.zeros(4, 16)},
        r"carries an adapter's name": {
            **good,
            "base_model.model.query.lora_A.default.weight": torch.zeros(4, 16),
        },
    }
    for message, tensors in cases.items():
        rewrite(tmp_path, tensors)
        model = fresh("bert")
        with unchanged(model), pytest.raises(CheckpointError, match=message):
            minilora.load(model, tmp_path)
    rewrite(tmp_path, good)
    edit(tmp_path, rank_pattern={"value": 2})
    with pytest.raises(
        CheckpointError, match=r"value' \(x2\): the config gives it rank 2, its tensors have rank 4"
    ):
        minilora.load(fresh("bert"), tmp_path)


def test_a_shared_layer_is_refused_both_ways(tmp_path: Path) -> None:
    """PEFT adapts a shared layer under the first of its parents only."""
    model = minilora.inject(CASES["shared"].build(), ["first"], LoRAConfig(r=4))
    with pytest.raises(CheckpointError, match="shared by several parents"):
        minilora.save(model, tmp_path / "new", format="peft")
    theirs = peft.get_peft_model(CASES["shared"].build(), peft.LoraConfig(r=4, target_modules=["first"]))
    theirs.save_pretrained(tmp_path / "theirs")
    assert type(theirs.base_model.model.again) is nn.Linear  # the very layer that `first` adapts
    with pytest.raises(CheckpointError, match="shared by several parents"):
        minilora.load(Shared(), tmp_path / "theirs")


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.overhead = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + self.overhead(x)


def test_modules_caught_in_the_middle_of_a_segment(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Heads().state_dict(), torch.randn(2, 8)

    def bare() -> nn.Module:
        model = Heads().eval()
        model.load_state_dict(base)
        return model

    model = peft.get_peft_model(
        bare(), peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    )
    for tensor in peft.get_peft_model_state_dict(model).values():
        tensor.data.normal_()
    model.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="'overhead'"):
        loaded = minilora.load(bare(), tmp_path / "theirs")
    assert isinstance(loaded.overhead, TrainableHead)
    torch.testing.assert_close(loaded(x), model.eval()(x), **SINGLE)

    ours = minilora.inject(bare(), ["body"], LoRAConfig(r=2, alpha=4), trainable=["head"])
    minilora.save(randomise(ours), tmp_path / "ours", format="peft")
    stored = tensors_of(tmp_path / "ours")
    assert torch.equal(stored["base_model.model.overhead.weight"], base["overhead.weight"])
    theirs = peft.PeftModel.from_pretrained(bare(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), ours(x), **SINGLE)


# What is written


def names_and_patterns(folder: Path) -> tuple[object, object, object]:
    config = config_of(folder)
    return config["target_modules"], config["rank_pattern"], config["alpha_pattern"]


def test_target_names_are_short_where_the_set_is_regular(tmp_path: Path) -> None:
    def written(targets: Any, path: str) -> object:
        model = minilora.inject(fresh("bert"), targets, LoRAConfig(r=4), trainable=())
        minilora.save(randomise(model), tmp_path / path, format="peft")
        by_peft("bert", tmp_path / path)
        return config_of(tmp_path / path)["target_modules"]

    assert written(["query", "value"], "a") == ["query", "value"]
    assert written(["attention.output.dense"], "b") == ["attention.output.dense"]
    everywhere = [
        "intermediate.dense",
        "key",
        "output.dense",
        "query",
        "value",
    ]  # `dense` is the pooler's, too
    assert set(written(re.compile(r"bert\.encoder\..*(dense|query|key|value)"), "c")) == {*everywhere}
    assert written(["layer.1.attention.self.query"], "d") == ["bert.encoder.layer.1.attention.self.query"]


class Echo(nn.Module):
    """A full name, "block.proj", that is the end of a longer one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential()
        self.block.proj = nn.Linear(4, 4)
        self.inner = nn.Sequential()
        self.inner.block = nn.Sequential()
        self.inner.block.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.block.proj(torch.tanh(self.block.proj(x)))


def test_a_name_that_ends_another_is_written_as_an_expression(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Echo().state_dict(), torch.randn(2, 4)

    def bare() -> nn.Module:
        model = Echo()
        model.load_state_dict(base)
        return model

    outer = re.compile(r"block\.proj")
    model = minilora.inject(bare(), outer, LoRAConfig(r=2, alpha=4))
    minilora.save(randomise(model), tmp_path / "a", format="peft")
    assert config_of(tmp_path / "a")["target_modules"] == r"block\.proj"
    theirs = peft.PeftModel.from_pretrained(bare(), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(x), model(x), **SINGLE)

    minilora.inject(model, re.compile(r"inner\.block\.proj"), LoRAConfig(r=3, alpha=3))
    minilora.save(randomise(model), tmp_path / "b", format="peft")
    targets, ranks, alphas = names_and_patterns(tmp_path / "b")
    assert targets == ["proj"]
    assert ranks == {r"^inner\.block\.proj": 3}
    assert alphas == {r"^inner\.block\.proj": 3}
    theirs = peft.PeftModel.from_pretrained(bare(), tmp_path / "b").eval()
    torch.testing.assert_close(theirs(x), model(x), **SINGLE)
    minilora.eject(minilora.load(model, tmp_path / "b"))


def test_several_configs_become_patterns(tmp_path: Path) -> None:
    model = minilora.inject(fresh("bert"), ["query"], LoRAConfig(r=4, alpha=8), trainable=())
    minilora.inject(model, ["value"], LoRAConfig(r=2, alpha=8), trainable=())
    minilora.inject(model, ["layer.1.attention.self.key"], LoRAConfig(r=4, alpha=32), trainable=())
    minilora.save(randomise(model), tmp_path / "a", format="peft")
    one_key = "bert.encoder.layer.1.attention.self.key"
    assert set(names_and_patterns(tmp_path / "a")[0]) == {"query", "value", one_key}
    assert names_and_patterns(tmp_path / "a")[1:] == ({"value": 2}, {"key": 32})
    with torch.no_grad():
        expected = MODELS["bert"][1](model)
    torch.testing.assert_close(by_peft("bert", tmp_path / "a"), expected, **EXACT)
    assert torch.equal(by_minilora("bert", tmp_path / "a"), expected)


def test_nothing_of_our_own_in_the_config_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = randomise(minilora.inject(fresh("bert"), ["query"], LoRAConfig(r=4), trainable=["classifier"]))
    minilora.save(model, tmp_path / "a", format="peft")
    minilora.save(minilora.merge(model), tmp_path / "b", format="peft")
    assert set(config_of(tmp_path / "a")) <= set(peft.LoraConfig.__dataclass_fields__)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    with safetensors.safe_open(tmp_path / "a" / "adapter_model.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format", "minilora_base", "minilora_config", "minilora_sha256"}


def test_vllm_finds_the_fields_that_it_reads(tmp_path: Path) -> None:
    """vLLM 0.10's PEFTHelper needs r, lora_alpha, target_modules; refuses DoRA, biases, modules_to_save."""
    model = randomise(minilora.inject(fresh("llama"), ["q_proj", "v_proj"], LoRAConfig(r=4, alpha=8)))
    minilora.save(model, tmp_path / "a", format="peft")
    config = config_of(tmp_path / "a")
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["use_dora"] is False
    for key, tensor in tensors_of(tmp_path / "a").items():
        assert re.fullmatch(
            r"base_model\.model\.model\.layers\.\d+\.self_attn\.[qv]_proj\.lora_[AB]\.weight", key
        )
        assert tensor.shape[0 if "lora_A" in key else 1] == 4


def test_what_peft_has_no_words_for(tmp_path: Path) -> None:
    model = minilora.inject(fresh("bert"), ["output.dense"], AdapterConfig(bottleneck=4), trainable=())
    minilora.inject(model, ["query"], LoRAConfig(r=2, dropout=0.1), trainable=())
    minilora.inject(model, ["value"], LoRAConfig(r=2, rslora=True), trainable=())
    with pytest.raises(CheckpointError, match=r"(?s)3 problems.*no bottleneck.*dropout.*rslora"):
        minilora.save(model, tmp_path / "a", format="peft")
    assert not any(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="at least one LoRA site"):
        peft_format.write(tmp_path / "b", _contents_without_lora())


def _contents_without_lora() -> Any:
    from minilora.files.contents import Contents
    from minilora.manifest import Manifest

    return Contents(Manifest((), ("head",)), {"head.weight": torch.zeros(2)})


def test_sites_that_peft_would_leave_out(tmp_path: Path) -> None:
    model = CASES["bert"].build()
    model.bert.classifier = nn.Linear(2, 2)
    minilora.inject(
        model, ["bert.classifier", "query"], LoRAConfig(r=2), trainable=[re.compile("classifier")]
    )
    with pytest.raises(CheckpointError, match=r"'bert\.classifier': PEFT leaves it out"):
        minilora.save(model, tmp_path / "a", format="peft")


def test_a_file_of_that_name_is_not_written_over(tmp_path: Path) -> None:
    model = minilora.inject(fresh("bert"), ["query"], LoRAConfig(r=4), trainable=())
    (tmp_path / "a").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        minilora.save(model, tmp_path / "a", format="peft")
    assert (tmp_path / "a").read_text() == "precious"


def test_the_formats_are_checked(tmp_path: Path) -> None:
    model = minilora.inject(fresh("bert"), ["query"], LoRAConfig(r=4), trainable=())
    with pytest.raises(minilora.MiniLoRAError, match="format must be one of"):
        minilora.save(model, tmp_path / "a", format="pickle")  # type: ignore[arg-type]
    with pytest.raises(minilora.MiniLoRAError, match="format must be one of"):
        minilora.load(model, tmp_path / "a", format="pickle")  # type: ignore[arg-type]
    with pytest.raises(minilora.MiniLoRAError, match="config goes with"):
        minilora.load(model, tmp_path / "a", config=LoRAConfig())


def test_loading_into_a_model_that_carries_the_same_injections(tmp_path: Path) -> None:
    expected = trained_by_peft(
        "bert", tmp_path, r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS"
    )
    model = minilora.load(fresh("bert"), tmp_path)
    randomise(model)
    with torch.no_grad():
        assert not torch.allclose(MODELS["bert"][1](model), expected)
        found = MODELS["bert"][1](minilora.load(model, tmp_path))
    torch.testing.assert_close(found, expected, **EXACT)
    assert all(p.requires_grad for p in minilora.trainable_parameters(model))


# What PEFT reads, where it can be computed


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 0},
        {"lora_alpha": -6},
        {"lora_alpha": 2.5},
        {"lora_dropout": 1.0},
        {"alpha_pattern": {"value": 0, "key": -3}, "target_modules": ["query", "value", "key"]},
    ],
    ids=str,
)
def test_odd_numbers_both_ways(fields: dict[str, Any], tmp_path: Path) -> None:
    expected = trained_by_peft("bert", tmp_path / "a", **{"r": 4, "target_modules": ["query"], **fields})
    torch.testing.assert_close(by_minilora("bert", tmp_path / "a"), expected, **EXACT)
    minilora.save(minilora.load(fresh("bert"), tmp_path / "a"), tmp_path / "b", format="peft")
    torch.testing.assert_close(by_peft("bert", tmp_path / "b"), expected, **EXACT)


def test_a_head_in_a_wider_dtype_is_rounded_as_peft_rounds_it(tmp_path: Path) -> None:
    case = CASES["bert"]
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(case.build(), config)
    for tensor in peft.get_peft_model_state_dict(model).values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.build(torch.bfloat16), tmp_path).eval()
    with pytest.warns(
        UserWarning, match=r"'classifier\.weight', 'classifier\.bias': torch\.float32, rounded to"
    ):
        ours = minilora.load(case.build(torch.bfloat16), tmp_path)
    head = theirs.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.dtype == torch.bfloat16
    assert torch.equal(ours.classifier.trained.weight, head.weight)
    assert torch.equal(ours.classifier.trained.bias, head.bias)
    with torch.no_grad():
        torch.testing.assert_close(case.run(ours), case.run(theirs), rtol=0, atol=5e-2)
    minilora.save(minilora.load(case.build(), tmp_path), tmp_path / "own")
    with pytest.raises(
        CheckpointError, match=r"torch\.float32, which torch\.bfloat16 cannot hold without loss"
    ):
        minilora.load(case.build(torch.bfloat16), tmp_path / "own")


# What PEFT's Auto classes and the hub read


def saved_base(name: str, folder: Path) -> nn.Module:
    """Return a bare model that knows where it came from."""
    fresh(name).save_pretrained(folder)
    model = type(fresh(name)).from_pretrained(folder, dtype="auto").eval()
    assert model.name_or_path == str(folder)
    return model


AUTO = {
    "bert": ("SEQ_CLS", "AutoPeftModelForSequenceClassification", {"num_labels": 3}),
    "distilbert": ("SEQ_CLS", "AutoPeftModelForSequenceClassification", {"num_labels": 3}),
    "gpt2": ("CAUSAL_LM", "AutoPeftModelForCausalLM", {}),
    "llama": ("CAUSAL_LM", "AutoPeftModelForCausalLM", {}),
    "t5": ("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM", {}),
    "vit": (None, "AutoPeftModel", {}),
    "whisper": (None, "AutoPeftModel", {}),
}


@pytest.mark.parametrize("name", AUTO)
def test_the_auto_classes_open_what_minilora_wrote(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, auto_class, options = AUTO[name]
    _, run, targets, trainable = MODELS[name]
    model = minilora.inject(
        saved_base(name, tmp_path / "base"), targets, LoRAConfig(r=4), trainable=trainable
    )
    minilora.save(randomise(model), tmp_path / "a", format="peft")
    config = config_of(tmp_path / "a")
    assert config["task_type"] == task
    assert (config["auto_mapping"] is None) == (task is not None)
    monkeypatch.setattr(peft.auto, "check_file_exists_on_hf_hub", lambda *_, **__: None)  # for a tokenizer
    theirs = getattr(peft, auto_class).from_pretrained(tmp_path / "a", dtype=torch.float64, **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(run(theirs), run(model), **EXACT)
        assert torch.equal(
            run(minilora.load(saved_base(name, tmp_path / "base"), tmp_path / "a")), run(model)
        )


def test_a_frozen_head_is_not_claimed_by_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With task_type SEQ_CLS, PEFT would look for the classifier in the file."""
    model = minilora.inject(saved_base("bert", tmp_path / "base"), ["query"], LoRAConfig(r=4), trainable=())
    minilora.save(randomise(model), tmp_path / "a", format="peft")
    assert config_of(tmp_path / "a")["task_type"] is None
    assert config_of(tmp_path / "a")["auto_mapping"] == {
        "base_model_class": "BertForSequenceClassification",
        "parent_library": "transformers.models.bert.modeling_bert",
    }
    monkeypatch.setattr(peft.auto, "check_file_exists_on_hf_hub", lambda *_, **__: None)
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "a", num_labels=3, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(MODELS["bert"][1](theirs), MODELS["bert"][1](model), **EXACT)


def test_lora_on_the_head_is_not_claimed_by_a_task(tmp_path: Path) -> None:
    model = minilora.inject(fresh("bert"), ["query", "classifier"], LoRAConfig(r=2))
    minilora.save(randomise(model), tmp_path / "a", format="peft")
    assert config_of(tmp_path / "a")["task_type"] is None
    with torch.no_grad():
        torch.testing.assert_close(by_peft("bert", tmp_path / "a"), MODELS["bert"][1](model), **EXACT)


def test_the_model_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = minilora.inject(fresh("bert"), ["query"], LoRAConfig(r=4, alpha=8), trainable=["classifier"])
    model.name_or_path = "google-bert/bert-base-uncased"
    minilora.save(model, tmp_path / "a", format="peft")
    card = hub.ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == [
        "base_model:adapter:google-bert/bert-base-uncased",
        "lora",
        "minilora",
        "transformers",
    ]
    assert "| `bert.encoder.layer.*.attention.self.query` | 2 | LoRA, r = 4, alpha = 8 |" in card.text
    assert "| `classifier` | 1 | trained in full |" in card.text
    theirs = peft.get_peft_model(fresh("bert"), peft.LoraConfig(r=4, target_modules=["query"]))
    theirs.save_pretrained(tmp_path / "a")  # PEFT takes the card for one of its own, and adds to it
    assert hub.ModelCard.load(tmp_path / "a" / "README.md").data.library_name == "peft"
