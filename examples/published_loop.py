"""The published TD+EDM run's loop (arXiv 2606.15048), in our own words: three lines changed.

Its loop is EDM's with a target network. `published.TDLoss` has its command's settings, its target's
decay and its gradient, which is smaller than EDM's by the number of a batch's elements.
"""

import torch

from tdkern.integrations.published import LEARNING_RATE, TDLoss  # tdkern
from tdkern.networks import EDMPrecond, unet


def train(steps=4, batch_size=8, loss_scaling=1):
    """One process of the loop; returns the network and its target."""
    net = EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1]))
    loss_fn = TDLoss(sigma_data=0.5)  # tdkern
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    loss_fn.attach(net, optimizer)  # tdkern
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        images = torch.rand(batch_size, 3, 8, 8) * 2 - 1
        loss = loss_fn(net=net, images=images)
        loss.sum().mul(loss_scaling / batch_size).backward()
        optimizer.step()
    return net, loss_fn.target


if __name__ == "__main__":
    train()
