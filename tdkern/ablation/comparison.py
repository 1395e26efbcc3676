"""A table with the numbers that a results file has for it."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.files import FileError
from .bootstrap import CONFIDENCE, Difference, differences
from .results import read_results
from .tables import Table, costs_of, tables_of

COST = ("ms", "of_baseline", "memory_mib")  # what is told of a step


def _by_row() -> dict:
    return defaultdict(dict)


@dataclass
class Comparison:
    """What a results file has for a table.

    Attributes:
        numbers: by row and seed, the measures of a job.
        failed: by row and seed, why there are none.
        widths: by row and seed, the width of the power-function average that was chosen.
        costs: by row, of a step, as far as it was measured.
    """

    table: Table
    numbers: dict[str, dict[int, dict[str, float]]] = field(default_factory=_by_row)
    failed: dict[str, dict[int, str]] = field(default_factory=_by_row)
    widths: dict[str, dict[int, float]] = field(default_factory=_by_row)
    costs: dict[str, dict] = field(default_factory=dict)

    @property
    def measures(self) -> list[str]:
        """The names of the measures, in the order of the jobs."""
        every = [measures for seeds in self.numbers.values() for measures in seeds.values()]
        return list(dict.fromkeys(name for measures in every for name in measures))

    def means(self, name: str, measures: list[str]) -> list[float]:
        """Of a row, over all its seeds."""
        return self._values(name, sorted(self.numbers[name]), measures).mean(0).tolist()

    def against(
        self, name: str, other: str, measures: list[str], confidence: float = CONFIDENCE
    ) -> list[Difference]:
        """A row's differences from another, over the seeds that both have."""
        seeds = sorted(self.numbers[name].keys() & self.numbers[other].keys())
        ours, theirs = (self._values(each, seeds, measures) for each in (name, other))
        return differences(ours, theirs, confidence)

    def _values(self, name: str, seeds: list[int], measures: list[str]) -> np.ndarray:
        """[seeds, measures]; NaN for what a job did not measure."""
        jobs = [self.numbers[name][seed] for seed in seeds]
        return np.array([[job.get(each, math.nan) for each in measures] for job in jobs])

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The rows and what each is compared with, where they have a seed in common."""
        for name, row in self.table.rows.items():
            for other in row.against:
                if self.numbers[name].keys() & self.numbers[other].keys():
                    yield name, other

    def take(self, name: str, line: dict) -> None:
        """A job's line, of a row; the newest counts."""
        seed = line["seed"]
        if line["kind"] == "failed":
            if seed not in self.numbers[name]:
                self.failed[name][seed] = line["error"]
            return
        self.numbers[name][seed] = {each: float(of) for each, of in line["measures"].items()}
        self.failed[name].pop(seed, None)
        if "width" in line:
            self.widths[name][seed] = float(line["width"])


def comparisons_in(path: Path) -> list[Comparison]:
    """The tables of a results file, with their numbers.

    Raises:
        OSError: it cannot be read.
        FileError: it holds no table, or a line that cannot be one.
    """
    lines, _ = read_results(path)
    try:
        found = [_comparison(table, lines) for table in tables_of(lines)]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise FileError(f"{path}: holds a line that is no result ({error}); remove it") from error
    if not found:
        raise FileError(f"{path}: holds no table yet; give it to tdkern ablate as --out")
    return found


def _comparison(table: Table, lines: list[dict]) -> Comparison:
    comparison, rows = Comparison(table), defaultdict(list)
    for name, row in table.rows.items():
        rows[row.key].append(name)
    for line in lines:
        if line["kind"] in ("job", "failed") and line["seed"] in table.seeds:
            for name in rows[line["key"]]:
                comparison.take(name, line)
    costs = costs_of(lines, table.rows[table.baseline].step_key)
    for name, row in table.rows.items():
        if row.step_key in costs:
            cost = costs[row.step_key]
            comparison.costs[name] = {each: float(cost[each]) for each in COST}
    return comparison
