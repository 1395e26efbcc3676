"""A loop on Accelerate with a TD term: four lines changed.

`accelerate launch` runs it in any number of processes. `save_state` and `load_state` have the
target network, in the optimizer's state. Accelerate divides each micro-batch's loss by their
number; the mean over samples and elements is what its users scale learning rates for.
"""

import torch
from accelerate import Accelerator

from tdkern.integrations import attach_target  # tdkern
from tdkern.losses import TDEDMLoss  # tdkern
from tdkern.networks import EDMPrecond, unet


def train(outdir=None, epochs=2, resume=None, **settings):
    """The loop of each process; returns the network and its target."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    net = EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1]))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    data = torch.utils.data.TensorDataset(torch.rand(16, 3, 8, 8) * 2 - 1)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    target = attach_target(net, optimizer)  # tdkern
    if resume is not None:
        accelerator.load_state(resume)
    for _ in range(epochs):
        for (images,) in loader:
            with accelerator.accumulate(net):
                loss = TDEDMLoss()(net, target, images).mean()  # tdkern
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    if outdir is not None:
        accelerator.save_state(outdir)
    return net, target


if __name__ == "__main__":
    train()
