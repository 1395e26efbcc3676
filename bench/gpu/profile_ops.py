"""One call of every op on float32, for a profiler.

python bench/gpu/profile_ops.py BACKEND ELEMENTS
"""

import sys

import torch

import tdkern
from tdkern.ops import adam_ema_

BACKEND, ELEMENTS = sys.argv[1], int(sys.argv[2])
DEVICE = "cpu" if BACKEND == "cpp" else "cuda"
SAMPLE = 3 * 32 * 32  # elements of a sample


def draw(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


batch = max(1, ELEMENTS // SAMPLE)
one = torch.ones(batch, dtype=torch.float64, device=DEVICE)
coef, levels = tdkern.td_coef(one, backend=BACKEND)
x = [draw(batch, SAMPLE) for _ in range(5)]
x[0].requires_grad_()
loss = tdkern.td_loss(x[0], x[1], x[2], coef, x[3], x[4], backend=BACKEND)
torch.autograd.grad(loss, x[0], torch.full_like(loss, 2.0))
tdkern.noise_pair(x[1], one, levels[:, 0], one, levels[:, 2], seed=1, backend=BACKEND)
step = torch.tensor([2.0, 0.06, 0.48, -0.7, 0.0, 0.37], dtype=torch.float64, device=DEVICE)
tdkern.heun_step(x[1], x[2].double(), step, net_dtype=torch.float32, backend=BACKEND)
tdkern.ema_update_([[x[2]], [x[3]]], [x[1]], [0.9, 0.5], backend=BACKEND)
moments, count = x[4].abs(), torch.ones((), device=DEVICE)
adam_ema_([x[1]], [x[2]], [x[3]], [moments], [count], [[x[4]]], [0.9], lr=0.01, backend=BACKEND)
print("every op ran")
