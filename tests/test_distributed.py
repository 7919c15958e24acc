"""A sharded model, in a group of one process: what works, and what refuses and says what to do instead.

What takes several processes is in test_distributed_processes.py.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minilora
from minilora import AdapterConfig, LoRAConfig, MiniLoRAError, RowsConfig
from minilora.distributed.gathering import stand_in, whole
from minilora.torch_internals import class_unsharded, is_shard

if not torch.distributed.is_available():
    pytest.skip("no torch.distributed", allow_module_level=True)
if not hasattr(torch.cpu.Stream, "record_event"):
    pytest.skip("FSDP2 of this torch does not compute on a CPU", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


@pytest.fixture(autouse=True)
def _one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Tiny(nn.Module):
    """Tokens in, tokens out, with a tied output layer and something of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8, bias=False))
        self.plain = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.output = nn.Linear(8, 10, bias=False)
        self.output.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        x = self.norm(self.plain(self.body(x + self.conv(x.mT).mT)))
        return self.head(x).sum(-1, keepdim=True) + self.output(x)


def injected(*, adapters: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = minilora.inject(Tiny(), ["conv", "body.0"], LoRAConfig(r=3), trainable=["head", "norm.bias"])
    minilora.inject(model, "body.2", LoRAConfig(r=2, dora=True), trainable=())
    minilora.inject(model, "words", RowsConfig(rows=[3, 9]), trainable=())
    if adapters:
        minilora.inject(model, "body", AdapterConfig(bottleneck=2, hidden_size=8), trainable=())
    generator = torch.Generator().manual_seed(1)
    for tensor in minilora.adapter_state_dict(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def sharded(model: nn.Module, **policy: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model.conv, model.body, model):
        fully_shard(layer, mesh=mesh, **policy)
    return model


IDS = torch.tensor([[1, 3, 9, 4]])


def held(model: nn.Module) -> dict[str, object]:
    """Return the modules and the parameters that stand in a model."""
    return dict(model.named_modules()) | {
        f"{name} (parameter)": parameter for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("adapters", [False, True])
def test_the_file_of_a_sharded_model_is_that_of_the_whole_one(adapters, tmp_path):
    minilora.save(injected(adapters=adapters), tmp_path / "whole")
    model = sharded(injected(adapters=adapters))
    before = held(model)
    minilora.save(model, tmp_path / "sharded")
    assert (tmp_path / "sharded").read_bytes() == (tmp_path / "whole").read_bytes()
    assert held(model) == before
    assert any(map(is_shard, model.parameters()))


def test_so_are_the_files_for_peft(tmp_path):
    def plain():
        torch.manual_seed(0)
        return minilora.inject(Tiny(), ["conv", "body.0"], LoRAConfig(r=3), trainable=["head"])

    minilora.save(plain(), tmp_path / "whole", format="peft")
    minilora.save(sharded(plain()), tmp_path / "sharded", format="peft")
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "sharded").iterdir())
    for name in files:
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_so_are_the_tensors():
    expected = minilora.adapter_state_dict(injected())
    found = minilora.adapter_state_dict(sharded(injected()))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert type(found[name]) is torch.Tensor
        assert torch.equal(found[name], tensor)


def test_what_fsdp_has_cast_to_compute_with_is_not_what_is_saved(tmp_path):
    """After a forward pass the root's parameters are whole, and in the dtype that it computes in."""
    minilora.save(injected(), tmp_path / "whole")
    model = sharded(injected(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        model(IDS)
    assert model.head.trained.weight.dtype == torch.bfloat16
    minilora.save(model, tmp_path / "sharded")
    assert (tmp_path / "sharded").read_bytes() == (tmp_path / "whole").read_bytes()


def test_merged_weights_are_those_of_the_whole_model():
    expected = dict(minilora.merged_weights(injected()))
    model = sharded(injected())
    before = held(model)
    found = dict(minilora.merged_weights(model))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert not is_shard(found[name])
        assert torch.equal(found[name], tensor), name
    assert held(model) == before


def test_merged_weights_that_are_not_finite_are_refused_at_the_call():
    model = injected()
    with torch.no_grad():
        model.conv.lora_B.fill_(torch.inf)
        model.head.trained.bias.fill_(torch.nan)
    with pytest.raises(minilora.MergeError, match=r"2 problems.*\n.*'conv'.*\n.*'head'") as whole:
        minilora.merged_weights(copy.deepcopy(model))
    with pytest.raises(minilora.MergeError) as found:
        minilora.merged_weights(sharded(model))
    assert str(found.value) == str(whole.value)


def test_a_warning_names_what_trains_and_is_not_saved(tmp_path):
    model = injected()
    model.body[0].base.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'body.0.base.bias': trained, but not saved"):
        minilora.save(sharded(model), tmp_path / "a")


def test_merge_loss_is_that_of_the_whole_model():
    assert minilora.merge_loss(sharded(injected()), dtype="bfloat16") == minilora.merge_loss(
        injected(), dtype="bfloat16"
    )


def test_a_summary_counts_the_whole():
    whole, model = minilora.summary(injected()), sharded(injected())
    with torch.no_grad():
        model(IDS)  # after which FSDP holds some whole, and lets go of them as it likes
    found = minilora.summary(model)
    assert found.rows == whole.rows
    assert (found.trainable, found.base, found.reached) == (whole.trainable, whole.base, whole.reached)


def test_an_optimizer_is_given_the_shards():
    """Not what FSDP has gathered for a pass, which no step would reach."""
    model = injected()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        model(IDS)
    assert not any(map(is_shard, model.parameters()))
    assert all(map(is_shard, minilora.trainable_parameters(model)))
    with torch.no_grad():
        model(IDS)
    groups = minilora.parameter_groups(model, lr=1e-3, lora_plus_ratio=2)
    assert [group["lr"] for group in groups] == [1e-3, 2e-3]
    assert all(is_shard(parameter) for group in groups for parameter in group["params"])


def test_gradients_are_checked_whole():
    model = sharded(injected())
    model(IDS).square().mean().backward()
    assert minilora.check_gradients(model) == []
    with torch.no_grad():
        model.body[0].lora_A.grad.mul_(torch.nan)
        model.conv.lora_A.grad.zero_()
        model.conv.lora_B.grad.zero_()
    with torch.no_grad():  # which leaves the root's whole
        model(IDS)
    first, second = minilora.check_gradients(model)
    assert first.startswith("'conv': only zeros in its gradients")
    assert second.startswith("'body.0': NaN or inf in the gradient of 'lora_A'")


def test_disabled_computes_what_the_base_does():
    model = sharded(injected().eval())
    torch.manual_seed(0)
    base = Tiny().eval()
    with torch.no_grad():
        active = model(IDS)
        with minilora.disabled(model):
            torch.testing.assert_close(model(IDS), base(IDS))
        assert torch.equal(model(IDS), active)
    assert not torch.allclose(active, base(IDS))


REFUSED = {
    "inject": lambda model, _: minilora.inject(model, "body.2", LoRAConfig(r=1), trainable=()),
    "load": minilora.load,
    "merge": lambda model, _: minilora.merge(model),
    "unmerge": lambda model, _: minilora.unmerge(model),
    "fuse": lambda model, _: minilora.fuse(model),
    "eject": lambda model, _: minilora.eject(model),
    "freeze": lambda model, _: minilora.freeze(model),
    "slim_checkpoints": lambda model, _: minilora.slim_checkpoints(model),
}


@pytest.mark.parametrize("act", REFUSED)
@pytest.mark.parametrize("after_forward", [False, True])
def test_what_a_sharded_model_refuses(act, after_forward, tmp_path):
    minilora.save(injected(), tmp_path / "a")
    model = sharded(injected())
    if after_forward:
        with torch.no_grad():
            model(IDS)
    before = held(model)
    fix = r"nothing changed\. .*(before|then) fully_shard"
    with pytest.raises(MiniLoRAError, match=f"'conv'.*: sharded .*{fix}"):
        REFUSED[act](model, tmp_path / "a")
    assert held(model) == before


def test_a_bare_sharded_model_takes_no_injection():
    model = Tiny()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(MiniLoRAError, match="'the model': sharded"):
        minilora.inject(model, "body.2", trainable=())


def test_a_model_merged_before_it_was_sharded(tmp_path):
    """FSDP goes on with the merged weight, so there is no way back; the file is what it always is."""
    minilora.save(injected(), tmp_path / "whole")
    merged = minilora.merge(injected().eval())
    with torch.no_grad():
        expected = merged(IDS)
        model = sharded(merged)
        torch.testing.assert_close(model(IDS), expected)
    with pytest.raises(MiniLoRAError, match="unmerge before fully_shard"), minilora.disabled(model):
        pass
    minilora.save(model, tmp_path / "sharded")
    assert (tmp_path / "sharded").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_fsdp_keeps_on_the_cpu_is_gathered_where_the_processes_talk():
    class DTensor(torch.Tensor):  # a stand-in, with a device for others' tensors that needs none
        device_mesh = SimpleNamespace(device_type="meta")

        def full_tensor(self):
            return self.as_subclass(torch.Tensor)

    assert whole(torch.zeros(2).as_subclass(DTensor)).device.type == "meta"


def test_a_stand_in_shares_what_is_not_gathered_and_owns_its_places():
    model = sharded(injected())
    twin = stand_in(model)
    assert type(twin) is class_unsharded(type(model)) is Tiny
    assert twin.body[0].base.weight is model.body[0].base.weight
    assert is_shard(model.body[0].lora_A)
    assert not is_shard(twin.body[0].lora_A)
    assert twin.output._first is twin.words
    whole = injected()
    assert stand_in(whole) is whole


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # torch's, of what nn.Linear returns in bf16
def test_float32_adapters_beside_a_bf16_base(tmp_path):
    """What trains in one group has one dtype; what is frozen may have another. A head is its own group."""
    torch.manual_seed(0)
    model = minilora.inject(Tiny().bfloat16(), ["body.0"], LoRAConfig(r=3), trainable=["head"])
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model.body, model.head, model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=0.1)
    model(IDS).float().square().mean().backward()
    optimizer.step()
    minilora.save(model, tmp_path / "a.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "a.safetensors").items()}
    assert dtypes == {
        "body.0.lora_A": torch.float32,
        "body.0.lora_B": torch.float32,
        "head.weight": torch.bfloat16,
        "head.bias": torch.bfloat16,
    }
