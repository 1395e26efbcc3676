"""The demo's numbers as a picture."""

import io

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .families import Levels
from .study import Study
from .tables import BAND_NAMES, CLEAR, Difference

# Okabe and Ito's colours, which stay apart for colour-blind readers; markers tell the lines apart
# without colour
EXACT = "#A85585"
STYLES = (("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#8C8C8C", "v"))
PLACES = (-1.5, 1.3)  # of the data, in both coordinates


def draw_picture(study: Study) -> bytes:
    """A PNG file with samples of every method, and three figures.

    They are denoiser error by noise level, sample distance by steps, and error over training.
    """
    figure = Figure(figsize=(16, 9.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.1, 1.45])
    _samples(study, top)
    axes = bottom.subplots(1, 4, width_ratios=[1, 1.25, 1, 1])
    for panel, axis in zip((_error, _difference, _distance, _training), axes, strict=True):
        panel(study, axis)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    bottom.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=11
    )
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _lines(study: Study):
    """(name, outcome, style of its line) of every method."""
    for (name, outcome), (color, marker) in zip(study.outcomes.items(), STYLES, strict=False):
        yield name, outcome, {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.4}


def _spread(values):
    """Mean and standard error over the seeds, the first dimension."""
    return values.mean(0).numpy(), (values.std(0) / len(values) ** 0.5).numpy()


def _samples(study: Study, figure) -> None:
    config, family = study.config, study.family
    figure.suptitle(
        f"{config.seeds} paired seeds, {config.iterations} iterations of batch {config.batch}.  "
        f"Samples of the first seed after {family.budgets[-1]} steps; the lines hold 50, 90 "
        "and 99 % of the data",
        fontsize=12,
    )
    exact = family.exact_name.removeprefix("the ")
    panels = [(exact, study.exact_samples, study.exact_distance[-1])]
    panels += [
        (name, outcome.samples, outcome.distance[0, -1]) for name, outcome in study.outcomes.items()
    ]
    colors = [EXACT] + [color for color, _ in STYLES]
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axis, (name, samples, distance), color in zip(axes, panels, colors, strict=False):
        axis.scatter(*samples.T.numpy(), s=1.5, color=color, alpha=0.45, linewidths=0)
        _draw_density(study, axis)
        axis.set(
            title=f"{name}\nsliced W2 {distance:.3f}",
            aspect="equal",
            xlim=PLACES,
            ylim=PLACES,
            xlabel="$x_1$",
        )
        axis.label_outer()
    figure.axes[0].set_ylabel("$x_2$")


def _draw_density(study: Study, axis) -> None:
    """The lines that hold so much of the data."""
    ticks = torch.linspace(*PLACES, 141, dtype=torch.float64)
    grid = torch.cartesian_prod(ticks, ticks)
    density = study.mixture.log_prob(grid, 0.0).unflatten(0, (141, 141)).T.exp()
    mass = density.flatten().sort(descending=True).values
    levels = [
        mass[(mass.cumsum(0) < share * mass.sum()).sum()].item() for share in (0.99, 0.9, 0.5)
    ]
    axis.contour(
        ticks.numpy(), ticks.numpy(), density.numpy(), levels, colors="#444444", linewidths=0.7
    )


def _error(study: Study, axis) -> None:
    sigma = Levels.sigma.numpy()
    for name, outcome, style in _lines(study):
        mean, error = _spread(outcome.error)
        axis.plot(sigma, mean, label=name, **style)
        axis.fill_between(
            sigma, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel=r"noise level $\sigma$",
        ylabel="excess EDM loss",
        title=f"Denoiser error\nmean ± standard error, {study.config.seeds} seeds",
    )


def _difference(study: Study, axis) -> None:
    levels, name = study.family.levels, next(iter(study.outcomes))
    baseline = levels.by_band(study.outcomes[name].error)
    places = range(len(BAND_NAMES) + 1)
    for i, (_, outcome, style) in enumerate(_lines(study)):
        if i == 0:
            continue
        differences = Difference.of(levels.by_band(outcome.error), baseline)
        x = [place + 0.19 * (i - 2.5) for place in places]
        percent, error = [d.percent for d in differences], [d.error for d in differences]
        axis.errorbar(
            x, percent, [CLEAR * e for e in error], fmt="none", ecolor=style["color"], elinewidth=1
        )
        axis.errorbar(
            x, percent, error, fmt=style["marker"], color=style["color"], markersize=6, elinewidth=3
        )
    axis.axhline(0, color=STYLES[0][0], linewidth=1)
    axis.set(
        xticks=list(places),
        xticklabels=[*BAND_NAMES, "all"],
        xlabel=r"noise level $\sigma$",
        ylabel=f"% of {name}'s error",
        title=f"Paired difference from {name}\nbars: 1 and {CLEAR} standard errors",
    )


def _distance(study: Study, axis) -> None:
    budgets = study.family.budgets
    axis.axhline(1, color=EXACT, linestyle="--", linewidth=2)
    exact = study.family.exact_name.removeprefix("the ")
    axis.annotate(
        exact,
        (1, 1),
        (-4, -13),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=EXACT,
    )
    for i, (_, outcome, style) in enumerate(_lines(study)):
        mean, error = _spread(outcome.distance / study.exact_distance)
        axis.errorbar(
            [place + 0.07 * (i - 2) for place in range(len(budgets))], mean, error, **style
        )
    axis.set(
        xticks=range(len(budgets)),
        xticklabels=budgets,
        xlabel=f"steps of {study.family.sampler_name}",
        ylabel=f"sliced W2 / sliced W2 of {study.family.exact_name}",
        title="Distance of samples from the data\nmean ± standard error",
    )


def _training(study: Study, axis) -> None:
    (baseline, first), *_ = study.outcomes.items()
    for _, outcome, style in _lines(study):
        mean, error = _spread(outcome.curve.T)
        cost = torch.tensor(outcome.curve_steps).numpy() * (outcome.step_ms / first.step_ms) / 1000
        axis.errorbar(cost, mean, error, **style)
    samples = study.family.follow_samples
    axis.set(
        yscale="log",
        xlabel=f"training time, in 1,000 steps of {baseline}",
        title=f"{'Samples' if samples else 'Error'} over training\nmean ± standard error",
        ylabel=f"sliced W2, {study.family.budgets[0]} step"
        if samples
        else "excess EDM loss, all noise levels",
    )
