"""The demo's numbers as tables and as one sentence."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .families import BANDS
from .study import Study

# standard errors beyond which a difference is called one; for 8 seeds the 4 % level of Student's t
CLEAR = 2.5
BAND_NAMES = [f"{lo:g}-{hi:g}" for lo, hi, _ in BANDS]


class Difference(NamedTuple):
    """How a method differs from another, seed by seed, in % of the other's mean."""

    percent: float
    error: float  # standard error of `percent`
    won: int  # seeds with the smaller value

    @classmethod
    def of(cls, values: Tensor, baseline: Tensor) -> list["Difference"]:
        """One a column of [seeds, columns], the rows of both being paired."""
        gap = 100 * (values - baseline) / baseline.mean(0)
        return [
            cls(*numbers)
            for numbers in zip(
                gap.mean(0).tolist(),
                (gap.std(0) / len(gap) ** 0.5).tolist(),
                (gap < 0).sum(0).tolist(),
                strict=True,
            )
        ]

    def __str__(self) -> str:
        digits = 1 if abs(self.percent) < 9.95 and self.error < 9.95 else 0
        return f"{self.percent:+.{digits}f} ± {self.error:.{digits}f} ({self.won})"

    @property
    def short(self) -> str:
        """As it stands in a sentence."""
        return f"{self.percent:+.0f} %"

    @property
    def clear(self) -> bool:
        return abs(self.percent) > CLEAR * self.error


def report(study: Study) -> str:
    """The tables and the conclusion, as text of at most 120 columns."""
    lines = [
        *_preface(study),
        *_errors(study),
        *_distances(study),
        *(_progress(study) if study.family.follow_samples else ()),
        *_times(study),
        *textwrap.wrap(conclusion(study), 118),
    ]
    return "\n".join(lines)


def _preface(study: Study) -> list[str]:
    config = study.config
    return [
        "Four unequal Gaussians on a ring, standard deviation 0.5 a coordinate: their exact "
        "denoiser is known.",
        f"{config.iterations} iterations of batch {config.batch}, {config.seeds} seeds, averaged "
        "weights. All methods share a seed's initial weights, data and noise.",
        "Differences are paired: mean ± standard error over the seeds, and in brackets how many of "
        f"the {config.seeds} are better.",
        "",
    ]


def _errors(study: Study) -> list[str]:
    levels = study.family.levels
    errors = {name: levels.by_band(outcome.error) for name, outcome in study.outcomes.items()}
    shares = [levels.share[levels.band == i].sum() for i in range(len(BANDS))]
    return [
        f"DENOISER ERROR by sigma: {study.family.error_name}; 'all' weighs the levels as training "
        "does",
        _row("", [*BAND_NAMES, "all"]),
        _row("share of training", [f"{100 * share:.2g} %" for share in shares]),
        *_comparison(errors),
        "",
    ]


def _distances(study: Study) -> list[str]:
    config, family = study.config, study.family
    distances = {name: outcome.distance for name, outcome in study.outcomes.items()}
    return [
        f"SAMPLE DISTANCE by steps of {family.sampler_name}: sliced W2 of {config.points} samples "
        "to the data, evenly spread latents",
        _row("", [f"{steps}" for steps in family.budgets]),
        _row(family.exact_name, [f"{value:.3g}" for value in study.exact_distance.tolist()]),
        *_comparison(distances),
        f" {config.points} independent draws of the data: {study.random_distance:.3g}. What "
        f"{family.exact_name} has as well is the sampler's error.",
        "",
    ]


def _comparison(values: dict[str, Tensor]) -> list[str]:
    """Rows of every method's means, and of their differences from the two baselines."""
    baseline, *td, longer = values
    lines = [
        _row(name, [f"{mean:.3g}" for mean in value.mean(0).tolist()])
        for name, value in values.items()
    ]
    for title, other, names in (
        ("equal steps, and what more iterations bring", baseline, [*td, longer]),
        ("equal compute", longer, td),
    ):
        lines.append(f" Difference from {other}, in %: TD at {title}")
        for name in names:
            lines.append(_row(name, map(str, Difference.of(values[name], values[other]))))
    return lines


def _times(study: Study) -> list[str]:
    baseline, *td, _ = study.outcomes
    step_ms = {name: study.outcomes[name].step_ms for name in (baseline, *td)}
    rows = [
        _row(name, [f"{time:.2f} ms", f"{time / step_ms[baseline]:.2f} x {baseline}"])
        for name, time in step_ms.items()
    ]
    measured = f": the measured ratio of a TD step to one of {baseline}"
    return [
        "CPU TIME of a training step, all seeds in one thread",
        *rows,
        f" {baseline} at equal compute has {study.compute:.2f} times the iterations"
        f"{'' if study.config.compute else measured}.",
        "",
    ]


def _progress(study: Study) -> list[str]:
    """The samples of the smallest budget over training, at doubling times."""
    baseline, *td, _ = study.outcomes
    steps = study.outcomes[baseline].curve_steps
    shown = sorted({len(steps) // 2**i - 1 for i in range(5)} - {-1})
    rows = []
    for name in (baseline, *td):
        curve = study.outcomes[name].curve.T[:, shown]
        mean, error = curve.mean(0).tolist(), (curve.std(0) / len(curve) ** 0.5).tolist()
        rows.append(_row(name, [f"{m:.3g} ± {e:.2g}" for m, e in zip(mean, error, strict=True)]))
    title = (
        f"SAMPLE DISTANCE over training: sliced W2 with {study.family.budgets[0]} step, after so "
        "many iterations"
    )
    return [title, _row("", [str(steps[i]) for i in shown]), *rows, ""]


def conclusion(study: Study) -> str:
    """What the numbers say of TD with its default weight, in one sentence."""
    baseline, *_, longer = study.outcomes
    levels, budgets = study.family.levels, study.family.budgets
    clauses = []
    for title, other in (("equal steps", baseline), (f"equal compute ({longer})", longer)):
        errors = Difference.of(
            *(levels.by_band(study.outcomes[name].error) for name in ("TD", other))
        )
        distances = Difference.of(*(study.outcomes[name].distance for name in ("TD", other)))
        levels_by_name = [*(f"sigma {name}" for name in BAND_NAMES), "all sigma together"]
        steps_by_name = ["1 step" if steps == 1 else f"{steps} steps" for steps in budgets]
        clauses.append(
            f"at {title} its denoiser error is {verdict(errors, levels_by_name)}, "
            f"its sample distance {verdict(distances, steps_by_name)}"
        )
    return (
        f"TD with its default weight against {baseline}, counting differences beyond {CLEAR} "
        f"standard errors: {'; '.join(clauses)}."
    )


def _row(name: str, cells) -> str:
    return f"  {name:<23}" + "".join(f"{cell:>15}" for cell in cells)


def verdict(differences: Sequence, places: list[str]) -> str:
    """Differences in words, each having `percent`, `clear` and `short`.

    Such as "lower at sigma 0.4-4 (-20 %), higher at sigma 12-40 (+30 %), not clearly different
    elsewhere".
    """
    clear = [
        (place, difference)
        for place, difference in zip(places, differences, strict=True)
        if difference.clear
    ]
    parts = []
    for word, sign in (("lower", -1), ("higher", 1)):
        found = [
            f"{place} ({difference.short})"
            for place, difference in clear
            if difference.percent * sign > 0
        ]
        if found:
            parts.append(f"{word} at {', '.join(found)}")
    if len(clear) < len(places):
        parts.append("not clearly different " + ("elsewhere" if clear else "anywhere"))
    return ", ".join(parts)
