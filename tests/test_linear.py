"""What counts as a linear layer, and which weights can be merged into."""

import pytest
import torch
from torch import nn

from minilora.linear import linear_shape, plain_weight


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
    assert plain_weight(nn.Linear(4, 6, dtype=torch.bfloat16))
    assert not plain_weight(Packed())
    integers = nn.Linear(4, 6)
    integers.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)
    assert not plain_weight(integers)
    subclass = nn.Linear(4, 6)
    subclass.weight = nn.Parameter(torch.zeros(6, 4).as_subclass(type("Sub", (torch.Tensor,), {})))
    assert not plain_weight(subclass)
