"""A plain loop under FSDP2 with a TD term: nine lines changed.

`torchrun --nproc_per_node=2 examples/fsdp_loop.py` runs it. The target network is made before the
network is sharded, then both are sharded alike. `save_network` gathers the shards.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tdkern  # tdkern
from tdkern.ema import EMA  # tdkern
from tdkern.integrations import attach_target  # tdkern
from tdkern.losses import TDEDMLoss  # tdkern
from tdkern.networks import EDMPrecond, unet


def train(path=None, steps=4, batch_per_process=4):
    """The loop of each process; returns the network and its target."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # of the weights, which are the same in all processes
    net = EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1]))
    target = EMA(net)  # tdkern
    for each in (net, target.module):  # tdkern
        fully_shard(each, mesh=mesh)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    attach_target(net, optimizer, target=target)  # tdkern
    torch.manual_seed(dist.get_rank())  # of the samples and their noise
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        images = torch.rand(batch_per_process, 3, 8, 8) * 2 - 1
        loss = TDEDMLoss()(net, target, images)  # tdkern
        loss.mean().backward()
        optimizer.step()
    if path is not None:
        tdkern.save_network(target, path)  # tdkern
    dist.destroy_process_group()
    return net, target


if __name__ == "__main__":
    train()
