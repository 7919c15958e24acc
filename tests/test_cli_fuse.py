"""`minilora fuse` against the merged model in transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checks import injected_modules, randomise
from command_line import Output, assert_close, assert_same_state, loaded, logits, run, trained
from models import BERT, CASES, VIT_MLP, transformers_major
from torch import Tensor, nn

import minilora
from minilora import AdapterConfig, LoRAConfig
from minilora.cli import base_files, fuse_files, updates
from minilora.files.formats import native
from minilora.files.loading import read
from minilora.files.tensors import opened

transformers = pytest.importorskip("transformers")


Fuse = Callable[..., Output]


@pytest.fixture
def fuse(tmp_path: Path) -> Fuse:
    """Fuse an adapter, `a.safetensors` if not told, into a base, `base` if not told, to `out`."""

    def fuse(*more: str, base: str = "base", adapter: str = "a.safetensors", out: str = "out") -> Output:
        base_path, adapter_path, out_path = (tmp_path / name for name in (base, adapter, out))
        return run("fuse", "--base", base_path, "--adapter", adapter_path, "--out", out_path, *more)

    return fuse


FUSED = {
    "bert": (("query", "value", "output.dense"), ("classifier",)),
    "gpt2": (("c_attn", "c_fc", "attn.c_proj"), ()),
    "t5": (("q", "v", "wo"), ()),
    "vit": (VIT_MLP, ("classifier",)),
    "llama": (("q_proj", "v_proj", "down_proj", "lm_head"), ()),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_files_compute_what_the_merged_model_does(
    name: str, sharded: bool, tmp_path: Path, fuse: Fuse
) -> None:
    targets, trainable = FUSED[name]
    CASES[name].build().save_pretrained(tmp_path / "base", max_shard_size="8KB" if sharded else "1GB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == sharded
    model = trained(name, trainable, targets)
    minilora.save(model, tmp_path / "a.safetensors")
    result = fuse()
    assert result.code == 0, result.err
    assert "the same base" in result.err
    found = loaded(name, tmp_path / "out")
    assert_close(logits(name, found), logits(name, minilora.merge(model)))
    assert_same_state(found, minilora.fuse(minilora.unmerge(model)))
    before, after = (_described(tmp_path / folder) for folder in ("base", "out"))
    assert before == after
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _described(folder: Path) -> Any:
    base = base_files.BaseFiles.open(folder)
    index = {key: value for key, value in (base.index or {}).items() if key != "metadata"}
    sizes = (base.index or {}).get("metadata", {}).get("total_size")
    return dict(base.tensors), index, sizes, base.config


@pytest.mark.skipif(transformers_major() < 5, reason="the names are still those of the first version")
def test_weights_under_other_names_are_known_by_their_values(tmp_path: Path) -> None:
    """transformers saves a ViT under the names of its first version."""
    CASES["vit"].build().save_pretrained(tmp_path / "base")
    stored = base_files.BaseFiles.open(tmp_path / "base").tensors
    model = trained("vit", ["classifier"], ["fc1"])
    assert not any(f"{site}.weight" in stored for site in injected_modules(model) if "fc1" in site)
    minilora.save(model, tmp_path / "a.safetensors")
    assert run("verify", tmp_path / "a.safetensors", "--base", tmp_path / "base").code == 0
    CASES["vit"].build(torch.bfloat16).save_pretrained(tmp_path / "cast")
    result = run("verify", tmp_path / "a.safetensors", "--base", tmp_path / "cast")
    assert "yes: the same base in another dtype" in result.out
    tensors = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    copies = {f"again.{name}": tensor.clone() for name, tensor in tensors.items()}
    (tmp_path / "twice").mkdir()
    safetensors.torch.save_file({**tensors, **copies}, tmp_path / "twice" / "model.safetensors")
    result = run("verify", tmp_path / "a.safetensors", "--base", tmp_path / "twice")
    assert result.code == 1
    assert "the base has no weight of that name" in result.out
    inner = trained("vit", ["layernorm"], ["fc1"])
    minilora.save(inner, tmp_path / "b.safetensors")
    stored_names = {name.split(".", 1)[1] for name in stored}
    assert ("layernorm.weight" in stored_names) == (
        run("verify", tmp_path / "b.safetensors", "--base", tmp_path / "base").code == 0
    )


@pytest.mark.peft
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_peft_folder_is_fused_as_peft_would(name: str, tmp_path: Path, fuse: Fuse) -> None:
    peft = pytest.importorskip("peft")
    CASES[name].build().save_pretrained(tmp_path / "base")
    fields = (
        {"target_modules": ["query"]}
        if name == "bert"
        else {"target_modules": ["c_proj"], "fan_in_fan_out": True}
    )
    theirs = peft.get_peft_model(CASES[name].build(), peft.LoraConfig(r=4, init_lora_weights=False, **fields))
    theirs.save_pretrained(tmp_path / "peft")
    result = fuse(adapter="peft")
    assert result.code == 0, result.err
    found = logits(name, loaded(name, tmp_path / "out"))
    assert_close(found, logits(name, theirs.merge_and_unload()))


def test_fuse_into_another_dtype(file: Path, base: Path, fuse: Fuse, tmp_path: Path) -> None:
    CASES["bert"].build().save_pretrained(base, max_shard_size="8KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    result = fuse("--dtype", "bfloat16")
    assert result.code == 0, result.err
    index = base_files.BaseFiles.open(tmp_path / "out").index
    assert index["metadata"]["total_size"] == sum(
        2 * torch.Size(described.shape).numel()
        for described in base_files.BaseFiles.open(tmp_path / "out").tensors.values()
    )
    shares = minilora.merge_loss(minilora.load(CASES["bert"].build(), file), dtype="bfloat16")
    worst, share = next(iter(shares.items()))
    assert f"lost to rounding: {share:.2%} of the update of '{worst}', where it is most" in result.err
    model = loaded("bert", tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = minilora.fuse(minilora.load(CASES["bert"].build(), file), dtype=torch.bfloat16)
    assert_same_state(model, expected)


def test_other_files_are_carried_along_but_no_other_weights(
    file: Path, base: Path, fuse: Fuse, tmp_path: Path
) -> None:
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("[]")
    (base / "pytorch_model.bin").write_bytes(b"old")
    result = fuse()
    assert result.code == 0
    assert "not carried along, being the unfused weights in other forms: 'pytorch_model.bin'" in result.err
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}


def test_a_base_saved_from_the_bare_model(fuse: Fuse, tmp_path: Path) -> None:
    """Its names lack the prefix `bert.`; transformers adds it, and so does fuse."""
    CASES["bert"].build().bert.save_pretrained(tmp_path / "base")
    model = trained("bert", (), ["query"])
    minilora.save(model, tmp_path / "a.safetensors")
    result = fuse()
    assert result.code == 0, result.err
    fused = transformers.BertModel.from_pretrained(tmp_path / "out")
    assert_same_state(fused, minilora.fuse(model).bert)
    minilora.save(trained(), tmp_path / "b.safetensors")
    result = fuse(adapter="b.safetensors", out="no")
    assert result.code == 2
    assert "'classifier.bias', 'classifier.weight': trained in full, and outside 'bert'" in result.err


def test_an_adapter_of_the_bare_model(base: Path, fuse: Fuse, tmp_path: Path) -> None:
    bare = minilora.inject(CASES["bert"].build().bert, ["query"], LoRAConfig(r=2), trainable=["pooler"])
    minilora.save(randomise(bare), tmp_path / "a.safetensors")
    result = fuse()
    assert result.code == 0, result.err
    assert_same_state(loaded("bert", tmp_path / "out").bert, minilora.fuse(bare))


def test_a_head_that_the_base_does_not_have(fuse: Fuse, tmp_path: Path) -> None:
    stored = {k: v for k, v in CASES["bert"].build().state_dict().items() if "classifier" not in k}
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(stored, tmp_path / "base" / "model.safetensors")
    CASES["bert"].build().config.save_pretrained(tmp_path / "base")
    minilora.save(trained(), tmp_path / "a.safetensors")
    result = fuse()
    assert result.code == 0, result.err
    assert "new in this checkpoint: 'classifier.bias', 'classifier.weight'" in result.err
    assert_same_state(loaded("bert", tmp_path / "out"), minilora.fuse(trained()))


def test_tied_weights_are_refused(fuse: Fuse, tmp_path: Path) -> None:
    model = CASES["gpt2"].build()
    model.save_pretrained(tmp_path / "base")  # one of the two names only
    minilora.save(trained("gpt2", (), ["lm_head"]), tmp_path / "a.safetensors")
    result = fuse()
    assert result.code == 2
    assert "'lm_head': its weight is tied to 'transformer.wte.weight'" in result.err
    both = {key: value.clone() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(both, tmp_path / "base" / "model.safetensors")
    result = fuse()
    assert result.code == 2
    assert "'lm_head': its weight is tied to 'transformer.wte.weight'" in result.err
    head_only = {key: value for key, value in both.items() if "wte" not in key}
    safetensors.torch.save_file(head_only, tmp_path / "base" / "model.safetensors")
    result = fuse()
    assert result.code == 2
    assert "tied to the embedding, which is not stored apart" in result.err
    assert not (tmp_path / "out").exists()


def albert() -> nn.Module:
    shape = {**BERT, "vocab_size": 40, "embedding_size": 8, "classifier_dropout_prob": 0.0}
    return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**shape))


def electra() -> nn.Module:
    shape = {**BERT, "vocab_size": 40, "embedding_size": 8, "classifier_dropout": 0.0}
    return transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**shape))


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (albert, "embedding_hidden_mapping_in"),
        (electra, "embeddings_project"),
        # Not tied either: a weight with as many rows as there are words, beside the embedding.
        (CASES["bert"].build, "intermediate.dense"),
    ],
    ids=["albert", "electra", "bert"],
)
def test_a_name_or_a_shape_is_no_tie(
    make: Callable[[], nn.Module], target: str, fuse: Fuse, tmp_path: Path
) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    model = randomise(minilora.inject(model, [target, "query"], LoRAConfig(r=2), trainable=()))
    minilora.save(model, tmp_path / "a.safetensors")
    result = fuse()
    assert result.code == 0, result.err
    assert_same_state(type(make()).from_pretrained(tmp_path / "out"), minilora.fuse(model))


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ensemble = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.zeros = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        for layer in self.zeros:
            nn.init.zeros_(layer.weight)


def test_one_file_becomes_one_file(fuse: Fuse, tmp_path: Path) -> None:
    """Also: `ensemble` and weights that all start from zero are no embeddings."""
    model = Ensemble()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base.safetensors")
    minilora.inject(model, "all-linear", LoRAConfig(r=2))
    minilora.save(randomise(model), tmp_path / "a.safetensors")
    for out in ("out", "a.safetensors", "base.safetensors"):
        before = sorted(tmp_path.iterdir())
        result = fuse(base="base.safetensors", out=out)
        assert result.code == 2
        assert ("ends with .safetensors" if out == "out" else "exists already") in result.err
        assert sorted(tmp_path.iterdir()) == before
    result = fuse(base="base.safetensors", out="out.safetensors")
    assert result.code == 0, result.err
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    expected = minilora.fuse(model).state_dict()
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-7)


def test_places_where_the_result_cannot_be(file: Path, base: Path, fuse: Fuse) -> None:
    for out, says in (
        ("out.safetensors", "is a folder, and so is the result"),
        ("base/out", "lies inside the base's own folder"),
        ("base", "inside the base's own folder"),
        ("absent/out", "absent"),
    ):
        result = fuse(out=out)
        assert result.code == 2
        assert says in result.err
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "model.safetensors"]


def test_ties_that_a_header_tells_of(fuse: Fuse, tmp_path: Path) -> None:
    """`safetensors.torch.save_model` leaves a tied weight out under one name, and notes it."""
    for name, target in (("tied", "head"), ("gpt2", "lm_head")):
        safetensors.torch.save_model(CASES[name].build(), tmp_path / f"{name}.safetensors")
        minilora.save(trained(name, (), [target]), tmp_path / "a.safetensors")
        result = fuse(base=f"{name}.safetensors", out="out.safetensors")
        assert result.code == 2
        assert f"{target!r}: " in result.err
        assert "tied" in result.err
        assert "no weight of that name" not in result.err


def test_equal_values_are_a_tie_where_nothing_else_is_known(fuse: Fuse, tmp_path: Path) -> None:
    model = CASES["tied"].build()
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(stored, tmp_path / "base.safetensors")
    minilora.save(trained("tied", (), ["head", "body"]), tmp_path / "a.safetensors")
    arguments = {"base": "base.safetensors", "out": "out.safetensors"}
    result = fuse(**arguments)
    assert result.code == 2
    assert "'head': its weight is tied to 'embedding.weight', whose values it has" in result.err
    assert "'body'" not in result.err
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    assert fuse(**arguments).code == 0


def test_without_a_config_a_weight_under_another_name_is_another_weight(fuse: Fuse, tmp_path: Path) -> None:
    """The values of the head are those of the embedding, which an update must not reach."""
    stored = {key: value for key, value in CASES["tied"].build().state_dict().items() if key != "head.weight"}
    safetensors.torch.save_file(stored, tmp_path / "base.safetensors")
    minilora.save(trained("tied", (), ["head", "body"]), tmp_path / "a.safetensors")
    result = fuse(base="base.safetensors", out="out.safetensors")
    assert result.code == 2
    assert "'head': the base has no weight of that name" in result.err
    assert "A weight that is tied to another" in result.err


def test_values_that_the_dtype_cannot_hold(base: Path, fuse: Fuse, tmp_path: Path) -> None:
    model = minilora.inject(CASES["bert"].build(), ["query"], LoRAConfig(r=2, alpha=1e6), trainable=())
    minilora.save(randomise(model), tmp_path / "a.safetensors")
    result = fuse("--dtype", "float16")
    assert result.code == 2
    assert "values are too large for float16" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base"]
    assert fuse("--dtype", "bfloat16").code == 0


def test_an_adapter_that_is_not_finite(file: Path, base: Path, fuse: Fuse, tmp_path: Path) -> None:
    contents = read(file)
    tensors = {key: tensor.clone() for key, tensor in contents.tensors.items()}
    tensors["classifier.bias"][0] = torch.nan
    native.write(file, dataclasses.replace(contents, tensors=tensors))
    result = fuse()
    assert result.code == 2
    assert "'classifier.bias' of the adapter: not finite" in result.err
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_unless_told(file: Path, fuse: Fuse, tmp_path: Path) -> None:
    other = CASES["bert"].build()
    other.bert.encoder.layer[0].output.dense.weight.data.add_(0.1)
    other.save_pretrained(tmp_path / "base")
    result = fuse()
    assert result.code == 2
    assert "not the base that the adapter was trained on" in result.err
    assert not (tmp_path / "out").exists()
    assert fuse("--no-check-base").code == 0


def test_what_cannot_be_fused(base: Path, file: Path, fuse: Fuse, tmp_path: Path) -> None:
    model = minilora.inject(
        CASES["bert"].build(), ["output.dense"], AdapterConfig(bottleneck=2), trainable=()
    )
    minilora.save(model, tmp_path / "b.safetensors")
    result = fuse(adapter="b.safetensors")
    assert "a bottleneck adapter is not linear" in result.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    assert "exists already" in fuse(out="full").err
    assert "has neither" in fuse(base="full").err
    quantised = {
        key: value.to(torch.int8) if "query.weight" in key else value.clone()
        for key, value in CASES["bert"].build().state_dict().items()
    }
    safetensors.torch.save_file(quantised, base / "model.safetensors")
    assert "is I8, quantised" in fuse().err
    assert not (tmp_path / "out").exists()


def test_an_index_that_lies(file: Path, fuse: Fuse, tmp_path: Path) -> None:
    CASES["bert"].build().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for weight_map, says in (
        ({**good["weight_map"], "classifier.bias": "../../a.safetensors"}, "files elsewhere"),
        (
            {k: v for k, v in good["weight_map"].items() if k != "classifier.bias"},
            "disagree on 'classifier.bias'",
        ),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({**good, "weight_map": weight_map}))
        result = fuse()
        assert result.code == 2
        assert says in result.err


@pytest.mark.parametrize("dies", ["in the first shard", "while files are carried along"])
def test_an_interruption_leaves_nothing(
    dies: str, file: Path, base: Path, fuse: Fuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    if dies == "in the first shard":
        monkeypatch.setattr(updates, "effective_weight", interrupted)
    else:
        monkeypatch.setattr(shutil, "copyfile", interrupted)
    result = fuse()
    assert result.code == 130
    assert "nothing has been written" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base"]


def test_one_tensor_in_memory_at_a_time(
    file: Path, base: Path, fuse: Fuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of the base is let go before the next is read, so no shard need fit in memory."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            nonlocal most
            tensor = self.file.get_tensor(name)
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

    @contextlib.contextmanager
    def counted(path: Path) -> Iterator[Counting]:
        with opened(path) as source:
            yield Counting(source)

    monkeypatch.setattr(base_files, "opened", counted)
    monkeypatch.setattr(fuse_files, "opened", counted)
    assert fuse().code == 0
    assert 1 <= most <= 2
