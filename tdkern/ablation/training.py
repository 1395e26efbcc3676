"""One job: a method trained on a problem from one seed, and measured."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import derive_seed
from ..demo import FAMILIES
from ..ema import EMA, PowerFunctionEMA, edm_decay, target_decay
from ..losses import TDBatch, stable_target
from ..networks.saved import PRECISIONS
from ..optim import AdamEMA
from .grid import POWER_AVERAGE, STABLE_TARGET, Setting
from .measures import Measures
from .problems import PROBLEMS, Problem
from .rivals import WIDTHS, best_width

REFERENCE = 256  # further data for the stable target, of each step
MEASURED, CHOSEN = 0, 1  # seeds of the measures' draws: for what is told, and for what is chosen
Tell = Callable[[float], None]  # is given the share of a job that is done


class Draw(NamedTuple):
    """One step's data and noise, which every method gets."""

    images: Tensor  # [B, C, H, W]
    labels: Tensor | None  # [B, label_dim]
    level: dict[str, Tensor]  # [B], under the name that `loss.pair` has for it
    noise: Tensor  # as images: x_t = images + sigma noise
    bridge: Tensor  # as images: what of x_t' is not in x_t

    def pair(self, loss: Any) -> TDBatch:
        """The loss's noisy pair, whose x_t is the same for every loss."""
        return loss.pair(self.images, **self.level, **self._noises(loss))

    def _noises(self, loss: Any) -> dict[str, Tensor]:
        """What `loss.pair` is to be given.

        On a Markov path x_t = x0 + sigma' noise_p + sqrt(sigma^2 - sigma'^2) noise. A rotation of
        two unit noises is two unit noises: with r = sigma' / sigma and s = sqrt(1 - r^2),
        noise_p = r eps + s xi and noise = s eps - r xi give x_t = x0 + sigma eps.
        """
        if "noise_p" not in signature(loss.pair).parameters or loss.coupling == "shared":
            return {"noise": self.noise}
        nothing = torch.zeros(len(self.images))
        levels = loss.pair(nothing, **self.level, noise=nothing, noise_p=nothing)
        r = (levels.sigma_p / levels.sigma).clamp(max=1.0)[:, None, None, None]
        s = (1 - r**2).sqrt()
        noise_p = r * self.noise + s * self.bridge
        noise = s * self.noise - r * self.bridge
        return {"noise": noise.float(), "noise_p": noise_p.float()}


class Training:
    """A method in training.

    The same seed gives every method the same initial weights, and of the same batch the same data,
    noise levels and noise, step by step.

    Args:
        setting: the method's.
        seed: >= 0.
    """

    def __init__(self, setting: Setting, seed: int):
        self.setting, self.loss = setting, setting.make_loss()
        self.problem, self.family = problem_of(setting.problem), FAMILIES[setting.family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "init"))
            net: Any = self.family.network(self.problem.network())
        net.dtype = PRECISIONS[setting.precision]
        self.net = net
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "step"))
        self.others = torch.Generator().manual_seed(derive_seed(seed, "subset"))
        self._make_averages()
        self.optimizer = AdamEMA(
            self.net.parameters(),
            lr=setting.lr,
            averages=[average.module.parameters() for average in self.averages],
            decays=torch.ones(len(self.averages), dtype=torch.float64),
        )

    def _make_averages(self) -> None:
        setting = self.setting
        self.ema, self.target = EMA(self.net), None
        self.averages = [self.ema]
        if setting.has_target:
            self.target = EMA(self.net)
            precision = setting.target_precision or setting.precision
            self.target.module.dtype = PRECISIONS[precision]
            self.averages.append(self.target)
        self.power = None
        if setting.rival == POWER_AVERAGE:
            self.power = PowerFunctionEMA(self.net, WIDTHS)
            self.averages += self.power.averages.values()

    def draw(self) -> Draw:
        """The next step's draw."""
        size = self.setting.batch
        images, labels = self.problem.sample(size, self.generator)
        level = self.family.draw(size, self.generator)
        noise, bridge = torch.randn(2, *images.shape, generator=self.generator)
        return Draw(images, labels, level, noise, bridge)

    def reference(self) -> tuple[Tensor, Tensor | None] | None:
        """Further data for the next step, where the method takes any."""
        if self.setting.rival != STABLE_TARGET:
            return None
        return self.problem.sample(REFERENCE, self.others)

    def step(self, batch: TDBatch, labels: Tensor | None, reference, step: int) -> None:
        """One training step, counted from 0.

        Args:
            batch: `draw().pair(loss)`.
            labels: of the draw.
            reference: of `reference()`.
        """
        self._set_rates(step)
        if reference is not None:
            batch = stable_target(batch, reference[0], labels, reference[1])
        self.optimizer.zero_grad()
        # as EDM: a sum over elements, a mean over the batch
        scale = batch.x0[0].numel() / len(batch.x0)
        terms = self.loss.evaluate(self.net, self.target, batch, labels, gradient_scale=scale)
        terms.loss.sum().backward()
        self.optimizer.step()
        for average in self.averages:
            average.copy_buffers(self.net)

    def _set_rates(self, step: int) -> None:
        setting, decays = self.setting, self.optimizer.decays
        cosine = (1 + math.cos(math.pi * step / setting.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = setting.lr * cosine
        images = setting.steps * setting.batch
        halflife = setting.ema_halflife * images
        decays[0] = edm_decay(setting.batch, halflife, (step + 1) * setting.batch)
        if self.target:
            decays[1] = target_decay(setting.target_ema_tau, step)
        if self.power:
            decays[-len(WIDTHS) :] = torch.tensor(self.power.decays(step + 1))

    def measured(self) -> dict:
        """What a results file holds of the network: its measures, and what was chosen for them."""
        if self.power is None:
            return {"measures": measures_of(self.setting.problem, MEASURED)(self.ema.module)}
        chooses = measures_of(self.setting.problem, CHOSEN)
        width, net = best_width(self.power, lambda net: chooses.errors(net)["error/all"])
        measures = measures_of(self.setting.problem, MEASURED)(net)
        return {"measures": measures, "width": width}


@cache
def problem_of(name: str) -> Problem:
    """A problem, made once in a process."""
    return PROBLEMS[name]()


@cache
def measures_of(problem: str, seed: int) -> Measures:
    """A problem's measures, whose exact answers are computed once in a process."""
    return Measures(problem_of(problem), seed=seed)


def train(setting: Setting, seed: int, tell: Tell) -> dict:
    """Train and measure a job.

    Args:
        setting: the method's.
        seed: >= 0.
        tell: is given the share of the steps that are done, after each.

    Returns:
        A line of a results file. Deterministic, but for its times and memory.

    Raises:
        FloatingPointError: it diverged.
    """
    began, training, seconds = time.monotonic(), Training(setting, seed), []
    for step in range(setting.steps):
        draw, reference = training.draw(), training.reference()
        batch = draw.pair(training.loss)
        started = time.thread_time()
        training.step(batch, draw.labels, reference, step)
        seconds.append(time.thread_time() - started)
        tell((step + 1) / setting.steps)
    measured = training.measured()
    for name, value in measured["measures"].items():
        if not math.isfinite(value):
            raise FloatingPointError(f"diverged: {name} is not finite")
    return {
        "kind": "job",
        "key": setting.key,
        "setting": asdict(setting),
        "seed": seed,
        **measured,
        "skipped": int(training.optimizer.skipped),
        "step_ms": 1e3 * torch.tensor(seconds).median().item(),
        "seconds": time.monotonic() - began,
    }
