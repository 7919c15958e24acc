"""LoRA on every kind of layer, trained in two processes: DDP and FSDP2 against one process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora
from minilora import LoRAConfig, MiniLoRAError, RowsConfig

PROCESSES = 2
TARGETS = ["embedding", "conv", "in_proj_weight", "linear1", "out_proj", "up", "down", "bilinear"]


class Experts(nn.Module):
    """A stack of matrices, used one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + F.linear(torch.tanh(F.linear(x, up)), down)
        return x


class Mixed(nn.Module):
    """A layer of each kind, one after the other; no row of the batch knows of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8, padding_idx=1)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2, padding_mode="reflect")
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.experts = Experts()
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.norm = nn.LayerNorm(8)
        self.words = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.words(ids)
        x = self.encoder(x + self.conv(x.mT).mT)
        x = self.experts(x)
        return self.head(self.norm(self.bilinear(x, x)))


def injected() -> nn.Module:
    torch.manual_seed(0)
    model = minilora.inject(
        Mixed(), TARGETS, LoRAConfig(r=2), trainable=["norm.bias", "encoder.norm1.weight", "encoder.norm2"]
    )
    minilora.inject(model, "words", RowsConfig(rows=[3, 9]))  # and at the head
    generator = torch.Generator().manual_seed(1)
    for name, tensor in minilora.adapter_state_dict(model).items():
        if "lora_" in name or "rows" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def loss(model: nn.Module, rank: int | None = None) -> Tensor:
    """Return the mean loss of one process's share of the batch, or of all of it."""
    ids = torch.randint(0, 10, (4, 6), generator=torch.Generator().manual_seed(2))
    return model(ids if rank is None else ids.chunk(PROCESSES)[rank]).square().mean()


def step(model: nn.Module, rank: int | None = None) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, rank).backward()
    optimizer.step()


def trains_what_one_process_trains(rank: int, folder: Path) -> None:
    """Run in each of the processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=PROCESSES
    )
    one = injected()
    step(one)
    expected = one.state_dict()
    assert all(p.grad is not None and p.grad.any() for p in minilora.trainable_parameters(one))

    model = injected()
    ddp = nn.parallel.DistributedDataParallel(model)
    step(ddp, rank)
    torch.testing.assert_close(model.state_dict(), expected)

    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = injected()
    for name in ("embedding", "conv", "encoder", "experts"):  # the rest is the root's
        fully_shard(getattr(model, name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, rank)
    model.eval()  # the encoder's fused path reads weights
    loss(model, rank)
    with torch.no_grad():
        loss(model, rank)
    minilora.save(model, folder / "sharded.safetensors")
    with pytest.raises(MiniLoRAError, match="merge before fully_shard"):
        minilora.merge(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # who alone is given it
        torch.testing.assert_close(state, expected)
        whole = injected()
        whole.load_state_dict(state)
        minilora.save(whole, folder / "a.safetensors")
        assert (folder / "a.safetensors").read_bytes() == (folder / "sharded.safetensors").read_bytes()
        fresh = minilora.load(copy.deepcopy(minilora.eject(whole)), folder / "a.safetensors")
        torch.testing.assert_close(fresh.state_dict(), expected)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.multiprocessing.spawn(trains_what_one_process_trains, (tmp_path,), PROCESSES)
