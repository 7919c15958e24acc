"""What counts as a linear layer, and which weights can be merged into."""

import pytest
import torch
from checks import state
from torch import nn

from minilora.linear import call_problem, computes_plainly, linear_shape, plain_weight


class Packed(nn.Module):
    """A linear layer as quantisers build them: no floating-point weight."""

    in_features, out_features = 4, 6


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 6), (6, 4, False)),
        (nn.MultiheadAttention(4, 2).out_proj, (4, 4, False)),
        (Packed(), (6, 4, False)),
        (nn.Embedding(4, 6), None),
        (nn.Bilinear(4, 4, 6), None),
        (nn.LazyLinear(6), None),
        (nn.Sequential(nn.Linear(4, 6)), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_linear_shape(module, shape):
    assert linear_shape(module) == shape


def test_conv1d_of_transformers_is_linear_and_transposed():
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D(6, 4)  # (out, in), and a weight of (in, out)
    assert conv.weight.shape == (4, 6)
    assert linear_shape(conv) == (6, 4, True)


def test_another_conv1d_is_not():
    assert linear_shape(type("Conv1D", (nn.Module,), {})()) is None
    assert linear_shape(nn.Conv1d(4, 6, 1)) is None


def test_plain_weights():
    layer = nn.Linear(4, 6, dtype=torch.bfloat16)
    assert plain_weight(layer) is layer.weight
    for weight in (
        torch.zeros(6, 4, dtype=torch.int8),
        torch.zeros(6, 4).to(torch.float8_e4m3fn),
        torch.zeros(6, 4).as_subclass(type("Sub", (torch.Tensor,), {})),
    ):
        layer.weight = nn.Parameter(weight, requires_grad=False)
        assert plain_weight(layer) is None
    assert plain_weight(Packed()) is None


def test_a_parametrized_weight_is_not_plain_and_not_computed_to_find_out():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)).train()
    before = state(layer)
    assert plain_weight(layer) is None
    assert state(layer) == before


class Scaled(nn.Linear):
    """A subclass with a call of its own."""

    def forward(self, input):
        return super().forward(input) * 2


def hooked(kind):
    layer = nn.Linear(4, 6)
    getattr(layer, f"register_{kind}")(lambda *_: None)
    return layer


def replaced():
    layer = nn.Linear(4, 6)
    layer.forward = lambda input: input
    return layer


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (Scaled(4, 6), "Scaled computes in a way of its own"),
        (Packed(), "Packed computes in a way of its own"),
        (replaced(), "its forward has been replaced on the instance"),
        *((hooked(f"forward{pre}_hook"), "it has hooks") for pre in ("", "_pre")),
        *((hooked(f"full_backward{pre}_hook"), "it has hooks") for pre in ("", "_pre")),
    ],
)
def test_a_call_that_is_not_plain(layer, says):
    assert says in call_problem(layer)
    assert not computes_plainly(layer)


def test_a_call_that_is_plain():
    for layer in (
        nn.Linear(4, 6),
        type("Named", (nn.Linear,), {})(4, 6),
        nn.MultiheadAttention(4, 2).out_proj,
    ):
        assert call_problem(layer) is None
        assert computes_plainly(layer)
