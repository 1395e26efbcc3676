"""The samplers against golden vectors with analytic denoisers, and against the exact solution of
the ODE.
"""

import math
from functools import partial

import pytest
import torch

from helpers import golden_of
from helpers.analytic import gmm, iso
from helpers.heun_step import Steps
from tdkern.networks import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from tdkern.samplers import ablation, euler, heun
from tdkern.schedules import EDM


class Exact(torch.nn.Module):
    """The raw network, of EDM's input and output scaling, whose D is `denoiser`; keeps what it was
    given as x and sigma.
    """

    def __init__(self, denoiser, sigma_data=0.5):
        super().__init__()
        self.denoiser, self.sigma_data, self.seen = denoiser, sigma_data, []

    def forward(self, scaled, c_noise, class_labels=None, augment_labels=None):
        sigma = (4 * c_noise).exp()
        s = sigma.reshape(-1, *[1] * (scaled.ndim - 1))
        total = s**2 + self.sigma_data**2
        x = scaled * total.sqrt()
        self.seen.append((x, sigma))
        return (self.denoiser(x, sigma) - self.sigma_data**2 / total * x) / (
            s * self.sigma_data / total.sqrt()
        )


def test_gmm_probe():
    golden = golden_of("heun_gmm")
    D = gmm(golden)(golden["probe_x"].double(), golden["probe_sigma"])
    torch.testing.assert_close(D, golden["probe_D"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["det", "churn"])
@pytest.mark.parametrize("steps", [3, 5, 9, 18])
@pytest.mark.parametrize("case", [iso, gmm])
def test_heun_golden(case, steps, kind):
    """Every state, and the level of every call, to 1e-12."""
    golden = golden_of(f"heun_{case.__name__}")
    sigmas = EDM(
        steps, float(golden["sigma_min"]), float(golden["sigma_max"]), float(golden["rho"])
    ).sigmas()
    torch.testing.assert_close(sigmas, golden[f"t_steps{steps}"], rtol=1e-12, atol=0)
    churn, noises = {}, iter(golden["noise"].double())
    if kind == "churn":
        churn = {key: float(golden[key]) for key in ("S_churn", "S_min", "S_max", "S_noise")} | {
            "randn_like": lambda x: next(noises)
        }
    calls, states, exact = [], [], case(golden)

    def denoiser(x, sigma):
        calls.append(sigma)
        return exact(x, sigma)

    def callback(seen):
        assert seen["step"] == len(states) and seen["sigma"] == sigmas[len(states)]
        states.append(seen["x"])

    x = heun(denoiser, golden["latents"].double() * sigmas[0], sigmas, callback=callback, **churn)
    torch.testing.assert_close(
        torch.stack([*states, x]), golden[f"{kind}_steps{steps}_x"], rtol=1e-12, atol=1e-12
    )
    calls = torch.stack(calls)
    assert calls.shape == (2 * steps - 1, 4) and (calls == calls[:, :1]).all()
    torch.testing.assert_close(
        calls[:, 0], golden[f"{kind}_steps{steps}_sigma_calls"], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", ["det", "churn"])
@pytest.mark.parametrize("steps", [3, 5, 9, 18])
@pytest.mark.parametrize("case", [iso, gmm])
def test_heun_golden_from_the_raw_output(case, steps, kind):
    """The same through `heun_step`: what the network is asked about, and the result."""
    golden = golden_of(f"heun_{case.__name__}")
    sigmas = EDM(
        steps, float(golden["sigma_min"]), float(golden["sigma_max"]), float(golden["rho"])
    ).sigmas()
    churn, noises = {}, iter(golden["noise"].double())
    if kind == "churn":
        churn = {key: float(golden[key]) for key in ("S_churn", "S_min", "S_max", "S_noise")} | {
            "randn_like": lambda x: next(noises)
        }
    model = Exact(case(golden))
    with Steps() as calls:
        x = heun(EDMPrecond(model), golden["latents"].double() * sigmas[0], sigmas, **churn)
    assert calls.count == len(model.seen) == 2 * steps - 1
    torch.testing.assert_close(x, golden[f"{kind}_steps{steps}_x"][-1], rtol=1e-12, atol=1e-12)
    levels = golden[f"{kind}_steps{steps}_sigma_calls"]
    torch.testing.assert_close(
        torch.stack([sigma for _, sigma in model.seen]),
        levels[:, None].expand(-1, 4),
        rtol=1e-12,
        atol=0,
    )
    for step, (x_hat, _) in enumerate(model.seen[::2]):
        churn = (
            golden["S_noise"]
            * (levels[2 * step] ** 2 - golden[f"t_steps{steps}"][step] ** 2).clamp(min=0).sqrt()
        )
        torch.testing.assert_close(
            x_hat,
            golden[f"{kind}_steps{steps}_x"][step] + churn * golden["noise"][step].double(),
            rtol=1e-12,
            atol=1e-12,
        )


class Small(torch.nn.Module):
    """A network of points with labels, in the dtype it is given."""

    label_dim = 3

    def __init__(self, outputs=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = torch.nn.Linear(8, outputs)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, scaled, c_noise, class_labels, augment_labels):
        given = torch.cat(
            [scaled, c_noise[:, None].to(scaled.dtype), class_labels.to(scaled.dtype)], 1
        )
        return torch.nn.functional.linear(
            given, self.layer.weight.to(scaled.dtype), self.layer.bias.to(scaled.dtype)
        ).tanh()


@pytest.mark.parametrize(
    "churn",
    [{}, {"S_churn": 4.0, "S_min": 0.1, "S_max": 20.0, "S_noise": 1.01}],
    ids=["det", "churn"],
)
@pytest.mark.parametrize("precision", ["float32 net", "float64", "float32", "bfloat16 net"])
@pytest.mark.parametrize("precond", [EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond])
@pytest.mark.parametrize("sampler", [heun, euler])
def test_a_network_and_a_callable_of_it_give_the_same(sampler, precond, precision, churn):
    """To the rounding of the less precise of network and state; whether the last level is 0 or
    not.
    """
    net = precond(Small(8 if precond is iDDPMPrecond else 4))
    if precision == "float64":
        net.double()
    if precision == "bfloat16 net":
        net.dtype = torch.bfloat16
    labels = torch.eye(3)
    x = torch.randn(
        3,
        4,
        dtype=torch.float32 if precision == "float32" else torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    for sigmas in ([20.0, 5.0, 1.0, 0.2, 0.0], [20.0, 5.0, 1.0]):

        def run(denoiser, sigmas=sigmas, **kwargs):
            with Steps() as calls:
                return sampler(
                    denoiser,
                    x * sigmas[0],
                    sigmas,
                    generator=torch.Generator().manual_seed(1),
                    **churn,
                    **kwargs,
                ), calls.count

        shown, other = run(partial(net, class_labels=labels), callback=lambda seen: None)
        # a callable that does not say which levels the network knows is asked at the raised ones
        plain, none = shown, other
        if not (churn and precond is iDDPMPrecond):
            plain, none = run(lambda x, sigma: net(x, sigma, labels))
        fused, count = run(partial(net, class_labels=labels))
        assert none == other == 0 and torch.equal(plain, shown)
        assert count == (len(sigmas) - 1) * (2 if sampler is heun else 1) - (
            sampler is heun and sigmas[-1] == 0
        )
        tolerance = {"float64": 1e-11, "bfloat16 net": 0.1}.get(precision, 2e-5)
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
        assert fused.dtype == x.dtype and not torch.equal(fused, x * sigmas[0])


def test_what_a_network_changes_about_its_denoised_is_kept():
    """A subclass with another D is called as it is; a compiled network is the network that it
    compiles.
    """

    class Guided(EDMPrecond):
        def forward(self, x, sigma, *labels):
            return 2 * super().forward(x, sigma, *labels)

    x = torch.randn(3, 4, dtype=torch.float64)
    for net, count in (
        (Guided(Small()), 0),
        (torch.compile(EDMPrecond(Small()), backend="eager"), 3),
    ):
        with Steps() as calls:
            seen = heun(net, x, [2.0, 1.0, 0.0])
        expected = heun(lambda x, sigma, net=net: net(x, sigma), x, [2.0, 1.0, 0.0])
        assert calls.count == count and torch.allclose(
            seen, expected, rtol=0 if count == 0 else 2e-5, atol=0 if count == 0 else 2e-5
        )


def test_callback_sees_the_denoised_of_the_step():
    golden = golden_of("heun_iso")
    denoiser, sigmas, seen = iso(golden), EDM(5).sigmas(), []
    for sampler in (heun, euler):
        seen.clear()
        sampler(denoiser, golden["latents"].double() * 80, sigmas, callback=seen.append)
        for step in seen:
            assert torch.equal(
                step["denoised"],
                denoiser(step["x"], torch.full((4,), step["sigma"], dtype=torch.float64)),
            )
        assert len(seen) == 5


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(sampler, order):
    """For data N(0, sd^2) the ODE's solution is x sqrt((sd^2 + s^2) / (sd^2 + s0^2)); the error
    falls with the steps^order.
    """
    sd, x0 = 0.5, torch.tensor([[1.0]], dtype=torch.float64)
    exact = ((sd**2 + 0.1**2) / (sd**2 + 4**2)) ** 0.5

    def error(steps):
        sigmas = torch.linspace(4**0.5, 0.1**0.5, steps + 1, dtype=torch.float64) ** 2
        return abs(
            sampler(lambda x, sigma: sd**2 / (sd**2 + sigma[:, None] ** 2) * x, x0, sigmas).item()
            - exact
        )

    assert math.log2(error(200) / error(400)) == pytest.approx(order, abs=0.05)


def test_euler_last_step_is_the_denoised():
    x = euler(
        lambda x, sigma: x / (1 + sigma[:, None] ** 2),
        torch.ones(2, 1, dtype=torch.float64),
        [2.0, 0.0],
    )
    torch.testing.assert_close(x, torch.full((2, 1), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("sampler", [heun, euler])
def test_churn_keeps_the_distribution(sampler):
    """Noise in, noise out: with an exact denoiser the samples' variance stays that of the data."""
    B, sd, sigmas = 100_000, 0.5, EDM(64).sigmas()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(B, 1, dtype=torch.float64, generator=generator) * sigmas[0]
    x = sampler(
        lambda x, sigma: sd**2 / (sd**2 + sigma[:, None] ** 2) * x,
        start,
        sigmas,
        S_churn=10.0,
        generator=generator,
    )
    # discretisation, above 4 standard errors of 0.45 %
    assert abs(x.var() / sd**2 - 1) < (0.02 if sampler is heun else 0.2)
    assert abs((x * start).mean() / x.std() / start.std()) < 0.9  # without churn it is 1


def test_generator_and_global_generator():
    sigmas, x = EDM(6).sigmas(), torch.randn(3, 2, generator=torch.Generator().manual_seed(1)) * 80

    def sample(**noise):
        return heun(lambda x, sigma: x / (1 + sigma[:, None] ** 2), x, sigmas, S_churn=5.0, **noise)

    seeded = [sample(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    torch.manual_seed(0)
    assert torch.equal(seeded[0], seeded[1]) and torch.equal(seeded[0], sample())
    assert not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("sampler", [heun, euler, ablation])
def test_raised_levels_are_those_of_the_network(sampler):
    """sigma_hat = net.round_sigma((1 + gamma) sigma), on both paths (arXiv 2206.00364, line 5).

    The noise is as much as the rounded level needs, and a step that is not raised is left alone.
    """
    net, sigmas, asked = iDDPMPrecond(Small(8).double()).double(), EDM(6, 0.01).sigmas(), []
    sigmas = net.round_sigma(sigmas)
    gamma = 3.0 / 6
    asked_by_forward = []
    net.model.register_forward_pre_hook(
        lambda module, given: asked_by_forward.append(net.u[int(net.M - 1 - given[1][0])].item())
    )
    named = partial(net, class_labels=torch.eye(3))
    x = sigmas[0] * torch.ones(3, 4, dtype=torch.float64)
    raised = [
        net.round_sigma(sigma * (1 + min(gamma, math.sqrt(2) - 1))) if sigma <= 5 else sigma
        for sigma in sigmas[:-1]
    ]
    assert any(
        hat != 1.4142135623730951 * sigma for hat, sigma in zip(raised, sigmas, strict=False)
    )
    noise = []

    def randn_like(x):
        noise.append(torch.ones_like(x))
        return noise[-1]

    options = {"S_churn": 3.0, "S_max": 5.0, "randn_like": randn_like}
    shown = sampler(named, x, sigmas, callback=asked.append, **options)
    fused = sampler(named, x, sigmas, **options)
    torch.testing.assert_close(fused, shown, rtol=1e-10, atol=1e-10)
    per_step = 1 if sampler is euler else 2
    assert asked_by_forward[: 2 * 6 * per_step : per_step][:6] == pytest.approx(
        [float(hat) for hat in raised], rel=1e-12
    )


@pytest.mark.parametrize("S_max", [0.0, 1.0, math.inf])
def test_noise_of_a_step_does_not_depend_on_the_window(S_max):
    draws = []

    def randn_like(x):
        draws.append(x)
        return torch.zeros_like(x)

    heun(
        lambda x, sigma: x / 2,
        torch.ones(1, 1),
        EDM(6).sigmas(),
        S_churn=5.0,
        S_max=S_max,
        randn_like=randn_like,
    )
    assert len(draws) == 6


@pytest.mark.parametrize("sampler", [heun, euler])
def test_state_keeps_its_dtype_and_input(sampler):
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, requires_grad=True)
    out = sampler(lambda x, sigma: (weight * x / 2).float(), x, [2.0, 1.0, 0.0])
    assert out.dtype == torch.float64 and not out.requires_grad
    assert (x == 1).all()
    narrow = sampler(lambda x, sigma: x.double() / 2, torch.ones(0, 3), [2.0, 1.0, 0.0])
    assert narrow.dtype == torch.float32 and narrow.shape == (0, 3)


@pytest.mark.parametrize("sampler", [heun, euler])
def test_bad_sigmas(sampler):
    for sigmas in (
        [80.0],
        [[1.0, 0.0]],
        [1.0, 0.0, 0.0],
        [-1.0, 0.0],
        [2.0, math.inf],
        [math.inf, math.inf, 1.0],
        [1.0, math.nan],
        [math.nan, 1.0],
        [1.0, -0.5],
        [1.0, -0.5, *[0.3] * 1000],
    ):
        with pytest.raises(ValueError, match=f"{sampler.__name__}: sigmas must") as caught:
            sampler(lambda x, sigma: x, torch.ones(1, 1), sigmas)
        assert len(str(caught.value)) < 160
