"""EDM's training loop (arXiv 2206.00364), in our own words, with a TD term: three lines changed.

EDM's own training/training_loop.py cannot be copied here (its licence), so the network is
tdkern's, which has EDM's constructor arguments, attributes and calls. The lines that differ from a
loop with EDM's loss are marked. Resuming and snapshots are EDM's: the target network is in the
optimizer's state.
"""

import copy
import pickle
from pathlib import Path

import torch

from tdkern.data import AugmentPipe
from tdkern.integrations.edm import TDLoss  # tdkern
from tdkern.networks import EDMPrecond, unet


def train(outdir, steps=4, batch_size=8, batch_gpu=4, loss_scaling=1, resume_state_dump=None):
    """One process of EDM's loop; returns the network and its average."""
    batch_gpu_total = batch_size  # over the number of processes, which is one here
    net = EDMPrecond(unet("ddpmpp", 8, 3, 2, cbase=4, cres=[1], augment_dim=9))
    net.train().requires_grad_(True)
    loss_fn = TDLoss(sigma_data=0.5)  # tdkern
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    augment_pipe = AugmentPipe(
        p=0.12, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1
    )
    loss_fn.attach(net, optimizer)  # tdkern
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    if resume_state_dump is not None:
        data = torch.load(resume_state_dump, weights_only=False)
        net.load_state_dict(data["net"].state_dict())
        optimizer.load_state_dict(data["optimizer_state"])

    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(batch_gpu_total // batch_gpu):
            images = torch.rand(batch_gpu, 3, 8, 8) * 2 - 1
            labels = torch.eye(2)[torch.randint(2, (batch_gpu,))]
            loss = loss_fn(net=net, images=images, labels=labels, augment_pipe=augment_pipe)
            loss.sum().mul(loss_scaling / batch_gpu_total).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for parameter in net.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()
        for average, parameter in zip(ema.parameters(), net.parameters(), strict=True):
            average.copy_(parameter.detach().lerp(average, 0.5 ** (batch_size / 500e3)))

    state = {"net": net, "optimizer_state": optimizer.state_dict()}
    torch.save(state, Path(outdir) / "training-state-000000.pt")
    snapshot = {"ema": ema, "loss_fn": loss_fn, "augment_pipe": None, "dataset_kwargs": {}}
    (Path(outdir) / "network-snapshot-000000.pkl").write_bytes(pickle.dumps(snapshot))
    return net, ema


if __name__ == "__main__":
    train(".")
