"""The demo's study: every method trained side by side on the same draws, then measured.

Errors are measured against the exact denoiser.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import signature
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..ema import EMA, edm_decay, target_decay
from ..evaluation.mixture import GaussianMixture, denoiser_error, normal_points, sliced_w2
from ..losses import Loss, TDBatch
from ..networks import MLP
from .families import STUDY, Family, Levels

CURVE = 16  # measurements during training


@dataclass(frozen=True)
class Config:
    """What a study is made of.

    The same values give the same numbers, times apart, if `compute` is given.
    """

    seeds: int = 8
    iterations: int = 4000
    seed: int = 0
    # iterations of the baseline at equal compute, as a multiple; None: the measured cost of a TD
    # step
    compute: float | None = None
    batch: int = 16  # of each seed
    width: int = 64
    num_blocks: int = 2
    lr: float = 2e-3  # Adam's, with cosine decay
    ema_halflife: float = 0.02  # of the averaged weights, as a share of the run
    target_ema_tau: float = 0.999
    points: int = 1024  # samples of each seed


@dataclass
class Outcome:
    """One method's numbers, seed by seed."""

    iterations: int
    step_ms: float  # median CPU time of a step
    curve_steps: list[int]
    # [len(curve_steps), seeds]: error over all noise levels, as training weighs them, or sample
    # distance
    curve: Tensor
    error: Tensor  # [seeds, levels]
    distance: Tensor  # [seeds, budgets]
    samples: Tensor  # [points, 2], of the first seed, with the largest budget


@dataclass
class Study:
    """All methods' outcomes, in the order of the report.

    The last one is the baseline at the default TD's compute.
    """

    family: Family
    config: Config
    mixture: GaussianMixture
    compute: float
    outcomes: dict[str, Outcome]
    exact_distance: Tensor  # [budgets], of the exact denoiser's samples
    exact_samples: Tensor  # [points, 2]
    random_distance: float  # of as many independent draws of the data


class Draw(NamedTuple):
    """One step's data and noise, which every method gets."""

    images: Tensor  # [seeds * batch, 2]
    level: dict[str, Tensor]  # [seeds * batch], under the name that `pair` has for it
    path: dict[str, Tensor]  # the two noises of a pair on a Markov path
    noise: dict[str, Tensor]  # the one noise that gives all others the very x_t of that pair

    def pair(self, loss: Loss) -> TDBatch:
        """The loss's noisy pair."""
        return loss.pair(
            self.images, **self.level, **(self.path if _on_a_path(loss) else self.noise)
        )


def _on_a_path(loss: Loss) -> bool:
    draws_both = "noise_p" in signature(loss.pair).parameters
    return draws_both and getattr(loss, "coupling", "shared") != "shared"


def draws(config: Config, mixture: GaussianMixture, family: Family) -> Iterator[Draw]:
    """The study's draws, step after step without end; the same at every call."""
    generator = torch.Generator().manual_seed(config.seed)
    n, loss = config.seeds * config.batch, family.losses["TD"]
    while True:
        images = mixture.sample(n, generator).float()
        level = family.draw(n, generator)
        noise, noise_p = torch.randn(2, *images.shape, generator=generator)
        draw = Draw(images, level, {"noise": noise, "noise_p": noise_p}, {"noise": noise})
        batch = draw.pair(loss)
        yield draw._replace(noise={"noise": (batch.x_t - images) / batch.sigma[:, None].float()})


class Run:
    """One method in training: all seeds as one batched network, its averages and its optimizer."""

    def __init__(self, config: Config, loss: Loss, net: torch.nn.Module, iterations: int):
        self.config = config
        self.loss = loss
        self.net = copy.deepcopy(net)
        self.iterations = iterations
        self.ema, self.target = EMA(net), EMA(net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr, fused=True)
        self.seconds, self.curve_steps, self.curve = [], [], []
        self.curve_at = {round(iterations * (i + 1) / CURVE) for i in range(CURVE)}

    def step(self, draw: Draw, step: int) -> None:
        """One training step, counted from 0, with its CPU time."""
        started = time.thread_time()
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * (1 + math.cos(math.pi * step / self.iterations)) / 2
        self.optimizer.zero_grad()
        batch = draw.pair(self.loss)
        # as EDM: a sum over elements, a mean over the batch; the seeds' parameters are apart, so
        # their losses just add up
        scale = draw.images.shape[1] / config.batch
        terms = self.loss.evaluate(self.net, self.target.module, batch, gradient_scale=scale)
        terms.loss.sum().backward()
        self.optimizer.step()
        self.ema.update(
            self.net,
            edm_decay(
                config.batch,
                config.ema_halflife * self.iterations * config.batch,
                (step + 1) * config.batch,
            ),
        )
        if batch.x_tp is not None:
            self.target.update(self.net, target_decay(config.target_ema_tau, step))
        self.seconds.append(time.thread_time() - started)

    def measure(self, step: int, follow: Callable[[torch.nn.Module], Tensor]) -> None:
        """Add a point to the curve, where one is due after so many steps."""
        if step in self.curve_at:
            self.curve_steps.append(step)
            self.curve.append(follow(self.ema.module))


def train(
    config: Config,
    mixture: GaussianMixture,
    family: Family,
    losses: dict[str, Loss],
    iterations: int,
    desc: str,
) -> dict[str, Run]:
    """Train methods in turns, step by step, so that a busy machine slows them alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = family.network(MLP(2, config.width, config.num_blocks, config.seeds))
    levels, data = family.levels, Samples(config, mixture)

    def follow(net: torch.nn.Module) -> Tensor:
        if family.follow_samples:
            return data.distance(net, config.seeds, family, family.budgets[:1])[0][:, 0]
        return levels.overall(
            denoiser_error(net, mixture, levels.sigma, num_models=config.seeds, n=128)
        )

    runs = {name: Run(config, loss, net, iterations) for name, loss in losses.items()}
    for step, draw in enumerate(
        tqdm(islice(draws(config, mixture, family), iterations), desc, iterations, unit="it")
    ):
        for run in runs.values():
            run.step(draw, step)
            run.measure(step + 1, follow)
    return runs


def run_study(config: Config, family: Family = STUDY) -> Study:
    """Train and measure every method.

    All methods share initial weights, data, noise levels and noise. The baseline at equal compute
    runs for `compute` times the iterations, its learning rate and averages stretched with them.

    Args:
        config: the study's.
        family: what is trained and how it is sampled; its own `config` overrides the study's.

    Returns:
        A `Study`. Deterministic, apart from the times and, unless `config.compute` is given, the
        baseline at equal compute.

    Raises:
        FloatingPointError: a seed diverged.
    """
    threads = torch.get_num_threads()
    # the matrices are so small that a second thread would only be waited for
    torch.set_num_threads(1)
    try:
        return _run_study(replace(config, **family.config), family)
    finally:
        torch.set_num_threads(threads)


def _run_study(config: Config, family: Family) -> Study:
    mixture = GaussianMixture.ring()
    runs, step_ms, compute = _train_all(config, mixture, family)
    data, exact = Samples(config, mixture), family.exact(mixture)
    exact_distance, exact_samples = data.distance(exact, 1, family, family.budgets)
    outcomes = {}
    for name, run in tqdm(runs.items(), "sampling", unit="method"):
        distance, samples = data.distance(run.ema.module, config.seeds, family, family.budgets)
        error = denoiser_error(
            run.ema.module, mixture, Levels.sigma, num_models=config.seeds, exact=exact
        )
        if not (error.isfinite().all() and distance.isfinite().all()):
            raise FloatingPointError(f"run_study: a seed of {name} diverged")
        outcomes[name] = Outcome(
            run.iterations,
            step_ms[name],
            run.curve_steps,
            torch.stack(run.curve),
            error,
            distance,
            samples,
        )
    random = sliced_w2(
        mixture.sample(config.points, torch.Generator().manual_seed(config.seed)), data.reference
    )
    return Study(
        family, config, mixture, compute, outcomes, exact_distance[0], exact_samples, random.item()
    )


def _train_all(
    config: Config, mixture: GaussianMixture, family: Family
) -> tuple[dict[str, Run], dict[str, float], float]:
    """Every method's run, the last of which is the baseline at the compute of TD, the median time
    of their steps in ms, and that compute as a multiple of the baseline's.
    """
    losses = family.losses
    baseline = next(iter(losses))
    desc = f"{len(losses)} methods x {config.seeds} seeds"
    runs = train(config, mixture, family, losses, config.iterations, desc)
    step_ms = {
        name: 1e3 * torch.tensor(run.seconds, dtype=torch.float64).median().item()
        for name, run in runs.items()
    }
    compute = round(max(config.compute or step_ms["TD"] / step_ms[baseline], 1), 2)
    longer, name = round(compute * config.iterations), f"{baseline}, {compute:.2f}x iterations"
    alone = {name: losses[baseline]}
    runs |= train(config, mixture, family, alone, longer, f"{baseline} at equal compute")
    step_ms[name] = step_ms[baseline]
    return runs, step_ms, compute


class Samples:
    """The latents that samplers start from, and the data that samples are compared with."""

    def __init__(self, config: Config, mixture: GaussianMixture):
        self.seed = config.seed
        self.latents = normal_points(config.points, 2, seed=config.seed + 1000)
        self.reference = mixture.points(config.points)

    def distance(
        self, denoiser, num_models: int, family: Family, budgets: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Sliced W2 [num_models, len(budgets)] of samples, and the first model's last ones.

        Latents and noise are the same for every model and call.
        """
        distances = []
        for steps in budgets:
            sigmas = family.sigmas(steps)
            generator = torch.Generator().manual_seed(self.seed)
            noise = {}
            if "randn_like" in signature(family.sampler).parameters:
                noise["randn_like"] = lambda x, generator=generator: torch.randn(
                    self.latents.shape, generator=generator, dtype=x.dtype
                ).repeat(num_models, 1)
            samples = family.sampler(
                denoiser, sigmas[0] * self.latents.repeat(num_models, 1), sigmas, **noise
            ).unflatten(0, (num_models, -1))
            distances.append(sliced_w2(samples, self.reference))
        return torch.stack(distances, 1), samples[0]
