"""A bank, row by row: what a batch of many adapters gives is what each adapter gives alone."""

import copy
import io
import threading

import pytest
import torch
from banks import MIXED, SHAPES, injected, side_by_side
from checks import TOLERANCE, assert_far, distance, frozen, picture, raw, unchanged
from models import CASES, MLP
from torch import nn

import minilora
from minilora import Bank, LoRAConfig, MiniLoRAError

WIDTHS = [torch.float64, torch.float32, torch.bfloat16]
on_shapes = pytest.mark.parametrize("name", SHAPES)
in_widths = pytest.mark.parametrize("dtype", WIDTHS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def empty(model=None, **more):
    """Return a bank with room for adapters at the first two layers of a small model."""
    settings = {"targets": ["up", "down"], "slots": 3, "r": 4} | more
    return Bank(MLP().eval() if model is None else model, **settings)


def filled(bank, name, seed, **config):
    """Add an adapter with random values."""
    bank.add(name, LoRAConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    bank.freeze(name)
    return bank


def two(**more):
    return filled(filled(empty(**more), "a", 1, r=4), "b", 2, r=2, alpha=3)


# Rows.


@on_shapes
@in_widths
def test_each_row_is_what_its_adapter_gives_alone(name, dtype, tmp_path):
    side = side_by_side(name, tmp_path, dtype)
    output = side.mixed()
    assert set(side.names) >= {"first", None, "narrow"}
    for row, adapter in enumerate(side.names):
        alone = side.case.run(side.alone[adapter])
        assert distance(output[row], alone[row]) < TOLERANCE[dtype]
        if adapter is not None and dtype != torch.bfloat16:
            assert distance(output[row], side.case.run(side.alone[None])[row]) > 1e-3


@on_shapes
@in_widths
def test_a_row_of_the_base_has_the_bits_of_the_base(name, dtype, tmp_path):
    side = side_by_side(name, tmp_path, dtype)
    bare = side.case.run(side.alone[None])
    assert raw(side.case.run(side.model)) == raw(bare)  # without a choice
    with side.bank.rows([None] * len(bare)):
        assert raw(side.case.run(side.model)) == raw(bare)
    assert raw(side.mixed()[1]) == raw(bare[1])


def test_a_row_of_the_base_keeps_zeros_signs_and_infinities():
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.0, 0.0], [1.0, 0.0]]))
    bank = filled(Bank(nn.Sequential(layer), targets=["0"], slots=1, r=2), "a", 1, r=2)
    x = torch.tensor([[1.0, 2.0], [torch.inf, 2.0], [1.0, 2.0]])
    with torch.no_grad(), bank.rows([None, None, "a"]):
        assert raw(bank.model(x)[:2]) == raw(nn.functional.linear(x, layer.weight)[:2])


@on_shapes
def test_one_name_for_all_rows(name, tmp_path):
    side = side_by_side(name, tmp_path, torch.float64)
    with side.bank.rows("first"):
        output = side.case.run(side.model)
    assert distance(output, side.case.run(side.alone["first"])) < 1e-12


def test_one_name_for_all_rows_is_looked_up_once():
    bank = two()
    with bank.rows(["a"] * 6):
        assert len(bank._directory.choice.rows.slots) == 1
        bank.model(torch.randn(5, 16))  # and fits any first dimension


def test_a_tensor_of_slots():
    bank, x = two(), torch.randn(3, 16)
    slots = torch.tensor([bank.slot("b"), bank.slot(None), bank.slot("a")])
    with bank.rows(["b", None, "a"]):
        named = bank.model(x)
    with bank.rows(slots.to(torch.int32)):
        assert torch.equal(bank.model(x), named)
    with bank.rows(slots):
        bank.model(x)
        slots.copy_(torch.tensor([1, 1, 1]))  # the tensor itself is read, at each call
        changed = bank.model(x)
    with bank.rows("a"):
        assert distance(changed, bank.model(x)) < 1e-5


@pytest.mark.parametrize("each", [2, 7])
def test_rows_times_beams_and_rows_times_tokens_are_recognised(each):
    bank, x = two(), torch.randn(3, each, 16)
    with bank.rows(["a", None, "b"]):
        apart, flat = bank.model(x), bank.model(x.reshape(-1, 16))
    assert distance(flat.view_as(apart), apart) < 1e-5


def test_any_other_first_dimension_is_refused_with_both_numbers():
    bank = two()
    with bank.rows(["a", None, "b"]), pytest.raises(MiniLoRAError, match=r"given 3 rows.* dimension of 7"):
        bank.model(torch.randn(7, 16))


def test_no_rows_at_all():
    bank = two()
    with bank.rows(["a", "b"]):
        assert bank.model(torch.randn(0, 16)).shape == (0, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("c", "no adapter 'c'; it holds 'a', 'b'"),
        (["a", "c", "d"], "no adapters 'c', 'd'; it holds 'a', 'b'"),
        ([], "rows must be a name, a list"),
        (3, "rows must be a name, a list"),
        (torch.tensor([1.0]), "as integers; this one is torch.float32"),
        (torch.tensor([[1]]), r"of shape \(1, 1\)"),
        (torch.tensor([True]), "as integers"),
        (torch.tensor([1, 3]), "slots 3 hold no adapter"),
        (torch.tensor([-1, 9]), "slots -1, 9 hold no adapter"),
    ],
)
def test_what_is_no_rows(rows, message):
    bank = two()
    with pytest.raises(MiniLoRAError, match=message), bank.rows(rows):
        pytest.fail("there are no such rows")
    assert bank._directory.choice.rows is None


def test_choices_nest_and_end_with_their_blocks():
    bank, x = two(), torch.randn(2, 16)
    base = bank.model(x)
    with bank.rows("a"):
        outer = bank.model(x)
        with bank.rows(None):
            assert torch.equal(bank.model(x), base)
        assert torch.equal(bank.model(x), outer)
        with pytest.raises(KeyError), bank.rows("b"):
            raise KeyError
        assert torch.equal(bank.model(x), outer)
    assert torch.equal(bank.model(x), base)


def test_two_threads_with_two_batches_do_not_meet():
    bank, x = two(), torch.randn(2, 16)
    names = {"one": "a", "two": ["b", None]}
    expected, found, meet = {}, {}, threading.Barrier(2)
    for key, rows in names.items():
        with torch.no_grad(), bank.rows(rows):
            expected[key] = bank.model(x)

    def serve(key):
        with torch.no_grad(), bank.rows(names[key]):
            meet.wait()
            found[key] = [bank.model(x) for _ in range(20)]
            meet.wait()

    threads = [threading.Thread(target=serve, args=(key,)) for key in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, expected[key]) for key in names for output in found[key])


# Kinds of layers.


def test_embeddings(tmp_path):
    case, adapters = CASES["tied"], {}
    for seed in (1, 2):
        model = minilora.inject(case.build(torch.float64), ["embedding", "body"], LoRAConfig(r=seed + 1))
        adapters[f"a{seed}"] = filled_alone(model, seed)
        minilora.save(model, tmp_path / f"a{seed}")
    bank = Bank(case.build(torch.float64), {name: tmp_path / name for name in adapters})
    with bank.rows(["a1", None, "a2"]):
        output = case.run(bank.model)
    for row, model in ((0, adapters["a1"]), (1, case.build(torch.float64)), (2, adapters["a2"])):
        assert distance(output[row], case.run(model)[row]) < 1e-12
    assert distance(output[0], case.run(bank.model)[0]) > 1e-2


def filled_alone(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in minilora.adapter_state_dict(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


class Scaled(nn.Embedding):
    """An embedding that does more than look up."""

    def forward(self, ids):
        return super().forward(ids) * 4


class Routed(nn.Module):
    """Experts that see the tokens which a router picks."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)),
            ["0", "1"],
            r"'\*' \(x2\): LoRA r=2 alpha=16 on Conv2d",
        ),
        (nn.Sequential(Scaled(4, 4)), ["0"], "'0': LoRA r=2 alpha=16 on Scaled"),
        (nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), ["0"], "'0': LoRA r=2 alpha=16 on Embedding"),
        (nn.MultiheadAttention(4, 2), ["out_proj"], "'out_proj': is never called"),
        (
            nn.Sequential(nn.MultiheadAttention(4, 2)),
            ["in_proj_weight"],
            "'0.in_proj_weight': LoRA .* on Multihead",
        ),
        (Routed(), ["experts.0", "experts.1"], "several experts"),
    ],
)
def test_other_kinds_are_refused_with_their_names(model, targets, message):
    with unchanged(model), pytest.raises(MiniLoRAError, match=message):
        Bank(model, targets=targets, slots=2, r=2)


def test_bottleneck_adapters_and_trained_parameters_are_refused(tmp_path):
    base = MLP()
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    minilora.save(
        minilora.inject(one, "up", LoRAConfig(r=1), trainable="down.weight"), tmp_path / "parameter"
    )
    minilora.save(
        minilora.inject(other, ["up", "down"], minilora.AdapterConfig(bottleneck=2)), tmp_path / "neck"
    )
    with unchanged(base), pytest.raises(MiniLoRAError) as error:
        Bank(base, {"parameter": tmp_path / "parameter", "neck": tmp_path / "neck"})
    assert "'parameter': 'down.weight': trained in full (weight) on Linear" in str(error.value)
    assert "'neck': 'up', 'down': adapter m=2" in str(error.value)


def test_code_that_computes_with_the_weight_past_the_layer_is_stopped():
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True).eval()
    bank = filled(Bank(layer, targets=["linear1"], slots=1, r=2), "a", 1, r=2)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        base = layer(x)
        with bank.rows("a"):  # the fused path reads weights and calls no layer: it must see that it cannot
            fused, dtype = layer(x), layer.linear1.weight.dtype
            with pytest.raises(TypeError, match=r"inside bank\.rows"):
                nn.functional.linear(x, layer.linear1.weight)
        with torch.enable_grad(), bank.rows("a"):
            assert distance(fused, layer(x)) < 1e-5
        assert_far(fused, base)
    assert dtype == torch.float32
    assert layer.linear1.weight is layer.linear1.base.weight


# What a bank is made of.


def test_every_problem_is_in_one_error_and_nothing_has_changed(tmp_path):
    minilora.save(injected(CASES["mlp"], "first", torch.float32), tmp_path / "other base")
    minilora.save(minilora.inject(MLP(), "classifier", LoRAConfig(r=3)), tmp_path / "wide")
    (tmp_path / "broken").write_bytes(b"nothing")
    base = MLP()
    base.load_state_dict(MLP().state_dict())
    files = {name: tmp_path / name for name in ("other base", "wide", "broken")}
    with unchanged(base), pytest.raises(MiniLoRAError) as error:
        Bank(base, files, targets=["upp"], slots=4, r=2)
    for part in ("4 problems", "not the base that", "'wide'", "'broken'", "'upp' matches no module"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": 0}, "slots must be an int from 1 on"),
        ({"r": 2.5, "slots": 2}, "r must be an int"),
        ({"dtype": "int8", "slots": 2}, "dtype must be a floating-point"),
        ({"adapters": ["a.safetensors"], "slots": 2}, "adapters must be a mapping"),
        ({}, "neither adapters nor slots"),
        ({"slots": 2}, "no site: give adapters, targets or trainable"),
        ({"slots": 2, "targets": ["up"]}, r"Bank\(..., r=8\)"),
        ({"slots": 1, "adapters": {"a": "a", "b": "b"}}, "slots=1, and 2 adapters are given: 'a', 'b'"),
        ({"slots": 1, "adapters": {"": "a"}}, "a string that is not empty"),
        ({"slots": 1, "adapters": {"a": 3}}, "'a': path must be a string"),
    ],
)
def test_wrong_arguments(arguments, message):
    base = MLP()
    with unchanged(base), pytest.raises(MiniLoRAError, match=message):
        Bank(base, **arguments)


def test_one_adapter_trains_in_full_what_another_adapts(tmp_path):
    minilora.save(injected(CASES["mlp"], "first", torch.float32), tmp_path / "head")
    minilora.save(minilora.inject(CASES["mlp"].build(), "classifier", LoRAConfig(r=2)), tmp_path / "lora")
    with pytest.raises(MiniLoRAError, match="choose one of the two"):
        Bank(CASES["mlp"].build(), {"head": tmp_path / "head", "lora": tmp_path / "lora"})


def test_an_injected_model_takes_no_bank_and_a_banked_one_no_injection(tmp_path):
    with pytest.raises(MiniLoRAError, match="'up': injected already"):
        empty(minilora.inject(MLP(), "up", trainable=()))
    bank = two()
    with pytest.raises(MiniLoRAError, match="injected already"):
        empty(bank.model)
    with unchanged(bank.model), pytest.raises(MiniLoRAError, match="carries bank, LoRA r<=4, 2 of 3 slots"):
        minilora.inject(bank.model, "up", trainable=())
    with pytest.raises(MiniLoRAError, match=r"bank\.save\(name, path\)"):
        minilora.save(bank.model, tmp_path / "all")
    with pytest.raises(minilora.MergeError, match=r"bank\.save"):
        minilora.merge(bank.model)
    with pytest.raises(minilora.MergeError, match=r"bank\.save"):
        minilora.fuse(bank.model)


def test_frozen_statistics_stay_frozen():
    case = CASES["cnn"]
    bank = filled(Bank(case.build(), targets=["project"], slots=2, r=2), "a", 1, r=2)
    before = copy.deepcopy(bank.model.norm.running_mean)
    with bank.rows("a"):
        case.call(bank.model.train())
    assert torch.equal(bank.model.norm.running_mean, before)


# What else one does with a model.


def test_summary_disabled_and_eject():
    base = MLP().eval()
    before, x = picture(base), torch.randn(3, 16)
    bare = frozen(base)(x)
    bank = two(model=base)
    row = minilora.summary(base).rows[0]
    assert (row.sites, row.description) == ("up", "bank, LoRA r<=4, 2 of 3 slots")
    assert row.parameters == (4 + 2) * (16 + 32)
    assert minilora.summary(base).base == sum(p.numel() for p in MLP().parameters())
    with bank.rows("a"), minilora.disabled(base):
        assert torch.equal(base(x), bare)
    with bank.rows("a"):
        assert_far(base(x), bare)
    minilora.eject(base)
    assert picture(base.requires_grad_(True)) == before
    for act in (lambda: bank.rows("a").__enter__(), lambda: bank.add("c"), lambda: bank.parameters("a")):
        with pytest.raises(MiniLoRAError, match="has been ejected"):
            act()


def copies(bank):
    yield Bank.of(copy.deepcopy(bank.model))
    yield copy.deepcopy(bank)
    buffer = io.BytesIO()
    torch.save(bank.model, buffer)
    buffer.seek(0)
    yield Bank.of(torch.load(buffer, weights_only=False))


def test_copies_have_banks_of_their_own():
    bank, x = two(), torch.randn(3, 16)
    bank.parameters("b")
    with bank.rows(["a", None, "b"]):
        expected = bank.model(x)
        assert all(torch.equal(c.model(x), c.model.eval()(x)) for c in copies(bank))  # without a choice
    for copied in copies(bank):
        assert copied.names == ("a", "b")
        with copied.rows(["a", None, "b"]):
            assert torch.equal(copied.model(x), expected)
        copied.remove("a")
        assert "a" not in copied
        assert "a" in bank
        with torch.no_grad():
            copied.parameters("b")[0].zero_()
    with bank.rows(["a", None, "b"]):
        assert torch.equal(bank.model(x), expected)
    with pytest.raises(MiniLoRAError, match="carries no bank"):
        Bank.of(MLP())


def test_moved_and_cast_models_keep_their_scaling():
    bank, x = two(model=MLP().double().eval()), torch.randn(3, 16, dtype=torch.float64)
    rows = ["a", None, "b"]
    with bank.rows(rows):
        exact = bank.model(x)
    bank.model.to(torch.bfloat16).to(torch.float32)
    assert bank.model.up.scaling.dtype == torch.float32
    assert bank.model.up.scaling.tolist()[1:3] == [4.0, 1.5]
    with bank.rows(rows):
        assert distance(bank.model(x.float()), exact) < 3e-2


def test_a_bare_checkpoint_and_the_bank_s_own_load():
    bank, x = two(), torch.randn(3, 16)
    state, bare = copy.deepcopy(bank.model.state_dict()), MLP().state_dict()
    with bank.rows(["a", None, "b"]):
        expected = bank.model(x)
        bank.model.load_state_dict(bare)
        assert_far(bank.model(x), expected)
        bank.model.load_state_dict(state)
        assert torch.equal(bank.model(x), expected)


def test_autocast_and_16_bit_bases(tmp_path):
    side = side_by_side("bert", tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        output = side.mixed()
        for row, adapter in enumerate(side.names):
            assert distance(output[row], side.case.run(side.alone[adapter])[row]) < 6e-2
    half = side_by_side("bert", tmp_path, torch.bfloat16)
    query = half.model.bert.encoder.layer[0].attention.self.query
    assert query.lora_A.values.dtype == torch.float32  # as adapters of their own would be


def test_generate_with_beams(tmp_path):
    side = side_by_side("t5", tmp_path)
    ids = torch.randint(1, 11, (3, 8))
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with side.bank.rows(side.names):
        mixed = side.model.generate(ids, **how)
    apart = [side.alone[name].generate(ids[[row]], **how)[0] for row, name in enumerate(side.names)]
    assert torch.equal(mixed, torch.stack(apart))
    assert not torch.equal(mixed, side.model.generate(ids, **how))


def test_all_adapters_of_a_batch_are_those_of_the_list():
    """The rows of the grid do differ: a wrong order is seen."""
    bank, x = two(), torch.randn(1, 16).repeat(2, 1)
    with bank.rows(["a", "b"]):
        first, second = bank.model(x)
    assert_far(first, second)
    with bank.rows(["b", "a"]):
        assert distance(bank.model(x)[1], first) < 1e-5


assert MIXED.count("first") == 2
