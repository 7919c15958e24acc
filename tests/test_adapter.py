"""Adapter: the formula, around anything that returns a tensor, and loud where it cannot be."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from checks import TOLERANCE, assert_equal_to_rounding, distance, frozen, raw, unchanged
from models import CASES, in_dtypes
from torch import nn

import minilora
from minilora import Adapter, AdapterConfig, LoRAConfig, LoRALinear, MergeError, TargetError

PLACEMENTS = ["sequential", "parallel"]
in_placements = pytest.mark.parametrize("placement", PLACEMENTS)


def trained(base, **options):
    layer = Adapter(base.requires_grad_(False), AdapterConfig(**{"bottleneck": 4, **options}))
    for parameter in (*layer.adapter_down.parameters(), *layer.adapter_up.parameters()):
        nn.init.normal_(parameter, std=0.5)
    return layer


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


def formula(layer, x, activation, placement, scale):
    h = F.linear(x.double(), layer.base.weight.double(), layer.base.bias.double())
    read = h if placement == "sequential" else x.double()
    down = F.linear(read, layer.adapter_down.weight.double(), layer.adapter_down.bias.double())
    up = F.linear(
        ACTIVATIONS[activation](down), layer.adapter_up.weight.double(), layer.adapter_up.bias.double()
    )
    return h + scale * up


@in_dtypes
@in_placements
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_is_the_formula(dtype, placement, activation, autocast):
    layer = trained(nn.Linear(6, 10).to(dtype), placement=placement, activation=activation, scale=3.0)
    x = torch.randn(5, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, plain = layer(x), layer.base(x)
    expected = formula(layer, x, activation, placement, 3.0)
    assert y.dtype == plain.dtype
    tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
    assert distance(y, expected) < tolerance
    assert distance(plain, expected) > 2 * tolerance


@in_dtypes
@in_placements
def test_new_adapter_is_a_bit_exact_identity(dtype, placement):
    base = nn.Linear(6, 10).to(dtype)
    layer = Adapter(copy.deepcopy(base), AdapterConfig(placement=placement))
    x = torch.randn(5, 6).to(dtype)
    assert torch.equal(layer(x), base(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), base(x))


@in_placements
def test_gradcheck(placement):
    layer = trained(nn.Linear(3, 4, dtype=torch.float64), placement=placement)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert len(names) == 4
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True), *map(layer.get_parameter, names)]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(
    ("base", "widths"),
    [
        (nn.Linear(6, 10), (6, 10)),
        (nn.LayerNorm(8), (8, 8)),
        (nn.LayerNorm((5, 8)), (8, 8)),
        (nn.RMSNorm(8), (8, 8)),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)), (6, 4)),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8)), (6, 8)),
        (LoRALinear(nn.Linear(6, 10), LoRAConfig(r=2)), (6, 10)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_widths_are_read_off_the_base(base, widths):
    for placement, source in zip(PLACEMENTS, reversed(widths), strict=True):
        layer = Adapter(base, AdapterConfig(bottleneck=3, placement=placement))
        assert layer.adapter_down.weight.shape == (3, source)
        assert layer.adapter_up.weight.shape == (widths[1], 3)


def test_widths_that_cannot_be_read_off_must_be_given():
    for base in (nn.GELU(), nn.Sequential(nn.Linear(3, 3), nn.Flatten())):
        with pytest.raises(TargetError, match=r"output width of .* give AdapterConfig\(hidden_size="):
            Adapter(base, AdapterConfig())
    layer = Adapter(nn.GELU(), AdapterConfig(hidden_size=5))
    assert layer(torch.randn(2, 5)).shape == (2, 5)


@pytest.mark.parametrize(("factor", "m"), [(2, 16), (3, 10), (32, 1), (100, 1), (0.5, 64)])
def test_reduction_factor(factor, m):
    assert Adapter(nn.Linear(8, 32), AdapterConfig(reduction_factor=factor)).adapter_down.out_features == m


def test_initial_values():
    layer = Adapter(nn.Linear(300, 400), AdapterConfig(bottleneck=100))
    assert layer.adapter_down.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for zero in (layer.adapter_down.bias, layer.adapter_up.weight, layer.adapter_up.bias):
        assert not zero.any()


@pytest.mark.parametrize("asked", [None, torch.bfloat16])
def test_dtype_on_a_16_bit_base(asked):
    layer = Adapter(nn.Linear(6, 10, dtype=torch.float16), AdapterConfig(dtype=asked))
    assert {p.dtype for p in (*layer.adapter_down.parameters(), *layer.adapter_up.parameters())} == {
        asked or torch.float32
    }


def test_around_lora():
    base = nn.Linear(6, 10)
    inner = LoRALinear(base.requires_grad_(False), LoRAConfig(r=2))
    nn.init.normal_(inner.lora_B)
    outer = trained(inner)
    x = torch.randn(5, 6)
    torch.testing.assert_close(outer(x), formula_on(inner.effective_weight(), base.bias, outer, x))


def formula_on(weight, bias, layer, x):
    h = F.linear(x, weight, bias)
    return h + layer.adapter_up(F.gelu(layer.adapter_down(h)))


class TwoOutputs(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("base", "placement", "call", "says"),
    [
        (TwoOutputs(4, 4), "sequential", lambda m, x: m(x), "returns tuple"),
        (nn.Linear(4, 4), "parallel", lambda m, x: m(input=x), "takes NoneType"),
    ],
)
def test_what_is_no_tensor_is_refused_with_a_hint(base, placement, call, says):
    layer = Adapter(base, AdapterConfig(placement=placement))
    with pytest.raises(TypeError, match=rf"{says}.*must return one tensor.*Choose a module inside it"):
        call(layer, torch.randn(2, 4))


def test_keyword_arguments_reach_the_base():
    layer = Adapter(nn.Linear(4, 4), AdapterConfig())
    x = torch.randn(2, 4)
    assert torch.equal(layer(input=x), layer.base(x))


def test_weight_describes_and_does_not_compute():
    base = LoRALinear(nn.Linear(6, 10, dtype=torch.bfloat16), LoRAConfig(r=2))
    weight = Adapter(base, AdapterConfig()).weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.bfloat16, (10, 6), "cpu")
    assert (weight.size(0), weight.dim(), weight.numel(), weight.is_floating_point()) == (10, 2, 60, True)
    for compute in (
        lambda: F.linear(torch.randn(2, 6), weight),
        lambda: weight.add(1),
        weight.clone,
    ):
        with pytest.raises(TypeError, match="No single weight does what the layer does"):
            compute()
    assert not hasattr(Adapter(nn.GELU(), AdapterConfig(hidden_size=4)), "weight")


def test_multihead_attention_with_an_adapter_on_out_proj_is_refused_and_not_wrong():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    minilora.inject(attention, "out_proj", AdapterConfig(bottleneck=4))
    x = torch.randn(2, 3, 16)
    for training in (True, False):
        attention.train(training)
        with pytest.raises(TypeError, match="choose another target"):
            attention(x, x, x)
        with torch.inference_mode(), pytest.raises(TypeError, match="choose another target"):
            attention(x, x, x)


def test_no_merged_form():
    layer = Adapter(nn.Linear(6, 10), AdapterConfig())
    for number in range(2):
        with pytest.raises(MergeError, match="skip_adapters=True"):
            layer.fused() if number else minilora.merge(nn.Sequential(layer))


def test_containers():
    """A Sequential computes under an adapter; a ModuleList, which is never called, is refused."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    plain = model(x)
    minilora.inject(model, "0", AdapterConfig())
    assert_equal_to_rounding(model(x), plain)
    listed = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    says = "'layers': a ModuleList is never called itself; .* linear layers inside it: 'layers.0'"
    with unchanged(listed), pytest.raises(TargetError, match=says):
        minilora.inject(listed, "layers", AdapterConfig(hidden_size=4))


def test_reset_parameters():
    layer = Adapter(nn.Linear(6, 10), AdapterConfig(), site="a")
    first = raw(layer.adapter_down.weight)
    nn.init.ones_(layer.adapter_down.weight)
    nn.init.ones_(layer.adapter_up.weight)
    layer.reset_parameters("a")
    assert raw(layer.adapter_down.weight) == first
    assert not layer.adapter_up.weight.any()


def test_description():
    layer = Adapter(nn.Linear(6, 10), AdapterConfig(bottleneck=3, activation="relu", placement="parallel"))
    assert layer.description() == layer.extra_repr() == "adapter m=3 relu parallel"


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: [], 2: [nn.BatchNorm2d(6)], 3: [nn.BatchNorm3d(6)]}


class Residual(nn.Module):
    """A stage whose width cannot be read off, though its layers are all convolutions and their norms."""

    def __init__(self, dims):
        super().__init__()
        self.conv, self.norm = CONVOLUTIONS[dims](6, 6, 3, padding=1), nn.GroupNorm(2, 6)

    def forward(self, x):
        return x + self.norm(self.conv(x))


@in_placements
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["layer", "stage", "block"])
def test_around_convolutions_the_channels_are_read(dims, kind, placement):
    """(b, d, ...) with d second; where only `hidden_size` tells the width, it is that of both sides."""
    conv = CONVOLUTIONS[dims](4, 6, 3, padding=1)
    stage = nn.Sequential(conv, *NORMS[dims], nn.ReLU()).eval()
    base = {"layer": conv, "stage": stage, "block": Residual(dims)}[kind].requires_grad_(False)
    config = AdapterConfig(bottleneck=3, placement=placement, hidden_size=6 if kind == "block" else None)
    layer = Adapter(base, config)
    x = torch.randn(2, 6 if kind == "block" else 4, *(7, 8, 9)[:dims])
    h = base(x)
    assert torch.equal(layer(x), h)
    for parameter in (*layer.adapter_down.parameters(), *layer.adapter_up.parameters()):
        nn.init.normal_(parameter, std=0.5)
    read = (h if placement == "sequential" else x).movedim(1, -1)
    expected = h + layer.adapter_up(F.gelu(layer.adapter_down(read))).movedim(-1, 1)
    torch.testing.assert_close(layer(x), expected)
    assert distance(layer(x), h) > 0.01


def test_around_a_convolution_without_a_batch():
    layer = trained(nn.Conv2d(4, 6, 1))
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_a_stage_of_convolutions_trains_in_a_model():
    model = CASES["cnn"].build().train()
    expected = CASES["cnn"].run(frozen(model))
    minilora.inject(model, ["block", "stem.0"], AdapterConfig(bottleneck=4), trainable=())
    assert raw(CASES["cnn"].run(model)) == raw(expected)
    CASES["cnn"].call(model).square().mean().backward()
    assert model.block.adapter_up.weight.grad.any()


class Mixed(nn.Module):
    """A stage that ends who knows how: convolutions over an image beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.conv(x).movedim(1, -1))


def test_where_the_width_may_be_second_or_last_it_is_refused_when_injecting():
    model = nn.Sequential(Mixed())
    says = "Mixed holds convolutions beside layers of other kinds.* choose a module inside it"
    with unchanged(model), pytest.raises(TargetError, match=says):
        minilora.inject(model, "0", AdapterConfig(hidden_size=4))
    minilora.inject(model, ["conv", "linear"], AdapterConfig(bottleneck=2))
    assert model(torch.randn(2, 4, 5, 3)).shape == (2, 5, 3, 4)


class Conformer(nn.Module):
    """(b, t, d) in and out, with a convolution over time inside."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 4), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.linear(x).mT).mT


def test_around_a_block_with_a_convolution_over_time_the_width_is_last():
    base = Conformer()
    x = torch.randn(2, 5, 4)
    assert torch.equal(Adapter(base, AdapterConfig(hidden_size=4))(x), base(x))


@pytest.mark.parametrize(
    ("around", "shape", "dimension"),
    [(nn.Conv2d(4, 4, 1), (4, 3), -3), (nn.Conv2d(4, 4, 1), (3, 4, 4), -3), (nn.GELU(), (2, 7), -1)],
)
def test_a_wrong_width_is_named_when_it_is_met(around, shape, dimension):
    layer = Adapter(around, AdapterConfig(hidden_size=4))
    layer.base = nn.Identity()  # which returns whatever it is given
    given = re.escape(str(shape))
    says = rf"reads 4 values in dimension {dimension}, and was given a tensor of {given}\. Choose"
    with pytest.raises(TypeError, match=says):
        layer(torch.randn(shape))


def test_a_width_other_than_the_one_that_is_read_off_is_refused_when_injecting():
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 6), nn.ReLU()), "conv": nn.Conv2d(4, 6, 1)})
    says = r"'block': hidden_size=8 is given, .* Sequential has the width 6.*\n.*'conv'.* width 6"
    with unchanged(model), pytest.raises(TargetError, match=says):
        minilora.inject(model, ["block", "conv"], AdapterConfig(hidden_size=8))
    minilora.inject(model, ["block", "conv"], AdapterConfig(hidden_size=6))


class Dense(nn.Sequential):
    """What goes in beside what comes out, as in a DenseNet."""

    def forward(self, x):
        return torch.cat([x, super().forward(x)], -1)


def test_a_sequential_with_a_forward_of_its_own_needs_its_width_told():
    model = nn.ModuleDict({"dense": Dense(nn.Linear(4, 6))})
    with unchanged(model), pytest.raises(TargetError, match="width of Dense cannot be read off it"):
        minilora.inject(model, "dense", AdapterConfig())
    minilora.inject(model, "dense", AdapterConfig(hidden_size=10))
    assert model["dense"](torch.randn(2, 4)).shape == (2, 10)


def test_a_bottleneck_wider_than_anything_is_refused():
    with pytest.raises(TargetError, match="is wider than 2147483647"):
        Adapter(nn.Linear(4, 4), AdapterConfig(reduction_factor=1e-300))
