"""A call of every op, for the sanitizers: python bench/gpu/selection.py BACKEND. Small, with packs
and with tails; the results are checked.

Inputs are drawn, and the reference computed, on the CPU: a sanitizer patches every kernel that
runs, and torch's are not what is looked at.
"""

import sys

import torch

import tdkern
from tdkern.ops import adam_ema_

BACKEND = sys.argv[1]
DEVICE = "cpu" if BACKEND == "cpp" else "cuda"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def both(op, *tensors):
    """op's results on the backend and on the reference, from copies of the same tensors; close to
    each other.
    """
    results = []
    for backend, device in ((BACKEND, DEVICE), ("reference", "cpu")):
        given = [tensor.to(device, copy=True) for tensor in tensors]
        results.append([result.cpu().double() for result in op(backend, *given)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0.02, atol=0.02)


def td_loss(backend, F, F_p, x0, x_t, x_tp, coef):
    F.requires_grad_()
    loss = tdkern.td_loss(F, F_p, x0, coef, x_t, x_tp, base="consistency", backend=backend)
    return loss, *torch.autograd.grad(
        loss, F, torch.tensor([[1.0, 1.0], [2.0, 0.5]], device=F.device, dtype=loss.dtype)
    )


def adam(backend, *tensors):
    params, grads, exp_avgs, exp_avg_sqs, *averages = (
        [tensor, tensor[:5].clone()] for tensor in tensors
    )
    exp_avg_sqs = [tensor.square() for tensor in exp_avg_sqs]
    steps = [torch.ones((), device=param.device) for param in params]
    adam_ema_(
        params, grads, exp_avgs, exp_avg_sqs, steps, averages, [0.9, 0.5], lr=0.01, backend=backend
    )
    return *params, *exp_avgs, *exp_avg_sqs, *averages[0], *averages[1], *steps


def ema(backend, param, *averages):
    tdkern.ema_update_(
        [[average] for average in averages], [param], [0.9, 0.5, 0.1], backend=backend
    )
    return averages


def pair(backend, x0, one, sigma, sigma_p):
    return tdkern.noise_pair(x0, one, sigma, one, sigma_p, seed=7, backend=backend)


def heun(backend, F, x, x_hat, noise, coef):
    return tdkern.heun_step(F, x, coef, x_hat, noise, net_dtype=F.dtype, backend=backend)


torch.manual_seed(0)
sigma = torch.tensor([0.7, 3.0], dtype=F64)
coef, levels = tdkern.td_coef(sigma, backend="reference")
one = torch.ones_like(sigma)
both(lambda backend, sigma: tdkern.td_coef(sigma, backend=backend), sigma)
step = torch.tensor([2.0, 0.06, 0.48, -0.7, 0.9, 0.37], dtype=F64)
for dtype in (F32, F64, BF16, F16):
    for n in (107, 8192 + 16, 20_003):  # one chunk; two, in packs alone; several with a tail
        x = [torch.randn(2, n).to(dtype) for _ in range(5)]
        both(td_loss, *x, coef)
        both(pair, x[0], one, levels[:, 0], levels[:, 2])
        both(ema, *(t.flatten() for t in x[:4]))
        both(adam, *(t.flatten() for t in (*x, x[0])))
        state = F64 if dtype == F64 else F32
        both(heun, x[0], *(t.to(state) for t in x[1:4]), step)
print("every op ran")
