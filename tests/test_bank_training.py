"""Training several adapters of a bank side by side: each as it would train alone."""

import copy
import threading

import pytest
import torch
from banks import SHAPES, side_by_side, sums
from checks import assert_far, distance, raw
from models import CASES, MLP
from test_bank import empty, filled, two
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora
from minilora import Bank, LoRAConfig, MiniLoRAError


class Encoder(nn.Module):
    """A model whose head is more than a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.up = nn.Linear(8, 16)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, ids):
        return self.head(torch.tanh(self.up(self.embedding(ids))).mean(1))


def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder().double()


SITES = {"targets": ["up", "embedding"], "trainable": ["head"]}
CONFIGS = {"a": LoRAConfig(r=4), "b": LoRAConfig(r=2, alpha=3), "c": LoRAConfig(r=1, rslora=True)}


def begun():
    """Return a bank with three new adapters, and each of them on a model of its own."""
    bank = Bank(encoder(), slots=4, r=4, **SITES)
    alone = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        bank.add(name, config)
        torch.manual_seed(seed)
        alone[name] = minilora.inject(encoder(), config=config, **SITES)
    return bank, alone


def batches(n, rows=6):
    generator = torch.Generator().manual_seed(3)
    names = list(CONFIGS)
    for i in range(n):
        ids = torch.randint(0, 11, (rows, 5), generator=generator)
        absent = names[i % 3] if i else None
        yield ids, [name for name in (names * rows) if name != absent][:rows]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


@pytest.mark.parametrize("name", SHAPES)
def test_each_adapter_gets_the_gradient_that_it_gets_alone(name, tmp_path):
    side = side_by_side(name, tmp_path, torch.float64)
    adapters = [adapter for adapter in dict.fromkeys(side.names) if adapter is not None]
    parameters = {adapter: side.bank.parameters(adapter) for adapter in adapters}
    with side.bank.rows(side.names):
        sums(side.case.call(side.model)).sum().backward()
    for adapter in adapters:
        alone = side.alone[adapter]
        mine = torch.tensor([row == adapter for row in side.names])
        sums(side.case.call(alone))[mine].sum().backward()
        expected = [p.grad for p in alone.parameters() if p.requires_grad]
        found = [p.grad for p in parameters[adapter]]
        assert len(found) == len(expected) > 1
        for own, other in zip(in_order(found), in_order(expected), strict=True):
            assert distance(own, other) < 1e-12
    assert all(p.grad is None for adapter in adapters for p in side.alone[None].parameters())


def in_order(gradients):
    """Return gradients in an order that does not depend on the model's."""
    return sorted(gradients, key=lambda g: (tuple(g.shape), float(g.abs().sum())))


def test_steps_on_mixed_batches_are_steps_alone():
    bank, alone = begun()
    optimizers = {name: adamw(bank.parameters(name)) for name in CONFIGS}
    apart = {name: adamw(minilora.trainable_parameters(model)) for name, model in alone.items()}
    for ids, rows in batches(6):
        with bank.rows(rows):
            loss = sums(bank.model(ids)).sum()
        loss.backward()
        for name, model in alone.items():
            if own := [row for row, other in enumerate(rows) if other == name]:
                sums(model(ids[own])).sum().backward()
        for optimizer in (*optimizers.values(), *apart.values()):
            optimizer.step()
            optimizer.zero_grad()
    ids = next(batches(1))[0]
    for name, model in alone.items():
        with bank.rows(name):
            assert distance(bank.model(ids), model(ids)) < 1e-11
        assert_far(model(ids), encoder()(ids))
    assert raw(bank.model(ids)) == raw(encoder().requires_grad_(False)(ids))


def test_an_absent_adapter_keeps_its_values_and_its_optimizer_state_bit_by_bit():
    bank, _ = begun()
    optimizers = {name: adamw(bank.parameters(name)) for name in CONFIGS}

    def step(rows):
        with bank.rows(rows):
            sums(bank.model(torch.ones(len(rows), 5, dtype=torch.int64))).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    def picture(name):
        moments = optimizers[name].state_dict()["state"].values()
        return [raw(p) for p in bank.parameters(name)], [raw(t) for m in moments for t in m.values()]

    step(["a", "b", "c"])
    before = {name: picture(name) for name in CONFIGS}
    step(["a", None, "c", "a"])
    assert picture("b") == before["b"]
    assert all(picture(name) != before[name] for name in ("a", "c"))
    step("b")
    assert picture("b") != before["b"]


def test_an_adapter_that_does_not_train_gets_no_gradient_and_does_its_share():
    bank, _ = begun()
    filled(bank, "loaded", 5, r=4)
    mine = bank.parameters("a")
    ids = next(batches(1))[0]
    with bank.rows(["a", "loaded", None, "loaded", "a", "b"]):
        output = bank.model(ids)
    sums(output).sum().backward()
    assert [p for p in bank.model.parameters() if p.grad is not None] == [
        p for p in bank.model.parameters() if any(p is q for q in mine)
    ]
    bank.freeze("a")
    with bank.rows(["a", "loaded", None, "loaded", "a", "b"]):
        assert distance(bank.model(ids), output) < 1e-12


def test_a_step_of_one_adapter_leaves_the_graph_of_another_alone():
    bank, _ = begun()
    mine, other = bank.parameters("a"), bank.parameters("b")
    ids = next(batches(1))[0]
    losses = {}
    for name in ("a", "b"):
        with bank.rows(name):
            losses[name] = sums(bank.model(ids)).sum()
    losses["a"].backward()
    adamw(mine).step()
    losses["b"].backward()
    assert all(p.grad is not None for p in other)


def test_a_tensor_of_slots_trains_too():
    bank, _ = begun()
    mine, other = bank.parameters("a"), bank.parameters("b")
    with bank.rows(torch.tensor([bank.slot("a"), 0, bank.slot("a")])):
        sums(bank.model(torch.ones(3, 5, dtype=torch.int64))).sum().backward()
    assert all(p.grad is not None for p in mine)
    assert all(p.grad is None for p in other)


def test_parameters_are_the_same_each_time_and_freeze_puts_them_back():
    bank, x = two(), torch.randn(3, 16)
    with bank.rows("a"):
        before = bank.model(x)
    first = bank.parameters("a")
    assert all(p is q for p, q in zip(first, bank.parameters("a"), strict=True))
    assert {id(p) for p in first} == {id(p) for p in minilora.trainable_parameters(bank.model)}
    with bank.rows("a"):
        assert distance(bank.model(x), before) < 1e-6
        for act in (bank.parameters, bank.freeze, bank.remove):
            with pytest.raises(MiniLoRAError, match="leave its block first"):
                act("a")
        with pytest.raises(MiniLoRAError, match="leave its block first"):
            bank.replace("a", "file")
    with torch.no_grad():
        first[0].mul_(2)
    with bank.rows(["a", None, "b"]):
        trained = bank.model(x)
    bank.freeze("a")
    assert not any(p.requires_grad for p in bank.model.parameters())
    with bank.rows(["a", None, "b"]):
        assert distance(bank.model(x), trained) < 1e-6
    assert_far(trained[0], before[0])


def test_the_padding_of_an_embedding_gets_no_gradient():
    bank, _ = begun()
    embedding = bank.model.embedding
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.copy_(torch.rand(parameter.shape) * 0.1)
    with bank.rows(["a", None]):
        sums(bank.model(torch.tensor([[0, 1], [0, 2]]))).sum().backward()
    A = embedding.lora_A.trained[str(bank.slot("a"))]
    assert A.grad[:, 0].abs().sum() == 0
    assert A.grad[:, 1].abs().sum() > 0


def test_dropout_is_that_of_each_row_s_adapter_and_acts_in_training_alone():
    bank = filled(filled(empty(), "all", 1, r=4, dropout=1.0), "none", 1, r=4)
    bank = filled(bank, "half", 1, r=4, dropout=0.5)
    x = torch.randn(1, 64, 16).repeat(4, 1, 1)
    with bank.rows(["all", "none", "half", None]):
        evaluated = bank.model(x)
        assert torch.equal(evaluated[0], evaluated[1])
        assert torch.equal(evaluated[0], evaluated[2])
        bank.model.train()
        all_of_it, none, half, base = bank.model(x)
    assert torch.equal(none, evaluated[1])
    assert torch.equal(all_of_it, base)
    assert_far(half, none)
    assert_far(half, base)
    with bank.rows("half"):
        layer, many = bank.model.up, torch.ones(4000, 16)
        delta = (layer(many) - layer.base(many)).mean(0)
        bank.model.eval()
        assert distance(delta, (layer(many) - layer.base(many)).mean(0)) < 0.1  # what is left is scaled up


# Heads.


def test_other_heads_are_called_on_their_rows(tmp_path):
    alone, files = {}, {}
    for seed, name in enumerate(("a", "b")):
        model = minilora.inject(encoder(), ["up"], LoRAConfig(r=2), trainable=["head"])
        generator = torch.Generator().manual_seed(seed)
        for tensor in minilora.adapter_state_dict(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        alone[name], files[name] = model, tmp_path / name
        minilora.save(model, files[name])
    bank = Bank(encoder(), files, slots=3)
    alone[None] = encoder()
    ids = torch.randint(0, 11, (5, 5))
    rows = ["b", None, "a", "b", "a"]
    with bank.rows(rows):
        output = bank.model(ids)
        beams = bank.model(ids.repeat_interleave(2, 0))
    for row, name in enumerate(rows):
        assert distance(output[row], alone[name](ids)[row]) < 1e-12
    assert distance(beams[::2], output) < 1e-12
    with bank.rows("b"):
        assert distance(bank.model(ids), alone["b"](ids)) < 1e-12
    bank.remove("b")
    assert list(bank.model.head.heads) == [str(bank.slot("a"))]


def test_a_head_of_another_width_is_refused(tmp_path):
    model = encoder()
    model.head[2] = nn.Linear(8, 3).double()
    minilora.save(minilora.inject(model, ["up"], trainable=["head"]), tmp_path / "wide")
    bank, _ = begun()
    with pytest.raises(MiniLoRAError, match=r"'head.2.weight': shape \(3, 8\), the model needs \(2, 8\)"):
        bank.load("wide", tmp_path / "wide")


def test_a_head_that_returns_something_else_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    bank = Bank(nn.Sequential(Pair(2, 2)), trainable=["0"], slots=2, r=1)
    bank.add("a")
    with pytest.raises(MiniLoRAError, match="one tensor, and Pair returns"), bank.rows(["a", None]):
        bank.model(torch.ones(2, 2))


# Checkpoints of activations.


@pytest.mark.parametrize("elsewhere", [False, True], ids=["this thread", "a thread of torch's"])
def test_what_a_checkpoint_computes_again_has_the_same_rows(elsewhere):
    """As on a GPU, where torch computes gradients in threads of its own."""
    bank, x = two(), torch.randn(3, 16)
    mine = bank.parameters("a")
    rows = ["a", None, "b"]
    with bank.rows(rows):
        sums(bank.model(x)).sum().backward()
    expected = [p.grad.clone() for p in mine]
    for p in mine:
        p.grad = None
    with bank.rows(rows):
        loss = sums(checkpoint(bank.model, x, use_reentrant=False)).sum()
        if elsewhere:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
    assert all(distance(p.grad, e) < 1e-6 for p, e in zip(mine, expected, strict=True))


def test_gradients_reach_what_stands_below():
    """Through a row's own adapter, and no other."""
    bank = two()
    x = torch.randn(3, 16, requires_grad=True)
    with bank.rows(["a", None, "b"]):
        sums(bank.model(x)).sum().backward()
    mixed = x.grad.clone()
    for row, name in enumerate(["a", None, "b"]):
        x.grad = None
        with bank.rows(name):
            sums(bank.model(x)).sum().backward()
        assert distance(mixed[row], x.grad[row]) < 1e-5


def test_a_sharded_parameter_is_refused(monkeypatch):
    bank = two()
    copied = copy.deepcopy(bank)
    bank.parameters("a")
    monkeypatch.setattr(minilora.sites, "shards_in", lambda model: ["0.weight"])
    for bank_of_shards in (bank, copied):
        with pytest.raises(MiniLoRAError, match=r"'0.weight': sharded .*before fully_shard"):
            bank_of_shards.parameters("b")


assert CASES["mlp"].make is MLP
