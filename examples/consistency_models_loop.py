"""The training loop of consistency models (arXiv 2303.01469), in our own words: two lines changed.

Its code is not needed: a small U-Net with the signature of its own, `model(x, timesteps, y=None)`,
stands in for it. The loop keeps its target network, in training mode, and its own curriculum.
"""

import copy
from functools import partial

import torch
from torch import nn

from tdkern.integrations.consistency_models import Diffusion  # tdkern


class UNetModel(nn.Module):
    """A convolution that is told the time and the class, by the signature of that loop's U-Net."""

    def __init__(self, channels=3, width=8, num_classes=2):
        super().__init__()
        self.before = nn.Conv2d(channels, width, 3, padding=1)
        self.time, self.label = nn.Linear(1, width), nn.Embedding(num_classes, width)
        self.after = nn.Sequential(nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(width, channels, 3, 1, 1))

    def forward(self, x, timesteps, y=None):
        """F of [B, C, H, W] at times [B] for classes [B]."""
        embedding = self.time(timesteps[:, None] / 1000)
        if y is not None:
            embedding = embedding + self.label(y)
        return self.after(self.before(x) + embedding[:, :, None, None])


def train(steps=4, batch_size=8, start_scales=4, target_ema=0.95):
    """One process of the loop; returns the model and its target."""
    model = UNetModel()
    ddp_model = model  # DistributedDataParallel(model) where there are several processes
    target_model = copy.deepcopy(model).requires_grad_(False).train()
    diffusion = Diffusion(loss_norm="l2", weight_schedule="uniform")  # tdkern
    optimizer = torch.optim.RAdam(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        micro = torch.rand(batch_size, 3, 8, 8) * 2 - 1
        micro_cond = {"y": torch.randint(2, (batch_size,))}
        weights = torch.ones(batch_size)  # of that loop's uniform sampler
        num_scales = start_scales + step
        compute_losses = partial(
            diffusion.consistency_losses,
            ddp_model,
            micro,
            num_scales,
            target_model=target_model,
            model_kwargs=micro_cond,
        )
        loss = (compute_losses()["loss"] * weights).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, p in zip(target_model.parameters(), model.parameters(), strict=True):
                average.mul_(target_ema).add_(p, alpha=1 - target_ema)
    return model, target_model


if __name__ == "__main__":
    train()
