"""Every family of the TD loss for the tests, each beside its textbook: levels, predictions, means
and weights written out by hand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tdkern.losses import TDCTLoss, TDDDPMLoss, TDEDMLoss, TDFlowLoss, TDVELoss, TDVPLoss

SD = 0.5  # sigma_data
BIASED = (0.5, 1.0, 2.0, 4.0)  # the noise levels of `Family.bias`, which docs/families.md has too


def column(values, like):
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Raw:
    """A network whose raw output is given, and which fits whatever loss asks."""

    def __init__(self, out, loss):
        self.out, self.preconditioning = out, loss.preconditioning

    def __call__(self, *_, raw, **__):
        assert raw
        return self.out


@dataclass
class Family:
    """A loss and the textbook of its path.

    make: of (coupling, prediction, weight, eta) the TD loss. levels: of times, (alpha, sigma).
        steps: (tau - t, t' - t).
    times: where the tests look; the last has no TD term. etas: of the means, None being the
        coupling's own. argument: of `pair`, the time.
    base: what the base loss compares.
    bias: in %, how far "shared" noise brings the target's slope off at the noise levels BIASED.
    """

    name: str
    make: Callable
    levels: Callable
    steps: tuple[float, float]
    times: list[float]
    predictions: tuple[str, ...]
    etas: tuple = (None, 0.0)
    argument: str = "t"
    base: str = "denoise"
    bias: tuple[float, ...] = ()

    def loss(self, coupling="markov", prediction=None, weight="pairwise", eta=None):
        return self.make(coupling, prediction or self.predictions[0], weight, eta)

    def pair(self, loss, x0, t, **noises):
        return loss.pair(x0, **{self.argument: t}, **noises)

    def four(self, t):
        """alpha and sigma [4, B] at t, tau, t', tau'; the last two held on the path, where no TD
        term reads them.
        """
        tau, p = self.steps
        return self.levels(torch.stack([t, t + tau, t + p, t + p + tau]))


def ddpm(beta_schedule, T, k, bias):
    def levels(t):
        if beta_schedule == "linear":
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        else:
            f = torch.tensor(
                [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)],
                dtype=torch.float64,
            )
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])[
            t.long().clamp(min=0)
        ]
        return abar.sqrt(), (1 - abar).sqrt()

    return Family(
        f"ddpm {beta_schedule} T={T} k={k}",
        lambda coupling, prediction, weight, eta: TDDDPMLoss(
            T,
            k,
            prediction=prediction,
            beta_schedule=beta_schedule,
            terminal="simple",
            coupling=coupling,
            weight=weight,
            eta=eta,
        ),
        levels,
        (-1, -k),
        [0.95 * T // 1, T // 2, k + 1, k],
        ("eps", "x0", "v"),
        bias=bias,
    )


def continuous(name, make, levels, t_min, t_max, prediction, bias):
    h = (t_max - t_min) / 17
    return Family(
        name,
        lambda coupling, prediction, weight, eta: make(coupling=coupling, weight=weight, eta=eta),
        levels,
        (-h, -h),
        [t_max, 0.5, t_min + 2.1 * h, t_min + 1.9 * h],
        (prediction,),
        bias=bias,
    )


def vp(t):
    t = t.clamp(min=1e-5)
    abar = torch.exp(-(19.9 * t**2 / 2 + 0.1 * t))
    return abar.sqrt(), (1 - abar).sqrt()


def ve(t):
    return torch.ones_like(t), 0.02 * 5000 ** t.clamp(min=0)


def flow(t):
    t = t.clamp(min=1e-3)
    return 1 - t, t


def karras(steps):
    return lambda i: (
        torch.ones_like(i),
        (80 ** (1 / 7) + i.clamp(max=steps - 1) / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7)))
        ** 7,
    )


FAMILIES = [
    ddpm("linear", 1000, 1, bias=(0.4, 0.4, 0.5, 0.6)),
    ddpm("cosine", 50, 3, bias=(13, 17, 23, 40)),
    continuous("vp", TDVPLoss, vp, 1e-5, 1.0, "eps", bias=(30, 34, 37, 45)),
    continuous("ve", TDVELoss, ve, 0.0, 1.0, "score", bias=(17, 39, 56, 62)),
    continuous("flow", TDFlowLoss, flow, 1e-3, 0.999, "velocity", bias=(14, 22, 29, 41)),
    Family(
        "edm",
        lambda coupling, prediction, weight, eta: TDEDMLoss(coupling=coupling, weight=weight),
        karras(18),
        (0.25, 1.0),
        [0.0, 6.3, 15.5, 16.0],
        ("edm",),
        (None,),
        "index",
        bias=(22, 51, 69, 68),
    ),
    Family(
        "ct",
        lambda coupling, prediction, weight, eta: TDCTLoss(coupling=coupling, weight=weight),
        karras(40),
        (0.25, 1.0),
        [0.0, 20.0, 37.0, 38.0],
        ("ct",),
        (None,),
        "index",
        "consistency",
    ),
]


def denoised(prediction, x, F, alpha, sigma):
    """D and its slope in F, of a state x of the path itself."""
    if prediction in ("edm", "ct"):
        shifted = sigma - 0.002 if prediction == "ct" else sigma
        slope = SD * shifted / (SD**2 + sigma**2).sqrt()
        return SD**2 / (SD**2 + shifted**2) * x + slope * F, slope
    slope = {
        "x0": torch.ones_like(sigma),
        "eps": -sigma / alpha,
        "v": -sigma,
        "velocity": -sigma,
        "score": sigma,
    }[prediction]
    return {"x0": 0 * x, "eps": x / alpha, "v": alpha * x, "velocity": x, "score": x}[
        prediction
    ] + slope * F, slope


def drift(alpha_t, sigma_t, alpha_tau, sigma_tau, eta):
    """(A, kappa) of DDPM's posterior (eta = 1) or DDIM's step (eta = 0)."""
    kappa = sigma_tau / sigma_t
    kappa = kappa if eta == 0 else kappa**2 * alpha_t / alpha_tau
    return alpha_tau - kappa * alpha_t, kappa


def draws(family):
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor(family.times, dtype=torch.float64)
    x0, noise, F, F_p = torch.randn(4, len(t), 3, dtype=torch.float64, generator=generator)
    return t, x0 / 2, noise, F, F_p


def textbook(family, coupling, eta, prediction, weight, batch, t, F, F_p):
    """td and base [B], from the path's own states, four means, and the weights' definitions."""
    alpha, sigma = family.four(t)
    eta = {"markov": 1, "shared": 0}[coupling] if eta is None else eta
    x0, sides = batch.x0, []
    for side, (x, out) in enumerate(((batch.x_t, F), (batch.x_tp, F_p))):
        levels = [
            column(level, x0)
            for level in (
                alpha[2 * side],
                sigma[2 * side],
                alpha[2 * side + 1],
                sigma[2 * side + 1],
            )
        ]
        state = levels[0] * x
        A, kappa = drift(*levels, eta)
        D, slope = denoised(prediction, state, out, *levels[:2])
        sides.append((A * x0 + kappa * state, A * D + kappa * state, D, A[:, 0], slope[:, 0]))
    (mu, model, D, A, c), (mu_p, model_p, D_p, A_p, c_p) = sides
    delta = (mu - mu_p) - (model - model_p)
    w_td = {
        "pairwise": 1 / ((A * c) ** 2 + (A_p * c_p) ** 2),
        "pairwise_x0": 1 / (A**2 + A_p**2).clamp(min=0.01),
        "online": 1 / ((A * c) ** 2).clamp(min=1e-8),
        "none": torch.ones_like(A),
    }[weight]
    valid = torch.arange(len(t)) < len(t) - 1
    base = (x0 - D) if family.base == "denoise" else (D_p - D)
    w = torch.ones_like(c) if family.name == "ct" else c**-2
    return (
        torch.where(valid, w_td * delta.square().mean(1), 0.0),
        (0.5 + (~valid).double()) * w * base.square().mean(1),
        valid,
    )
