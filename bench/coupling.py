"""What the noise of the pair does to TD's target, for Gaussian data; from closed forms, in seconds.

    PYTHONPATH=. python bench/coupling.py bench/results/coupling.json

With r = A' / A and the mean squares v, v' of the exact denoiser's errors at sigma, sigma', states
on one Markov path give the target the variance 1 - (2 r - r^2) v' / v, in those of the plain one.
With shared noise its slope in x_t is off by r sigma' (sigma - sigma') / (sd^2 + sigma'^2) of the
optimal one. tests/losses/test_optimum.py measures both.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from tdkern.columns import A_P, SIGMA, SIGMA_P, W_TD, A
from tdkern.losses import Loss, TDDDPMLoss, TDEDMLoss, TDFlowLoss, TDVELoss, TDVPLoss
from tdkern.schedules import EDM

SD = 0.5  # of the data
LEVELS = (0.5, 1.0, 2.0, 4.0)  # of the biases
LOSSES = {
    "`TDEDMLoss`": (TDEDMLoss, {}),
    "`TDVPLoss`": (TDVPLoss, {}),
    "`TDVELoss`": (TDVELoss, {}),
    "`TDFlowLoss`": (TDFlowLoss, {}),
    "`TDDDPMLoss`, T = 1000, k = 1": (TDDDPMLoss, {}),
    "`TDDDPMLoss`, T = 50, cosine, k = 3": (
        TDDDPMLoss,
        {"T": 50, "beta_schedule": "cosine", "k": 3},
    ),
}


def every_time(loss: Loss) -> dict[str, Tensor]:
    """The times of a loss, or 4001 of them, as a keyword of its `pair`."""
    if isinstance(loss, TDEDMLoss):
        return {"index": torch.linspace(0, loss.steps - 1, 4001, dtype=torch.float64)}
    if isinstance(loss, TDDDPMLoss):
        return {"t": torch.arange(1, loss.T + 1)}
    path = loss.schedule
    return {"t": torch.linspace(path.t_min, path.t_max, 4001, dtype=torch.float64)}


def times_of(loss: Loss, sigma: Tensor) -> dict[str, Tensor]:
    """The times of noise levels, as a keyword of the loss's `pair`."""
    if isinstance(loss, TDEDMLoss):
        return {"index": EDM().index(sigma)}
    time = loss.schedule.time(sigma)
    return {"t": time.round() if isinstance(loss, TDDDPMLoss) else time}


def numbers(loss: Loss, times: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """r, sigma and sigma' at the times that have a TD term."""
    batch = loss.pair(torch.zeros(len(*times.values()), 1), **times)
    valid = batch.coef[:, W_TD] != 0
    coef, levels = batch.coef[valid], batch.levels[valid]
    return coef[:, A_P] / coef[:, A], levels[:, SIGMA], levels[:, SIGMA_P]


def coupled(make, settings: dict) -> dict:
    """The numbers of one loss: least and most over all times, and the bias at LEVELS in %."""
    markov = make(coupling="markov", **settings)
    r, sigma, sigma_p = numbers(markov, every_time(markov))
    v, v_p = (SD**2 * level**2 / (SD**2 + level**2) for level in (sigma, sigma_p))
    variance = 1 - (2 * r - r**2) * v_p / v
    shared = make(coupling="shared", **settings)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    r_s, sigma, sigma_p = numbers(shared, times_of(shared, levels))
    bias = 100 * r_s * sigma_p * (sigma - sigma_p) / (SD**2 + sigma_p**2)
    return {
        "r": [r.min().item(), r.max().item()],
        "variance": [variance.min().item(), variance.max().item()],
        "bias_percent": bias.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    losses = {name: coupled(*loss) for name, loss in LOSSES.items()}
    results = {"sigma_data": SD, "sigma": LEVELS, "losses": losses}
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
