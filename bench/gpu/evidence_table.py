"""What the trials of evidence.sh found, as tables of one file of results (bench/report.py)."""

import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from table import table
from trials import BUDGETS, EDM, LONGER, TD, WINDOWED

METHODS = (EDM, LONGER, TD, WINDOWED)
# TD at equal steps and at equal compute, and what the longer training brings
PAIRS = ((TD, EDM), (WINDOWED, EDM), (LONGER, EDM), (TD, LONGER), (WINDOWED, LONGER))
TITLES = {"frechet": "Fréchet distance", "kernel": "kernel distance"}


class Found:
    """A file of results.

    Attributes:
        lines: all of them.
        seeds: those of which every method is scored after all numbers of steps.
    """

    def __init__(self, path: Path):
        self.lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.at = {(line["seed"], line["method"], line["steps"]): line for line in self.lines}
        self.seeds = [seed for seed in self.every_seed() if self.is_whole(seed)]

    def every_seed(self) -> list[int]:
        return sorted({line["seed"] for line in self.lines})

    def is_whole(self, seed: int) -> bool:
        places = [(seed, method, steps) for method in METHODS for steps in BUDGETS]
        return all(place in self.at and "failure" not in self.at[place] for place in places)

    def values(self, method: str, measure: str) -> np.ndarray:
        """[seeds, steps], the scores of a method."""
        rows = [[self.at[seed, method, steps][measure] for steps in BUDGETS] for seed in self.seeds]
        return np.array(rows)

    def median(self, method: str, name: str) -> float:
        """Of what the lines of a method say; NaN where none says anything."""
        own = [line[name] for line in self.lines if line["method"] == method]
        return statistics.median([value for value in own if value is not None] or [math.nan])


def markdown(path: Path) -> str:
    """Scores by sampling steps with their paired differences over seeds, and what a step costs."""
    found = Found(path)
    measures = [name for name in found.lines[0] if name.partition("_")[0] in TITLES]
    tables = [scores(found, measure) for measure in measures if found.seeds]
    return "\n\n".join([about(found, path), *tables, costs(found)])


def about(found: Found, path: Path) -> str:
    """What was trained and scored, and where."""
    line = found.lines[0]
    devices = sorted({str(each["device"]) for each in found.lines})
    parts = found.every_seed()
    left_out = [str(seed) for seed in parts if seed not in found.seeds]
    return (
        f"{' and '.join(devices)}, torch {line['torch']}; a SongUNet of "
        f"{line['parameters'] / 1e6:.2f} million parameters, batches of {line['batch']}; "
        f"{line['samples']:,} images of each of {len(found.seeds)} seeds, by features of "
        f"{line['detector']}; from `bench/results/evidence/{path.name}`"
        + (f" (not whole, and in no score: seeds {', '.join(left_out)})" if left_out else "")
    )


def scores(found: Found, measure: str) -> str:
    """Means of every method, and differences in % with their intervals; less is better."""
    from tdkern.ablation.bootstrap import differences

    values = {method: found.values(method, measure) for method in METHODS}
    body = [[name, *(f"{mean:.4g}" for mean in value.mean(0))] for name, value in values.items()]
    for method, other in PAIRS:
        cells = map(str, differences(values[method], values[other]))
        body.append([f"{method} − {other}, %", *cells])
    title = TITLES[measure.partition("_")[0]]
    return table([f"{title} by steps", *map(str, BUDGETS)], body, left=1)


def costs(found: Found) -> str:
    """Images in training, and the time and memory of a step: medians."""
    first, body = found.median(EDM, "step_ms"), []
    for method in METHODS:
        ms, mib = found.median(method, "step_ms"), found.median(method, "memory_mib")
        images = f"{found.median(method, 'images'):,.0f}"
        body.append([method, images, f"{ms:.2f}", f"{ms / first:.2f}", f"{mib:,.0f}"])
    return table(["", "images in training", "ms a step", f"of {EDM}", "MiB"], body, left=1)
