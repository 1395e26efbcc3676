"""A LightningModule with a TD term: four lines changed.

The callback makes the target network (and averages), moves them behind each step, and has them in
every checkpoint with the optimizer's state.
"""

import lightning
import torch

from tdkern.integrations.lightning import TDCallback  # tdkern
from tdkern.losses import TDEDMLoss  # tdkern
from tdkern.networks import EDMPrecond, unet


class System(lightning.LightningModule):
    """A network and how it is trained."""

    def __init__(self):
        super().__init__()
        self.net = EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1]))

    def training_step(self, batch, batch_idx):
        """The loss of a batch."""
        (images,) = batch
        return TDEDMLoss()(self.net, self.target, images).mean()  # tdkern

    def configure_optimizers(self):
        """Adam of the network."""
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)


def train(outdir, max_epochs=2, resume=None, **settings):
    """Fit, or go on from a checkpoint; returns the module and its trainer."""
    system = System()
    data = torch.utils.data.TensorDataset(torch.rand(16, 3, 8, 8) * 2 - 1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        default_root_dir=outdir,
        callbacks=[TDCallback(averages={"ema": 0.999})],  # tdkern
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(system, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=resume)
    return system, trainer


if __name__ == "__main__":
    train(".")
