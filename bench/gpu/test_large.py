"""Every op on more than 2^31 elements, where 32-bit indices end: what it writes at both ends and in
the middle.

TDKERN_LARGE is another number of elements, for a run without a GPU.
"""

import os

import pytest
import torch

import tdkern
from tdkern.ops import _backends, adam_ema_, found_inf
from tdkern.reference import philox

N = int(os.environ.get("TDKERN_LARGE", 2**31 + 77))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PIECES = [slice(0, 1000), slice(N // 2 + 3, N // 2 + 1003), slice(N - 1000, N)]
BF16, F64 = torch.bfloat16, torch.float64
ROUNDING = {"rtol": 2.0**-8, "atol": 1e-6}  # once, to bfloat16


@pytest.fixture(params=["cuda", "triton"] if DEVICE == "cuda" else ["cpp"])
def backend(request):
    if _backends.MISSING[request.param]:
        pytest.skip(_backends.MISSING[request.param])
    if DEVICE == "cpu" and "TDKERN_LARGE" not in os.environ:
        pytest.skip("more than 2^31 elements are for a GPU's memory; set TDKERN_LARGE to fewer")
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 20 * N:
            pytest.skip(f"needs {20 * N >> 30} GiB of GPU memory")
    return request.param


def draw(*shape: int, dtype=BF16):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def cut(tensors):
    """Each of the pieces of flat tensors, as tensors of their own."""
    return [[tensor.detach()[piece].clone() for tensor in tensors] for piece in PIECES]


def coefficients(batch: int):
    return torch.tensor([0.3, 0.7, 0.2, 0.6, 0.5, 0.4, 0.9, 0.8], dtype=F64, device=DEVICE).repeat(
        batch, 1
    )


def test_td_loss_of_one_sample(backend):
    F, F_p, x0, x_t, x_tp = (draw(1, N) for _ in range(5))
    F.requires_grad_()
    loss = tdkern.td_loss(F, F_p, x0, coefficients(1), x_t, x_tp, backend=backend)
    (dF,) = torch.autograd.grad(loss, F, torch.tensor([[2.0, 0.5]], device=DEVICE))
    sums = torch.zeros(2, dtype=F64, device=DEVICE)
    for start in range(0, N, 2**26):
        e, delta = errors(*(t.detach()[0, start : start + 2**26] for t in (F, F_p, x0, x_t, x_tp)))
        sums += torch.stack([delta.square().sum(dtype=F64), e.square().sum(dtype=F64)])
    torch.testing.assert_close(
        loss[0].double(),
        torch.tensor([0.9, 0.8], dtype=F64, device=DEVICE) * sums / N,
        rtol=1e-5,
        atol=0,
    )
    for piece, given in zip(PIECES, cut([t[0] for t in (F, F_p, x0, x_t, x_tp)]), strict=True):
        e, delta = errors(*given)
        torch.testing.assert_close(
            N * dF[0, piece].float(), -2 * 0.7 * (2 * 0.9 * 0.5 * delta + 0.5 * 0.8 * e), **ROUNDING
        )


def errors(F, F_p, x0, x_t, x_tp):
    """(e, delta) of docs/mathematics.md, for `coefficients`."""
    F, F_p, x0, x_t, x_tp = (t.float() for t in (F, F_p, x0, x_t, x_tp))
    e, e_p = x0 - (0.3 * x_t + 0.7 * F), x0 - (0.2 * x_tp + 0.6 * F_p)
    return e, 0.5 * e - 0.4 * e_p


def test_td_loss_of_many_samples(backend):
    """The first, a middle and the last sample are what they are alone."""
    batch = N // 1000 + 1
    tensors, coef = [draw(batch, 1000) for _ in range(5)], coefficients(batch)

    def results(F, F_p, x0, x_t, x_tp, coef):
        F.requires_grad_()
        loss = tdkern.td_loss(F, F_p, x0, coef, x_t, x_tp, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, F, torch.full_like(loss, 3.0))

    loss, dF = results(*tensors, coef)
    for b in (0, batch // 2, batch - 1):
        alone = results(
            *(tensor.detach()[b : b + 1].clone() for tensor in tensors), coef[b : b + 1]
        )
        assert torch.equal(loss[b : b + 1], alone[0]) and torch.equal(dF[b : b + 1], alone[1])


@pytest.mark.parametrize(
    "shape",
    [(1, N), (1, N // 4 * 4), (N // 1000 + 1, 1000)],
    ids=["one sample", "one sample of whole packs", "many samples"],
)
def test_noise_pair(backend, shape):
    x0, one = draw(*shape), torch.ones((), dtype=F64, device=DEVICE).expand(shape[0])
    x_t, x_tp = (
        t.flatten()
        for t in tdkern.noise_pair(
            x0, 0.6 * one, 2 * one, 0.8 * one, one, seed=2**40 + 5, backend=backend
        )
    )
    x0 = x0.flatten()
    for piece in PIECES:
        i = torch.arange(piece.start, min(piece.stop, x0.numel()), device=DEVICE)
        n1, n2 = (normals(i // shape[1], i % shape[1], 2**40 + 5, stream) for stream in (0, 1))
        near = 0.8 * x0[piece].double() + n1
        torch.testing.assert_close(x_tp[piece].double(), near, **ROUNDING)
        torch.testing.assert_close(
            x_t[piece].double(), 0.75 * near + (4 - 0.75**2) ** 0.5 * n2, **ROUNDING
        )


def normals(sample, element, seed, stream):
    """Element by element what `reference.philox.normals` draws."""
    zero = torch.zeros_like(sample)
    counter = torch.stack([element // 4, sample, zero, zero + stream], 1)
    w0, w1, w2, w3 = philox.philox4x32(
        counter, torch.tensor([seed & philox.WORD, seed >> 32], device=DEVICE)
    ).unbind(1)
    return torch.stack([*philox.box_muller(w0, w1), *philox.box_muller(w2, w3)], 1).gather(
        1, element[:, None] % 4
    )[:, 0]


def test_heun_step(backend):
    F, x = draw(N), draw(N, dtype=torch.float32)
    coef = torch.tensor([2.0, 0.06, 0.48, -0.7, 0.9, 0.48], dtype=F64, device=DEVICE)
    x_next, _ = tdkern.heun_step(F, x, coef, backend=backend)
    for piece, given in zip(PIECES, cut([F, x]), strict=True):
        assert torch.equal(x_next[piece], tdkern.heun_step(*given, coef, backend=backend)[0])


def test_ema_update(backend):
    param, average = draw(N), draw(N)
    pieces = cut([param, average])
    tdkern.ema_update_([[average]], [param], [0.75], backend=backend)
    for piece, (part, expected) in zip(PIECES, pieces, strict=True):
        tdkern.ema_update_([[expected]], [part], [0.75], backend=backend)
        assert torch.equal(average[piece], expected)


def test_adam_ema(backend):
    tensors = [draw(N), draw(N), draw(N), draw(N).abs_()]
    average, count = tensors[0].clone(), [torch.tensor(3.0, device=DEVICE)]
    pieces = cut([*tensors, average])

    def step(tensors, average, count):
        adam_ema_(
            *([tensor] for tensor in tensors), count, [[average]], [0.9], lr=0.01, backend=backend
        )

    step(tensors, average, count)
    for piece, (*parts, expected) in zip(PIECES, pieces, strict=True):
        step(parts, expected, [torch.tensor(3.0, device=DEVICE)])
        assert all(
            torch.equal(tensor[piece], part)
            for tensor, part in zip((*tensors, average), (*parts, expected), strict=True)
        )
    tensors[1][-1] = torch.inf
    assert found_inf(tensors[1:2], backend=backend).item() == 1
