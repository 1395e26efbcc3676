"""Flow matching's loss, alone and with a temporal-difference term in continuous time."""
from dataclasses import dataclass

from ..schedules import FlowMatching
from .path import PathLoss, TDTimeLoss


@dataclass(frozen=True)
class FlowLoss(PathLoss):
    """Flow matching on the straight path x_t = (1 - t) x0 + t eps: t uniform in [t_min, t_max], loss = mean((eps - x0 - F)^2), F the velocity.

    (arXiv 2210.02747, 2209.03003; `schedules.FlowMatching`.) `loss(net, target_net, images, labels=None, augment_pipe=None) -> [B]`, a mean
    over each sample's elements; `target_net` is not used and may be None. The fused path is that of `Denoiser(module, "velocity")`.

    Args:
        t_min, t_max: of the schedule, 0 < t_min < t_max < 1.
        backend: of the ops, as in `td_loss`.

    Raises:
        ValueError: an argument is out of its range.

    Gradient to `net`'s parameters. The draws come from torch's global generator: t, then the noise's seed.
    """

    t_min: float = 1e-3
    t_max: float = 0.999

    prediction = "velocity"

    @property
    def schedule(self) -> FlowMatching:
        return FlowMatching(self.t_min, self.t_max)


@dataclass(frozen=True)
class TDFlowLoss(TDTimeLoss, FlowLoss):
    """Flow matching with a temporal-difference term; ours, the paper has none.

    D = x_t - t F in the path's state and x0 - D = t (F - u), u = eps - x0 the true velocity. With a = t - tau and
    rho = (tau / (1 - tau)) / (t / (1 - t)), the ratio of the levels sigma_hat,

        A t = a                the drift of x_tau is -a u: one Euler step of the ODE          (eta = 0)
        A t = a (1 + rho)      from A = (1 - tau)(1 - rho^2), 1 - rho = a / (t (1 - tau)): the posterior's step, which is up to twice as long   (eta = 1)
        delta = A t (F - u) - A' t' (F' - u'),

    so the two velocity errors are compared, each over the step that a sampler takes.

    Coupling: with "markov" states u' = eps' - x0 is another velocity than u, and the target u + (A' t' / A t)(F' - u') is unbiased, with .02 to .80 of
    the baseline's variance. With "shared" states and eta = 0, where eps' = eps and A t = A' t' = a, delta = a (F - F'): the data drop out, and
    the term only asks that the velocity stay the same along a line from eps to x0, which the true field does not do. Its slope, as D's target, is off
    by +14, +21, +29 and +42 % at sigma_hat .5, 1, 2 and 4 (Gaussian data of standard deviation 0.5, default steps).

    `TDPathLoss` has the equations and the arguments `lambda_base`, `coupling`, `eta`, `weight`; `TDTimeLoss` `steps`, `k_idx`, `one_idx`;
    `FlowLoss` the schedule and the rest. `target_net` is needed.
    """
