"""LoRALinear: one effective weight for forward, gradients, `.weight` and merge, in every dtype."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from checks import TOLERANCE, distance, raw, unchanged
from models import DTYPES, in_dtypes
from torch import nn

import minilora
from minilora import LoRAConfig, LoRALinear, MergeError, MiniLoRAError, TargetError

TOKENS = {"few": (2, 3), "many": (40, 3)}  # on both sides of variants.choice.prefers_weight_form
in_shapes = pytest.mark.parametrize("shape", TOKENS.values(), ids=TOKENS)


def linear(dtype=torch.float32, **options):
    return nn.Linear(24, 16, dtype=dtype, **options)


def conv1d(dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(16, 24).to(dtype)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": linear,
    "no_bias": lambda dtype=torch.float32: linear(dtype, bias=False),
    "conv1d": conv1d,
}
on_layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def trained(base, **options):
    """Return a frozen base under a LoRA update of which both halves have values."""
    layer = LoRALinear(base.requires_grad_(False), LoRAConfig(r=4, alpha=8, **options))
    nn.init.normal_(layer.lora_A, std=0.3)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def formula(layer, x, dtype=None):
    """Return F.linear(x, W + s BA, b), reckoned in `dtype`."""
    dtype = dtype or torch.float64
    weight, bias = layer.base.weight, layer.base.bias
    weight = weight.T if layer.layout.transposed else weight
    w_eff = weight.to(dtype) + layer.config.scaling * (layer.lora_B.to(dtype) @ layer.lora_A.to(dtype))
    return F.linear(x.to(dtype), w_eff, None if bias is None else bias.to(dtype))


@on_layers
@in_shapes
@in_dtypes
@pytest.mark.parametrize("adapter_dtype", [None, *DTYPES], ids=str)
def test_forward_is_the_formula(make, shape, dtype, adapter_dtype):
    layer = trained(make(dtype), dtype=adapter_dtype)
    x = torch.randn(*shape, 24).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    worst = max(TOLERANCE[dtype], TOLERANCE[layer.lora_A.dtype])
    assert distance(y, formula(layer, x)) < worst
    assert distance(layer.base(x), formula(layer, x)) > 2 * worst


@on_layers
@in_shapes
@in_dtypes
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_forward_under_autocast(make, shape, dtype, lower):
    layer = trained(make(dtype))
    x = torch.randn(*shape, 24).to(dtype)
    with torch.autocast("cpu", dtype=lower):
        y, plain = layer(x), layer.base(x)
    assert y.dtype == plain.dtype
    assert distance(y, formula(layer, x)) < TOLERANCE[torch.bfloat16]


@on_layers
@in_shapes
@in_dtypes
@pytest.mark.parametrize("autocast", [False, True])
def test_new_layer_is_a_bit_exact_identity(make, shape, dtype, autocast):
    base = make(dtype).requires_grad_(False)
    x = torch.randn(*shape, 24).to(dtype)
    layer = LoRALinear(copy.deepcopy(base), LoRAConfig(r=4))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(x), base(x))


@on_layers
@in_shapes
@pytest.mark.parametrize("thawed", [False, True])
def test_gradients_are_those_of_autograd_on_the_formula(make, shape, thawed):
    layer = trained(make(torch.float64))
    wanted = [layer.lora_A, layer.lora_B]
    if thawed:  # somebody trains the base, too
        wanted += [p.requires_grad_() for p in layer.base.parameters()]
    x = torch.randn(*shape, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*shape, 16, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x), [x, *wanted], upstream)
    plain = torch.autograd.grad(formula(layer, x), [x, *wanted], upstream)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 9])
def test_gradcheck(tokens):
    base = nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False)
    layer = LoRALinear(base, LoRAConfig(r=2))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)

    def call(x, lora_A, lora_B):
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, x)

    inputs = (x, layer.lora_A, layer.lora_B)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@in_shapes
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits(shape, lower):
    for base, autocast in ((linear(lower), False), (linear(), True)):
        layer = trained(base)
        x = torch.randn(*shape, 24).to(base.weight.dtype)
        with torch.autocast("cpu", dtype=lower, enabled=autocast):
            y = layer(x)
        ours = torch.autograd.grad(y.float().square().mean(), [layer.lora_A, layer.lora_B])
        loss = formula(layer, x).square().mean()
        for mine, theirs in zip(ours, torch.autograd.grad(loss, [layer.lora_A, layer.lora_B]), strict=True):
            assert mine.dtype == torch.float32
            assert distance(mine, theirs) < 0.1


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (1, 1, 1, 24)], ids=str)
def test_inputs_of_every_shape(shape):
    layer = trained(linear())
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 16)
    torch.testing.assert_close(y, formula(layer, x, torch.float32))
    y.sum().backward()
    assert x.grad.shape == shape


@on_layers
@in_dtypes
def test_weight_is_what_outside_code_may_compute_with(make, dtype):
    layer = trained(make(dtype))
    x = torch.randn(5, 24).to(dtype)
    weight = layer.weight
    assert (weight.shape, weight.dtype) == (layer.base.weight.shape, dtype)
    outside = F.linear(x, weight.T if layer.layout.transposed else weight, layer.bias)
    assert distance(outside, formula(layer, x)) < TOLERANCE[dtype]
    before = raw(weight)
    layer.merge()
    assert raw(layer.weight) == before


def test_weight_carries_gradients():
    layer = trained(linear())
    layer.weight.sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_is_set_goes_to_the_base(name):
    """So that code which ties weights by assignment reaches the layer, and the update stays on top."""
    layer = trained(linear())
    new = nn.Parameter(torch.randn_like(getattr(layer.base, name)), requires_grad=False)
    setattr(layer, name, new)
    assert getattr(layer.base, name) is new
    assert name not in dict(layer.named_parameters(recurse=False))
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), formula(layer, x, torch.float32))


def test_a_parameter_set_on_a_merged_layer_is_refused():
    layer = trained(linear())
    layer.merge()
    with unchanged(layer), pytest.raises(MiniLoRAError, match="'weight' cannot be set on a merged layer"):
        layer.weight = nn.Parameter(torch.zeros(16, 24))


def test_a_tensor_cannot_be_set_as_the_weight():
    layer = trained(linear())
    with unchanged(layer), pytest.raises(AttributeError):
        layer.weight = torch.zeros(16, 24)


def test_a_layer_merged_twice_is_merged_once():
    layer = trained(linear(torch.bfloat16))
    weight = layer.base.weight
    layer.merge()
    merged = layer.base.weight
    layer.merge()
    assert layer.base.weight is merged
    layer.unmerge()
    layer.unmerge()
    assert layer.base.weight is weight


def test_delta_weight_is_out_by_in_on_every_layout():
    for make in LAYERS.values():
        layer = trained(make())
        delta = layer.config.scaling * (layer.lora_B @ layer.lora_A)
        torch.testing.assert_close(layer.delta_weight(), delta)
        assert layer.delta_weight().shape == (16, 24)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values(init):
    layer = LoRALinear(nn.Linear(400, 300), LoRAConfig(r=50, init=init))
    assert layer.lora_A.shape == (50, 400)
    assert layer.lora_B.shape == (300, 50)
    assert not layer.lora_B.any()
    if init == "kaiming":
        bound = 1 / math.sqrt(400)
        assert 0.99 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    else:
        assert layer.lora_A.std().item() == pytest.approx(1 / 50, rel=0.02)
    assert abs(layer.lora_A.mean()) < 1e-3


def test_reset_parameters():
    layer = LoRALinear(linear(), LoRAConfig(), site="a.b")
    first = raw(layer.lora_A)
    nn.init.ones_(layer.lora_A)
    nn.init.ones_(layer.lora_B)
    layer.reset_parameters("a.b")
    assert raw(layer.lora_A) == first
    assert not layer.lora_B.any()


@pytest.mark.parametrize(
    ("base", "asked", "given"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_of_the_update(base, asked, given):
    layer = LoRALinear(linear(base), LoRAConfig(dtype=asked))
    assert (layer.lora_A.dtype, layer.lora_B.dtype, layer.base.weight.dtype) == (given, given, base)


@in_shapes
def test_dropout_acts_on_the_update_alone_and_only_in_training(shape):
    layer = trained(linear(), dropout=0.5)
    x = torch.randn(*shape, 24)
    exact = formula(layer, x, torch.float32)
    torch.testing.assert_close(layer.eval()(x), exact)
    layer.train()
    assert distance(layer(x), exact) > 0.1
    mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    assert distance(mean, exact) < 0.1  # inverted dropout keeps the expectation
    layer.lora_B.data.zero_()
    assert torch.equal(layer(x), layer.base(x))  # what the base reads is not dropped


@on_layers
@pytest.mark.parametrize("shape", [(3,), (200,), *TOKENS.values()], ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"dora": True}], ids=str)
def test_what_comes_out_may_be_written_into(make, shape, options):
    """By an activation with `inplace=True`, say."""
    gradients = []
    for write in (torch.relu, torch.relu_):
        torch.manual_seed(0)
        layer, x = trained(make(torch.float64), **options), torch.randn(*shape, 24, dtype=torch.float64)
        y = write(layer(x.requires_grad_()))
        gradients.append(torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B]))
    assert all(map(torch.equal, *gradients))


@in_shapes
def test_dropout_of_one_drops_the_whole_update_in_training(shape):
    layer, x = trained(linear(), dropout=1), torch.randn(*shape, 24)
    assert torch.equal(layer.train()(x), layer.base(x))
    assert distance(layer.eval()(x), layer.base(x)) > 0.1


@in_shapes
def test_jagged_tensors(shape):
    """Torch's own linear layer takes them."""
    layer = trained(linear())
    parts = [torch.randn(n, 24) for n in (2, *shape)]
    y = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    assert y.is_nested
    (ours,) = torch.autograd.grad(y.values().sum(), layer.lora_A)
    (plain,) = torch.autograd.grad(formula(layer, torch.cat(parts), torch.float32).sum(), layer.lora_A)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    y = y.detach()
    for out, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(out, formula(layer, part, torch.float32))


# torch's own, when its rules for forward mode are first loaded.
loads_jvp_rules = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@loads_jvp_rules
@on_layers
@in_shapes
def test_forward_mode(make, shape):
    """Whatever the number of tokens: both forms know their directional derivative."""
    layer = trained(make(torch.float64))
    x, dx = torch.randn(2, *shape, 24, dtype=torch.float64)
    pair = {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()}
    along = {name: torch.randn_like(tensor) for name, tensor in pair.items()}

    def ours(x, pair):
        return torch.func.functional_call(layer, pair, x)

    def plain(x, pair):
        weight = layer.base.weight.T if layer.layout.transposed else layer.base.weight
        return F.linear(x, weight + layer.scaling * pair["lora_B"] @ pair["lora_A"], layer.bias)

    for primal, tangent in (((x, pair), (dx, along)), ((x, pair), (torch.zeros_like(x), along))):
        mine, theirs = (torch.func.jvp(f, primal, tangent) for f in (ours, plain))
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.func.jvp(lambda x: ours(x, pair), (x,), (dx,)),
        torch.func.jvp(lambda x: plain(x, pair), (x,), (dx,)),
    )


@loads_jvp_rules
@pytest.mark.parametrize("tokens", [1, 9])
def test_hessian(tokens):
    layer = LoRALinear(nn.Linear(3, 2, dtype=torch.float64).requires_grad_(False), LoRAConfig(r=2))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(tokens, 3, dtype=torch.float64)

    def loss(lora_A):
        return torch.func.functional_call(layer, {"lora_A": lora_A}, x).square().sum()

    def plain(lora_A):
        return (
            F.linear(x, layer.base.weight + layer.scaling * layer.lora_B @ lora_A, layer.bias).square().sum()
        )

    A = layer.lora_A.detach()
    torch.testing.assert_close(torch.func.hessian(loss)(A), torch.func.hessian(plain)(A))


@in_shapes
def test_a_rank_above_the_smaller_side_is_honoured(shape):
    layer = LoRALinear(linear().requires_grad_(False), LoRAConfig(r=40))
    nn.init.normal_(layer.lora_B)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((40, 24), (16, 40))
    x = torch.randn(*shape, 24)
    torch.testing.assert_close(layer(x), formula(layer, x, torch.float32), rtol=1e-4, atol=1e-4)


@in_shapes
def test_the_base_is_called_with_what_the_layer_is_called_with(shape):
    layer = trained(linear())
    x = torch.randn(*shape, 24)
    torch.testing.assert_close(layer(input=x), layer(x))
    for args, kwargs in (((), {}), ((), {"no_such": x}), ((x, x), {}), ((x,), {"no_such": x})):
        with pytest.raises(TypeError, match="argument"):  # the base's own
            layer(*args, **kwargs)


@in_shapes
def test_a_merged_layer_does_not_train(shape):
    layer, x = trained(linear()), torch.randn(*shape, 24)
    layer.merge()
    for module in (layer, nn.Sequential(layer)):
        with pytest.raises(MiniLoRAError, match=r"does not train: call minilora\.unmerge\(model\).*eval"):
            module.train()(x)
    with torch.no_grad():
        expected = layer(x)  # an evaluation in the midst of training
    assert torch.equal(layer.eval()(x), expected)
    layer.unmerge()
    layer.train()(x).sum().backward()
    assert layer.lora_B.grad.any()


def test_not_linear():
    with pytest.raises(TargetError, match="Conv2d is not a linear layer"):
        LoRALinear(nn.Conv2d(3, 3, 1), LoRAConfig())


@in_shapes
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_base_are_called(shape, hook):
    layer, calls = trained(linear()), []
    getattr(layer.base, hook)(lambda *seen: calls.append(len(seen)))
    layer(torch.randn(*shape, 24))
    assert len(calls) == 1


@in_shapes
def test_forward_of_a_subclass_is_called(shape):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = LoRALinear(Doubling(24, 16).requires_grad_(False), LoRAConfig())
    x = torch.randn(*shape, 24)
    assert torch.equal(layer(x), layer.base(x))


class PackedLinear(nn.Module):
    """A base whose weight is integers and a scale, as quantisers make it."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 24, 16
        self.register_buffer("weight", torch.randint(-100, 100, (16, 24), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 100)


@in_shapes
def test_quantised_base_computes_and_refuses_what_needs_its_weight(shape):
    model = nn.Sequential(PackedLinear())
    x = torch.randn(*shape, 24)
    plain = model(x)
    minilora.inject(model, "0")
    layer = model[0]
    assert torch.equal(model(x), plain)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(model(x), plain + F.linear(x, layer.delta_weight()), rtol=1e-4, atol=1e-4)
    with unchanged(model):
        for action in (minilora.merge, minilora.fuse, lambda model: model[0].weight):
            with pytest.raises(MergeError, match=r"PackedLinear, a Tensor of torch\.int8, is not a plain"):
                action(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch is moving its quantisation to torchao
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamically_quantised_base():
    float_model = nn.Sequential(nn.Linear(24, 16)).eval()
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no int8 kernels on this machine")
    model = torch.ao.quantization.quantize_dynamic(float_model, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(3, 24)
    plain = model(x)
    minilora.inject(model, "all-linear")
    assert torch.equal(model(x), plain)
    nn.init.normal_(model[0].lora_B)
    assert distance(model(x), plain) > 0.1
    with pytest.raises(MergeError, match="run it unmerged, or load the base in floating point"):
        minilora.merge(model)
    minilora.eject(model)
    assert torch.equal(model(x), plain)


def test_description_and_repr():
    assert trained(linear()).description() == "LoRA r=4 alpha=8"
    layer = trained(linear(), rslora=True, dropout=0.1)
    assert repr(layer).startswith("LoRALinear(\n  LoRA r=4 alpha=8 rslora dropout=0.1, merged=False\n")


@pytest.mark.parametrize("make", [linear, conv1d])
def test_beside_a_bias_that_is_trained_it_computes_with_both(make):
    """transformers' Conv1D is known by its class, which the wrapper that trains the bias does not have."""
    model, x = nn.Sequential(make()), torch.randn(3, 24)
    minilora.inject(model, ["0"], LoRAConfig(r=4, alpha=8), trainable=["0.bias"])
    with torch.no_grad():
        model[0].lora_B.normal_(std=0.3)
        model[0].base.trained.add_(1.0)
        expected = F.linear(x, model[0].weight.T if make is conv1d else model[0].weight, model[0].bias)
        assert distance(model(x), expected) < 1e-5
        assert distance(minilora.fuse(model)(x), expected) < 1e-5
