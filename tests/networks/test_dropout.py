"""The networks' dropout beside torch's: its probability, its scale, its draws and its gradient."""

import pytest
import torch
import torch.nn.functional as F

from tdkern.networks.layers import dropout

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.13, 0.5, 0.9])
def test_zeroes_with_its_probability_in_every_place_of_four(p):
    torch.manual_seed(0)
    zero = dropout(torch.ones(2**18, 4), p) == 0
    n = zero.shape[0]
    spread = (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(
        zero.double().mean(0), torch.full((4,), p).double(), atol=5 * spread, rtol=0
    )
    # neighbours of one random number, and of two, do not know of each other
    for a, b in ((zero[:, 0], zero[:, 1]), (zero[:, 3], zero[:, 2]), (zero[1:, 0], zero[:-1, 3])):
        assert abs((a & b).double().mean() - p * p) < 5 * p * n**-0.5


@pytest.mark.parametrize("p", [0.1, 0.13, 0.5])
def test_the_mean_is_kept(p):
    """What is kept is scaled by the probability as it was taken."""
    torch.manual_seed(0)
    kept = dropout(torch.ones(1000), p)
    taken = round(p * 2**16) / 2**16
    assert torch.equal(kept.unique(), torch.tensor([0.0, 1 / (1 - taken)]))
    assert abs(taken - p) <= 2**-17


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (2, 3, 5, 5), (4, 0, 2)])
def test_shapes_and_dtypes(shape, dtype):
    y = dropout(torch.ones(shape, dtype=dtype), 0.5)
    assert y.shape == shape and y.dtype == dtype
    assert y.unique().tolist() in ([], [0], [2], [0, 2])


def test_draws_from_the_global_generator_and_the_gradient_has_the_mask():
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    torch.manual_seed(1)
    first = dropout(x, 0.3)
    torch.manual_seed(1)
    again = dropout(x, 0.3)
    assert torch.equal(first, again) and not torch.equal(first, dropout(x, 0.3))
    (grad,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(grad * x, first)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends_are_torchs(p):
    x = torch.randn(10)
    assert torch.equal(dropout(x, p), F.dropout(x, p))


def test_compiled_and_mapped():
    compiled = torch.compile(lambda x: dropout(x, 0.5), backend="aot_eager", fullgraph=True)
    assert set(compiled(torch.ones(64)).tolist()) == {0.0, 2.0}
    mapped = torch.vmap(lambda x: dropout(x, 0.5), randomness="different")
    rows = mapped(torch.ones(2, 64))
    assert set(rows.flatten().tolist()) == {0.0, 2.0} and not torch.equal(*rows)
