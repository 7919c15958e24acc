"""PEFT's `trainable_token_indices` beside LoRA, both ways, against the installed PEFT."""

from __future__ import annotations

import copy
import json
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

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

IDS = torch.tensor([[1, 9, 5, 0], [3, 9, 9, 7]])
SAME = {"rtol": 0.0, "atol": 1e-11}
VOCABULARY = 12


class Scaled(nn.Embedding):
    """As Gemma's: rows are multiplied after the look-up, and the class says by what."""

    embed_scale = torch.tensor(3.0, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Cubed(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 3


class Net(nn.Module):
    """An embedding, a layer for LoRA and an output layer, none of it transformers'."""

    def __init__(self, kind: type[nn.Embedding] = nn.Embedding, bias: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed_tokens = kind(VOCABULARY, 8, **options)
        self.lin = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, VOCABULARY, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.lin(self.embed_tokens(ids))))


def llama(tied: bool = True, vocabulary: int = VOCABULARY, **more: Any) -> nn.Module:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **shape, **more)
    return transformers.LlamaForCausalLM(config)


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


LIN = {"target_modules": ["lin"]}
Q = {"target_modules": ["q_proj"]}

# What is made, LoRA's targets, and trainable_token_indices.
HELD: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "a list, the embedding's own name": (Net, LIN, [9, 0]),
    "a name": (Net, LIN, {"embed_tokens": [0, 3, 9]}),
    "the end of a name": (Net, LIN, {"tokens": [3]}),
    "an output layer": (Net, LIN, {"lm_head": [9, 1]}),
    "both, other rows": (Net, LIN, {"embed_tokens": [9, 0], "lm_head": [1, 2, 5]}),
    "padding": (lambda: Net(padding_idx=9), LIN, [9, 0]),
    "renormalised": (lambda: Net(max_norm=1.0), LIN, [9, 0]),
    "by frequency": (lambda: Net(scale_grad_by_freq=True), LIN, [9, 0]),
    "scaled": (lambda: Net(Scaled), LIN, [9, 0]),
    "beside a bias of LoRA's layer and a head": (
        Net,
        {**LIN, "bias": "all", "modules_to_save": ["lm_head"]},
        [9],
    ),
    "tied": (llama, Q, [9, 0]),
    "tied, in another order": (llama, Q, {"embed_tokens": [9, 0, 3]}),
    "tied, both named": (llama, Q, {"lm_head": [9, 0], "model.embed_tokens": [9, 0]}),
    "untied": (lambda: llama(False), Q, [9, 0]),
    "untied, both named": (lambda: llama(False), Q, {"lm_head": [9], "embed_tokens": [0, 9]}),
    "tied, with padding": (lambda: llama(pad_token_id=9), Q, [9, 1]),
}
REFUSED: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "a bias that PEFT drops": (lambda: Net(bias=True), LIN, {"lm_head": [9]}, "it leaves out the bias"),
    "a look-up that does more": (lambda: Net(Cubed), LIN, [9], "Cubed does more than that"),
    "tied, other rows": (llama, Q, {"embed_tokens": [9], "lm_head": [1]}, "they have other rows"),
}


def config_of(fields: dict[str, Any], indices: Any) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=3, trainable_token_indices=copy.deepcopy(indices), **fields)


def trained(case: tuple[Any, ...], folder: Path) -> nn.Module:
    """Return PEFT's model with random values, as if it had been trained, and save it."""
    make, fields, indices, *_ = case
    model = peft.get_peft_model(made(make), config_of(fields, indices))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(values * 0.3)
    model.save_pretrained(folder)
    return model.eval()


def by_peft(case: tuple[Any, ...], folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(made(case[0]), folder, is_trainable=True).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y = model(IDS)
        return y if isinstance(y, Tensor) else y.logits


def after_steps(model: nn.Module) -> Tensor:
    """Return what a model computes after two steps of plain gradient descent."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        y = model(IDS)
        (y if isinstance(y, Tensor) else y.logits).square().mean().backward()
        optimizer.step()
    return output(model.eval())


def tensors_of(folder: Path) -> dict[str, Any]:
    """Return a folder's tensors, rows in ascending order, as minilora has them."""
    said = json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]
    found = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    copies = (".original_module.", ".modules_to_save.")
    found = {key: t for key, t in found.items() if not any(part in key for part in copies)}
    for key, tensor in found.items():
        if "trainable_tokens_delta" in key:
            named = said.items() if isinstance(said, dict) else [("embed_tokens", said)]
            rows = next(rows for end, rows in named if key.split(".token_adapter")[0].endswith(end))
            found[key] = tensor[sorted(range(len(rows)), key=rows.__getitem__)]
    return {key: raw(tensor) for key, tensor in found.items()}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.filterwarnings("ignore:.*has no rule")
def test_a_file_of_pefts_computes_trains_merges_and_goes_back(name: str, tmp_path: Path) -> None:
    case = HELD[name]
    theirs = trained(case, tmp_path / "theirs")
    expected, base = output(theirs), made(case[0])
    plain = output(made(case[0]))
    assert not torch.allclose(expected, plain)
    model = minilora.load(base, tmp_path / "theirs")
    torch.testing.assert_close(output(model), expected, **SAME)
    if name != "renormalised":  # by itself, the base would write into its weight
        with minilora.disabled(model):
            assert torch.equal(output(model), plain)
    torch.testing.assert_close(output(minilora.merge(model)), expected, **SAME)
    minilora.unmerge(model)

    minilora.save(model, tmp_path / "ours.safetensors")
    again = minilora.load(made(case[0]), tmp_path / "ours.safetensors")
    assert torch.equal(output(again), output(model))
    minilora.save(model, tmp_path / "ours", format="peft")
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
    torch.testing.assert_close(output(minilora.load(made(case[0]), tmp_path / "ours")), expected, **SAME)
    back = by_peft(case, tmp_path / "ours")
    torch.testing.assert_close(output(back), expected, **SAME)

    stepped = after_steps(theirs)
    assert (stepped - expected).abs().max() > 1e-8
    torch.testing.assert_close(after_steps(model), stepped, **SAME)
    torch.testing.assert_close(after_steps(back), stepped, **SAME)
    fused = minilora.fuse(again)
    torch.testing.assert_close(output(fused), expected, **SAME)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_pefts_that_computes_something_else_is_refused(name: str, tmp_path: Path) -> None:
    case = REFUSED[name]
    trained(case, tmp_path)
    model = made(case[0])
    with unchanged(model), pytest.raises(CheckpointError, match=case[3]):
        minilora.load(model, tmp_path)


def test_rows_that_peft_trains_apart_from_what_shares_them_are_refused(tmp_path: Path) -> None:
    """Tied by hand, without a config that says so: PEFT's output layer keeps the rows of the base."""

    def tied_by_hand() -> nn.Module:
        model = Net()
        model.lm_head.weight = model.embed_tokens.weight
        return model

    trained((tied_by_hand, LIN, [9]), tmp_path / "theirs")
    model = made(tied_by_hand)
    with unchanged(model), pytest.raises(CheckpointError, match="PEFT trains rows of it apart"):
        minilora.load(model, tmp_path / "theirs")
    configs = {"embed_tokens": RowsConfig(rows=[9]), "lin": LoRAConfig(r=2)}
    minilora.inject(model, list(configs), configs)
    with pytest.raises(CheckpointError, match="PEFT trains rows of it apart"):
        minilora.save(model, tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_vocabulary(tied: bool, tmp_path: Path) -> None:
    """PEFT adds the whole embedding, and for a tied output layer the rows once more."""
    torch.manual_seed(0)
    llama(tied).save_pretrained(tmp_path / "base")

    def resized(seed: int = 1) -> nn.Module:
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").double().eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
        if not tied:  # as the file will have it
            model.lm_head.weight.data[VOCABULARY:] = 0.5
        return model

    new = [VOCABULARY, VOCABULARY + 1]
    theirs = peft.get_peft_model(resized(), config_of(Q, new))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    stored = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert sum("base_layer" in key for key in stored) == 1 + tied
    for seed in (1, 2):  # whatever the rows were before, they are what was trained
        model = minilora.load(resized(seed), tmp_path / "theirs")
        torch.testing.assert_close(output(model), output(theirs.eval()), **SAME)
    other = resized()
    other.model.embed_tokens.weight.data[3, 3] += 1
    with unchanged(other), pytest.raises(CheckpointError, match="with other values than the model's"):
        minilora.load(other, tmp_path / "theirs")
    small = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").double()
    with (
        unchanged(small),
        pytest.raises(CheckpointError, match=r"has no row 12, 13; .*resize_token_embeddings\(14\)"),
    ):
        minilora.load(small, tmp_path / "theirs")
    if tied:
        key = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
        stored[key] = stored[key] + 1
        safetensors.torch.save_file(stored, tmp_path / "theirs" / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"'lm_head': .* the file has other rows for it"):
            minilora.load(resized(), tmp_path / "theirs")


def saved(folder: Path) -> Path:
    trained((Net, LIN, [9, 0]), folder)
    return folder


def edit(folder: Path, indices: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": indices}))


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ("9", "trainable_token_indices: must be a list of rows"),
        ([True, 2], "each once and from 0 on"),
        ([-1, 2], "must be a list of rows"),
        ([3, 3], "must be a list of rows"),
        ([[3]], "must be a list of rows"),
        ({"embed_tokens": []}, "must be a list of rows"),
        ({"embed_tokens": 3}, "must be a list of rows"),
        ([1], r"'embed_tokens': 1 rows by the config, and a tensor of \(2, 8\)"),
        ([1, 99], "has no row 99"),
        ({"lm_head": [9, 0]}, "'lm_head': its rows are trained by .*, and not in the file"),
        ({"lm_head": [9, 0]}, "'embed_tokens': it has trained rows, and .* does not name it"),
        (None, "'embed_tokens': it has trained rows, and .* does not name it"),
        (
            {"embed_tokens": [9, 0], "nowhere": [1]},
            "'nowhere': its rows are trained by .*, and not in the file",
        ),
    ],
    ids=str,
)
def test_a_config_that_says_something_else_is_refused(indices: Any, says: str, tmp_path: Path) -> None:
    edit(saved(tmp_path), indices)
    model = made(Net)
    with unchanged(model), pytest.raises(CheckpointError, match=says):
        minilora.load(model, tmp_path)


def test_what_minilora_wrote_tells_when_its_config_was_edited(tmp_path: Path) -> None:
    minilora.save(minilora.load(made(Net), saved(tmp_path / "a")), tmp_path / "b", format="peft")
    edit(tmp_path / "b", {"embed_tokens": [1, 9]})
    with pytest.raises(CheckpointError, match="gives other ranks, scales"):
        minilora.load(made(Net), tmp_path / "b")


def test_without_the_model_rows_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    for command in (
        ["inspect", tmp_path / "a"],
        ["convert", tmp_path / "a", tmp_path / "b", "--to", "minilora"],
    ):
        found = run(*command)
        assert found.code == 2
        assert (
            "which modules share the trained rows depends on the model: minilora.load(model, folder)"
            in found.err
        )
    minilora.save(minilora.load(made(Net), tmp_path / "a"), tmp_path / "c")
    found = run("convert", tmp_path / "c", tmp_path / "b", "--to", "peft")
    assert found.code == 2
    assert 'minilora.save(model, folder, format="peft")' in found.err
    assert not (tmp_path / "b").exists()


def test_what_peft_has_no_words_for_is_refused(tmp_path: Path) -> None:
    rows = RowsConfig(rows=[9])
    alone = minilora.inject(made(Net), "embed_tokens", rows)
    with pytest.raises(CheckpointError, match="at least one LoRA site"):
        minilora.save(alone, tmp_path / "a", format="peft")
    bias = minilora.inject(
        made(lambda: Net(bias=True)), ["lm_head", "lin"], {"lm_head": rows, "lin": LoRAConfig()}
    )
    with pytest.raises(CheckpointError, match="it leaves out the bias"):
        minilora.save(bias, tmp_path / "a", format="peft")

    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.my_embed_tokens = nn.Embedding(VOCABULARY, 8)

    two = minilora.inject(made(Two), ["embed_tokens", "lin"], {"embed_tokens": rows, "lin": LoRAConfig()})
    with pytest.raises(
        CheckpointError, match=r"'my_embed_tokens': its rows are trained by .*, and not in the file"
    ):
        minilora.save(two, tmp_path / "a", format="peft")
    linear = minilora.inject(
        made(Net), ["embed_tokens", "lin"], {"embed_tokens": rows, "lin": LoRAConfig()}, trainable=["lm_head"]
    )
    minilora.save(randomise(linear), tmp_path / "b", format="peft")
    theirs = peft.PeftModel.from_pretrained(made(Net), tmp_path / "b").eval()
    torch.testing.assert_close(output(theirs), output(linear), **SAME)


def test_16_bits(tmp_path: Path) -> None:
    """PEFT rounds the rows to the weight's dtype as it computes; so do look-ups here."""
    torch.manual_seed(0)
    base = llama().bfloat16().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), config_of(Q, [9, 0]))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path / "a")
    model = minilora.load(copy.deepcopy(base), tmp_path / "a")
    assert model.model.embed_tokens.trained_rows.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens(IDS), theirs.get_input_embeddings()(IDS))
    torch.testing.assert_close(output(model), output(theirs.eval()), rtol=0.05, atol=0.05)
    minilora.save(model, tmp_path / "b", format="peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=0.05, atol=0.05)


def test_the_card_tells_of_rows(tmp_path: Path) -> None:
    minilora.save(minilora.load(made(Net), saved(tmp_path / "a")), tmp_path / "b", format="peft")
    assert "| `embed_tokens` | 1 | 2 rows trained |" in (tmp_path / "b" / "README.md").read_text()
