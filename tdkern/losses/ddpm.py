"""DDPM's and DDIM's loss over discrete times, alone and with a temporal-difference term, TD(k)."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..fields import Range, flag, short
from ..ops._modes import can_check_values
from ..schedules import BETA_SCHEDULES, DDPM
from .path import PathLoss, TDPathLoss

PREDICTIONS = ("eps", "x0", "v")
TERMINALS = ("mean", "simple")
TIMES = Range("must be at least 2 and at most a million", lambda T: 2 <= T <= 1_000_000)


@dataclass(frozen=True)
class DDPMLoss(PathLoss):
    """DDPM's simple loss: t uniform in 1 .. T, loss = mean((F* - F)^2).

    F* is the eps, x0 or v that the network predicts (arXiv 2006.11239, eq. 14; 2202.00512;
    `schedules.DDPM`), or with another `base_weight` as `PathLoss` says, which also says how it is
    called. The fused path is
    that of `Denoiser` with the same prediction, and for "eps" of `VPPrecond` and `iDDPMPrecond`
    too. A network of any other kind works through its denoised output; `prediction` is then the
    loss's weight alone.

    Args:
        beta_schedule: "linear", "cosine" or T betas, kept as a tuple, the last of which may be 1
            (zero terminal SNR) where `prediction` is not "eps".
        backend: which backend the ops use, as in `td_loss`.

    The other arguments are described where they are declared.

    Raises:
        ValueError: an argument is out of its range.

    Gradient to `net`'s parameters. The draws come from torch's global generator: t, then the
    noise's seed.
    """

    T: int = flag(1000, "Number of discrete times.", within=TIMES)
    prediction: str = flag("eps", "What the network predicts.", choices=PREDICTIONS, kw_only=True)
    beta_schedule: str | tuple[float, ...] = flag(
        "linear", "Betas of the discrete times.", choices=BETA_SCHEDULES, kw_only=True
    )

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"{type(self).__name__}: prediction must be one of {', '.join(PREDICTIONS)}, "
                f"got {short(self.prediction)}"
            )
        super().__post_init__()
        # a list or a tensor as the schedule keeps it
        object.__setattr__(self, "beta_schedule", self.schedule.beta_schedule)

    @cached_property  # given betas are many, and are read once
    def schedule(self) -> DDPM:
        return DDPM(self.T, self.beta_schedule)

    def _time(self, given: Tensor | None, images: Tensor) -> Tensor:
        if given is None:
            return self._draw(
                images, lambda n: torch.randint(1, self.T + 1, (n,), device=images.device).double()
            )
        given = super()._time(given, images)
        if can_check_values(given) and not (given == given.round()).all():
            first = given[given != given.round()][0].item()
            raise ValueError(f"{type(self).__name__}: t must be whole numbers, got {first}")
        return given


@dataclass(frozen=True)
class TDDDPMLoss(TDPathLoss, DDPMLoss):
    """TD(k) for DDPM and DDIM: tau = t - 1, t' = t - k, tau' = t - k - 1; TD(0) is k = 1.

    (arXiv 2606.15048.) Where t <= k the whole return is known: the error is A^2 |x0 - D|^2, "mean
    matching", weighed as a TD term whose A' is 0; with the weights "pairwise" and "online" that is
    the simple loss again. The DDPM loss comes beside both, lambda_base times.

    docs/families.md has what each coupling does. `target_net` is needed.

    Args:
        terminal: the loss where t <= k, "mean" matching or the "simple" DDPM loss.
    """

    k: int = flag(1, "How many discrete times lie between t and t', 1 to T - 1.")
    terminal: str = field(default="mean", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.k, int) and 1 <= self.k < self.T):
            raise ValueError(
                f"TDDDPMLoss: k must be a whole number from 1 to T - 1 = {self.T - 1}, got {self.k}"
            )
        if self.terminal not in TERMINALS:
            known = ", ".join(TERMINALS)
            raise ValueError(
                f"TDDDPMLoss: terminal must be one of {known}, got {short(self.terminal)}"
            )

    @property
    def distances(self) -> tuple[float, float]:
        return 1.0, float(self.k)

    @property
    def mean_matching(self) -> bool:  # type: ignore[override]
        return self.terminal == "mean"
