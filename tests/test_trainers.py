"""An unmodified Trainer of transformers: slim checkpoints, equal resumption, and the adapter out of them."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import raw, state, unchanged
from command_line import run as command
from torch import nn

import minilora
from minilora import AdapterConfig, CheckpointError, LoRAConfig, MiniLoRAError, RowsConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
safetensors_torch = pytest.importorskip("safetensors.torch")

STEPS = 4


@pytest.fixture(autouse=True)
def _heard(accelerate_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps its logger to itself."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(  # type: ignore[no-any-return]
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(  # type: ignore[no-any-return]
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=16,
            **more,
        )
    )


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(  # type: ignore[no-any-return]
        transformers.MixtralConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def slim_bert() -> nn.Module:
    """LoRA, bottlenecks around it, a head, and a parameter of its own."""
    model = minilora.inject(
        bert(),
        ["query", "output.dense"],
        LoRAConfig(r=2),
        trainable=["classifier", "embeddings.LayerNorm.bias"],
    )
    minilora.inject(model, ["attention.output.dense"], AdapterConfig(bottleneck=2), trainable=())
    return minilora.slim_checkpoints(model)


def slim_llama() -> nn.Module:
    return minilora.slim_checkpoints(minilora.inject(llama(), "all-linear", LoRAConfig(r=2, dropout=0.1)))


def slim_mixtral() -> nn.Module:
    """Whose experts transformers names otherwise in files."""
    return minilora.slim_checkpoints(minilora.inject(mixtral(), "all-linear", LoRAConfig(r=2)))


def slim_tied() -> nn.Module:
    """Whose embedding with LoRA `tie_weights` cannot read."""
    model = minilora.inject(llama(tie_word_embeddings=True), ["embed_tokens", "q_proj"], LoRAConfig(r=2))
    return minilora.slim_checkpoints(model)


def slim_rows() -> nn.Module:
    """With rows for new tokens, at the embedding and at the output layer that is tied to it."""
    model = minilora.inject(llama(tie_word_embeddings=True), ["q_proj"], LoRAConfig(r=2))
    return minilora.slim_checkpoints(minilora.inject(model, ["embed_tokens"], RowsConfig(rows=[3, 7])))


def data(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 50, (8,), generator=generator) for _ in range(16)]
    causal = "CausalLM" in type(model).__name__
    return [{"input_ids": x, "labels": x if causal else torch.tensor(i % 2)} for i, x in enumerate(ids)]


def trainer(model: nn.Module, out: Path, **more: Any) -> Any:
    arguments = {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 4, **more}
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(out),
            learning_rate=0.05,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
            data_seed=1,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=data(model),
        eval_dataset=data(model),
    )


def keys_of(path: Path) -> set[str]:
    return set(safetensors_torch.load_file(path))


def train(model: nn.Module, out: Path, resume: Path | None = None, **more: Any) -> Any:
    trained = trainer(model, out, **more)
    trained.train(resume_from_checkpoint=str(resume) if resume else None)
    return trained


@pytest.mark.parametrize("make", [slim_bert, slim_llama, slim_mixtral, slim_tied, slim_rows])
def test_a_checkpoint_holds_what_trains_and_resumes_to_the_bit(
    make: Callable[[], nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    train(model, tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert keys_of(tmp_path / "checkpoint-2" / "model.safetensors") == trained
    caplog.clear()
    again = make()
    train(again, tmp_path / "again", tmp_path / "checkpoint-2")
    assert state(again) == state(model)
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    # tie_weights would have failed, so the Trainer is not brought to call it, and lists the base's names.
    assert [m for m in told if "keys" in m and make not in (slim_tied, slim_rows)] == []
    assert not any("unexpected" in m for m in told)


def test_the_best_model_comes_back_and_is_saved(tmp_path: Path) -> None:
    model = slim_bert()
    trained = train(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
    )
    best = Path(trained.state.best_model_checkpoint)
    other = minilora.load(bert(), best)
    assert {k: raw(t) for k, t in minilora.adapter_state_dict(other).items()} == {
        k: raw(t) for k, t in minilora.adapter_state_dict(model).items()
    }
    trained.save_model(str(tmp_path / "saved"))
    assert keys_of(tmp_path / "saved" / "model.safetensors") == keys_of(best / "model.safetensors")


@pytest.mark.parametrize("make", [slim_bert, slim_llama, slim_mixtral, slim_tied, slim_rows])
def test_a_checkpoint_becomes_the_file_that_save_writes(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make()
    generator = torch.Generator().manual_seed(3)
    for tensor in minilora.adapter_state_dict(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(tmp_path / "checkpoint")
    minilora.save(model, tmp_path / "saved.safetensors")
    assert command("convert", tmp_path / "checkpoint", tmp_path / "converted.safetensors").code == 0
    assert (tmp_path / "converted.safetensors").read_bytes() == (tmp_path / "saved.safetensors").read_bytes()
    bare = {slim_bert: bert, slim_llama: llama, slim_mixtral: mixtral}.get(
        make, lambda: llama(tie_word_embeddings=True)
    )
    loaded = minilora.load(bare(), tmp_path / "checkpoint")
    minilora.save(loaded, tmp_path / "loaded.safetensors")
    assert (tmp_path / "loaded.safetensors").read_bytes() == (tmp_path / "saved.safetensors").read_bytes()


def test_another_base_is_refused(tmp_path: Path) -> None:
    slim_bert().save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="not the base that the adapter was trained on"):
        minilora.load(bert(seed=1), tmp_path / "checkpoint")


@pytest.mark.parametrize("undo", ["eject", "fuse"])
def test_eject_and_fuse_undo_it(undo: str, tmp_path: Path) -> None:
    plain = llama()
    before, entries = set(vars(plain)), set(vars(plain.config))
    ignored = plain._keys_to_ignore_on_save
    model = minilora.slim_checkpoints(minilora.inject(plain, "all-linear", LoRAConfig(r=2)))
    model.save_pretrained(tmp_path / "slim")
    getattr(minilora, undo)(model)
    assert model._keys_to_ignore_on_save is ignored
    assert set(vars(model)) == before
    assert set(vars(model.config)) - {"dtype", "architectures"} == entries - {"dtype", "architectures"}
    model.save_pretrained(tmp_path / "whole")
    assert keys_of(tmp_path / "whole" / "model.safetensors") == set(model.state_dict())
    assert "minilora" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "whole")
    assert state(again) == state(model)


def test_what_is_thawed_or_injected_later_is_in_it(tmp_path: Path) -> None:
    model = minilora.slim_checkpoints(minilora.inject(bert(), ["query"], LoRAConfig(r=2), trainable=()))
    minilora.inject(model, [], trainable=["classifier"])
    model.bert.pooler.dense.bias.requires_grad_(True)
    model.save_pretrained(tmp_path / "checkpoint")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert keys_of(tmp_path / "checkpoint" / "model.safetensors") == trained
    assert {"bert.pooler.dense.bias", "classifier.trained.weight"} < trained
    with pytest.warns(UserWarning, match=r"'bert\.pooler\.dense\.bias': in the checkpoint, and not part"):
        loaded = minilora.load(bert(), tmp_path / "checkpoint")
    assert set(minilora.adapter_state_dict(loaded)) == set(minilora.adapter_state_dict(model))


def test_a_thawed_tied_weight_is_written_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make() -> nn.Module:
        model = minilora.inject(llama(tie_word_embeddings=True), ["q_proj"], LoRAConfig(r=2))
        model.model.embed_tokens.weight.requires_grad_(True)
        return minilora.slim_checkpoints(model)

    model = make()
    train(model, tmp_path)
    keys = keys_of(tmp_path / "checkpoint-2" / "model.safetensors")
    assert "model.embed_tokens.weight" in keys
    assert "lm_head.weight" not in keys
    again = make()
    train(again, tmp_path / "again", tmp_path / "checkpoint-2")
    assert state(again) == state(model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not any("keys in the checkpoint" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_its_own_way(copied: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = slim_llama()
    twin = copied(model)
    keys = set(model._keys_to_ignore_on_save)
    assert keys == set(twin._keys_to_ignore_on_save)
    minilora.eject(model)
    assert set(twin._keys_to_ignore_on_save) == keys
    twin.model.embed_tokens.weight.requires_grad_(True)
    assert set(twin._keys_to_ignore_on_save) == keys - {"model.embed_tokens.weight"}
    minilora.fuse(twin)
    assert not twin._keys_to_ignore_on_save
    assert not hasattr(twin.config, "minilora")


def test_it_does_not_keep_a_model_alive() -> None:
    import gc
    import weakref

    model = slim_llama()
    minilora.eject(model)
    keys = minilora.slim_checkpoints(
        minilora.inject(model, ["q_proj"], LoRAConfig(r=2))
    )._keys_to_ignore_on_save
    seen = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert seen() is None
        assert list(keys) == []
    finally:
        gc.enable()


def test_a_list_of_the_class_is_kept() -> None:
    class Marked(transformers.LlamaForCausalLM):  # type: ignore[name-defined, misc]
        _keys_to_ignore_on_save = ("lm_head.weight",)

    torch.manual_seed(0)
    plain = Marked(llama().config)
    own = plain._keys_to_ignore_on_save
    model = minilora.slim_checkpoints(minilora.inject(plain, ["q_proj"], LoRAConfig(r=2)))
    assert "lm_head.weight" in model._keys_to_ignore_on_save
    assert len(model._keys_to_ignore_on_save) > 1
    minilora.eject(model)
    assert model._keys_to_ignore_on_save == own
    assert set(own) == {"lm_head.weight"}


def test_twice_is_once_and_the_model_computes_the_same() -> None:
    model = minilora.inject(llama(), ["q_proj"], LoRAConfig(r=2))
    with unchanged(model):
        keys = minilora.slim_checkpoints(model)._keys_to_ignore_on_save
        assert minilora.slim_checkpoints(model)._keys_to_ignore_on_save is keys


def test_what_it_is_not_for_is_told() -> None:
    with pytest.raises(MiniLoRAError, match="carries no injection"):
        minilora.slim_checkpoints(bert())
    plain = minilora.inject(nn.Sequential(nn.Linear(4, 4)), "0", LoRAConfig(r=2))
    with pytest.raises(MiniLoRAError, match=r"for models of transformers.*this Sequential has no such list"):
        minilora.slim_checkpoints(plain)
    with pytest.raises(MiniLoRAError, match=r"wrapped in DataParallel.*`parallel\.module`"):
        minilora.slim_checkpoints(nn.DataParallel(slim_bert()))


def test_a_checkpoint_that_is_none_is_told(tmp_path: Path) -> None:
    model = slim_bert()
    model.save_pretrained(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    with pytest.raises(
        CheckpointError, match=r"part of a Trainer's checkpoint, which is the folder: .*checkpoint'"
    ):
        minilora.load(bert(), file)
    tensors = safetensors_torch.load_file(file)
    first, *rest = sorted(tensors)
    safetensors_torch.save_file({key: tensors[key] for key in rest}, file)
    fresh = bert()
    with (
        unchanged(fresh),
        pytest.raises(CheckpointError, match=rf"missing from model.safetensors: '{first}'"),
    ):
        minilora.load(fresh, tmp_path / "checkpoint")
    bert().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"slim_checkpoints\(model\) puts there before training"):
        minilora.load(fresh, tmp_path / "plain", format="trainer")
