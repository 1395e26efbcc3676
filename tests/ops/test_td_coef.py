"""td_coef: every backend against the reference, the reference against the published code's numbers,
and its manners as an op.
"""

import itertools
import math

import pytest
import torch

from helpers import DATA, aot, golden_of
from helpers.cases import device_of
from tdkern import td_coef
from tdkern.ops import _backends
from tdkern.ops.td_coef import BASE_WEIGHTS, PRECONDS, WEIGHTS
from tdkern.schedules import EDM, two_moment

# NumPy's, of what Triton's interpreter masks out afterwards
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Inside the schedule, above and below it, and far out. No sigma lies where rounding decides whether
# it is valid.
SIGMA = torch.tensor(
    [0.0022, 0.0039, 0.01, 0.05, 0.3, 1.0, 2.5, 11.0, 79.9, 80.5, 400.0, 1e-3, 1e-5, 3e4],
    dtype=torch.float64,
)
INDEX = torch.tensor(
    [0.0, 0.3, 1.0, 7.5, 15.0, 15.75, 15.7500001, 16.0, 17.0, 20.0, -0.5], dtype=torch.float64
)


def close(actual, expected):
    """To 1e-12 relative; at sigma_min CT's scale' is itself a rounding error, hence 1e-15."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float64 and a.shape == e.shape
        torch.testing.assert_close(a.cpu(), e.cpu(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("base_weight", BASE_WEIGHTS)
@pytest.mark.parametrize("precond", PRECONDS)
def test_td_coef(compiled, precond, base_weight, weight):
    for coupling, from_index in itertools.product(("markov", "shared"), (False, True)):
        options = {
            "from_index": from_index,
            "precond": precond,
            "base_weight": base_weight,
            "weight": weight,
            "coupling": coupling,
        }
        noise = INDEX if from_index else SIGMA
        close(
            td_coef(noise.to(device_of(compiled)), **options, backend=compiled),
            td_coef(noise, **options, backend="reference"),
        )


OPTIONS = [
    {"steps": 40, "rho": 5.0, "sigma_min": 0.01, "sigma_max": 50.0},
    {"steps": 2, "k_idx": 0.5},
    {"k_idx": 0.4, "one_idx": 0.05},
    {"k_idx": 3.0},
    {"one_idx": 1.0},
    {"sigma_data": 1.3, "lambda_base": 0.0},
    {"lambda_base": 2.5},
    {"td_sigma": (0.04, 3.0)},
    {"td_sigma": (0.3, math.inf), "from_index": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_td_coef_options(compiled, options):
    noise = INDEX if options.get("from_index") else SIGMA
    close(
        td_coef(noise.to(device_of(compiled)), **options, backend=compiled),
        td_coef(noise, **options, backend="reference"),
    )


def test_td_coef_of_many_samples(compiled):
    """More than a block of threads; sizes that divide nothing."""
    for size in (0, 1, 129, 1000):
        sigma = (
            torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
            .mul(1.2)
            .sub(1.2)
            .exp()
        )
        coef, levels = td_coef(sigma.to(device_of(compiled)), backend=compiled)
        close((coef, levels), td_coef(sigma, backend="reference"))
        assert coef.shape == (size, 8) and levels.shape == (size, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_td_coef_dtypes_and_strides(backend, dtype):
    noise = torch.tensor([1, 5, 2, 5, 40, 5], dtype=dtype)[::2]
    coef, levels = td_coef(noise.to(device_of(backend)), backend=backend)
    close(
        (coef, levels),
        td_coef(torch.tensor([1.0, 2.0, 40.0], dtype=torch.float64), backend="reference"),
    )


def test_td_coef_is_what_the_design_says(backend):
    """Column by column, from the public definitions, for one valid and one invalid noise level."""
    schedule, sd = EDM(), 0.5
    coef, levels = (
        t.cpu()
        for t in td_coef(
            torch.tensor([1.7, 0.003], dtype=torch.float64, device=device_of(backend)),
            lambda_base=0.3,
            backend=backend,
        )
    )
    for row, sigma, valid in zip(range(2), (1.7, 0.003), (True, False), strict=True):
        index = schedule.index(sigma).item()
        expected = [sigma, *(schedule.sigma(index + step).item() for step in (0.25, 1.0, 1.25))]
        torch.testing.assert_close(
            levels[row], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )
        A, A_p = (1 - (tau / t) ** 2 for t, tau in (expected[:2], expected[2:]))
        skip, skip_p = (sd**2 / (s**2 + sd**2) for s in (sigma, expected[2]))
        scale, scale_p = (s * sd / math.sqrt(s**2 + sd**2) for s in (sigma, expected[2]))
        w = 1 / sigma**2 + 1 / sd**2
        numbers = [
            skip,
            scale,
            skip_p,
            scale_p,
            A,
            A_p,
            valid / ((A * scale) ** 2 + (A_p * scale_p) ** 2 + (not valid)),
            0.3 * w if valid else 1.3 * w,
        ]
        torch.testing.assert_close(
            coef[row], torch.tensor(numbers, dtype=torch.float64), rtol=1e-11, atol=1e-15
        )
        assert A == pytest.approx(two_moment(1, sigma, 1, expected[1])[0].item(), rel=1e-12)


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("td_ct_*.npz")))
def test_td_coef_gives_the_published_ct_numbers(backend, name):
    """From integer indices: levels, boundary scalings, A, the validity mask and the weights."""
    golden = golden_of(name)
    schedule = {
        "steps": int(golden["num_scales"]),
        **{name: float(golden[name]) for name in ("sigma_min", "sigma_max", "rho")},
    }
    options = {
        **schedule,
        "sigma_data": float(golden["sigma_data"]),
        "one_idx": float(golden["one_idx"]),
        "lambda_base": float(golden["lambda_td"]),
    }
    index, valid = golden["indices"].to(device_of(backend)), golden["boundary"] == 0
    for base_weight in ("uniform", "karras", "snr"):
        coef, levels = td_coef(
            index,
            from_index=True,
            **options,
            k_idx=1.0,
            precond="ct",
            weight="pairwise_x0",
            base_weight=base_weight,
            backend=backend,
        )
        expected_levels = torch.stack(
            [golden[name] for name in ("t", "t_prev", "t2", "t2_prev")], 1
        )
        w_base = golden[f"weight__{base_weight}"] * torch.where(
            valid, golden["lambda_td"], 1 + golden["lambda_td"]
        )
        columns = [
            golden[name] for name in ("c_skip_t", "c_out_t", "c_skip_t2", "c_out_t2", "A_t", "A_t2")
        ] + [golden["w_td"] * valid, w_base]
        torch.testing.assert_close(levels.cpu(), expected_levels, rtol=1e-12, atol=0)
        torch.testing.assert_close(coef.cpu(), torch.stack(columns, 1), rtol=1e-11, atol=1e-14)
    assert 0 < valid.sum() < len(valid)


def test_td_coef_has_no_gradient(backend):
    noise = torch.ones(3, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    assert not any(t.requires_grad for t in td_coef(noise, backend=backend))


def test_td_coef_twice_is_bit_equal(compiled):
    first, second = (td_coef(SIGMA.to(device_of(compiled)), backend=compiled) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


ARGS = (
    False,
    18,
    0.002,
    80.0,
    7.0,
    0.5,
    1.0,
    0.25,
    0.5,
    "edm",
    "karras",
    1.0,
    "pairwise",
    0.0,
    math.inf,
)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_td_coef_opcheck(compiled, size):
    torch.library.opcheck(
        _backends.op("td_coef", compiled),
        (torch.rand(size, dtype=torch.float64, device=device_of(compiled)) + 0.1, *ARGS),
    )


def test_td_coef_in_torch_compile(compiled):
    torch._dynamo.reset()
    sigma = SIGMA.to(device_of(compiled))
    traced = torch.compile(
        lambda sigma: td_coef(sigma, backend=compiled, td_sigma=(0.1, 50.0)),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for noise in (sigma, sigma[:5]):
        eager, other = td_coef(noise, backend=compiled, td_sigma=(0.1, 50.0)), traced(noise)
        assert torch.equal(eager[0], other[0]) and torch.equal(eager[1], other[1])


BAD = {
    "noise of two dimensions": (
        {"noise": torch.ones(2, 1)},
        "td_coef: noise must have shape [B], got [2, 1]",
    ),
    "one step": ({"steps": 1}, "EDM: steps must be at least 2, got 1"),
    "sigma_min of 0": (
        {"sigma_min": 0.0},
        "EDM: sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got 0.0 and "
        "80.0",
    ),
    "sigma_max below sigma_min": (
        {"sigma_max": 0.001},
        "EDM: sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got 0.002 and "
        "0.001",
    ),
    "rho of 0": ({"rho": 0.0}, "EDM: rho must be positive, got 0.0"),
    "sigma_data of 0": (
        {"sigma_data": 0.0},
        "td_coef: sigma_data must be a positive number, got 0.0",
    ),
    "sigma_data of NaN": (
        {"sigma_data": math.nan},
        "td_coef: sigma_data must be a positive number, got nan",
    ),
    "k_idx below 0": ({"k_idx": -1.0}, "td_coef: k_idx must be a positive number, got -1.0"),
    "infinite one_idx": (
        {"one_idx": math.inf},
        "td_coef: one_idx must be a positive number, got inf",
    ),
    "lambda_base below 0": (
        {"lambda_base": -0.5},
        "td_coef: lambda_base must be a number >= 0, got -0.5",
    ),
    "no such precond": ({"precond": "vp"}, "td_coef: precond must be one of edm, ct, got 'vp'"),
    "no such base_weight": (
        {"base_weight": "snr+2"},
        "td_coef: base_weight must be one of karras, uniform, snr, snr+1, truncated-snr, got "
        "'snr+2'",
    ),
    "no such weight": (
        {"weight": "both"},
        "td_coef: weight must be one of pairwise, pairwise_x0, online, none, got 'both'",
    ),
    "no such coupling": ({"coupling": "ddim"}, "coupling must be 'markov' or 'shared', got 'ddim'"),
    "an empty window": (
        {"td_sigma": (3.0, 3.0)},
        "td_coef: td_sigma must be (lo, hi) with lo < hi, got (3.0, 3.0)",
    ),
    "a window of NaN": (
        {"td_sigma": (math.nan, 3.0)},
        "td_coef: td_sigma must be (lo, hi) with lo < hi, got (nan, 3.0)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_td_coef_bad_arguments(backend, what):
    wrong, message = BAD[what]
    arguments = {"noise": torch.ones(2), **wrong}
    arguments["noise"] = arguments["noise"].to(device_of(backend))
    with pytest.raises(ValueError) as error:
        td_coef(**arguments, backend=backend)
    assert str(error.value) == message


@pytest.mark.xdist_group("ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_td_coef_triton_ahead_of_time(capability):
    pytest.importorskip("triton")
    report = {name: facts for name, facts in aot.report(capability).items() if "td_coef" in name}
    assert len(report) == 2 and all(
        facts["stack"] == 0 and facts["local"] == 0 for facts in report.values()
    ), report
