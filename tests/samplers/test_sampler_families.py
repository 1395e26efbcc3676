"""DDIM and DDPM, the consistency models' samplers, DPM-Solver++ and UniPC, and EDM's generalised
sampler.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from helpers import golden_of
from helpers.analytic import gmm
from helpers.heun_step import Steps
from tdkern.networks import EDMPrecond, VPPrecond
from tdkern.samplers import (
    SAMPLERS,
    ablation,
    ablation_sigmas,
    ddim,
    ddpm,
    dpmpp,
    euler,
    heun,
    multistep,
    onestep,
    unipc,
)
from tdkern.samplers.generalised import RANGES
from tdkern.schedules import EDM, FlowMatching


def recorded(noises):
    """`randn_like` that gives these noises in turn, as float64."""
    noises = iter(noises)
    return lambda x: next(noises).double()


def halving(x, sigma):
    return x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)))


# DDIM, DDPM


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_the_textbook_step_of_a_vp_path(eta):
    """In x_t = sqrt(abar) x0 + sqrt(1 - abar) eps: DDIM's eq. 12 and 16, and for eta = 1 DDPM's eq.
    11 with beta-tilde.
    """
    T, generator, golden = 12, torch.Generator().manual_seed(0), golden_of("heun_gmm")
    beta = torch.linspace(1e-3, 0.4, T, dtype=torch.float64)
    # abar[t], t = 0 .. T
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
    sigma = (1 / abar - 1).sqrt()
    denoiser = gmm(golden)
    start, *noises = torch.randn(T, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    x = ddpm_x = start * (1 - abar[T]).sqrt()
    for t in range(T, 0, -1):

        def eps_of(x, t=t):
            x0 = denoiser(x / abar[t].sqrt(), sigma[t].expand(4))
            return (x - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()

        z = noises[T - t] if t > 1 else torch.zeros_like(x)
        eps = eps_of(x)
        s = eta * ((1 - abar[t - 1]) / (1 - abar[t])).sqrt() * (1 - abar[t] / abar[t - 1]).sqrt()
        x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        x = abar[t - 1].sqrt() * x0 + (1 - abar[t - 1] - s**2).clamp(min=0).sqrt() * eps + s * z
        tilde = (1 - abar[t - 1]) / (1 - abar[t]) * beta[t - 1]
        ddpm_x = (ddpm_x - beta[t - 1] / (1 - abar[t]).sqrt() * eps_of(ddpm_x)) / (
            1 - beta[t - 1]
        ).sqrt() + tilde.sqrt() * z
    seen = ddim(denoiser, start * sigma[T], sigma.flip(0), eta=eta, randn_like=recorded(noises))
    torch.testing.assert_close(seen, x, rtol=1e-12, atol=1e-12)
    if eta == 1:
        torch.testing.assert_close(seen, ddpm_x, rtol=1e-12, atol=1e-12)
        assert torch.equal(
            seen, ddpm(denoiser, start * sigma[T], sigma.flip(0), randn_like=recorded(noises))
        )


def test_ddim_without_noise_is_euler():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 80
    torch.testing.assert_close(
        ddim(halving, x, EDM(9).sigmas(), randn_like=recorded([])),
        euler(halving, x, EDM(9).sigmas()),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("precond", [EDMPrecond, VPPrecond])
@pytest.mark.parametrize("sampler", [ddpm, partial(ddim, eta=0.0), partial(ddim, eta=0.5)])
def test_ddim_through_heun_step_gives_the_same(sampler, precond):
    """Whether the last level is 0 or not, to rounding; the same draws are made."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4).double()
    net = precond(model)
    model.forward = lambda x, c_noise, *labels, linear=model.forward: (
        linear(x).tanh() * c_noise[:, None].cos()
    )
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20
    for sigmas in ([20.0, 5.0, 1.0, 0.2, 0.0], [20.0, 5.0, 1.0]):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        with Steps() as calls:
            fused = sampler(net, x, sigmas, generator=generators[0])
        assert calls.count == len(sigmas) - 1
        plain = sampler(lambda x, sigma: net(x, sigma), x, sigmas, generator=generators[1])
        torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-11)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_ddpm_draws_the_variance_of_its_chain():
    """With Gaussian data's D = c x a step is x (k + (1 - k) c) + s noise, k = r^2 and s = sigma_tau
    sqrt(1 - r^2).
    """
    B, sd, sigmas, generator = 100_000, 0.5, EDM(16).sigmas(), torch.Generator().manual_seed(0)
    start = torch.randn(B, 1, dtype=torch.float64, generator=generator) * sigmas[0]
    x = ddpm(
        lambda x, sigma: sd**2 / (sd**2 + sigma[:, None] ** 2) * x,
        start,
        sigmas,
        generator=generator,
    )
    variance = sigmas[0] ** 2
    for sigma, sigma_tau in pairwise(sigmas):
        k, c = (sigma_tau / sigma) ** 2, sd**2 / (sd**2 + sigma**2)
        variance = (k + (1 - k) * c) ** 2 * variance + sigma_tau**2 * (1 - k)
    assert abs(x.var() / variance - 1) < 0.02  # 4 standard errors
    assert abs((x * start).mean() / x.std() / start.std()) < 0.02  # little is left of the start


# consistency models


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_consistency_samplers_golden(case):
    """Every input of the denoiser, its level, and the result."""
    golden = golden_of("cm_samplers")
    get = {
        key.removeprefix(f"{case}_"): value
        for key, value in golden.items()
        if key.startswith(f"{case}_")
    }
    sigmas = EDM(
        int(get["steps"]), float(golden["t_min"]), float(golden["t_max"]), float(golden["rho"])
    ).sigma(get["ts"])
    D, calls = iter(get["D"].double()), []

    def denoiser(x, sigma):
        calls.append((x, sigma))
        return next(D)

    start = get["latents"].double() * sigmas[0]
    x = multistep(
        denoiser, start, sigmas, sigma_min=float(golden["t_min"]), randn_like=recorded(get["noise"])
    )
    torch.testing.assert_close(
        torch.stack([x for x, _ in calls]), get["x_in"], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        torch.stack([sigma for _, sigma in calls]),
        get["t_in"][:, None].expand(-1, 4),
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(x, get["out"], rtol=1e-12, atol=1e-12)

    calls.clear()
    x = onestep(lambda x, sigma: calls.append((x, sigma)) or get["D"][0].double(), start, sigmas)
    ((seen, sigma),) = calls
    torch.testing.assert_close(seen, get["onestep_x_in"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sigma, get["onestep_t_in"].expand(4), rtol=1e-12, atol=0)
    torch.testing.assert_close(x, get["onestep_out"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_consistency_sampling_from_the_raw_output_golden(case):
    """With D clamped to [-1, 1], from c_skip x + c_out F with the boundary condition's scalings."""
    golden = golden_of("cm_karras_sample")
    get = {
        key.removeprefix(f"{case}_"): value
        for key, value in golden.items()
        if key.startswith(f"{case}_")
    }
    lo, sd = float(golden["sigma_min"]), float(golden["sigma_data"])
    sigmas = EDM(int(get["steps"]), lo, float(golden["sigma_max"]), float(golden["rho"])).sigma(
        get["ts"]
    )
    F, inputs = iter([*get["F"].double(), get["F"][0].double()]), []

    def denoiser(x, sigma):
        s = sigma.reshape(-1, 1, 1, 1)
        inputs.append(x / (s**2 + sd**2).sqrt())
        return sd**2 / ((s - lo) ** 2 + sd**2) * x + (s - lo) * sd / (s**2 + sd**2).sqrt() * next(F)

    start = get["latents"].double() * sigmas[0]
    x = multistep(
        denoiser, start, sigmas, sigma_min=lo, clip_denoised=True, randn_like=recorded(get["noise"])
    )
    torch.testing.assert_close(torch.stack(inputs), get["net_in"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x, get["out"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        onestep(denoiser, start, sigmas, clip_denoised=True),
        get["onestep_out"],
        rtol=1e-12,
        atol=1e-12,
    )


def test_multistep_adds_no_noise_at_the_end():
    x = torch.ones(2, 1, dtype=torch.float64)
    for last in (0.0, 0.001, 0.002):
        assert torch.equal(
            multistep(lambda x, sigma: x / 2, x, [80.0, last], randn_like=None), x / 2
        )
    assert not torch.equal(multistep(lambda x, sigma: x / 2, x, [80.0, 1.0]), x / 2)
    clipped = multistep(
        lambda x, sigma: x / 2,
        x,
        [80.0, 1.0],
        clip_denoised=True,
        randn_like=lambda x: 9 * torch.ones_like(x),
    )
    assert torch.equal(clipped, x)


def test_onestep_takes_its_one_level_alone():
    x = 80 * torch.ones(2, 1, dtype=torch.float64)
    for sigmas in ([80.0], torch.tensor([80.0])):
        assert torch.equal(onestep(halving, x, sigmas), onestep(halving, x, [80.0, 0.0]))


# DPM-Solver++(2M), UniPC


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("name", ["dpmpp", "unipc1", "unipc2", "unipc3"])
def test_few_step_solvers_agree_with_diffusers(name, steps):
    """The last denoiser's input and the sample, against diffusers 0.42.1 on the mixture of
    heun_gmm; its DPM-Solver++ casts to float32.
    """
    golden, sigmas, seen = golden_of("heun_gmm"), EDM(steps).sigmas(), []
    sampler = dpmpp if name == "dpmpp" else partial(unipc, order=int(name[-1]))
    x = sampler(
        gmm(golden),
        golden["latents"].double() * sigmas[0],
        sigmas,
        callback=lambda step: seen.append(step["x"]),
    )
    tolerance = 2e-6 if name == "dpmpp" else 1e-12
    torch.testing.assert_close(
        torch.stack([seen[-1], x]),
        golden_of("fewstep_diffusers")[f"{name}_steps{steps}_x"],
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize(
    ("sampler", "low", "high"),
    [
        (partial(ddim, eta=0.0), 1, 1),
        (dpmpp, 2, 2),
        (partial(unipc, order=1), 2, 2),
        (unipc, 3, 3),
        (partial(unipc, order=3), 3, 4),
        (partial(ablation, alpha=0.5), 2, 2),
    ],
)
def test_order_of_convergence(sampler, low, high):
    """On the mixture, against Heun's method of very many steps, extrapolated.

    UniPC of order 3 has 4, but for its first step, which has 3.
    """
    golden = golden_of("heun_gmm")
    denoiser, start = gmm(golden), golden["latents"][:1].double() * 10

    def sample(sampler, steps):
        return sampler(
            denoiser,
            start,
            torch.linspace(10 ** (1 / 7), 0.1 ** (1 / 7), steps + 1, dtype=torch.float64) ** 7,
        )

    exact = (4 * sample(heun, 1000) - sample(heun, 500)) / 3
    order = math.log2(
        (sample(sampler, 100) - exact).abs().max() / (sample(sampler, 200) - exact).abs().max()
    )
    assert low - 0.25 < order < high + 0.25


# EDM's generalised sampler


def ablated(golden, discretization, **options):
    sigmas = ablation_sigmas(discretization, int(golden["num_steps"]))
    lo, hi = RANGES[discretization]
    return ablation(
        gmm(golden),
        golden["latents"].double() * sigmas[0],
        sigmas,
        sigma_min=lo,
        sigma_max=hi,
        **options,
    )


# the discretizations, schedules and scalings of the published code
PUBLISHED = ("vp", "ve", "iddpm", "edm")


@pytest.mark.parametrize("discretization", PUBLISHED)
def test_ablation_golden(discretization):
    """Every solver, schedule and scaling."""
    golden = golden_of("heun_ablation")
    cases = [
        key.removeprefix("x__").split("_")
        for key in golden
        if key.startswith("x__") and key.count("_") == 5
    ]
    cases = [
        (solver, schedule, scaling)
        for solver, schedule, disc, scaling in cases
        if disc == discretization
    ]
    assert len(cases) == 12
    for solver, schedule, scaling in cases:
        x = ablated(golden, discretization, solver=solver, schedule=schedule, scaling=scaling)
        torch.testing.assert_close(
            x, golden[f"x__{solver}_{schedule}_{discretization}_{scaling}"], rtol=1e-12, atol=1e-12
        )


def test_ablation_golden_alpha_and_churn():
    golden = golden_of("heun_ablation")
    x = ablated(golden, "edm", alpha=float(golden["alpha_var"]))
    torch.testing.assert_close(
        x, golden["x__alpha_var_heun_linear_edm_none"], rtol=1e-12, atol=1e-12
    )
    churn = {key: float(golden[key]) for key in ("S_churn", "S_min", "S_max", "S_noise")}
    x = ablated(
        golden, "vp", schedule="vp", scaling="vp", randn_like=recorded(golden["noise"]), **churn
    )
    torch.testing.assert_close(x, golden["x__churn_heun_vp_vp_vp"], rtol=1e-12, atol=1e-12)


def test_ablation_is_heun_by_default_and_stays_in_edms_state():
    golden = golden_of("heun_gmm")
    sigmas = torch.tensor([20.0, 4.0, 1.0, 0.3], dtype=torch.float64)  # does not end at 0
    denoiser, start = gmm(golden), golden["latents"].double() * 20
    torch.testing.assert_close(
        ablation(denoiser, start, sigmas), heun(denoiser, start, sigmas), rtol=1e-12, atol=1e-12
    )
    fine, seen = torch.linspace(20**0.5, 0.3**0.5, 401, dtype=torch.float64) ** 2, []
    x = ablation(denoiser, start, fine, schedule="vp", scaling="vp", callback=seen.append)
    torch.testing.assert_close(x, heun(denoiser, start, fine), rtol=1e-3, atol=1e-3)
    for step in (seen[0], seen[200]):
        torch.testing.assert_close(
            step["denoised"],
            denoiser(step["x"], torch.full((4,), step["sigma"], dtype=torch.float64)),
            rtol=1e-9,
            atol=1e-9,
        )


def test_ablation_sigmas_golden():
    """Of iDDPM, single precision, as in a default run of the published code, moves them by less
    than 1e-3.
    """
    golden = golden_of("heun_ablation")
    for discretization in PUBLISHED:
        sigmas = ablation_sigmas(discretization, 6)
        torch.testing.assert_close(
            sigmas[:-1], golden[f"sigma_steps__{discretization}"], rtol=1e-11, atol=0
        )
        assert sigmas[-1] == 0
    torch.testing.assert_close(
        ablation_sigmas("iddpm", 6)[:-1],
        golden["sigma_steps__iddpm_f32alphabar"],
        rtol=1e-3,
        atol=0,
    )
    narrow = [ablation_sigmas(discretization, 6, 0.1, 20.0, 5.0) for discretization in RANGES]
    for sigmas in narrow:
        assert len(sigmas) == 7 and (sigmas.diff() < 0).all()
        # iDDPM's are the nearest
        torch.testing.assert_close(
            sigmas[[0, 5]], torch.tensor([20.0, 0.1], dtype=torch.float64), rtol=0.05, atol=0
        )
    with pytest.raises(
        ValueError,
        match=r"ablation: no VP path rises from sigma\(0.001\) = 0.3 to sigma\(1\) = 20.0; take a "
        r"lower sigma_min",
    ):
        ablation_sigmas("vp", 6, 0.3, 20.0)
    with pytest.raises(
        ValueError,
        match="ablation_sigmas: discretization must be one of vp, ve, iddpm, edm, flow, got "
        "'cosine'",
    ):
        ablation_sigmas("cosine", 6)


def test_ablation_sigmas_of_flow():
    """Evenly spread times, up to t = 1 where it is asked for; of no other discretization."""
    torch.testing.assert_close(ablation_sigmas("flow", 6), FlowMatching().sigmas(6))
    to_noise = ablation_sigmas("flow", 6, 0.25, math.inf)
    t = torch.linspace(1, 0.2, 6, dtype=torch.float64)
    torch.testing.assert_close(to_noise[:-1], t / (1 - t))
    for discretization in PUBLISHED:
        with pytest.raises(
            ValueError, match=r"EDM: sigma_min and sigma_max must .* got 0.25 and inf"
        ):
            ablation_sigmas(discretization, 6, 0.25, math.inf)
    with pytest.raises(ValueError, match="EDM: sigma_min and sigma_max must"):
        ablation_sigmas("flow", 6, 3.0, 2.0)


# all


class Sine(torch.nn.Module):
    def forward(self, scaled, *_):
        return scaled.sin()


ALL = [ddim, ddpm, dpmpp, unipc, onestep, multistep, ablation]


@pytest.mark.parametrize("sampler", ALL)
def test_state_keeps_its_dtype_and_input_and_the_callback_sees_every_step(sampler):
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, requires_grad=True)
    seen = []
    out = sampler(
        lambda x, sigma: (weight * halving(x, sigma)).float(),
        x,
        [2.0, 1.0, 0.5, 0.0],
        callback=seen.append,
    )
    assert out.dtype == torch.float64 and not out.requires_grad and (x == 1).all()
    assert [(step["step"], step["sigma"]) for step in seen] == (
        [(0, 2.0)] if sampler is onestep else [(0, 2.0), (1, 1.0), (2, 0.5)]
    )
    for step in seen:
        torch.testing.assert_close(
            step["denoised"],
            halving(step["x"], torch.full((2,), step["sigma"])).detach(),
            rtol=1e-6,
            atol=1e-6,
        )
    assert sampler(halving, torch.ones(0, 3), [2.0, 1.0, 0.0]).shape == (0, 3)
    # no state of the fused path
    half = sampler(EDMPrecond(Sine()), torch.ones(2, 3, dtype=torch.bfloat16), [2.0, 1.0, 0.0])
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("sampler", [ddpm, multistep])
def test_noise_comes_from_the_generator(sampler):
    def sample(**noise):
        return sampler(halving, torch.ones(3, 2), [5.0, 2.0, 1.0, 0.0], **noise)

    seeded = [sample(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    torch.manual_seed(0)
    assert torch.equal(seeded[0], seeded[1]) and torch.equal(seeded[0], sample())
    assert not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("sampler", ALL)
def test_bad_arguments(sampler):
    name = sampler.__name__
    for sigmas in (
        [] if sampler is onestep else [80.0],
        [[1.0, 0.0]],
        [1.0, 0.0, 0.0],
        [1.0, math.nan],
        *([[1.0, 2.0, 0.0], [1.0, 1.0, 0.0]] if sampler is not ablation else ()),
    ):
        with pytest.raises(ValueError, match=f"{name}: sigmas must"):
            sampler(halving, torch.ones(1, 1), sigmas)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (ddim, {"eta": 1.1}, r"ddim: eta must be in \[0, 1\], got 1.1"),
        (unipc, {"order": 4}, "unipc: order must be 1, 2 or 3, got 4"),
        (multistep, {"sigma_min": -1.0}, "multistep: sigma_min must be at least 0, got -1.0"),
        (ablation, {"solver": "rk4"}, "ablation: solver must be one of euler, heun, got 'rk4'"),
        (
            ablation,
            {"schedule": "cosine"},
            "ablation: schedule must be one of vp, ve, linear, flow, got 'cosine'",
        ),
        (ablation, {"scaling": "ve"}, "ablation: scaling must be one of vp, none, flow, got 've'"),
        (heun, {"time": "t"}, "heun: time must be one of sigma, flow, got 't'"),
        (ablation, {"schedule": "vp", "sigma_min": 0.3}, "ablation: no VP path rises from"),
        (ablation, {"S_churn": -1.0}, "ablation: S_churn must be a number >= 0, got -1.0"),
        (heun, {"S_churn": math.nan}, "heun: S_churn must be a number >= 0, got nan"),
        (ablation, {"alpha": 0.0}, r"ablation: alpha must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_options(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(halving, torch.ones(1, 1), [1.0, 0.0], **options)


# the registry


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_registry_says_what_the_samplers_do(name):
    """How often they ask the network, whether they take a level twice, and the fewest steps."""
    kind, asked = SAMPLERS[name], []

    def denoiser(x, sigma):
        asked.append(sigma[0].item())
        return halving(x, sigma)

    x = torch.randn(2, 3, dtype=torch.float64)
    for steps in (kind.least_steps, 5):
        asked.clear()
        sigmas = EDM(steps + kind.ends_at_sigma_min).sigmas()
        kind.sample(denoiser, 80 * x, sigmas[:-1] if kind.ends_at_sigma_min else sigmas)
        assert len(asked) == kind.evaluations(steps)
        assert (set(asked) == {80.0}) == (kind.from_one_level or steps == 1)
    twice = [2.0, 1.0, 1.0, 0.0]
    if kind.repeats:
        kind.sample(denoiser, x, twice)
    elif not kind.from_one_level:
        with pytest.raises(ValueError, match="sigmas must fall"):
            kind.sample(denoiser, x, twice)
