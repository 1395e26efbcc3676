"""The tables of `tdkern ablate --preset`, and how long each problem is trained on.

The paper is arXiv 2606.15048. Its tables are of images; here each is of a problem whose answer is
known, with the paper's settings: lambda_base 0.5, k_idx 1, one_idx 0.25, 18 levels, Markov states
and a target average of decay 0.999.
"""

from dataclasses import replace
from typing import Any

from ..training.presets import PUBLISHED_TD, WINDOW
from .grid import (
    COMPUTE,
    POWER_AVERAGE,
    STABLE_TARGET,
    STEPS,
    WINDOW_SHARE,
    Method,
    Preset,
    Size,
)

LR = 5e-3  # of 2e-3, 5e-3 and 1e-2 the best for EDM without TD on patches8, by one seed
# so that a job takes a quarter to half a minute of one core
SIZES = {
    "mixture": Size(steps=4000, batch=16),
    "patches8": Size(steps=500, batch=64, lr=LR),
    "images8": Size(steps=500, batch=64, lr=LR),
    "images16": Size(steps=300, batch=32, lr=LR),
    "empirical8": Size(steps=400, batch=64, lr=LR),
    "empirical": Size(steps=100, batch=32, lr=LR),
}
BASELINE, PAPER = "EDM", "TD"
EDM = {BASELINE: Method()}


def td(**loss: Any) -> Method:
    """EDM with the TD term and settings of its loss."""
    return Method(td=True, loss=loss)


def _lengths() -> dict[str, Method]:
    """Both methods at several lengths of training, each pair compared with each other."""
    methods = {}
    for length, name in ((1.0, ""), (0.25, ", 1/4 of the steps"), (0.5, ", 1/2 of the steps")):
        methods[BASELINE + name] = Method(length=length)
        methods[PAPER + name] = Method(td=True, length=length, against=(BASELINE + name,))
    return methods


WEIGHTS = {
    "TD, pairwise weight": td(),
    "TD, online weight": td(weight="online"),
    "TD, no weight": td(weight="none"),
}
LAMBDAS = {f"TD, lambda {value}": td(lambda_base=value) for value in (0.01, 0.1, 0.25, 0.5, 1.0)}
STRIDES = {
    "TD, delta 1/2": td(one_idx=1 / 2),
    "TD, delta 1/3": td(one_idx=1 / 3),
    "TD, delta 1/4": td(one_idx=1 / 4),
    "TD, delta 1/5": td(one_idx=1 / 5),
    "TD, k 1/2": td(k_idx=0.5),
    "TD, k 2": td(k_idx=2.0),
    "TD, k 3, delta 1/5": td(k_idx=3.0, one_idx=0.2),
}
WINDOWED, BATCH = "TD, online, window", "EDM, 4/3 of the batch"
STABLE, POWER = "EDM, stable target", "EDM, power average"
RIVALS = {
    BATCH: Method(batch_factor=4 / 3),
    STABLE: Method(rival=STABLE_TARGET),
    POWER: Method(rival=POWER_AVERAGE),
}
# within the window, whose target network runs on that share of a batch alone
ON_SHARE = WINDOW | {"td_share": WINDOW_SHARE}
# what TD adds to each rival
WITH_RIVALS = {
    name.replace(BASELINE, "TD, window"): replace(
        rival, td=True, loss=ON_SHARE, against=(BASELINE, name)
    )
    for name, rival in RIVALS.items()
}
KINDS_OF_TD = {
    PAPER: td(),
    "TD, online": td(weight="online"),
    WINDOWED: replace(td(**ON_SHARE), against=(BASELINE, *RIVALS)),
    "TD, pairwise, window": td(**ON_SHARE | {"weight": "pairwise"}),
    # the target's ramp passes this in 80 steps, and 0.99 in 900
    "TD, online, window, target 0.9": replace(td(**ON_SHARE), target_ema_tau=0.9),
}

PRESETS = {
    "paper-main": Preset(
        help="the paper's main table: EDM and TD, and TD as the published command has it",
        methods=EDM | {PAPER: td(), "TD, published": td(**PUBLISHED_TD)},
        budgets=(STEPS, COMPUTE),
    ),
    "paper-weights": Preset(help="the weight of the TD term", methods=EDM | WEIGHTS),
    "paper-lambda": Preset(
        help="lambda, the weight of the base loss beside TD", methods=EDM | LAMBDAS
    ),
    "paper-stride": Preset(help="delta and k, the strides of the TD term", methods=EDM | STRIDES),
    "paper-steps": Preset(
        help="budgets in steps: trained for a quarter, half and all of them, and sampled in few "
        "and in many",
        methods=_lengths(),
    ),
    "paper-overhead": Preset(
        help="time and memory of a step, without training",
        methods=EDM
        | {
            PAPER: td(),
            WINDOWED: td(**WINDOW),
            "TD, bf16 target": Method(td=True, target_precision="bf16"),
        }
        | RIVALS,
        trains=False,
    ),
    "evidence": Preset(
        help="TD in every form, its rivals in variance, and both together",
        methods=EDM | KINDS_OF_TD | RIVALS | WITH_RIVALS,
        budgets=(STEPS, COMPUTE),
        seeds=16,
    ),
}
