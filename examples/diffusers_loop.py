"""diffusers' unconditional training loop with a TD term: five lines changed.

They take the place of the noise, the timesteps, `add_noise`, the model's call and the choice of
its target by `prediction_type`. Everything else is as in diffusers' example: the scheduler, the
average, Accelerate.
"""

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from tdkern.integrations.diffusers import Denoiser, Loss, attach_target  # tdkern


def small_unet(sample_size=8):
    """A `UNet2DModel` that trains in seconds."""
    return UNet2DModel(
        sample_size=sample_size,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )


def train(outdir=None, steps=4, prediction_type="epsilon", resume=None):
    """One process of the loop; returns the model, its average and the target."""
    accelerator = Accelerator(cpu=True)
    model = small_unet()
    ema_model = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    noise_scheduler = DDPMScheduler(prediction_type=prediction_type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999))
    images = torch.rand(8, 3, 8, 8) * 2 - 1
    dataset = torch.utils.data.TensorDataset(images)
    dataloader = torch.utils.data.DataLoader(dataset, batch_size=4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, dataloader, lr_scheduler
    )
    accelerator.register_for_checkpointing(ema_model)
    denoiser = Denoiser.from_scheduler(model, noise_scheduler)  # tdkern
    loss_fn = Loss.from_scheduler(noise_scheduler)  # tdkern
    target = attach_target(denoiser, optimizer)  # tdkern
    if resume is not None:
        accelerator.load_state(resume)
    for _ in range(steps // len(dataloader)):
        for (clean_images,) in dataloader:
            with accelerator.accumulate(model):
                loss = loss_fn(denoiser, target, clean_images).mean()  # tdkern
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema_model.step(model.parameters())
    if outdir is not None:
        accelerator.save_state(outdir)
    return model, ema_model, target


if __name__ == "__main__":
    train()
