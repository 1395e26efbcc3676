"""The hard cases of td_loss, one table for the correctness, gradient, opcheck and compile tests,
and the figures they are judged by.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdkern import reference, td_coef

OUT, TARGET, CLEAN, COEF, X_T, X_TP = range(6)  # td_loss's arguments, which `inputs` gives
NAMES = ("out", "out_target", "x0", "x_t", "x_tp")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (dtype of out and out_target, dtype of x0, x_t and x_tp)
DTYPES = {
    "float32": (F32, F32),
    "float64": (F64, F64),
    "bfloat16": (BF16, BF16),
    "float16": (F16, F16),
    "bfloat16 of float32": (BF16, F32),
    "float16 of float32": (F16, F32),
}

# ---- where a tensor's elements lie; what lies between them is NaN -------------------------------


def _nan(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def offset(t: Tensor) -> Tensor:
    """Begins one element behind an aligned address."""
    return _nan(t, t.numel() + 1)[1:].view(t.shape).copy_(t)


def rows(t: Tensor) -> Tensor:
    """The first channels of twice as many: samples dense, with a gap between them."""
    return _nan(t, t.shape[0], 2 * t.shape[1], *t.shape[2:])[:, : t.shape[1]].copy_(t)


def gaps(t: Tensor) -> Tensor:
    """Every second element of a row."""
    return _nan(t, *t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)


def one_for_all(t: Tensor) -> Tensor:
    """Stride 0 between samples."""
    return t[:1].expand_as(t)


def one_for_row(t: Tensor) -> Tensor:
    """Stride 0 within a sample."""
    return t[..., :1].expand_as(t)


def batch_inside(t: Tensor) -> Tensor:
    """The batch is not the outermost dimension in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def swapped(t: Tensor) -> Tensor:
    """Height inside width."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def odd_ones(t: Tensor) -> Tensor:
    """A stride that means nothing on every dimension of size 1."""
    return t.as_strided(
        t.shape,
        [977 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)],
    )


# ---- the table ----------------------------------------------------------------------------------

VALID = (0.7, 0.1, 3.0, 12.0, 0.03)
INVALID = (90.0, 0.004, 200.0, 0.001)
MIXED = (0.7, 90.0, 3.0, 0.004, 0.1)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    base: str = "denoise"
    norm: dict = field(default_factory=dict)  # td_loss's base_norm and huber_c
    sigma: tuple[float, ...] = (
        MIXED  # repeated over the batch; within td_coef's schedule a sample has a TD term
    )
    lie: dict[str, Callable] = field(default_factory=dict)  # of a tensor, or of "all"
    coef: dict = field(default_factory=dict)  # td_coef's options
    columns: dict[int, float] = field(default_factory=dict)  # columns of coef that are set
    silent: tuple[int, ...] = ()  # samples with both weights 0
    absent: tuple[str, ...] = ()
    coef_dtype: torch.dtype = F64
    large: bool = False  # too large for an interpreter


X0_PREDICTION = {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0}
CT = {"precond": "ct", "weight": "pairwise_x0", "base_weight": "uniform"}
L1, HUBER = {"base_norm": "l1"}, {"base_norm": "huber", "huber_c": 0.03}
CASES = {
    "odd": Case((5, 3, 5, 7)),
    "odd, consistency": Case((5, 3, 5, 7), "consistency", coef=CT),
    "odd, l1": Case((5, 3, 5, 7), "consistency", L1, coef=CT),
    "odd, l1, denoise": Case((5, 3, 5, 7), norm=L1),
    "odd, huber": Case((5, 3, 5, 7), "consistency", HUBER, coef=CT),
    "odd, huber, denoise": Case((5, 3, 5, 7), norm={"base_norm": "huber", "huber_c": 0.5}),
    "image": Case((3, 3, 32, 32)),
    "no samples": Case((0, 3, 4, 4)),
    "no elements": Case((3, 0, 4)),
    "no elements, huber": Case((3, 0, 4), norm=HUBER),
    "one sample": Case((1, 3, 8, 8)),
    # aligned, since there is no next row: packs, and a tail behind them
    "one odd sample": Case((1, 107), "consistency", sigma=VALID),
    "one element": Case((20, 1)),
    "1-D": Case((20,), "consistency"),
    "5-D": Case((2, 3, 2, 5, 3), "consistency"),
    "a chunk less one": Case((2, 8191), "consistency"),
    "a chunk": Case((2, 8192)),
    "a chunk and one": Case((2, 8193)),
    "several chunks": Case((2, 2 * 8192 + 77), "consistency", sigma=VALID),
    "several chunks, l1": Case((2, 8192 + 77), "consistency", L1, sigma=VALID),
    "several chunks, huber": Case((2, 8192 + 77), "consistency", HUBER, sigma=VALID),
    "a million and one": Case((1, 1_000_001), large=True),
    "misaligned": Case((3, 3, 5, 8), lie={"all": offset}),
    "one misaligned": Case((3, 3, 4, 8), lie={"x_t": offset}),
    "slices of channels": Case((3, 3, 5, 7), "consistency", lie={"all": rows}),
    "target of six channels": Case(
        (3, 3, 5, 8), lie={"out_target": rows, "x_tp": rows}, sigma=VALID
    ),
    "gaps": Case((3, 3, 5, 7), lie={"out": gaps, "x_tp": gaps}),
    "one clean image": Case((4, 3, 4, 4), lie={"x0": one_for_all, "out_target": one_for_all}),
    "one output": Case((4, 3, 4, 4), "consistency", lie={"out": one_for_all}),
    "one value a row": Case((4, 3, 4, 4), lie={"out": one_for_row, "x0": one_for_row}),
    "batch inside": Case((4, 3, 5, 3), lie={"all": batch_inside}),
    "batch inside of one": Case(
        (4, 3, 5, 3), lie={"x_t": batch_inside, "out_target": batch_inside}
    ),
    "channels_last": Case((4, 3, 5, 7), lie={"all": channels_last}),
    "channels_last of some": Case(
        (4, 3, 5, 7),
        "consistency",
        lie={"out": channels_last, "x_t": channels_last, "x_tp": swapped},
    ),
    "swapped": Case((4, 3, 5, 7), lie={"out": swapped}),
    "odd ones": Case((3, 1, 15, 1), lie={"all": odd_ones}),
    "odd ones of some": Case((3, 1, 15, 1), lie={"x0": odd_ones, "out_target": odd_ones}),
    "all valid": Case((5, 3, 4, 4), sigma=VALID),
    "none valid": Case((4, 3, 4, 4), sigma=INVALID),
    "large sigma": Case((4, 3, 8, 8), sigma=(79.0, 60.0, 40.0)),
    "small sigma": Case((4, 3, 8, 8), sigma=(0.01, 0.012, 0.015)),
    "shared noise": Case((4, 3, 4, 4), sigma=VALID, coef={"coupling": "shared"}),
    "TD alone": Case((3, 3, 4, 4), "consistency", coef={"lambda_base": 0.0}, sigma=VALID),
    "a silent sample": Case((5, 3, 4, 4), silent=(1, 2)),
    "a silent sample, l1": Case((5, 3, 4, 4), norm=L1, silent=(1, 2)),
    "a silent sample, huber": Case((5, 3, 4, 4), norm=HUBER, silent=(1, 2)),
    "float32 coef": Case((3, 3, 4, 4), coef_dtype=F32),
    "x0 prediction": Case((4, 3, 4, 4), columns=X0_PREDICTION, absent=("x_t", "x_tp")),
    "x0 prediction, consistency": Case(
        (4, 3, 4, 4), "consistency", columns=X0_PREDICTION, absent=("x_t", "x_tp")
    ),
    "no x_tp": Case((4, 3, 4, 4), "consistency", columns={2: 0.0, 3: 1.0}, absent=("x_tp",)),
}
SMALL = [name for name, case in CASES.items() if math.prod(case.shape) < 1000]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.device_count() > 0 else "cpu"


def inputs(
    name: str, dtypes: str = "float32", device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(out, out_target, x0, coef, x_t, x_tp) of a case, in td_loss's order; `out` requires a
    gradient.
    """
    case = CASES[name]
    random = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([case.sigma[b % len(case.sigma)] for b in range(case.shape[0])], dtype=F64)
    coef, levels = td_coef(sigma, **case.coef, backend="reference")
    for column, value in case.columns.items():
        coef[:, column] = value
    coef[list(case.silent), 6:] = 0
    out, out_target, x0, noise, noise_p = (
        torch.randn(case.shape, generator=random, dtype=F64) for _ in range(5)
    )
    x0 = x0 / 2
    column = (-1, *[1] * (len(case.shape) - 1))
    tensors = {
        "out": out,
        "out_target": out_target,
        "x0": x0,
        "x_t": x0 + levels[:, 0].view(column) * noise,
        "x_tp": x0 + levels[:, 2].view(column) * noise_p,
    }
    net, data = DTYPES[dtypes]
    for key in NAMES:
        lie = case.lie.get(key, case.lie.get("all", torch.Tensor.contiguous))
        dtype = net if key.startswith("out") else data
        tensors[key] = None if key in case.absent else lie(tensors[key].to(device, dtype))
    out, out_target, x0, x_t, x_tp = tensors.values()
    return out.requires_grad_(), out_target, x0, coef.to(device, case.coef_dtype), x_t, x_tp


def widened(args, dtype=F64):
    """The same numbers in float64 on the CPU, for the reference."""
    out, *rest = (None if arg is None else arg.detach().to("cpu", dtype) for arg in args)
    return out.requires_grad_(), *rest


def with_gradient(loss_of, args, upstream=None) -> tuple[Tensor, Tensor]:
    """(loss, dF) of loss_of(*args); upstream is 1 if not given."""
    loss = loss_of(*args)
    (dF,) = torch.autograd.grad(
        loss, args[0], torch.ones_like(loss) if upstream is None else upstream.to(loss)
    )
    return loss.detach(), dF


def oracle(args, base: str, upstream=None, **norm) -> tuple[Tensor, Tensor]:
    """(loss, dF) of the reference in float64."""
    return with_gradient(lambda *a: reference.td_loss(*a, base, **norm), widened(args), upstream)


# ---- figures ------------------------------------------------------------------------------------


def figures(actual: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """(relative L2, 1 - cosine, bias) over rows [R, n], each row counting the same; a row that is 0
    must be met exactly.

    The bias is the mean error in the direction of the sign of what is expected, relative to its
    mean magnitude.
    """
    actual, expected = (t.detach().to("cpu", F64) for t in (actual, expected))
    assert actual.shape == expected.shape and torch.isfinite(expected).all()
    scale = expected.norm(dim=1, keepdim=True)
    live = scale[:, 0] > 0
    assert (actual[~live] == 0).all(), "not 0 where it must be"
    if expected[live].numel() == 0:
        return 0.0, 0.0, 0.0
    actual, expected = actual[live] / scale[live], expected[live] / scale[live]
    error = actual - expected
    cosine = (actual * expected).sum() / (actual.norm() * expected.norm())
    return (
        (error.norm() / expected.norm()).item(),
        (1 - cosine).item(),
        ((error * expected.sign()).sum() / expected.abs().sum()).item(),
    )


def check(actual: Tensor, expected: Tensor, plain: Tensor, truncates: bool = False) -> None:
    """At most twice what plain PyTorch at the same precision loses, or rounding once; float64 to
    1e-12.

    truncates: the result's last conversion cuts off instead of rounding, which only Triton's
        interpreter does, for bfloat16.
    """
    l2, cosine, bias = figures(actual, expected)
    plain_l2, _, plain_bias = figures(plain, expected)
    eps = torch.finfo(actual.dtype).eps
    if actual.dtype == F64:
        limit, bias_limit = 1e-12, 1e-13
    else:
        once = {F32: 2e-6}.get(actual.dtype, 2e-6 + eps / (1 if truncates else 2))
        limit = max(once, 2 * plain_l2)
        bias_limit = (
            limit
            if truncates
            else 2 * abs(plain_bias) + 5e-7 + 4 * limit / math.sqrt(actual.numel() + 1)
        )
    assert l2 <= limit, f"relative L2 {l2:.3g} > {limit:.3g}, plain PyTorch {plain_l2:.3g}"
    assert cosine <= limit**2 + 1e-14, f"1 - cosine {cosine:.3g} > {limit**2:.3g}"
    assert abs(bias) <= bias_limit, (
        f"bias {bias:.3g}, allowed {bias_limit:.3g}, plain PyTorch {plain_bias:.3g}"
    )
