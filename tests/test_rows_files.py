"""Trained rows in files: minilora's own and the command line, from adding tokens to a fused model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checks import randomise, raw, unchanged
from command_line import run
from torch import Tensor, nn

import minilora
from minilora import CheckpointError, LoRAConfig, RowsConfig
from minilora.files.formats import native
from minilora.files.loading import read

transformers = pytest.importorskip("transformers")

WORDS, NEW = 32, (32, 33, 34)
IDS = torch.tensor([[1, 33, 5, 34, 32, 7]])
CONFIGS = {"embed_tokens": RowsConfig(rows=NEW), "q_proj": LoRAConfig(r=2), "v_proj": LoRAConfig(r=2)}
TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def llama(
    tied: bool = True, words: int = WORDS + len(NEW), seed: int = 0, dtype: Any = torch.float32
) -> nn.Module:
    """Return a model whose last rows, those of new tokens, begin at random as the seed has it."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        **shape,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(seed)
    if words != WORDS:
        model.resize_token_embeddings(words, mean_resizing=False)
    return model.to(dtype).eval()


def targets(tied: bool) -> tuple[list[str], dict[str, Any]]:
    """Return what to inject: where the weights are apart, new tokens need rows of both."""
    configs = CONFIGS if tied else {**CONFIGS, "lm_head": RowsConfig(rows=NEW)}
    return list(configs), configs


def trained(tied: bool = True, **options: Any) -> nn.Module:
    return randomise(minilora.inject(llama(tied, **options), *targets(tied)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    minilora.save(trained(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@TIES
def test_from_new_tokens_to_a_model_that_others_load(tied: bool, tmp_path: Path) -> None:
    model = minilora.inject(llama(tied), *targets(tied))
    assert torch.equal(logits(model), logits(llama(tied)))
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.1)
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] * 0.7
    expected = logits(model)
    minilora.save(model, tmp_path / "a.safetensors")
    rows = ["model.embed_tokens.trained_rows"] + ["lm_head.trained_rows"] * (not tied)
    tensors = {n: tuple(t.shape) for n, t in minilora.adapter_state_dict(model).items() if "rows" in n}
    assert tensors == dict.fromkeys(rows, (3, 16))

    again = minilora.load(llama(tied), tmp_path / "a.safetensors")
    assert torch.equal(logits(again), expected)
    minilora.load(again, tmp_path / "a.safetensors")
    assert torch.equal(logits(again), expected)
    again = minilora.load(llama(tied, seed=5), tmp_path / "a.safetensors")  # whose new rows were others
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = minilora.fuse(again)
    torch.testing.assert_close(logits(fused), expected, rtol=0, atol=1e-5)
    assert (fused.lm_head.weight is fused.model.embed_tokens.weight) == tied
    fused.save_pretrained(tmp_path / "fused")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "fused")
    assert torch.equal(logits(loaded), logits(fused))
    ids = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **ids), fused.generate(IDS, **ids))


def test_the_first_rows_alone_decide_what_base_it_is(file: Path) -> None:
    other = llama(seed=5)
    other.model.embed_tokens.weight.data[list(NEW)] = 7.0
    minilora.load(other, file)
    other = llama()
    other.model.embed_tokens.weight.data[3] += 1
    with unchanged(other), pytest.raises(CheckpointError, match=r"not the base .*'model\.embed_tokens'"):
        minilora.load(other, file)
    for words, says in ((WORDS, "has no row 32, 33, 34"), (WORDS + 1, "has no row 33, 34")):
        other = llama(words=words)
        with (
            unchanged(other),
            pytest.raises(CheckpointError, match=rf"{says}; .*resize_token_embeddings\(35\)"),
        ):
            minilora.load(other, file)
    minilora.load(llama(words=WORDS + 10), file)  # with room to spare


def test_rows_in_the_middle_and_all_of_them() -> None:
    for rows in ([0, 20], range(WORDS), [0], [WORDS - 1]):
        model = minilora.inject(llama(words=WORDS), "embed_tokens", RowsConfig(rows=rows))
        base = native_fingerprint(model)
        if len(rows) == WORDS:
            assert not base.signatures
            assert set(base.unchecked.values()) == {"all of its rows are trained"}
        else:
            assert {s.shape[0] for s in base.signatures.values()} == {19 if len(rows) == 2 else WORDS - 1}


def native_fingerprint(model: nn.Module) -> Any:
    from minilora.files.fingerprint import Fingerprint
    from minilora.sites import injected_sites

    return Fingerprint.of(injected_sites(model))


def test_what_was_trained_tied_is_loaded_tied_and_apart_apart(tmp_path: Path) -> None:
    for tied, here in ((True, False), (False, True)):
        minilora.save(trained(tied), tmp_path / "a")
        model = llama(here)
        with (
            unchanged(model),
            pytest.raises(CheckpointError, match="rows are the same at all modules that share"),
        ):
            minilora.load(model, tmp_path / "a")
        model = trained(here)
        with unchanged(model), pytest.raises(CheckpointError, match="another configuration"):
            minilora.load(model, tmp_path / "a")
    alone = minilora.inject(llama(tied=False), "embed_tokens", RowsConfig(rows=NEW))
    minilora.save(alone, tmp_path / "a")
    model = llama()
    with unchanged(model), pytest.raises(CheckpointError, match=r"share a weight, here .*'lm_head'"):
        minilora.load(model, tmp_path / "a")


def test_the_header_says_where_rows_are_and_whose(file: Path) -> None:
    contents = read(file)
    said = json.loads(json.dumps(native.manifest_to_json(contents.manifest)))
    assert [(e["config"], e["sites"]) for e in said["injections"] if e["kind"] == "rows"] == [
        ({"dtype": None, "rows": [32, 33, 34], "of": None}, ["model.embed_tokens"]),
        ({"dtype": None, "rows": [32, 33, 34], "of": "model.embed_tokens"}, ["lm_head"]),
    ]
    assert native.manifest_from_json(said) == contents.manifest


def rewritten(file: Path, edit: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a file with another manifest, or more tensors, under a checksum of its own."""
    from dataclasses import replace

    contents = read(file)
    said = native.manifest_to_json(contents.manifest)
    edit(said["injections"])
    manifest = native.manifest_from_json(json.loads(json.dumps(said)))
    native.write(file, replace(contents, manifest=manifest, tensors={**contents.tensors, **(tensors or {})}))
    return file


def rows_of(entries: list[Any]) -> list[Any]:
    return [entry for entry in entries if entry["kind"] == "rows"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda e: e.reverse(), "are those of 'model.embed_tokens', which is not placed before it"),
        (lambda e: rows_of(e)[1]["config"].update(of="model.norm"), "rows are the same at all"),
        (lambda e: rows_of(e)[1]["config"].update(of=None), "rows are the same at all"),
        (lambda e: e.remove(rows_of(e)[0]), "rows are the same at all"),
        (lambda e: e.remove(rows_of(e)[1]), "rows are the same at all"),
        (lambda e: rows_of(e)[1]["config"].update(rows=[1, 2, 3]), "rows are the same at all"),
        (
            lambda e: [r["config"].update(rows=[1, 2]) for r in rows_of(e)],
            r"shape \(3, 16\), the model needs \(2, 16\)",
        ),
        (
            lambda e: [r["config"].update(rows=[1, 2**70]) for r in rows_of(e)],
            "has no row 1180591620717411303424",
        ),
    ],
    ids=[
        "order",
        "of another",
        "of none",
        "first gone",
        "other gone",
        "other rows",
        "fewer rows",
        "large rows",
    ],
)
def test_a_file_that_contradicts_itself_is_refused(file: Path, edit: Any, says: str) -> None:
    rewritten(file, edit)
    model = llama()
    with unchanged(model), pytest.raises(CheckpointError, match=says):
        minilora.load(model, file)


@pytest.mark.parametrize("rows", [None, 3, [], [-1], [True], ["1"], [[1]], {"a": 1}])
@pytest.mark.parametrize("of", [None, 3, ["a"]])
def test_a_header_with_rows_that_are_none_is_refused(file: Path, rows: Any, of: Any) -> None:
    with pytest.raises(CheckpointError, match="config in the header is not valid"):
        rewritten(file, lambda e: rows_of(e)[0]["config"].update(rows=rows, of=of))


def test_names_that_changed_since(tmp_path: Path) -> None:
    def model(tokens: str, head: str) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential()
        made.add_module(tokens, nn.Embedding(10, 4))
        made.add_module(head, nn.Linear(4, 10, bias=False))
        made.get_submodule(head).weight = made.get_submodule(tokens).weight
        return made

    old = randomise(minilora.inject(model("wte", "lm_head"), "wte", RowsConfig(rows=[9])))
    minilora.save(old, tmp_path / "a")
    new = minilora.load(model("embed", "out"), tmp_path / "a", rename={"wte": "embed", "lm_head": "out"})
    ids = torch.tensor([9, 1])
    assert torch.equal(new(ids), old(ids))
    assert new.out.config.of == "embed"


def test_16_bit_bases_keep_float32_rows(tmp_path: Path) -> None:
    model = trained(dtype=torch.bfloat16)
    minilora.save(model, tmp_path / "a")
    loaded = minilora.load(llama(dtype=torch.bfloat16), tmp_path / "a")
    assert loaded.model.embed_tokens.trained_rows.dtype == torch.float32
    assert raw(loaded.model.embed_tokens.trained_rows) == raw(model.model.embed_tokens.trained_rows)
    assert torch.equal(logits(loaded), logits(model))
    minilora.load(llama(), tmp_path / "a", check_base=True)  # the same base, cast


def test_transformers_own_checkpoints_have_a_shared_weight_once(tmp_path: Path) -> None:
    """As its Trainer writes them; a model that was injected alike goes on from them."""
    model = trained()
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.trained_rows" in stored
    assert len([name for name in stored if name.endswith("base.weight") and "proj" not in name]) == 1
    other = minilora.inject(llama(seed=5), *targets(tied=True))
    missing = other.load_state_dict(stored, strict=False).missing_keys
    assert missing == ["lm_head.base.weight"]
    assert torch.equal(logits(other), logits(model))


# The command line


def test_inspect(file: Path) -> None:
    shown = run("inspect", file)
    assert shown.code == 0, shown.err
    for line in (
        "rows rows=32, 33, 34:",
        "model.embed_tokens  x1    trained_rows 3x16  norm ",
        "rows rows=32, 33, 34 of=model.embed_tokens:",
        "lm_head  x1    trained_rows 3x16  norm ",
    ):
        assert line in shown.out, shown.out
    said = json.loads(run("inspect", file, "--json").out)
    assert said["problems"] == []
    assert said["parameters"] == sum(t.numel() for t in read(file).tensors.values())
    assert {entry["site"] for entry in said["sites"] if entry["kind"] == "rows"} == {
        "model.embed_tokens",
        "lm_head",
    }


@pytest.mark.parametrize("base", ["tied", "resized anew", "another", "too small"])
def test_verify(base: str, file: Path, tmp_path: Path) -> None:
    model = llama(seed=5 if base == "resized anew" else 0, words=WORDS if base == "too small" else WORDS + 3)
    if base == "another":
        model.model.embed_tokens.weight.data[:10] += 1
    model.save_pretrained(tmp_path / "base")
    verdict = run("verify", file, "--base", tmp_path / "base")
    expected = {"another": "differ", "too small": "(32, 16), the adapter's update (3, 16)"}.get(
        base, "the same base"
    )
    assert verdict.code == (base in ("another", "too small")), verdict.out
    assert expected in verdict.out, verdict.out


def test_diff(file: Path, tmp_path: Path) -> None:
    other = trained()
    other.model.embed_tokens.trained_rows.data.add_(0.1)
    minilora.save(other, tmp_path / "b")
    found = run("diff", file, tmp_path / "b")
    assert found.code == 1
    assert "model.embed_tokens (rows): other values" in found.out
    assert run("diff", file, file).out == "the same\n"
    fewer = minilora.inject(llama(), "embed_tokens", RowsConfig(rows=[32]))
    minilora.save(fewer, tmp_path / "c")
    found = run("diff", file, tmp_path / "c").out
    assert "rows (32, 33, 34) -> (32,)" in found, found
    assert "model.embed_tokens (rows): other values, other shapes" in found


def test_convert_needs_the_model(file: Path, tmp_path: Path) -> None:
    found = run("convert", file, tmp_path / "out", "--to", "peft")
    assert found.code == 2
    assert "depends on the model" in found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@TIES
def test_fused_files_are_the_fused_model(tied: bool, sharded: bool, tmp_path: Path) -> None:
    model = trained(tied)
    minilora.save(model, tmp_path / "a")
    llama(tied, seed=5).save_pretrained(tmp_path / "base", max_shard_size="3KB" if sharded else "1GB")
    found = run("fuse", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--out", tmp_path / "out")
    assert found.code == 0, found.err
    fused, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(logits(fused.eval()), logits(model), rtol=0, atol=1e-5)
    expected = minilora.fuse(minilora.load(llama(tied, seed=5), tmp_path / "a"))
    assert raw(fused.model.embed_tokens.weight) == raw(expected.model.embed_tokens.weight)
    assert raw(fused.lm_head.weight) == raw(expected.lm_head.weight)
    to = ("--dtype", "bfloat16")
    found = run(
        "fuse", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--out", tmp_path / "half", *to
    )
    assert found.code == 0, found.err
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert torch.equal(half.lm_head.weight, expected.lm_head.weight.bfloat16())


def test_rows_of_one_side_are_not_fused_into_a_shared_weight(tmp_path: Path) -> None:
    alone = randomise(minilora.inject(llama(tied=False), "embed_tokens", RowsConfig(rows=NEW)))
    minilora.save(alone, tmp_path / "a")
    llama().save_pretrained(tmp_path / "base")
    found = run("fuse", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--out", tmp_path / "out")
    assert found.code == 2
    assert "its weight is tied to" in found.err


def test_a_base_that_has_the_two_apart_takes_rows_of_a_tied_one(tmp_path: Path) -> None:
    """Its output layer is stored, with the same values; both take the rows, and both were signed."""
    model = trained()
    minilora.save(model, tmp_path / "a")
    apart = llama(tied=False)
    apart.lm_head.weight.data.copy_(apart.model.embed_tokens.weight)
    apart.save_pretrained(tmp_path / "base")
    found = run("fuse", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--out", tmp_path / "out")
    assert found.code == 0, found.err
    fused = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(fused), logits(model), rtol=0, atol=1e-5)


def test_damaged_contents_are_found_without_a_model(file: Path) -> None:
    rewritten(file, lambda e: None, {"lm_head.trained_rows": torch.ones(3, 16)})
    found = run("inspect", file)
    assert found.code == 1
    assert "called for by nothing: 'lm_head.trained_rows'" in found.out
