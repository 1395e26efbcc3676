"""What a loss takes without a word, by design: docs/losses.md says each."""

import torch

from tdkern.ema import EMA
from tdkern.losses import TDEDMLoss
from tdkern.networks import EDMPrecond, unet


def network(label_dim=0, **preconditioning):
    torch.manual_seed(0)
    net = EDMPrecond(
        unet("ddpmpp", 8, 3, label_dim, cbase=4, cres=[1], dropout=0.0), **preconditioning
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def loss_of(net, target, images, *labels):
    torch.manual_seed(1)
    return TDEDMLoss(sigma_data=0.5)(net, target, images, *labels)


def test_another_sigma_data_is_the_plain_path_with_the_losss_weights():
    net, images = network(sigma_data=1.0), torch.rand(4, 3, 8, 8)
    denoised = lambda x, sigma: net(x, sigma)
    torch.testing.assert_close(loss_of(net, net, images), loss_of(denoised, denoised, images))


def test_labels_that_a_network_has_no_place_for_are_dropped():
    net, images = network(), torch.rand(4, 3, 8, 8)
    labels = torch.eye(10)[:4]
    target = EMA(net)
    assert torch.equal(loss_of(net, target, images), loss_of(net, target, images, labels))


def test_images_of_another_range_train():
    net, images = network(), 255 * torch.rand(4, 3, 8, 8)
    loss = loss_of(net, EMA(net), images)
    assert loss.isfinite().all() and loss.mean() > 100 * loss_of(net, EMA(net), images / 255).mean()
