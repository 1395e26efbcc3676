"""A plain loop under DistributedDataParallel with a TD term: five lines changed.

`torchrun --nproc_per_node=2 examples/ddp_loop.py` runs it. DistributedDataParallel averages
gradients over the processes, so the sum over a process's own samples is divided by their number
there, and not by that of all processes.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tdkern.integrations import attach_target  # tdkern
from tdkern.losses import TDEDMLoss  # tdkern
from tdkern.networks import EDMPrecond, unet


def train(path=None, steps=4, batch_per_process=4):
    """The loop of each process; returns the network and its target."""
    torch.manual_seed(0)  # of the weights, which are the same in all processes
    net = EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1]))
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    target = attach_target(net, optimizer)  # tdkern
    torch.manual_seed(dist.get_rank())  # of the samples and their noise
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        images = torch.rand(batch_per_process, 3, 8, 8) * 2 - 1
        scale = images[0].numel() / batch_per_process  # tdkern
        loss = TDEDMLoss()(ddp, target, images, gradient_scale=scale)  # tdkern
        loss.sum().backward()
        optimizer.step()
    if path is not None and dist.get_rank() == 0:
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return net, target


def main(*args, **kwargs):
    """The loop, among the processes that torchrun has started."""
    dist.init_process_group("gloo")
    trained = train(*args, **kwargs)
    dist.destroy_process_group()  # once DistributedDataParallel is gone, or it may wait for ever
    return trained


if __name__ == "__main__":
    main()
