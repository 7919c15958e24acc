"""Two processes that share one model: files, merged weights and gradients are those of one process."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_distributed import IDS, injected
from test_kinds_processes import injected as of_every_kind
from torch import nn

import minilora
from minilora import CheckpointError, LoRAConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]
PROCESSES = 2


def in_processes(act, folder: Path) -> None:
    torch.multiprocessing.spawn(_join, (act, folder), PROCESSES)


def _join(rank: int, act, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=PROCESSES
    )
    act(rank, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def sharded(model: nn.Module, *layers: str, shape: tuple[int, ...] = (PROCESSES,)) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for layer in (*map(model.get_submodule, layers), model):
        fully_shard(layer, mesh=mesh)
    return model


def same_files(a: Path, b: Path) -> bool:
    if a.is_file():
        return a.read_bytes() == b.read_bytes()
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


def saves_what_one_process_saves(rank: int, folder: Path) -> None:
    makes = {
        "tiny": (lambda: injected(adapters=True), ["conv", "body"]),  # r = 3: two rows here, one there
        "kinds": (of_every_kind, ["embedding", "conv", "encoder", "experts"]),
    }
    for name, (make, layers) in makes.items():
        whole = make()
        if rank == 0:
            minilora.save(whole, folder / f"{name}-whole")
        model = sharded(make(), *layers)
        minilora.save(model, folder / f"{name}-sharded")
        if rank == 0:  # whoever comes back finds it; only who wrote the other can compare
            assert same_files(folder / f"{name}-whole", folder / f"{name}-sharded")
        assert (folder / f"{name}-sharded").exists()
        for key, tensor in minilora.adapter_state_dict(whole).items():
            assert torch.equal(minilora.adapter_state_dict(model)[key], tensor), key
    whole, model = injected(), sharded(injected(), "conv", "body")
    for (key, expected), (found_key, found) in zip(
        minilora.merged_weights(whole), minilora.merged_weights(model), strict=True
    ):
        assert key == found_key
        assert torch.equal(found, expected), key
    assert minilora.merge_loss(model, dtype="bfloat16") == minilora.merge_loss(whole, dtype="bfloat16")
    found, expected = minilora.summary(model), minilora.summary(whole)
    assert (found.rows, found.trainable, found.base) == (expected.rows, expected.trainable, expected.base)
    with torch.no_grad(), minilora.disabled(model), minilora.disabled(whole):
        torch.testing.assert_close(model(IDS), whole(IDS))
    model(IDS).square().mean().backward()
    assert minilora.check_gradients(model) == []
    if rank == 1:  # its share alone is wrong, and every process says so
        model.body[0].lora_B.grad.to_local().fill_(torch.nan)
    assert "'body.0': NaN or inf" in "".join(minilora.check_gradients(model))


def test_two_processes_save_what_one_saves(tmp_path):
    in_processes(saves_what_one_process_saves, tmp_path)


def linears() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3))
    return minilora.inject(model, ["0", "2"], LoRAConfig(r=1), trainable=())  # one row: here, and none there


def one_writes(rank: int, folder: Path) -> None:
    from minilora.files import saving

    calls = []

    def slow(*args, **kwargs):
        calls.append(rank)
        time.sleep(1)  # whoever does not wait finds nothing
        real(*args, **kwargs)

    real = saving.write
    model = sharded(linears())
    with mock.patch.object(saving, "write", slow):
        minilora.save(model, folder / "peft", format="peft")
        assert (folder / "peft" / "adapter_config.json").exists()
        minilora.save(model, folder / "file")
        assert (folder / "file").exists()
    assert calls == [0, 0] * (rank == 0)
    if rank == 0:
        minilora.save(linears(), folder / "whole", format="peft")
        assert same_files(folder / "whole", folder / "peft")

    copied = sharded(linears(), shape=(PROCESSES, 1))  # each process has all of it, as groups of them would
    with mock.patch.object(saving, "write", slow):
        minilora.save(copied, folder / "copied")
    assert same_files(folder / "copied", folder / "file")
    assert calls == [0, 0, 0] * (rank == 0)

    # What the writer meets, the other hears of; nobody waits for ever.
    before = (folder / "file").read_bytes()
    full = mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with (
        full if rank == 0 else mock.MagicMock(),
        pytest.raises(OSError, match="nothing was written") as caught,
    ):
        minilora.save(model, folder / "file")
    assert caught.value.errno == errno.ENOSPC
    assert (folder / "file").read_bytes() == before
    with pytest.raises(OSError, match="there is no folder"):
        minilora.save(model, folder / "none" / "file")
    with torch.no_grad():
        model[0].lora_A.to_local().fill_(torch.nan)  # of which one process has a row
    with pytest.raises(CheckpointError, match=r"'0\.lora_A': not finite"):
        minilora.save(model, folder / "file")
    assert (folder / "file").read_bytes() == before


def test_one_process_writes_and_all_hear_of_it(tmp_path):
    in_processes(one_writes, tmp_path)


def every_process_of_ddp_saves(rank: int, folder: Path) -> None:
    """The model is whole in each, so each writes; what stands there at last is one of them, whole."""
    model = nn.parallel.DistributedDataParallel(linears()).module
    for again in range(10):
        torch.distributed.barrier()
        minilora.save(model, folder / f"file-{again % 2}")
        minilora.save(model, folder / f"peft-{again}", format="peft")
    torch.distributed.barrier()
    minilora.save(linears(), folder / f"{rank}-file")
    minilora.save(linears(), folder / f"{rank}-peft", format="peft")
    assert all(same_files(folder / f"file-{i}", folder / f"{rank}-file") for i in range(2))
    assert all(same_files(folder / f"peft-{i}", folder / f"{rank}-peft") for i in range(10))
    torch.distributed.barrier()
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]


def test_every_process_of_ddp_may_save(tmp_path):
    in_processes(every_process_of_ddp_saves, tmp_path)


def half() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Linear(8, 3)).bfloat16()
    model = minilora.inject(model, ["0", "2"], LoRAConfig(r=3), trainable=["3"])
    for tensor in minilora.adapter_state_dict(model).values():
        torch.nn.init.normal_(tensor, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def loss_of(model: nn.Module, rank: int | None = None) -> torch.Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    return model(x if rank is None else x.chunk(PROCESSES)[rank]).float().square().mean()


def float32_beside_bf16(rank: int, folder: Path) -> None:
    one = half()
    optimizer = torch.optim.SGD(minilora.trainable_parameters(one), lr=1.0)
    loss_of(one).backward()
    optimizer.step()
    model = sharded(half(), "3")  # the head, which trains in bfloat16, is a group of its own
    optimizer = torch.optim.SGD(minilora.trainable_parameters(model), lr=1.0)
    before = minilora.adapter_state_dict(model)
    loss_of(model, rank).backward()
    optimizer.step()
    found, expected = minilora.adapter_state_dict(model), minilora.adapter_state_dict(one)
    assert {tensor.dtype for key, tensor in found.items() if "lora_" in key} == {torch.float32}
    for key, tensor in expected.items():
        moved = (tensor - before[key]).float()
        assert moved.any()
        # The activations are rounded to bfloat16, and each process rounds those of its own rows.
        torch.testing.assert_close((found[key] - before[key]).float(), moved, rtol=0.05, atol=0.02)
    minilora.save(model, folder / "a.safetensors")
    if rank == 0:
        again = minilora.load(minilora.eject(half()), folder / "a.safetensors")
        for key, tensor in minilora.adapter_state_dict(again).items():
            assert torch.equal(tensor, found[key])


def test_float32_adapters_train_beside_a_bf16_base(tmp_path):
    in_processes(float32_beside_bf16, tmp_path)


def goes_on_from_a_distributed_checkpoint(rank: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    def begun():
        model = sharded(injected(), "conv", "body")
        return model, torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.1)

    def step(model, optimizer):
        model((IDS + rank) % 10).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def states(model, optimizer):
        options = StateDictOptions(ignore_frozen_params=True)
        return dict(
            zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True)
        )

    model, optimizer = begun()
    step(model, optimizer)
    held = states(model, optimizer)
    assert "conv.base.weight" not in held["model"]
    dcp.save(held, checkpoint_id=folder / "checkpoint")
    step(model, optimizer)

    again, optimizer = begun()
    held = states(again, optimizer)
    dcp.load(held, checkpoint_id=folder / "checkpoint")
    set_state_dict(
        again,
        optimizer,
        model_state_dict=held["model"],
        optim_state_dict=held["optimizer"],
        options=StateDictOptions(strict=False),
    )
    step(again, optimizer)
    minilora.save(model, folder / "a")
    minilora.save(again, folder / "b")
    assert same_files(folder / "a", folder / "b")


def test_a_distributed_checkpoint_goes_on(tmp_path):
    in_processes(goes_on_from_a_distributed_checkpoint, tmp_path)
