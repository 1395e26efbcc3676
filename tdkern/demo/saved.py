"""A study's numbers as JSON, and the study again that they are of."""

from dataclasses import asdict

import torch
from torch import Tensor

from .._version import __version__
from ..evaluation.mixture import GaussianMixture
from .families import FAMILIES, STUDY, Levels
from .study import Config, Outcome, Study
from .tables import BAND_NAMES, conclusion


def to_json(study: Study, family: str | None) -> dict:
    """The study's numbers, seed by seed: all that the tables and the picture are made of.

    Args:
        study: of `run_study`.
        family: the name in FAMILIES of its family; None for STUDY.
    """
    return {
        "tdkern": __version__,
        "torch": torch.__version__,
        "family": family,
        "config": asdict(study.config),
        "compute": study.compute,
        "levels": {
            "sigma": Levels.sigma.tolist(),
            "band": [BAND_NAMES[i] for i in Levels.band],
            "share_of_training": study.family.levels.share.tolist(),
        },
        "sampler": study.family.sampler_name,
        "steps": study.family.budgets,
        "exact_denoiser_distance": study.exact_distance.tolist(),
        "exact_denoiser_samples": _points(study.exact_samples),
        "independent_draws_distance": study.random_distance,
        "methods": {name: _outcome(outcome) for name, outcome in study.outcomes.items()},
        "conclusion": conclusion(study),
    }


def from_json(numbers: dict) -> Study:
    """The study that `to_json` gave, its samples rounded; arguments as there."""
    outcomes = {}
    for name, values in numbers["methods"].items():
        tensors = {key: _tensor(values[key]) for key in ("curve", "error", "distance", "samples")}
        outcomes[name] = Outcome(**values | tensors)
    return Study(
        family=FAMILIES[numbers["family"]] if numbers["family"] else STUDY,
        config=Config(**numbers["config"]),
        mixture=GaussianMixture.ring(),
        compute=numbers["compute"],
        outcomes=outcomes,
        exact_distance=_tensor(numbers["exact_denoiser_distance"]),
        exact_samples=_tensor(numbers["exact_denoiser_samples"]),
        random_distance=numbers["independent_draws_distance"],
    )


def _outcome(outcome: Outcome) -> dict:
    values = {
        key: value.tolist() if isinstance(value, Tensor) else value
        for key, value in vars(outcome).items()
    }
    return values | {"samples": _points(outcome.samples)}


def _points(points: Tensor) -> list[list[float]]:
    """[n, 2] as a picture needs them."""
    return [[round(value, 4) for value in point] for point in points.tolist()]


def _tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
