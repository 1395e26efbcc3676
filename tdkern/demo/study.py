"""The demo's study: every method trained side by side on the same draws, then measured against the exact denoiser."""
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..ema import EMA, edm_decay, target_decay
from ..evaluation.mixture import GaussianMixture, denoiser_error, normal_points, sliced_w2
from ..losses import EDMLoss, TDBatch, TDEDMLoss
from ..networks import MLP, EDMPrecond
from ..samplers import heun
from ..schedules import EDM

METHODS = {
    "EDM": EDMLoss(),
    "TD": TDEDMLoss(),
    "TD, online weight": TDEDMLoss(weight="online"),
    "TD, online, .3<sigma<5": TDEDMLoss(weight="online", td_sigma=(0.3, 5.0)),  # its target network runs on the whole batch all the same
}
BANDS = ((0.02, 0.2, 6), (0.2, 0.4, 2), (0.4, 4.0, 6), (4.0, 12.0, 3), (12.0, 40.0, 3))  # noise levels from, to, and how many are measured
BUDGETS = (4, 6, 9, 12, 18)  # sampling steps
CURVE = 16  # measurements during training


@dataclass(frozen=True)
class Config:
    """What a study is made of; the same values give the same numbers, times apart, if `compute` is given."""

    seeds: int = 8
    iterations: int = 4000
    seed: int = 0
    compute: float | None = None  # iterations of EDM at equal compute, as a multiple; None: the measured cost of a TD step
    batch: int = 16  # of each seed
    width: int = 64
    num_blocks: int = 2
    lr: float = 2e-3  # Adam's, with cosine decay
    ema_halflife: float = 0.02  # of the averaged weights, as a share of the run
    target_ema_tau: float = 0.999
    points: int = 1024  # samples a seed


@dataclass
class Outcome:
    """One method's numbers, seed by seed."""

    iterations: int
    step_ms: float  # median CPU time of a step
    curve_steps: list[int]
    curve: Tensor  # [len(curve_steps), seeds]: error over all noise levels, as training weighs them
    error: Tensor  # [seeds, levels]
    distance: Tensor  # [seeds, len(BUDGETS)]
    samples: Tensor  # [points, 2], of the first seed, with the largest budget


@dataclass
class Study:
    """All methods' outcomes, in the order of the report; the last one is EDM at the default TD's compute."""

    config: Config
    mixture: GaussianMixture
    compute: float
    outcomes: dict[str, Outcome]
    exact_distance: Tensor  # [len(BUDGETS)], of the exact denoiser's samples
    exact_samples: Tensor  # [points, 2]
    random_distance: float  # of as many independent draws of the data


class Levels:
    """The noise levels at which errors are measured: the middles, in log sigma, of the cells that make up BANDS."""

    edges = torch.tensor([lo * (hi / lo) ** (i / n) for lo, hi, n in BANDS for i in range(n)] + [BANDS[-1][1]], dtype=torch.float64)
    sigma = (edges[1:] * edges[:-1]).sqrt()
    band = torch.repeat_interleave(torch.arange(len(BANDS)), torch.tensor([n for *_, n in BANDS]))
    z = (edges.log() - EDMLoss.P_mean) / EDMLoss.P_std
    share = torch.special.ndtr(z).diff()  # of the noise levels that EDM's training draws

    @classmethod
    def by_band(cls, error: Tensor) -> Tensor:
        """[seeds, levels] to [seeds, bands + 1]: the mean in each band, and last over all levels as training weighs them."""
        bands = [error[:, cls.band == i].mean(1) for i in range(len(BANDS))]
        return torch.stack([*bands, cls.overall(error)], 1)

    @classmethod
    def overall(cls, error: Tensor) -> Tensor:
        return error @ cls.share / cls.share.sum()


class Draw(NamedTuple):
    """One step's data and noise, which every method gets."""

    images: Tensor  # [seeds * batch, 2]
    sigma: Tensor  # [seeds * batch] float64
    td: dict[str, Tensor]  # the two noises of TD's pair
    edm: dict[str, Tensor]  # the one noise that gives EDM the very x_t that TD has

    def pair(self, loss: EDMLoss) -> TDBatch:
        """The loss's noisy pair."""
        return loss.pair(self.images, sigma=self.sigma, **(self.td if isinstance(loss, TDEDMLoss) else self.edm))


def draws(config: Config, mixture: GaussianMixture) -> Iterator[Draw]:
    """The study's draws, step after step without end; the same at every call."""
    generator = torch.Generator().manual_seed(config.seed)
    n, loss = config.seeds * config.batch, METHODS["TD"]
    while True:
        images = mixture.sample(n, generator).float()
        sigma = (loss.P_mean + loss.P_std * torch.randn(n, generator=generator, dtype=torch.float64)).exp()
        noise, noise_p = torch.randn(2, *images.shape, generator=generator)
        x_t = loss.pair(images, sigma=sigma, noise=noise, noise_p=noise_p).x_t
        yield Draw(images, sigma, {"noise": noise, "noise_p": noise_p}, {"noise": (x_t - images) / sigma[:, None].float()})


class Run:
    """One method in training: all seeds as one batched network, its averages and its optimizer."""

    def __init__(self, config: Config, loss: EDMLoss, net: torch.nn.Module, iterations: int):
        self.config, self.loss, self.net, self.iterations = config, loss, copy.deepcopy(net), iterations
        self.ema = EMA(net)
        self.target = EMA(net) if isinstance(loss, TDEDMLoss) else None
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
        terms = self.loss.evaluate(self.net, self.target and self.target.module, draw.pair(self.loss))
        # as EDM: a sum over elements, a mean over the batch; the seeds' parameters are apart, so their losses just add up
        (terms.loss.sum() * draw.images.shape[1] / config.batch).backward()
        self.optimizer.step()
        self.ema.update(self.net, edm_decay(config.batch, config.ema_halflife * self.iterations * config.batch, (step + 1) * config.batch))
        if self.target:
            self.target.update(self.net, target_decay(config.target_ema_tau, step))
        self.seconds.append(time.thread_time() - started)

    def measure(self, mixture: GaussianMixture, step: int) -> None:
        """Add a point to the curve, where one is due after so many steps."""
        if step in self.curve_at:
            error = denoiser_error(self.ema.module, mixture, Levels.sigma, num_models=self.config.seeds, n=128)
            self.curve_steps.append(step)
            self.curve.append(Levels.overall(error))


def train(config: Config, mixture: GaussianMixture, losses: dict[str, EDMLoss], iterations: int, desc: str) -> dict[str, Run]:
    """Train methods in turns, step by step, so that a busy machine slows them alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = EDMPrecond(MLP(2, config.width, config.num_blocks, config.seeds), sigma_data=0.5)
    runs = {name: Run(config, loss, net, iterations) for name, loss in losses.items()}
    for step, draw in enumerate(tqdm(islice(draws(config, mixture), iterations), desc, iterations, unit="it")):
        for run in runs.values():
            run.step(draw, step)
            run.measure(mixture, step + 1)
    return runs


def run_study(config: Config) -> Study:
    """Train and measure every method.

    All methods share initial weights, data, noise levels and noise. EDM at equal compute runs for `compute` times the
    iterations, its learning rate and averages stretched with them.

    Args:
        config: the study's.

    Returns:
        A `Study`. Deterministic, apart from the times and, unless `config.compute` is given, EDM at equal compute.

    Raises:
        FloatingPointError: a seed diverged.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are so small that a second thread would only be waited for
    try:
        return _run_study(config)
    finally:
        torch.set_num_threads(threads)


def _run_study(config: Config) -> Study:
    mixture = GaussianMixture.ring()
    runs = train(config, mixture, METHODS, config.iterations, f"{len(METHODS)} methods x {config.seeds} seeds")
    step_ms = {name: 1e3 * torch.tensor(run.seconds, dtype=torch.float64).median().item() for name, run in runs.items()}
    compute = round(max(config.compute or step_ms["TD"] / step_ms["EDM"], 1), 2)
    name = f"EDM, {compute:.2f}x iterations"
    runs |= train(config, mixture, {name: METHODS["EDM"]}, round(compute * config.iterations), "EDM at equal compute")
    step_ms[name] = step_ms["EDM"]

    latents = normal_points(config.points, 2, seed=config.seed + 1000)
    reference = mixture.points(config.points)
    exact_distance, exact_samples = sample_distance(mixture.denoise, 1, latents, reference, BUDGETS)
    outcomes = {}
    for name, run in tqdm(runs.items(), "sampling", unit="method"):
        distance, samples = sample_distance(run.ema.module, config.seeds, latents, reference, BUDGETS)
        error = denoiser_error(run.ema.module, mixture, Levels.sigma, num_models=config.seeds)
        if not (error.isfinite().all() and distance.isfinite().all()):
            raise FloatingPointError(f"run_study: a seed of {name} diverged")
        outcomes[name] = Outcome(run.iterations, step_ms[name], run.curve_steps, torch.stack(run.curve), error, distance, samples)
    random = sliced_w2(mixture.sample(config.points, torch.Generator().manual_seed(config.seed)), reference)
    return Study(config, mixture, compute, outcomes, exact_distance[0], exact_samples, random.item())


def sample_distance(denoiser, num_models: int, latents: Tensor, reference: Tensor, budgets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sliced W2 [num_models, len(budgets)] of Heun samples from the same latents, and the first model's last samples."""
    distances = []
    for steps in budgets:
        sigmas = EDM(steps).sigmas()
        samples = heun(denoiser, sigmas[0] * latents.repeat(num_models, 1), sigmas).unflatten(0, (num_models, -1))
        distances.append(sliced_w2(samples, reference))
    return torch.stack(distances, 1), samples[0]
