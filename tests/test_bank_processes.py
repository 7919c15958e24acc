"""A bank in two processes: FSDP2 trains and serves what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minilora
from minilora import Bank, LoRAConfig, MiniLoRAError

PROCESSES = 2
ROWS = ["trained", None, "served", "trained"]  # two for each process


def bank_of_two() -> Bank:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Linear(8, 3))
    bank = Bank(model, targets=["0", "2"], trainable=["3"], slots=3, r=3)
    generator = torch.Generator().manual_seed(1)
    for name, r in (("served", 2), ("trained", 3)):
        bank.add(name, LoRAConfig(r=r))
        with torch.no_grad():
            for parameter in bank.parameters(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    bank.freeze("served")
    return bank


def outputs(bank: Bank, rank: int | None = None) -> Tensor:
    """Return what one process's share of the rows gives, or all of them."""
    x = torch.randn(len(ROWS), 8, generator=torch.Generator().manual_seed(2))
    size = len(ROWS) // PROCESSES
    mine = slice(None) if rank is None else slice(rank * size, (rank + 1) * size)
    with bank.rows(ROWS[mine]):
        return bank.model(x[mine])


def optimizer_of(bank: Bank) -> torch.optim.Optimizer:
    """Return what steps; made before the first pass, which puts whole tensors in the place of shards."""
    trained = [parameter for parameter in bank.model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.01)


def step(bank: Bank, optimizer: torch.optim.Optimizer, rank: int | None = None) -> None:
    outputs(bank, rank).square().mean().backward()
    optimizer.step()


def shards_as_one(rank: int, folder: Path) -> None:
    """Run in each of the processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=PROCESSES
    )
    one = bank_of_two()
    before = outputs(one)
    step(one, optimizer_of(one))
    assert not torch.equal(outputs(one), before)

    bank = bank_of_two()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in (bank.model[0], bank.model[2], bank.model):
        fully_shard(layer, mesh=mesh)
    optimizer = optimizer_of(bank)
    torch.testing.assert_close(outputs(bank, rank), before.chunk(PROCESSES)[rank])
    step(bank, optimizer, rank)
    torch.testing.assert_close(outputs(bank, rank), outputs(one).chunk(PROCESSES)[rank])
    acts = {
        "load": lambda: bank.load("new", folder / "a"),
        "add": lambda: bank.add("new"),
        "replace": lambda: bank.replace("served", folder / "a"),
        "remove": lambda: bank.remove("served"),
        "parameters": lambda: bank.parameters("served"),
        "freeze": lambda: bank.freeze("trained"),
        "save": lambda: bank.save("trained", folder / "a"),
    }
    for act in acts.values():
        with pytest.raises(MiniLoRAError, match="gather a full model to save"):
            act()
    state = get_model_state_dict(bank.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # who alone is given it
        whole = bank_of_two()
        whole.model.load_state_dict(state)
        torch.testing.assert_close(outputs(whole), outputs(one))
        whole.save("trained", folder / "a.safetensors")
        fresh = Bank(minilora.eject(whole.model), {"trained": folder / "a.safetensors"})
        with fresh.rows("trained"), one.rows("trained"):
            x = torch.randn(2, 8)
            torch.testing.assert_close(fresh.model(x), one.model(x))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_and_serve_what_one_does(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.multiprocessing.spawn(shards_as_one, (tmp_path,), PROCESSES)
