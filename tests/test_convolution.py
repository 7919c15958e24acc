"""Convolutions with a backward of their own: both forms of it, and what it stands in for."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import raw
from torch import nn

import minilora
from minilora.functional import effective_weight
from minilora.variants import convolution
from minilora.variants.convolution import convolved, low_rank_convolution, stands_in
from minilora.weight import EffectiveWeight

CONVS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
SHAPES = {  # of x, of W, and the steps
    "1d": ((2, 3, 9), (4, 3, 3), (2, 1, 2)),
    "2d": ((2, 3, 6, 5), (4, 3, 3, 2), ((1, 2), (1, 0), 1)),
    "2d_one": ((1, 3, 4, 4), (4, 3, 1, 1), (1, 0, 1)),
    "3d": ((2, 2, 4, 3, 4), (3, 2, 2, 2, 2), (1, (1, 0, 1), 1)),
}
on_shapes = pytest.mark.parametrize("shape", SHAPES)
# The first gradient of forward mode loads torch's own rules for it, with a warning of torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(params=["weight", "delta"])
def form(request, monkeypatch):
    """The form of a whole weight, or the one of a weight in 16 bits, which is exact in float64, too."""
    if request.param == "delta":
        monkeypatch.setattr(convolution, "is_whole", lambda dtype: False)
    return request.param


def tensors(shape, dtype=torch.float64):
    """Return x, b, A, B, and of what is no argument of the gradient W and the steps."""
    x, W, steps = SHAPES[shape]
    weight = torch.randn(W, dtype=dtype)
    A, B = torch.randn(2, weight[0].numel(), dtype=dtype), torch.randn(W[0], 2, dtype=dtype)
    return (torch.randn(x, dtype=dtype), torch.randn(W[0], dtype=dtype), A, B), weight, steps


def own(weight, steps, scaling=0.7):
    conv = CONVS[weight.dim() - 2]
    return lambda x, b, A, B: convolved(conv, x, weight, b, A, B, scaling, *steps)


def plain(weight, steps, scaling=0.7):
    conv = CONVS[weight.dim() - 2]
    return lambda x, b, A, B: conv(x, weight + scaling * (B @ A).view(weight.shape), b, *steps)


@on_shapes
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:])
def test_value_and_two_derivatives_are_those_of_the_formula(form, shape, needed):
    """Of x, b, A and B, in every combination: the gradients share what they are made of."""
    given, weight, steps = tensors(shape)

    def outcome(convolve):
        inputs = [t.clone().requires_grad_(needs) for t, needs in zip(given, needed, strict=True)]
        leaves = [t for t in inputs if t.requires_grad]
        y = convolve(*inputs)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    outcomes = outcome(own(weight, steps)), outcome(plain(weight, steps))
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs)


@on_shapes
def test_forward_mode_and_batches(form, shape):
    """jvp against the backward, for all at once and one by one; vmap against a loop."""
    given, weight, steps = tensors(shape)
    convolve = own(weight, steps)
    tangents = [torch.randn_like(t) for t in given]
    for some in ((0, 1, 2, 3), (0,), (1,), (2,), (3,)):
        chosen = tuple(t if i in some else torch.zeros_like(t) for i, t in enumerate(tangents))
        y, dy = torch.func.jvp(convolve, given, chosen)
        _, expected = torch.func.jvp(plain(weight, steps), given, chosen)
        torch.testing.assert_close(dy, expected)

        def of_some(*values, some=some):
            return convolve(*(values[some.index(i)] if i in some else t for i, t in enumerate(given)))

        _, alone = torch.func.jvp(of_some, tuple(given[i] for i in some), tuple(tangents[i] for i in some))
        torch.testing.assert_close(alone, expected)
    many = torch.func.vmap(convolve, (None, None, None, 0))(*given[:3], torch.stack([given[3], -given[3]]))
    torch.testing.assert_close(many[0], y)
    torch.testing.assert_close(many[1], convolve(*given[:3], -given[3]))

    def gradient_of_x(B):
        return torch.func.grad(lambda x: convolve(x, *given[1:3], B).square().sum())(given[0])

    batched = torch.func.vmap(gradient_of_x)(torch.stack([given[3], -given[3]]))
    torch.testing.assert_close(batched[1], gradient_of_x(-given[3]))


@on_shapes
def test_a_whole_weight_gives_the_bits_of_a_merged_layer(shape):
    (x, b, A, B), weight, steps = tensors(shape, torch.float32)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            merged = CONVS[weight.dim() - 2](x, effective_weight(weight, A, B, 0.7), b, *steps)
            assert raw(own(weight, steps)(x, b, A, B)) == raw(merged)


def test_under_autocast_the_second_derivative_goes_through_the_update():
    """There W_eff is kept from the forward, and what is kept knows nothing of A and B."""
    (x, _, A, B), weight, steps = tensors("2d", torch.float32)
    x.requires_grad_()
    A.requires_grad_()

    def second(convolve, enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = convolve(x, None, A, B)
        (dx,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.sum(), A)[0]

    expected = second(plain(weight, steps), False)
    torch.testing.assert_close(
        second(own(weight, steps), True), expected, rtol=0.05, atol=0.05 * expected.max()
    )


@on_shapes
def test_a_weight_in_16_bits_loses_nothing_of_a_small_update(shape):
    """W_eff would be W again: what the update adds, and its gradients, are there all the same."""
    (x, _, A, B), weight, steps = tensors(shape, torch.float32)
    weight, x = (weight.sign() * 2).bfloat16(), x.bfloat16()
    A, B = A.clamp(-1, 1).requires_grad_(), (B.clamp(-1, 1) * 1e-3).requires_grad_()
    assert torch.equal(effective_weight(weight, A, B, 0.7), weight)
    y, zero = own(weight, steps)(x, None, A, B), own(weight, steps)(x, None, A, 0 * B)
    assert y.dtype is torch.bfloat16
    wholes = [t.detach().double().requires_grad_() for t in (A, B)]
    expected = plain(weight.double(), steps)(x.double(), None, *wholes)
    rounding = torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert (y.double() - expected).abs().max() <= rounding
    assert not torch.equal(y, zero)
    for ours, theirs in zip(
        torch.autograd.grad(y.float().sum(), [A, B]), torch.autograd.grad(expected.sum(), wholes), strict=True
    ):
        assert ours.dtype is torch.float32
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_the_gradient_of_a_16_bit_input_holds_a_small_update():
    """g is the same for all, so W's part of dx is nought where W sums to nought; what is left is A's."""
    A, B = torch.randn(2, 3 * 9), torch.randn(4, 2) * 1e-4
    weight = torch.randn(2, 3, 3, 3).bfloat16()
    weight = torch.cat([weight, -weight])
    x = torch.randn(1, 3, 8, 8).bfloat16().requires_grad_()
    own(weight, (1, 1, 1))(x, None, A, B).sum().backward()
    of_update = low_rank_convolution(
        torch.conv2d, y := x.detach().float().requires_grad_(), (3, 3, 3), A, 0.7 * B, 1, 1, 1, 1
    )
    of_update.sum().backward()
    assert (x.grad.float() - y.grad).norm() < 0.02 * y.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_stay_last_in_memory(form, dtype):
    given, weight, steps = tensors("2d")
    inputs = [t.to(dtype).requires_grad_() for t in given]
    outcomes = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = given[0].to(dtype).to(memory_format=layout).requires_grad_()
        y = own(weight.to(dtype).to(memory_format=layout), steps)(x, *inputs[1:])
        assert y.is_contiguous(memory_format=layout)
        g = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape).to(memory_format=layout)
        gradients = torch.autograd.grad(y, [x, *inputs[1:]], g)
        assert gradients[0].is_contiguous(memory_format=layout)
        outcomes.append([y, *gradients])
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for one, other in zip(*outcomes, strict=True):
        assert (one.double() - other.double()).norm() < limit * one.double().norm()


def test_what_is_frozen_gets_no_gradient(form):
    (x, _, A, B), weight, steps = tensors("2d")
    weight.requires_grad_()
    own(weight, steps)(x, None, A.requires_grad_(), B).sum().backward()
    assert weight.grad is None
    assert A.grad is not None


def test_what_it_stands_in_for():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)

    def answer(x=x, weight=weight, stride=1, padding=0, dilation=1, groups=1):
        return stands_in(x, weight, stride, padding, dilation, groups)

    assert answer()
    assert answer(padding=(1, 0), stride=[2], dilation=(1, 2))
    assert answer(weight=nn.Parameter(weight, requires_grad=False))
    assert not answer(weight=weight.clone().requires_grad_())
    assert not answer(padding="same")
    assert not answer(x[0])
    assert not answer(groups=3)
    assert not answer(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert answer(x.bfloat16())
    # Where the two cost the same: 3 numbers of x and 2 of y for 4 of W.
    x, weight = torch.randn(4, 5, 2), torch.randn(4, 5, 2)  # 3 * 40 + 2 * 16 = 152 < 160
    assert [answer(x, weight, padding=p) for p in (0, 1)] == [False, True]  # with three times the points


class Calls:
    """Counts the calls of `convolved`."""

    def __init__(self, monkeypatch):
        self.count = 0
        monkeypatch.setattr(minilora.weight, "convolved", self)

    def __call__(self, *args):
        self.count += 1
        return convolved(*args)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_trains_the_same_by_it_and_by_autograd(monkeypatch, dtype, dora):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(dtype)
    minilora.inject(model, ["0", "2"], minilora.LoRAConfig(r=2, dora=dora), trainable=())
    with torch.no_grad():
        for module in (model[0], model[2]):
            module.lora_B.normal_(0, 0.1)
    x, calls = torch.randn(2, 3, 9, 9, dtype=dtype), Calls(monkeypatch)
    parameters = minilora.trainable_parameters(model)
    both = []
    for taken in (True, False):
        if not taken:
            monkeypatch.setattr(minilora.weight, "stands_in", lambda *args: False)
        y = model(x)
        both.append([y, *torch.autograd.grad(y.float().square().mean(), parameters)])
    assert calls.count == 2
    limit = 1e-5 if dtype is torch.float32 else 0.03
    for one, other in zip(*both, strict=True):
        assert (one - other).float().norm() < limit * other.float().norm()


def test_dropout_and_compiling_go_by_autograd(monkeypatch):
    calls = Calls(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    minilora.inject(model, "0", minilora.LoRAConfig(r=2, dropout=0.5), trainable=())
    x = torch.randn(2, 3, 9, 9)
    model.train()(x)
    assert calls.count == 0
    torch.compiler.reset()
    torch.compile(model.eval(), backend="eager", fullgraph=True)(x)
    assert calls.count == 0
    model(x)
    assert calls.count == 1


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_by_autograd_in_groups_and_without_a_batch(groups, batched):
    weight, L, R = torch.randn(6, 6 // groups, 3), torch.randn(6, 2), torch.randn(2, 18 // groups)
    x = torch.randn(2, 6, 5) if batched else torch.randn(6, 5)
    value = EffectiveWeight(weight.requires_grad_(), L, R, 0.7)  # thawed, so by autograd
    y = F.conv1d(x, value, None, 1, 1, 1, groups)
    torch.testing.assert_close(y, F.conv1d(x, value.formed(), None, 1, 1, 1, groups))
