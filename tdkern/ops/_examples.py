"""A call of every op with arguments that it takes: what the tests, the sanitizers' run and the
benchmarks make their calls from."""

import math

import torch
from torch import Tensor

SHAPE = (3, 4, 5)  # of the tensors that an op works through
PERIOD = 2**16  # so that an example of any size is made at once


def numbers(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> list[Tensor]:
    """Tensors of unit normals, drawn on the CPU, the same ones every time; of more than PERIOD
    numbers they repeat."""
    random = torch.Generator("cpu").manual_seed(count)
    size = math.prod(shape)
    tensors = []
    for _ in range(count):
        drawn = torch.randn(min(size, PERIOD), generator=random, dtype=torch.float64, device="cpu")
        there = drawn.to(device, dtype)
        if size > PERIOD:
            there = there.repeat(-(-size // PERIOD))[:size]
        tensors.append(there.reshape(shape))
    return tensors


def levels(batch: int, low: float, high: float, device: torch.device | str) -> Tensor:
    return torch.linspace(low, high, batch, dtype=torch.float64, device="cpu").to(device)


def td_coef(shape=SHAPE, dtype=torch.float32, device="cpu") -> dict:
    return {"noise": levels(shape[0], 0.1, 5.0, device)}


def td_loss(shape=SHAPE, dtype=torch.float32, device="cpu") -> dict:
    from .td_coef import td_coef

    out, out_target, x0, x_t, x_tp = numbers(5, shape, dtype, device)
    coef, _ = td_coef(levels(shape[0], 0.1, 5.0, "cpu"), backend="reference")
    return {
        "out": out,
        "out_target": out_target,
        "x0": x0,
        "coef": coef.to(device),
        "x_t": x_t,
        "x_tp": x_tp,
    }


def noise_pair(shape=SHAPE, dtype=torch.float32, device="cpu") -> dict:
    level = {
        name: levels(shape[0], *ends, device)
        for name, ends in {
            "alpha": (0.9, 0.4),
            "sigma": (0.1, 2.0),
            "alpha_p": (1.0, 0.8),
            "sigma_p": (0.05, 1.0),
        }.items()
    }
    return {"x0": numbers(1, shape, dtype, device)[0], **level, "seed": 3}


def heun_step(shape=SHAPE, dtype=torch.float32, device="cpu") -> dict:
    F, x, x_hat, noise = numbers(4, shape, dtype, device)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    coef = torch.tensor([2.0, 0.06, 0.48, -0.7, 0.9, 0.37], dtype=torch.float64, device="cpu").to(
        device
    )
    return {
        "F": F,
        "x": x.to(state),
        "coef": coef,
        "x_hat": x_hat.to(state),
        "noise": noise.to(state),
        "net_dtype": dtype,
    }


def ema_update_(shape=SHAPE, dtype=torch.float32, device="cpu") -> dict:
    param, *averages = numbers(3, shape, dtype, device)
    return {
        "averages": [[average, average[0].clone()] for average in averages],
        "params": [param, param[0].clone()],
        "decays": [0.9, 0.5],
    }


def found_inf(shape=SHAPE, dtype=torch.float32, device="cpu") -> dict:
    return {"grads": numbers(2, shape, dtype, device)}


def adam_ema_(shape=SHAPE, dtype=torch.float32, device="cpu") -> dict:
    param, grad, exp_avg, exp_avg_sq, average = (
        [tensor, tensor[0].clone()] for tensor in numbers(5, shape, dtype, device)
    )
    steps = [torch.ones((), dtype=torch.float32, device=device) for _ in range(2)]
    return {
        "params": param,
        "grads": grad,
        "exp_avgs": exp_avg,
        "exp_avg_sqs": [tensor.abs() for tensor in exp_avg_sq],
        "steps": steps,
        "averages": [average],
        "decays": [0.9],
        "lr": 0.01,
    }
