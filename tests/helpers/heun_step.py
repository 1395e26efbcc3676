"""The hard cases of heun_step, and how its results are judged."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.cases import (
    BF16,
    F16,
    F32,
    F64,
    batch_inside,
    channels_last,
    gaps,
    odd_ones,
    offset,
    one_for_all,
    rows,
    swapped,
)
from tdkern import reference

COEF = (2.0, 0.06, 0.48, -0.7, 0.9, 0.37)  # sigma, skip, scale, h, churn, c_in
# (dtype of F, of the state, of the network's next input)
DTYPES = [
    (F32, F64, F32),
    (BF16, F64, BF16),
    (F16, F64, F16),
    (F64, F64, F64),
    (F32, F32, F32),
    (BF16, F32, BF16),
    (F16, F32, F32),
    (F64, F32, BF16),
    (F32, F64, BF16),
    (BF16, F64, F32),
    (F32, F32, None),
    (F32, F64, None),
]
# x_hat, noise
KINDS = {
    "euler": (False, False),
    "euler, noise": (False, True),
    "correction": (True, False),
    "correction, noise": (True, True),
}
# shape, then where F, x, x_hat and noise lie
SAME = torch.Tensor.contiguous
CASES = {
    "odd": ((5, 3, 5, 7), SAME),
    "image": ((2, 3, 32, 32), SAME),
    "no samples": ((0, 3, 4, 4), SAME),
    "no elements": ((3, 0, 4), SAME),
    "no dimensions": ((), SAME),
    "one element": ((1, 1), SAME),
    "1-D": ((7,), SAME),
    "chunks and a bit": ((3, 4099), SAME),
    "misaligned": ((3, 3, 5, 8), offset),
    "F misaligned": ((3, 3, 4, 8), offset, SAME),
    "x_hat and noise misaligned": ((3, 3, 4, 8), SAME, SAME, offset, offset),
    "slices of channels": ((3, 3, 5, 7), rows),
    "F of six channels": ((3, 3, 5, 8), rows, SAME),
    "gaps": ((3, 3, 5, 7), SAME, gaps),
    "one F for all": ((4, 3, 4, 4), one_for_all, SAME),
    "one x for all": ((4, 3, 4, 4), SAME, one_for_all, SAME),
    "batch inside": ((4, 3, 5, 3), batch_inside),
    "channels_last": ((4, 3, 5, 7), channels_last),
    "channels_last of some": ((4, 3, 5, 7), channels_last, SAME, swapped, channels_last),
    "odd ones": ((3, 1, 5, 1), odd_ones),
}


def inputs(name="odd", kind="correction, noise", dtypes=(F32, F64, F32), device="cpu"):
    """(F, x, coef, x_hat, noise) of a case."""
    shape, *lie = CASES[name]
    net, state, _ = dtypes
    random = torch.Generator().manual_seed(0)
    F, x, x_hat, noise = (torch.randn(shape, generator=random, dtype=F64) for _ in range(4))
    pairs = enumerate([(F, net), (3 * x, state), (3 * x_hat, state), (noise, state)])
    laid = [
        (lie[i] if i < len(lie) else lie[-1])(tensor.to(device, dtype))
        for i, (tensor, dtype) in pairs
    ]
    with_x_hat, with_noise = KINDS[kind]
    return (
        laid[0],
        laid[1],
        torch.tensor(COEF, dtype=F64, device=device),
        laid[2] if with_x_hat else None,
        laid[3] if with_noise else None,
    )


def judge(x_next, net_input, args, net_dtype, truncates=False):
    """x_next to four roundings of what is added up to it; the network's input to one of its own."""
    F, x, coef, x_hat, noise = wide = tuple(
        arg if arg is None else arg.to("cpu", F64) for arg in args
    )
    expected, _ = reference.heun_step(*wide, None)
    assert (
        x_next.shape == x.shape
        and x_next.dtype == args[1].dtype
        and x_next.is_contiguous() >= args[1].is_contiguous()
    )
    magnitude = (
        2 * x.abs()
        + F.abs()
        + (0 if x_hat is None else x_hat.abs())
        + (0 if noise is None else noise.abs())
    )
    error = (x_next.to("cpu", F64) - expected).abs()
    assert (error <= 4 * torch.finfo(x_next.dtype).eps * magnitude).all(), (error / magnitude).max()
    if net_dtype is None:
        assert net_input is None
        return
    scaled = coef[5] * x_next.to("cpu", F64)
    assert (
        net_input.dtype == net_dtype
        and net_input.shape == x_next.shape
        and net_input.stride() == x_next.stride()
    )
    eps = max(torch.finfo(net_dtype).eps * (1 if truncates else 0.5), torch.finfo(x_next.dtype).eps)
    error = (net_input.to("cpu", F64) - scaled).abs()
    assert (
        error <= 1.01 * eps * scaled.abs() + torch.finfo(net_dtype).smallest_normal * eps
    ).all(), (error / scaled.abs()).max()


class Steps(TorchDispatchMode):
    """Counts the calls of heun_step."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("tdkern.heun_step")
        return func(*args, **(kwargs or {}))
