"""Rows of a weight, trained by themselves: the base's bits at first, then W_eff, and nothing else trains."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_far, distance, frozen, picture, raw, state, unchanged
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora
from minilora import (
    AdapterConfig,
    LoRAConfig,
    MergeError,
    MiniLoRAError,
    RowsConfig,
    TargetError,
    TrainedRows,
)
from minilora.rows import ReplacedRows

V, D = 12, 8
ROWS = (1, 7, 11)
IDS = torch.tensor([[0, 1, 7, 7], [11, 3, 1, 2]])


class Words(nn.Module):
    """An embedding, a body and an output layer, which computes with the embedding's weight where `tied`."""

    def __init__(self, tied: bool = True, bias: bool = False, **options: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D, **options)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=bias)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.tokens(ids))))


class Table(nn.Module):
    """A table of its own, looked up by indexing and multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, D))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids] @ self.table.T


class Wrapped(nn.Module):
    """A model that has another as a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


def build(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Words(**options).to(dtype)


def with_rows(dtype: torch.dtype = torch.float64, rows: Any = ROWS, **options: Any) -> nn.Module:
    """Return a model with rows of random values, as if they had been trained."""
    model = minilora.inject(build(dtype, **options), ["tokens"], RowsConfig(rows=rows))
    trained = model.tokens.trained_rows
    trained.data.copy_(torch.randn(trained.shape, generator=torch.Generator().manual_seed(1)))
    return model


def materialised(model: nn.Module, **options: Any) -> nn.Module:
    """Return the bare model with W_eff as its weight, which trains."""
    plain = build(next(model.parameters()).dtype, **options)
    weight = plain.tokens.weight.detach().clone()
    weight[list(model.tokens.config.rows)] = model.tokens.trained_rows.detach().to(weight.dtype)
    tied = plain.head.weight is plain.tokens.weight
    plain.requires_grad_(False)
    plain.tokens.weight = nn.Parameter(weight)
    if tied:
        plain.head.weight = plain.tokens.weight
    return plain


TIES = pytest.mark.parametrize("tied", [True, False])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding_idx": 7},
    {"padding_idx": 3},
    {"max_norm": 1.5},
    {"sparse": True},
    {"scale_grad_by_freq": True},
    {"max_norm": 1.0, "padding_idx": 1, "norm_type": 1.0, "sparse": True},
]


@TIES
@DTYPES
def test_at_first_the_model_gives_the_bases_bits(tied: bool, dtype: torch.dtype) -> None:
    base = frozen(build(dtype, tied=tied))
    model = minilora.inject(
        build(dtype, tied=tied), ["tokens", "body"], {"tokens": RowsConfig(rows=ROWS), "body": LoRAConfig()}
    )
    assert torch.equal(model(IDS), base(IDS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert model.tokens.trained_rows.dtype == wide
    assert torch.equal(model.tokens.weight, base.tokens.weight)


@TIES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:.*is formed, as large as W")
def test_it_computes_with_the_rows_in_the_weight_and_learns_what_they_would(
    tied: bool, options: dict[str, Any]
) -> None:
    if tied and "max_norm" in options:
        refused(
            "an embedding that writes into it", build(tied=tied, **options), "tokens", RowsConfig(rows=ROWS)
        )
        return
    model, plain = (
        with_rows(tied=tied, **options),
        materialised(with_rows(tied=tied, **options), tied=tied, **options),
    )
    for each in (model, plain):
        each(IDS).square().sum().backward()
    with torch.no_grad():
        assert distance(model(IDS), plain(IDS)) < 1e-12
    expected = plain.tokens.weight.grad.to_dense()[list(ROWS)]
    assert distance(model.tokens.trained_rows.grad, expected) < 1e-12
    assert not model.tokens.trained_rows.grad.is_sparse
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["tokens.trained_rows"]


@TIES
def test_training_moves_the_rows_and_nothing_else(tied: bool) -> None:
    model = build(tied=tied)
    before = state(model)
    minilora.inject(model, "tokens", RowsConfig(rows=ROWS))
    optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=0.1)
    start = model(IDS).detach()
    for _ in range(3):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_far(model(IDS), start)
    assert state(minilora.eject(model)) == before
    assert torch.equal(model(IDS), start)


@TIES
def test_gradients_of_any_order(tied: bool) -> None:
    model = with_rows(tied=tied)
    trained = model.tokens.trained_rows

    def run(rows: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"tokens.trained_rows": rows}, (IDS,))

    assert torch.autograd.gradcheck(run, trained, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, trained, fast_mode=True)


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.there = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.there:
                self.largest = max(self.largest, tensor.numel())
        return result


@TIES
def test_nothing_of_the_weights_size_is_formed(tied: bool) -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(500, 40), "head": nn.Linear(40, 500, bias=False)})
    if tied:
        model["head"].weight = model["tokens"].weight
    minilora.inject(model, "tokens", RowsConfig(rows=range(490, 500)))
    ids = torch.tensor([1, 495, 499])
    with Sizes(model) as sizes:
        model["head"](model["tokens"](ids)).sum().backward()
    assert 0 < sizes.largest <= 3 * 500  # the logits


def test_ids_of_every_shape_and_integer_dtype() -> None:
    model = with_rows()
    weight = model.tokens.weight
    for ids in (IDS, IDS[0, 1], IDS[:, :0], IDS.T, IDS[:, ::2], IDS.int(), IDS.expand(3, 2, 4)):
        assert torch.equal(model.tokens(ids), weight[ids])
    with pytest.raises(IndexError):
        model.tokens(torch.tensor([V]))


def test_under_autocast_and_on_16_bits_small_changes_count() -> None:
    """The rows are float32; what the output layer adds for them is not rounded to W's dtype first."""
    model = with_rows(torch.bfloat16)
    base = frozen(build(torch.bfloat16))
    rows = list(ROWS)
    trained = model.tokens.trained_rows
    trained.data.copy_(base.tokens.weight[rows].float() * (1 + 2**-14))  # less than bfloat16 tells apart
    x = torch.ones(1, D, dtype=torch.bfloat16)
    assert torch.equal(model.tokens(IDS), base.tokens(IDS))
    value = model.tokens.value()
    change = value.outputs(torch.zeros(1, V, dtype=torch.bfloat16), x)
    assert change[0, rows].abs().min() > 0
    assert not change[0, [0, 2, 3]].any()
    model, plain = with_rows(torch.float32), materialised(with_rows(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(IDS), plain(IDS)
        got.float().sum().backward()
    assert got.dtype == expected.dtype == torch.bfloat16
    assert distance(got, expected) < 6e-2
    assert model.tokens.trained_rows.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], r"rows must be a list of ints, of one at least, not \(\)"),
        (5, "rows must be a list of ints, of one at least, not 5"),
        (None, "not None"),
        ([1, -1, True, 2.0, "3"], r"rows must be ints from 0 on, not -1, True, 2\.0, '3'"),
        ("12", "rows must be ints from 0 on, not '1', '2'"),
        ([3, 1, 3, 1, 2], "rows has 3, 1 more than once"),
        ([[1], [1]], r"rows must be ints from 0 on, not \[1\], \[1\]"),
    ],
)
def test_rows_that_are_none_are_listed(rows: Any, says: str) -> None:
    with pytest.raises(MiniLoRAError, match=says):
        RowsConfig(rows=rows)


def test_all_that_is_wrong_with_a_config_is_said_at_once() -> None:
    with pytest.raises(MiniLoRAError) as error:
        RowsConfig(rows=[-1, 2, 2], of=3, dtype="int8")
    for line in (
        "4 problems",
        "from 0 on, not -1",
        "has 2 more than once",
        "of must be the name",
        "dtype must be",
    ):
        assert line in str(error.value)
    with pytest.raises(TypeError, match="rows"):
        RowsConfig()
    with pytest.raises(MiniLoRAError, match=r"token_indices.*RowsConfig\(rows"):
        RowsConfig(token_indices=[1])


def test_a_config_is_the_same_however_its_rows_are_given() -> None:
    numpy = pytest.importorskip("numpy")
    for rows in ([2, 0, 1], range(3), {0, 1, 2}, numpy.arange(3), (row for row in (1, 0, 2))):
        config = RowsConfig(rows=rows)
        assert config.rows == (0, 1, 2)
        assert {config: 1} == {RowsConfig(rows=[0, 1, 2]): 1}
    assert RowsConfig.from_dict(config.to_dict()) == config


def refused(says: str, model: nn.Module, *args: Any, **kwargs: Any) -> str:
    with unchanged(model), pytest.raises(TargetError, match=says) as error:
        minilora.inject(model, *args, **kwargs)
    return str(error.value)


def test_what_cannot_be_is_refused_and_nothing_has_changed() -> None:
    says = refused(
        r"'tokens', 'head': 'weight' is \(12, 8\), and has no row 12, 40; .*resize_token_embeddings\(41\)",
        build(),
        "tokens",
        RowsConfig(rows=[1, 12, 40]),
    )
    assert "1 problem;" in says  # of one weight
    refused("has no row 12", build(), ["tokens", "body"], RowsConfig(rows=[1, 12]))
    refused("rows are those of a matrix", nn.Sequential(nn.LayerNorm(4)), "0", RowsConfig(rows=[1]))
    refused("rows are those of a matrix", nn.Sequential(nn.Conv2d(3, 8, 3)), "0", RowsConfig(rows=[1]))
    refused("has no weight of its own", nn.Sequential(nn.Tanh()), "0", RowsConfig(rows=[1]))
    refused(
        "float64, whose rows torch.bfloat16 would round",
        build(),
        "tokens",
        RowsConfig(rows=[1], dtype="bfloat16"),
    )
    refused("is a parameter of the model itself", Table(), "table", RowsConfig(rows=[1]))
    refused(
        "keeps its weights flat", nn.ModuleDict({"rnn": nn.LSTM(2, 2)}), "weight_ih_l0", RowsConfig(rows=[1])
    )


def test_one_weight_has_one_kind_of_training() -> None:
    both = {"tokens": RowsConfig(rows=ROWS), "head": LoRAConfig()}
    refused(r"'head': carries .* as well; choose one of the two", build(), ["tokens", "head"], both)
    for first, second in ((LoRAConfig(), RowsConfig(rows=ROWS)), (RowsConfig(rows=ROWS), LoRAConfig())):
        model = minilora.inject(build(), "tokens", first)
        refused("'tokens': carries .* as well; choose one of the two", model, "tokens", second)
    model = minilora.inject(build(), "tokens", RowsConfig(rows=ROWS))
    refused(r"carries rows \(3\) already", model, "tokens", RowsConfig(rows=[0]))
    refused("lies inside an injected site", model, [], trainable=["tokens"])
    refused(r"but carries rows \(3\) already", model, [], trainable=["tokens.weight"])
    model = minilora.inject(build(tied=False), [], trainable=["tokens.weight"])
    refused(r"carries trained in full \(weight\) as well", model, "tokens", RowsConfig(rows=ROWS))
    model = minilora.inject(build(tied=False), [], trainable=["head"])
    refused("trained in full", model, "head", RowsConfig(rows=ROWS))


def test_rows_of_one_weight_are_the_same_everywhere() -> None:
    two = {"tokens": RowsConfig(rows=[1]), "head": RowsConfig(rows=[2])}
    refused(
        "rows are the same at all modules that share a weight, here 'tokens', 'head'",
        build(),
        ["tokens", "head"],
        two,
    )
    for targets in ("head", ["tokens", "head"], ["head", "tokens.weight"]):
        model = minilora.inject(build(), targets, RowsConfig(rows=ROWS))
        assert list(minilora.adapter_state_dict(model)) == ["tokens.trained_rows"]
    refused("'head': rows are the same at all", build(tied=False), "head", RowsConfig(rows=[1], of="tokens"))
    refused("'head': rows are the same at all", build(), "head", RowsConfig(rows=[1], of="tokens"))
    model = minilora.inject(build(tied=False), ["tokens", "head"], RowsConfig(rows=ROWS))
    assert list(minilora.adapter_state_dict(model)) == ["tokens.trained_rows", "head.trained_rows"]


@TIES
@DTYPES
def test_fusing_puts_the_rows_in_the_weight_rounded_once(tied: bool, dtype: torch.dtype) -> None:
    model = with_rows(dtype, tied=tied)
    rows, base = model.tokens.trained_rows.detach().clone(), build(dtype, tied=tied)
    for to in (None, torch.float32, torch.bfloat16):
        twin = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that was tied is untied
            fused = minilora.fuse(twin, dtype=to)
        expected = base.tokens.weight.detach().to(to or dtype)
        expected[list(ROWS)] = rows.to(to or dtype)
        assert raw(fused.tokens.weight) == raw(expected)
        assert (fused.head.weight is fused.tokens.weight) == tied
        assert list(fused.state_dict()) == list(base.state_dict())
        assert not fused.tokens.weight.requires_grad
        if to is None:
            assert distance(fused(IDS), model(IDS)) < {torch.float64: 1e-12, torch.float32: 1e-5}.get(
                dtype, 6e-2
            )


def test_merging_leaves_rows_as_they_are() -> None:
    model = with_rows()
    minilora.inject(model, "body", LoRAConfig(r=2))
    nn.init.normal_(model.body.lora_B)
    before = picture(model)
    y = model.eval()(IDS).detach()
    before = picture(model)
    assert distance(minilora.merge(model)(IDS), y) < 1e-12
    assert model.tokens.base.weight is model.head.base.weight
    assert picture(minilora.unmerge(model)) == before
    assert torch.equal(model(IDS), y)


def test_what_is_not_finite_is_neither_merged_nor_fused_nor_saved(tmp_path: Any) -> None:
    model = with_rows()
    model.tokens.trained_rows.data[0, 0] = float("nan")
    for act in (minilora.merge, minilora.fuse):
        with unchanged(model), pytest.raises(MergeError, match=r"'tokens': 1 of 24 values of 'trained_rows'"):
            act(model)
    with pytest.raises(MiniLoRAError, match=r"'tokens\.trained_rows': not finite"):
        minilora.save(model, tmp_path / "a")
    model.tokens.trained_rows.data[0, 0] = 1e30
    with unchanged(model), pytest.raises(MergeError, match=r"not finite in torch\.float16"):
        minilora.fuse(model, dtype="float16")


def test_disabled_and_ejected_the_base_is_back() -> None:
    model, base = with_rows(), frozen(build())
    y = model(IDS)
    with minilora.disabled(model):
        assert torch.equal(model(IDS), base(IDS))
        assert model.tokens.weight is model.tokens.base.weight
        assert str(minilora.summary(model)).count("disabled") == 2
    assert torch.equal(model(IDS), y)
    weight = model.tokens.base.weight
    minilora.eject(model)
    assert type(model.tokens) is nn.Embedding
    assert model.tokens.weight is model.head.weight is weight


def test_summary() -> None:
    model = with_rows()
    minilora.inject(model, "body", LoRAConfig(r=2))
    shown = str(minilora.summary(model))
    for line in (
        "tokens  x1  rows (3)                     24  active",
        "head    x1  rows (3, of tokens)           0  active",
        "not tokens x1",
    ):
        assert line in shown, shown
    assert f"trainable: {3 * D + 2 * 2 * D:,} parameters" in shown


@TIES
def test_copies_share_what_the_original_shares(tied: bool) -> None:
    model = with_rows(tied=tied)
    y = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), y)
        twin.tokens.trained_rows.data.add_(1)
        assert_far(twin(IDS), y)
        if tied:
            assert twin.head.value().right is twin.tokens.trained_rows
    assert torch.equal(model(IDS), y)


@TIES
def test_moved_and_cast_with_the_model(tied: bool) -> None:
    model = with_rows(tied=tied).float()
    assert model.tokens.trained_rows.dtype == torch.float32
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = model(IDS)
    model.to("meta")
    assert model(IDS.to("meta")).is_meta
    model.to_empty(device="cpu")
    if tied:  # as torch does it, to_empty unties
        model.head.base.weight = model.tokens.base.weight
    model.load_state_dict(values)
    assert torch.equal(model(IDS), y)


@TIES
def test_state_dicts_load(tied: bool) -> None:
    model = with_rows(tied=tied)
    twin = minilora.inject(build(tied=tied), "tokens", RowsConfig(rows=ROWS))
    assert set(model.state_dict()) - set(build(tied=tied).state_dict()) == {
        "tokens.trained_rows",
        "tokens.base.weight",
        *(["head.base.weight"] if tied else []),
    }
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(IDS), model(IDS))
    other = nn.Module.state_dict(build(tied=tied))
    other = {name: torch.randn_like(tensor) for name, tensor in other.items()}
    if tied:
        other["head.weight"] = other["tokens.weight"]
    fresh = minilora.inject(build(tied=tied), "tokens", RowsConfig(rows=ROWS))
    trained = model.tokens.trained_rows.detach().clone()
    for each in (fresh, model):
        each.load_state_dict(other)  # of the bare model
    plain = frozen(build(tied=tied))
    plain.load_state_dict(other)
    assert torch.equal(fresh(IDS), plain(IDS))
    assert torch.equal(model.tokens.trained_rows, trained)


@TIES
def test_it_compiles_in_one_graph(tied: bool) -> None:
    model = with_rows(torch.float32, tied=tied)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    y, expected = compiled(IDS), model(IDS)
    assert distance(y, expected) < 1e-5
    y.sum().backward()
    expected.sum().backward()


@pytest.mark.parametrize("order", ["rows first", "rows last", "together"])
def test_rows_and_an_adapter_of_one_module(order: str) -> None:
    model = build()
    rows, adapter = RowsConfig(rows=ROWS), AdapterConfig(bottleneck=2, hidden_size=D)
    first, second = (rows, adapter) if order == "rows first" else (adapter, rows)
    base = frozen(model)(IDS)
    minilora.inject(model, "tokens", first)
    minilora.inject(model, "tokens", second)
    assert [type(w).__name__ for w in (model.tokens, model.tokens.base)] == ["Adapter", "TrainedRows"]
    assert torch.equal(model(IDS), base)
    nn.init.normal_(model.tokens.adapter_up.weight)
    model.tokens.base.trained_rows.data.add_(1)
    y = model(IDS)
    assert_far(y, base)
    assert distance(minilora.fuse(model, skip_adapters=True)(IDS), y) < 1e-12
    assert model.head.weight is model.tokens.base.weight


def test_a_table_that_no_rule_knows_is_right_too() -> None:
    model = minilora.inject(Wrapped(Table()).double(), "table", RowsConfig(rows=ROWS))
    assert list(minilora.adapter_state_dict(model)) == ["inner.table.trained_rows"]
    base = copy.deepcopy(model.inner.base)
    model.inner.trained_rows.data.normal_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = model(IDS)
    assert [str(w.message) for w in caught] == [
        f"'inner.table': {what} has no rule, so W_eff is formed, as large as W"
        for what in ("indexing", "transpose")
    ]
    weight = base.table.detach().clone()
    weight[list(ROWS)] = model.inner.trained_rows.detach()
    assert torch.allclose(y, weight[IDS] @ weight.T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for each function
        model(IDS).sum().backward()
    assert model.inner.trained_rows.grad.abs().sum() > 0
    assert torch.equal(minilora.fuse(model).inner.table, weight)


def test_a_value_may_be_asked_for_what_a_tensor_has() -> None:
    W, T, rows = torch.randn(5, 3), torch.randn(2, 3), torch.tensor([1, 4])
    whole, value = W.index_copy(0, rows, T), ReplacedRows(W, rows, T, 1.0)
    x = torch.randn(2, 3)
    same: list[Callable[[Any], Tensor]] = [
        lambda v: F.linear(x, v),
        lambda v: F.linear(x, v, torch.ones(5)),
        lambda v: F.linear(x, v.T.T),
        lambda v: x @ v.T,
        lambda v: x @ v.t(),
        lambda v: v @ x.T,
        lambda v: torch.matmul(x, v.mT),
        lambda v: v[1],
        lambda v: v[1:],
        lambda v: v[rows],
        lambda v: torch.stack(list(v)),
        lambda v: v.to(torch.float64),
        lambda v: v.contiguous() * 2,
        lambda v: torch.tensor(v.shape),
        lambda v: F.embedding_bag(torch.tensor([[1, 0]]), v),
    ]
    for function in same:
        assert torch.allclose(function(value), function(whole), atol=1e-6)


@TIES
def test_a_shared_module_has_rows_under_each_of_its_names(tied: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Embedding(V, D), "head": nn.Linear(D, V, bias=False)})
    model["b"] = model["a"]
    if tied:
        model["head"].weight = model["a"].weight
    minilora.inject(model, "b", RowsConfig(rows=ROWS))
    assert model["a"] is model["b"]
    assert isinstance(model["a"], TrainedRows)
    assert isinstance(model["head"], TrainedRows) == tied
    assert list(minilora.adapter_state_dict(model)) == ["a.trained_rows"]


def test_an_embedding_that_scales_what_it_looks_up() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    model = minilora.inject(nn.Sequential(Scaled(V, D)), "0", RowsConfig(rows=ROWS))
    model[0].trained_rows.data.fill_(2)
    assert torch.equal(model(IDS), 3 * model[0].weight[IDS])
    assert (model(torch.tensor([7])) == 6).all()


def test_a_thawed_base_learns_where_no_row_stands() -> None:
    model = with_rows()
    plain = materialised(model)
    model.tokens.base.weight.requires_grad_(True)
    for each in (model, plain):
        each(IDS).square().sum().backward()
    expected = plain.tokens.weight.grad.clone()
    expected[list(ROWS)] = 0
    torch.testing.assert_close(model.tokens.base.weight.grad, expected)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Words()
    minilora.inject(model, "tokens", RowsConfig(rows=ROWS))
    assert minilora.summary(model).trainable == 3 * D


def test_bank_and_combine_refuse_rows_by_name(tmp_path: Any) -> None:
    model = with_rows(tied=False)
    minilora.inject(model, "body", LoRAConfig(r=2))
    minilora.save(model, tmp_path / "a.safetensors")
    bare = build(tied=False)
    with (
        unchanged(bare),
        pytest.raises(MiniLoRAError, match=r"'tokens': rows \(3\) on Embedding: a bank takes"),
    ):
        minilora.Bank(bare, {"a": tmp_path / "a.safetensors"})
    with pytest.raises(
        MiniLoRAError, match="'tokens': trained rows take the place of others, and have no sum"
    ):
        minilora.combine({tmp_path / "a.safetensors": 1.0}, tmp_path / "out")


@TIES
def test_gradients_are_checked_where_the_rows_are(tied: bool) -> None:
    model = with_rows(tied=tied)
    model(IDS).sum().backward()
    assert minilora.check_gradients(model) == []
    model.tokens.trained_rows.requires_grad_(False)
    model.body.requires_grad_(True)
    model(IDS).sum().backward()
    model.tokens.trained_rows.grad = None
    assert minilora.check_gradients(model) == [
        "'tokens': frozen: requires_grad is False on all that it holds"
    ]


def test_merging_costs_rows_nothing() -> None:
    model = minilora.inject(with_rows(torch.bfloat16), "body", LoRAConfig(r=2))
    assert list(minilora.merge_loss(model)) == ["body"]
