"""The MLP for points, alone and batched."""

import pytest
import torch

from tdkern.networks import MLP, EDMPrecond


def randomised(net, seed=0):
    """A network whose parameters are all random, so that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return net


def alone(net, model):
    """The one model of a batched MLP, as an MLP of its own."""
    single = MLP(in_channels=3, width=16, num_blocks=2)
    single.load_state_dict(
        {name: tensor[model : model + 1] for name, tensor in net.state_dict().items()}
    )
    return single


def test_each_model_computes_what_it_would_alone():
    net = randomised(MLP(in_channels=3, width=16, num_blocks=2, num_models=4))
    generator = torch.Generator().manual_seed(1)
    x, c_noise = torch.randn(4 * 5, 3, generator=generator), torch.randn(4 * 5, generator=generator)
    out = net(x, c_noise)
    weight = torch.randn(out.shape, generator=generator)
    (out * weight).sum().backward()
    for model, part in enumerate(torch.arange(20).split(5)):
        single = alone(net, model)
        expected = single(x[part], c_noise[part])
        torch.testing.assert_close(out[part], expected, rtol=1e-5, atol=1e-6)
        (expected * weight[part]).sum().backward()
        for batched, own in zip(net.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(
                batched.grad[model : model + 1], own.grad, rtol=1e-4, atol=1e-5
            )


def test_models_start_different_and_at_zero_output():
    net = MLP(num_models=2)
    assert net.input.weight[0].ne(net.input.weight[1]).all()
    assert net(torch.randn(6, 2), torch.randn(6)).eq(0).all()


def test_reads_points_and_noise():
    net = randomised(MLP())
    x, c_noise = torch.randn(7, 2), torch.randn(7)
    out = net(x, c_noise)
    assert out.shape == (7, 2)
    assert (net(x + 0.1, c_noise) - out).abs().amax(1).gt(1e-4).all()
    assert (net(x, c_noise + 0.1) - out).abs().amax(1).gt(1e-4).all()


def test_works_inside_the_preconditioning_in_both_precisions():
    net = EDMPrecond(randomised(MLP()))
    x = torch.randn(4, 2, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.5, 5.0, 80.0], dtype=torch.float64)
    single = net(x.float(), sigma.float(), class_labels=None)
    double = net.double()(x, sigma)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(7, 2), (4, 2, 1)])
def test_rejects_what_does_not_divide(shape):
    with pytest.raises(ValueError, match=r"MLP: x must have shape \[2 \* B, channels\]"):
        MLP(num_models=2)(torch.zeros(shape), torch.zeros(shape[0]))
