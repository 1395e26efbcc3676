"""How the time grows with the number of elements: beyond the cache, an element's time must stay
what it is; and a training step's with the batch, in which it must be linear, and its memory with
`--batch` and `--batch-gpu`.

On the CPU, outputs of more than 32 MB are pages fresh from the system at every call (glibc maps
them anew), which the copy, into memory that is there, does not pay for: from 10^7 elements on that
is part of an op's time, though the ops ask for large pages (checks.h).
"""

import pytest
import torch
from measure import DEVICE, TINY, of_device, random_images

import tdkern
from tdkern.training import Options, Trainer
from tdkern.training.distributed import this_process

ELEMENTS = (10**3, 10**4) if TINY else (10**4, 10**5, 10**6, 10**7, 10**8)
SAMPLE = 500 if TINY else 2000  # elements
# What each must move for an element. adam_ema_ reads the gradients twice: it looks at all of them
# before it changes anything.
BYTES = {
    "td_loss": 6 * 4,
    "noise_pair": 3 * 4,
    "ema_update_": 5 * 4,
    "heun_step": 2 * (4 + 8),
    "adam_ema_": 10 * 4,
}


def td_loss(B, draw):
    coef, _ = tdkern.td_coef(torch.linspace(0.1, 5, B, dtype=torch.float64, device=DEVICE))
    F, F_p, x0, x_t, x_tp = (draw() for _ in range(5))
    F.requires_grad_()
    upstream = torch.ones(B, 2, device=DEVICE)
    return lambda: torch.autograd.grad(tdkern.td_loss(F, F_p, x0, coef, x_t, x_tp), F, upstream)


def noise_pair(B, draw):
    x0, one = draw(), torch.ones(B, dtype=torch.float64, device=DEVICE)
    return lambda: tdkern.noise_pair(x0, one, 2 * one, one, one, seed=1)


def ema_update_(B, draw):
    param, *averages = (draw() for _ in range(3))
    return lambda: tdkern.ema_update_([[average] for average in averages], [param], [0.999, 0.9999])


def heun_step(B, draw):
    F, x = draw(), draw().double()
    coef = torch.tensor([2.0, 0.06, 0.48, -0.7, 0.9, 0.48], dtype=torch.float64, device=DEVICE)
    return lambda: tdkern.heun_step(F, x, coef, net_dtype=torch.float32)


def adam_ema_(B, draw):
    param, grad, exp_avg, exp_avg_sq, average = (draw().abs_() for _ in range(5))
    lists = [
        [tensor] for tensor in (param, grad, exp_avg, exp_avg_sq, torch.ones((), device=DEVICE))
    ]
    return lambda: tdkern.ops.adam_ema_(*lists, [[average]], [0.999], lr=1e-4)


@pytest.mark.parametrize("elements", ELEMENTS, ids="{:.0e}".format)
@pytest.mark.parametrize("op", [td_loss, noise_pair, ema_update_, adam_ema_, heun_step])
@pytest.mark.parametrize("competitor", ["tdkern", "copy"])
def bench_growth(compare, op, elements, competitor):
    def make():
        random = torch.Generator(DEVICE).manual_seed(0)
        return op(
            elements // SAMPLE,
            lambda: torch.randn(elements // SAMPLE, SAMPLE, device=DEVICE, generator=random),
        )

    compare(
        op.__name__,
        f"{elements:.0e}",
        competitor,
        make,
        moved=BYTES[op.__name__] * elements,
        elements=elements,
    )


# ---- the driver's step ---------------------------------------------------------------------------

BATCHES = of_device(tiny=(1, 2, 4), cpu=(4, 8, 16, 32), cuda=(64, 128, 256, 512))
NETWORK = {"cbase": 4, "cres": [1]} if TINY else {"cbase": 32, "cres": [1, 2]}


@pytest.mark.parametrize(
    ("batch", "batch_gpu"),
    [(batch, part) for batch in BATCHES for part in BATCHES if part <= batch],
)
def bench_driver_step(compare, tmp_path, batch, batch_gpu):
    """`tdkern train`'s step, from images of the data set to the new weights and averages."""

    def make():
        data = random_images(tmp_path, batch, 8 if TINY else 32)
        options = Options(data=str(data), batch=batch, batch_gpu=batch_gpu, workers=0, **NETWORK)
        trainer = Trainer(options, this_process())
        images, labels = zip(*(trainer.dataset[i] for i in range(batch)), strict=True)
        images, labels = torch.stack(images), torch.stack(labels)
        return lambda: trainer.train_step(images, labels)

    compare(
        "driver step",
        f"batch {batch}",
        f"--batch-gpu {batch_gpu}",
        make,
        moved=None,
        seconds=2.0,
        rotate=False,
        batch=batch,
        batch_gpu=batch_gpu,
    )
