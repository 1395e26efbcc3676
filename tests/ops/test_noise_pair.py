"""noise_pair: Philox against its published vectors, every backend against the reference in float64,
and the draws against their distribution.
"""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch

import tdkern
from helpers import aot
from helpers.cases import (
    BF16,
    F16,
    F32,
    F64,
    batch_inside,
    channels_last,
    device_of,
    gaps,
    offset,
    one_for_all,
    one_for_row,
    rows,
    swapped,
)
from tdkern import reference
from tdkern.ops import _backends
from tdkern.ops._dtypes import FLOATS
from tdkern.ops.noise_pair import output_like
from tdkern.reference import philox

# NumPy's, of Triton's interpreter: products that wrap around
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = {
    "odd": (5, 3, 5, 7),
    "image": (3, 3, 16, 16),
    "a tile": (3, 64),
    "a tile and one": (3, 65),
    "one": (20, 1),
    "two": (20, 2),
    "1-D": (20,),
    "5-D": (2, 3, 2, 5, 3),
    "one sample": (1, 131),
    "no samples": (0, 3, 4),
    "no elements": (3, 0, 4),
    "several chunks": (1, 8192 + 77),
    "chunks of whole packs": (2, 4096 + 1028),
}
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "offset": offset,
    "rows": rows,
    "gaps": gaps,
    "one_for_all": one_for_all,
    "one_for_row": one_for_row,
    "batch_inside": batch_inside,
    "swapped": swapped,
}
EPS = {F32: 2.0**-24, F64: 2.0**-53, BF16: 2.0**-8, F16: 2.0**-11}
SEED, STEP = 2**63 + 12345, 2**35 + 3  # both over 32 bits


def levels(batch, device="cpu"):
    """(alpha, sigma, alpha_p, sigma_p): general alpha, and below it a sample whose transition adds
    no noise; the columns of one tensor, so strided.
    """
    t = torch.linspace(0.2, 1, batch, dtype=F64)
    table = torch.stack([1 - 0.5 * t, 0.3 + 2 * t, 1 - 0.2 * t, 0.1 + t], 1)
    table[batch // 2 : batch // 2 + 1, 1] = 0.01
    return table.to(device).unbind(1)


def clean(shape, dtype=F32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(
        device, dtype
    )


def draws(n_samples, n, dtype=F32, seed=SEED, step=0, coupling="markov"):
    """(n1, n2) [n_samples, n] from the fastest backend here: x0 = 0, alpha = alpha' = sigma' = 1
    and sigma^2 = 2, so that x_tp = n1 and x_t = n1 + n2.
    """
    one = torch.ones((), dtype=F64).expand(n_samples)
    x_t, x_tp = tdkern.noise_pair(
        torch.zeros(n_samples, n, dtype=dtype),
        one,
        math.sqrt(2) * one,
        one,
        one,
        seed=seed,
        offset=step,
        coupling=coupling,
    )
    return x_tp, x_t - x_tp


def truncates(backend, dtype):
    """Triton's interpreter cuts bfloat16 off instead of rounding it."""
    return backend == "triton" and _backends.interpreted() and dtype == BF16


@pytest.mark.parametrize("name", ["odd", "a tile and one", "two", "several chunks"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("coupling", ["markov", "shared"])
def test_parts_of_a_batch_draw_what_the_whole_draws(backend, name, layout, coupling):
    """A sample's noise belongs to its index in the whole batch, so that any number of processes,
    and any split of a batch, sees the same."""
    shape = (7, *SHAPES[name][1:])
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("of images alone")
    device = device_of(backend)
    x0 = LAYOUTS[layout](clean(shape, device=device))
    columns = levels(7, device)
    options = {"seed": SEED, "offset": STEP, "coupling": coupling, "backend": backend}
    whole = tdkern.noise_pair(x0, *columns, **options)
    for first, end in ((0, 3), (3, 4), (4, 7)):
        columns_of_part = (column[first:end] for column in columns)
        part = tdkern.noise_pair(x0[first:end], *columns_of_part, first_sample=first, **options)
        for one, all_ in zip(part, whole, strict=True):
            assert torch.equal(one, all_[first:end])


def test_the_last_sample_there_can_be(backend):
    x0 = clean((1, 5), device=device_of(backend))
    columns = levels(1, device_of(backend))
    draw = lambda first, backend: tdkern.noise_pair(
        x0, *columns, seed=SEED, first_sample=first, backend=backend
    )
    last = draw(2**32 - 1, backend)
    for one, expected in zip(last, draw(2**32 - 1, "reference"), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    for first in (-1, 2**32):
        with pytest.raises(ValueError, match="first_sample must be"):
            draw(first, backend)


# ---- the reference ------------------------------------------------------------------------------

VECTORS = [  # of the Random123 library: counter, key, output
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def from_hex(numbers):
    return torch.tensor([int(number, 16) for number in numbers.split()])


@pytest.mark.parametrize("counter, key, output", VECTORS)
def test_philox_vectors(counter, key, output):
    assert torch.equal(philox.philox4x32(from_hex(counter), from_hex(key)), from_hex(output))


def test_philox_counters():
    """What each word of the counter and of the key is, one sample and block at a time."""
    words = philox.words(3, 5, seed=SEED, offset=STEP, stream=1)
    for b in range(3):
        for block in range(5):
            counter = torch.tensor([block, b, STEP % 2**32, 2 * (STEP // 2**32) + 1])
            assert torch.equal(
                words[b, block],
                philox.philox4x32(counter, torch.tensor([SEED % 2**32, SEED // 2**32])),
            )


def test_box_muller_covers_the_circle():
    """Words b on a regular grid are angles on a regular grid, each once; a alone sets the
    radius.
    """
    a = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])[:, None]
    b = torch.arange(1024) * 2**22 + 2**21
    x, y = philox.box_muller(a, b)
    radius = torch.sqrt(-2 * torch.log1p((a.double() + 0.5) / 2**32 - 1))
    torch.testing.assert_close(torch.hypot(x, y), radius.expand(5, 1024), rtol=1e-9, atol=0)
    angles = torch.atan2(y, x).sort(1).values
    torch.testing.assert_close(
        angles.diff(dim=1), torch.full((5, 1023), 2 * math.pi / 1024, dtype=F64), rtol=1e-8, atol=0
    )


def test_reference_is_the_two_equations():
    x0, (alpha, sigma, alpha_p, sigma_p) = clean((4, 3, 2), F64), levels(4)
    n1, n2 = (philox.normals(4, 6, SEED, STEP, stream).view(4, 3, 2) for stream in (0, 1))
    markov, shared = (
        tdkern.noise_pair(
            x0,
            alpha,
            sigma,
            alpha_p,
            sigma_p,
            coupling=coupling,
            seed=SEED,
            offset=STEP,
            backend="reference",
        )
        for coupling in ("markov", "shared")
    )
    for b in range(4):
        a = (alpha[b] / alpha_p[b]).item()
        near = alpha_p[b] * x0[b] + sigma_p[b] * n1[b]
        s = math.sqrt(max(sigma[b].item() ** 2 - (a * sigma_p[b].item()) ** 2, 0))
        torch.testing.assert_close(markov[1][b], near, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(markov[0][b], a * near + s * n2[b], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(shared[1][b], near, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(
            shared[0][b], alpha[b] * x0[b] + sigma[b] * n1[b], rtol=1e-14, atol=1e-14
        )


# ---- every backend against it -------------------------------------------------------------------


def judge(backend, x0, coupling):
    args, dtype = levels(len(x0), x0.device), x0.dtype
    got = tdkern.noise_pair(x0, *args, coupling=coupling, seed=SEED, offset=STEP, backend=backend)
    expected = reference.noise_pair(x0.double(), *args, coupling == "shared", SEED, STEP, 0)
    once = EPS[dtype] * (2 if truncates(backend, dtype) else 1)
    # of the arithmetic, some roundings on numbers below 32
    wide = EPS[F64] if dtype == F64 else EPS[F32]
    for actual, target in zip(got, expected, strict=True):
        assert actual.dtype == dtype and actual.shape == x0.shape
        assert actual.stride() == output_like(x0).stride()
        torch.testing.assert_close(
            actual.double(),
            target,
            rtol=1.01 * once if dtype in (BF16, F16) else 0,
            atol=64 * wide + (2.0**-25 if dtype == F16 else 0),
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", SHAPES)
def test_noise_pair(compiled, name, dtype):
    judge(compiled, clean(SHAPES[name], dtype, device_of(compiled)), "markov")


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["odd", "a tile and one", "two"])
def test_noise_pair_shared(compiled, name, dtype):
    judge(compiled, clean(SHAPES[name], dtype, device_of(compiled)), "shared")


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (3, 5, 8, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_pair_layouts_agree_to_the_bit(compiled, layout, shape):
    x0 = LAYOUTS[layout](clean(shape, F32, device_of(compiled)))
    judge(compiled, x0, "markov")
    args = levels(shape[0], x0.device)
    for lain, plain in zip(
        *(tdkern.noise_pair(x, *args, seed=5, backend=compiled) for x in (x0, x0.contiguous())),
        strict=True,
    ):
        assert torch.equal(lain, plain)


@pytest.mark.parametrize("shape", [(2, 3, 48, 48), (2, 40, 12, 12)])
def test_noise_pair_channels_last_of_several_chunks(compiled, shape):
    """A thread goes from one of its elements to the next without a division: over channels shorter
    and longer than its step.
    """
    x0, args = clean(shape, F32, device_of(compiled)), levels(2, device_of(compiled))
    for lain, plain in zip(
        *(tdkern.noise_pair(x, *args, seed=5, backend=compiled) for x in (channels_last(x0), x0)),
        strict=True,
    ):
        assert torch.equal(lain, plain) and lain.stride() == channels_last(x0).stride()


def test_normals_are_float64s_to_rounding(compiled):
    """The bounds that the docstring states.

    u near 1, where float32 has no digits left, is among 2^20 draws to within 2^-20.
    """
    blocks = 2**8 if compiled == "triton" and _backends.interpreted() else 2**18
    one = torch.ones(4, dtype=F64, device=device_of(compiled))
    zero = torch.zeros(4, blocks, device=device_of(compiled))
    expected = philox.normals(4, blocks, 7, device=zero.device)
    for dtype, bound in ((F32, 5e-7), (F64, 1e-14)):
        _, n1 = tdkern.noise_pair(zero.to(dtype), one, one, one, one, seed=7, backend=compiled)
        assert ((n1.double() - expected).abs() / (1 + expected.abs())).max() < bound


def test_noise_pair_draws_depend_on_seed_offset_sample_and_element_alone(backend):
    device = device_of(backend)
    x0, args = torch.zeros(6, 130, device=device), levels(6, device)
    full = tdkern.noise_pair(x0, *args, seed=9, offset=4, backend=backend)
    some = tdkern.noise_pair(
        x0[:3, :70], *(column[:3] for column in args), seed=9, offset=4, backend=backend
    )
    assert all(torch.equal(one[:3, :70], other) for one, other in zip(full, some, strict=True))
    shared = tdkern.noise_pair(x0, *args, coupling="shared", seed=9, offset=4, backend=backend)
    assert torch.equal(full[1], shared[1]) and not torch.equal(full[0], shared[0])


def test_noise_pair_seeds_and_offsets(backend):
    device = device_of(backend)
    x0, args = torch.zeros(2, 9, device=device), levels(2, device)

    def pair(seed, step=0):
        return tdkern.noise_pair(x0, *args, seed=seed, offset=step, backend=backend)[1]

    different = [
        pair(0),
        pair(1),
        pair(2**32),
        pair(2**63),
        pair(0, 1),
        pair(0, 2**31),
        pair(0, 2**32),
        pair(0, 2**62),
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    assert torch.equal(pair(-1), pair(2**64 - 1)) and torch.equal(pair(-(2**63)), pair(2**63))
    for seed, step in ((1, 0), (-1, 2**62), (2**62 + 1, 2**40 + 2)):
        assert torch.equal(
            pair(torch.tensor([seed], device=device), torch.tensor([step], device=device)),
            pair(seed, step),
        )


def test_noise_pair_reads_a_seed_in_memory_anew(compiled):
    device = device_of(compiled)
    x0 = torch.zeros(2, 9, device=device)
    args = levels(2, device)
    seed = torch.tensor([3], device=device)
    step = torch.tensor([0], device=device)
    first = tdkern.noise_pair(x0, *args, seed=seed, offset=step, backend=compiled)[0]
    step += 1
    second = tdkern.noise_pair(x0, *args, seed=seed, offset=step, backend=compiled)[0]
    assert torch.equal(
        second, tdkern.noise_pair(x0, *args, seed=3, offset=1, backend=compiled)[0]
    ) and not torch.equal(first, second)


def test_noise_pair_transition_without_noise_and_nan(backend):
    """sigma below a sigma': x_t = a x_tp to the bit of one product; a NaN level is not lost in the
    clamp.
    """
    one = torch.ones(2, dtype=F64, device=device_of(backend))
    x0 = clean((2, 70), F32, device_of(backend))
    x_t, x_tp = tdkern.noise_pair(x0, 0.5 * one, 0.1 * one, one, one, seed=1, backend=backend)
    assert torch.equal(x_t, 0.5 * x_tp)
    x_t, x_tp = tdkern.noise_pair(
        x0,
        one,
        torch.tensor([math.nan, 2.0], dtype=F64, device=one.device),
        one,
        one,
        seed=1,
        backend=backend,
    )
    assert x_t[0].isnan().all() and torch.isfinite(x_t[1]).all() and torch.isfinite(x_tp).all()


def test_noise_pair_has_no_gradient(backend):
    x0 = clean((2, 5), F32, device_of(backend)).requires_grad_()
    args = [column.clone().requires_grad_() for column in levels(2, x0.device)]
    pair = tdkern.noise_pair(x0, *args, seed=1, backend=backend)
    assert len(pair) == 2 and not any(tensor.requires_grad for tensor in pair)


# ---- distribution: fixed seeds, bounds of about five standard deviations ------------------------

N = 2**22


def test_distribution_moments_and_tails():
    for n in (t.double().flatten() for t in draws(1024, N // 1024)):
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(n.pow(power).mean() - mean) < 5 * math.sqrt(variance / N), power
    many = torch.stack(
        [draws(1024, N // 1024, step=step, coupling="shared")[0] for step in range(8)]
    ).abs()
    for sigmas in (1.0, 2.0, 3.0, 4.0, 4.5, 5.0):
        expected = scipy.stats.binom(many.numel(), 2 * scipy.stats.norm.sf(sigmas))
        assert expected.ppf(1e-6) <= (many > sigmas).sum().item() <= expected.ppf(1 - 1e-6), sigmas
    assert 5 < many.max() < math.sqrt(2 * 33 * math.log(2))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_distribution_kolmogorov_smirnov(dtype):
    for n in draws(64, 4096, dtype):
        assert scipy.stats.kstest(n.double().flatten().numpy(), "norm").pvalue > 1e-4
        assert (
            scipy.stats.kstest(
                (n[:, 0::4].double() ** 2 + n[:, 1::4].double() ** 2).flatten().numpy(),
                scipy.stats.chi2(2).cdf,
            ).pvalue
            > 1e-4
        )


def test_distribution_independence():
    """Between elements, samples, offsets, seeds and the two noises: no correlation of the values,
    of their squares or of their signs.
    """
    n1, n2 = (n.double() for n in draws(256, 4096))
    other_step = draws(256, 4096, step=1)[0].double()
    other_seed = draws(256, 4096, seed=SEED + 1)[0].double()
    pairs = {
        "n1, n2": (n1, n2),
        "n1, n2 shifted": (n1[:, 1:], n2[:, :-1]),
        "offsets": (n1, other_step),
        "seeds": (n1, other_seed),
        "samples": (n1[1:], n1[:-1]),
        "a sample and the next block": (n1[1:, :-4], n1[:-1, 4:]),
    }
    pairs |= {
        f"elements {lag} apart": (n1[:, lag:], n1[:, :-lag]) for lag in (1, 2, 3, 4, 5, 16, 64)
    }
    for name, (x, y) in pairs.items():
        for of, centre in (
            (lambda t: t, 0),
            (torch.square, 1),
            (torch.sign, 0),
            (torch.abs, math.sqrt(2 / math.pi)),
        ):
            x_, y_ = of(x) - centre, of(y) - centre
            correlation = (x_ * y_).sum() / torch.sqrt(x_.square().sum() * y_.square().sum())
            assert abs(correlation) < 5 / math.sqrt(x.numel()), name


@pytest.mark.parametrize("coupling", ["markov", "shared"])
@pytest.mark.parametrize(
    "alpha, sigma, alpha_p, sigma_p",
    [(1, 2, 1, 0.5), (0.6, 0.8, 0.9, math.sqrt(0.19)), (0.3, 0.7, 0.8, 0.2)],
)
def test_distribution_of_the_pair(coupling, alpha, sigma, alpha_p, sigma_p):
    """Mean and covariance of (x_t, x_t') given x0 = 3."""
    column = torch.ones((), dtype=F64).expand(256)
    x0 = torch.full((256, 4096), 3.0)
    args = (alpha * column, sigma * column, alpha_p * column, sigma_p * column)
    pair = (
        torch.stack(tdkern.noise_pair(x0, *args, coupling=coupling, seed=SEED)).double().flatten(1)
    )
    mean, covariance = pair.mean(1), torch.cov(pair)
    both = sigma * sigma_p if coupling == "shared" else alpha / alpha_p * sigma_p**2
    n = x0.numel()
    torch.testing.assert_close(
        mean, 3.0 * torch.tensor([alpha, alpha_p], dtype=F64), rtol=0, atol=5 * sigma / math.sqrt(n)
    )
    expected = torch.tensor([[sigma**2, both], [both, sigma_p**2]], dtype=F64)
    torch.testing.assert_close(
        covariance, expected, rtol=5 * math.sqrt(2 / n), atol=5 * sigma * sigma_p / math.sqrt(n)
    )


# ---- as an op -----------------------------------------------------------------------------------


def op_arguments(x0, shared=False, tensors=True):
    device = x0.device
    integers = (
        (0, torch.tensor([SEED - 2**64], device=device), 0, torch.tensor([STEP], device=device))
        if tensors
        else (5, None, 6, None)
    )
    return x0, *levels(len(x0), device), shared, *integers, 7


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "swapped", "gaps"])
def test_noise_pair_opcheck(compiled, layout):
    x0 = LAYOUTS[layout](clean((4, 3, 5, 7), F32, device_of(compiled)))
    torch.library.opcheck(_backends.op("noise_pair", compiled), op_arguments(x0))
    torch.library.opcheck(
        _backends.op("noise_pair", compiled), op_arguments(x0, True, tensors=False)
    )
    torch.library.opcheck(_backends.op("noise_pair", compiled), op_arguments(x0[:0]))


def test_noise_pair_in_torch_compile(compiled):
    torch._dynamo.reset()

    def step(x0, args, seed, offset):
        return tdkern.noise_pair(x0 * 2, *args, seed=seed, offset=offset, backend=compiled)

    x0 = channels_last(clean((4, 3, 5, 7), F32, device_of(compiled)))
    args = levels(4, x0.device)
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (1, 2, 2**40):
            integer = torch.tensor([value], device=x0.device)
            for eager, other in zip(
                step(x0, args, integer, integer), traced(x0, args, integer, integer), strict=True
            ):
                assert torch.equal(eager, other) and eager.stride() == other.stride()
    torch._dynamo.reset()
    for seed in (1, 2**63 + 1):
        assert torch.equal(step(x0, args, seed, 7)[0], traced(x0, args, seed, 7)[0])


@pytest.mark.xdist_group("ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_noise_pair_triton_ahead_of_time(capability):
    """Every kernel compiles to a cubin for the architecture, without a GPU, and spills nothing."""
    pytest.importorskip("triton")
    report = {name: facts for name, facts in aot.report(capability).items() if "noise_pair" in name}
    assert len(report) == 4
    assert all(
        facts["stack"] == 0 and facts["local"] == 0 and facts["registers"] <= 128
        for facts in report.values()
    ), report


# ---- the same bits ------------------------------------------------------------------------------

BITS = """
import hashlib, torch, tdkern
digest = hashlib.sha256()
t = torch.linspace(0.2, 1, 7, dtype=torch.float64)
for shape in ((7, 3, 40, 40), (7, 2), (7, 77)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for coupling in ("markov", "shared"):
            options = dict(coupling=coupling, seed=3, backend="cpp")
            for tensor in tdkern.noise_pair(x0, 1 - t / 2, 2 * t, 1 - t / 4, t, **options):
                digest.update(tensor.float().numpy().tobytes())
print(digest.hexdigest())
"""


def test_noise_pair_same_bits_on_lesser_processors():
    if _backends.MISSING["cpp"]:
        pytest.skip(_backends.MISSING["cpp"])
    root = str(_backends.LIB_DIR.parent.parent)
    digests = set()
    for isa in ("avx512", "avx2", "base"):
        # without Triton's import
        env = os.environ | {
            "TDKERN_CPU_ISA": isa,
            "PYTHONPATH": root,
            "TRITON_INTERPRET": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", BITS], capture_output=True, text=True, cwd=root, env=env
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("shape", [(3, 40_001), (5000, 6), (40, 3, 32, 32)])
def test_noise_pair_does_not_depend_on_threads(shape):
    if _backends.MISSING["cpp"]:
        pytest.skip(_backends.MISSING["cpp"])
    threads, results = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pair = tdkern.noise_pair(clean(shape), *levels(shape[0]), seed=1, backend="cpp")
            results.add(hashlib.sha256(np.stack(pair).tobytes()).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


# ---- bad arguments ------------------------------------------------------------------------------

GOOD = dict.fromkeys(("alpha", "sigma", "alpha_p", "sigma_p"), torch.ones(2, dtype=F64)) | {
    "x0": torch.zeros(2, 3),
    "seed": 1,
}
BAD = {
    "a scalar": ({"x0": torch.zeros(())}, "x0 must have shape [B, ...], got []"),
    "integers": (
        {"x0": torch.zeros(2, 3, dtype=torch.int64)},
        "x0 must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "alpha of another batch": (
        {"alpha": torch.ones(3, dtype=F64)},
        "alpha must have shape [2], got [3]",
    ),
    "sigma of one number": (
        {"sigma": torch.ones(1, dtype=F64)},
        "sigma must have shape [2], got [1]",
    ),
    "alpha_p with a dimension more": (
        {"alpha_p": torch.ones(2, 1, dtype=F64)},
        "alpha_p must have shape [2], got [2, 1]",
    ),
    "sigma_p of another dtype": (
        {"sigma_p": torch.ones(2)},
        "sigma_p must be torch.float64, got torch.float32",
    ),
    "alpha elsewhere": (
        {"alpha": torch.ones(2, dtype=F64, device="meta")},
        "alpha must be on cpu, got meta",
    ),
    "no such coupling": (
        {"coupling": "ddim"},
        "coupling must be one of markov, shared, got 'ddim'",
    ),
    "a seed too large": ({"seed": 2**64}, f"seed must be in [-2^63, 2^64), got {2**64}"),
    "a seed too small": (
        {"seed": -(2**63) - 1},
        f"seed must be in [-2^63, 2^64), got {-(2**63) - 1}",
    ),
    "a negative offset": ({"offset": -1}, "offset must be in [0, 2^63), got -1"),
    "an offset too large": ({"offset": 2**63}, f"offset must be in [0, 2^63), got {2**63}"),
    "two seeds": ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must have shape [1], got [2]"),
    "a seed of another dtype": (
        {"seed": torch.zeros(1, dtype=torch.int32)},
        "seed must be torch.int64, got torch.int32",
    ),
    "an offset elsewhere": (
        {"offset": torch.zeros(1, dtype=torch.int64, device="meta")},
        "offset must be on cpu, got meta",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_noise_pair_bad_arguments(backend, what):
    device = device_of(backend)
    wrong, message = BAD[what]
    arguments = {
        name: a.to(device) if isinstance(a, torch.Tensor) and a.device.type == "cpu" else a
        for name, a in (GOOD | wrong).items()
    }
    with pytest.raises(ValueError) as error:
        tdkern.noise_pair(**arguments, backend=backend)
    assert str(error.value).replace("cuda:0", "cpu") == f"noise_pair: {message}"
