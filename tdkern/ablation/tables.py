"""Tables: which settings a table compares, and on which seeds; as a results file has them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from .grid import COMPUTE, Preset, Setting, Size, setting_of


class Row(NamedTuple):
    """A method of a table.

    Attributes:
        setting: a `Setting` as JSON has it.
        key, step_key: the setting's.
        against: the names of the rows that it is compared with.
    """

    setting: dict
    key: str
    step_key: str
    against: list[str]

    @classmethod
    def of(cls, setting: Setting, against: Iterable[str]) -> "Row":
        """The row of a setting."""
        return cls(asdict(setting), setting.key, setting.step_key, list(against))


@dataclass(frozen=True)
class Table:
    """Methods that are compared on one problem.

    Attributes:
        name: of a preset, or of a grid.
        budget: one of `grid.BUDGETS`.
        confirm: whether its seeds are fresh ones, which nothing was chosen by.
        rows: by the methods' names, the baseline first.
    """

    name: str
    problem: str
    budget: str
    confirm: bool
    rows: dict[str, Row]
    seeds: tuple[int, ...]

    @property
    def baseline(self) -> str:
        """The name of the first row."""
        return next(iter(self.rows))

    @property
    def key(self) -> tuple:
        """The same for what continues a table: with other seeds, or further methods."""
        baseline = self.rows[self.baseline].key
        return self.name, self.problem, self.budget, self.confirm, baseline

    def with_(self, other: "Table") -> "Table":
        """The table with what another of the same key adds; its rows are newer."""
        seeds = tuple(sorted({*self.seeds, *other.seeds}))
        rows = self.rows | other.rows
        return Table(self.name, self.problem, self.budget, self.confirm, rows, seeds)

    def line(self) -> dict:
        """The table as a line of a results file."""
        rows = {name: row._asdict() for name, row in self.rows.items()}
        own = vars(self) | {"rows": rows, "seeds": list(self.seeds)}
        return {"kind": "table", "table": own.pop("name")} | own

    @classmethod
    def of_line(cls, line: dict) -> "Table":
        """The table of a line.

        Raises:
            ValueError, TypeError: it is none.
        """
        rows = {name: Row(**row) for name, row in line["rows"].items()}
        if not rows or not all(isinstance(seed, int) for seed in line["seeds"]):
            raise ValueError("no rows, or seeds that are no numbers")
        for row in rows.values():
            if not isinstance(row.setting, dict) or not {*row.against} <= {*rows}:
                raise ValueError("a row that is compared with none")
        given = (line["table"], line["problem"], line["budget"], line["confirm"])
        return cls(*given, rows, tuple(line["seeds"]))


def tables_of(lines: list[dict]) -> list[Table]:
    """The tables of a results file, each with all that its lines add; raises as `of_line`."""
    tables: dict[tuple, Table] = {}
    for line in lines:
        if line["kind"] == "table":
            table = Table.of_line(line)
            known = tables.get(table.key)
            tables[table.key] = known.with_(table) if known else table
    return list(tables.values())


def costs_of(lines: list[dict], baseline: str) -> dict[str, dict]:
    """What steps cost, by `Setting.step_key`, as measured beside a baseline's; the newest counts.

    Args:
        lines: of a results file.
        baseline: the baseline's step_key.
    """
    costs: dict[str, dict] = {}
    for line in lines:
        if line["kind"] == "cost" and line["baseline"] == baseline:
            costs |= {key: cost for key, cost in line["costs"].items() if "error" not in cost}
    return costs


def settings_of(
    preset: Preset, problem: str, size: Size, budget: str, costs: dict[str, dict]
) -> dict[str, Setting]:
    """The settings of a preset's methods.

    With `COMPUTE` a method has as many steps as the baseline's take time, its own steps being
    `of_baseline` times as dear; one whose cost is not known is left out.
    """
    settings = {}
    for name, method in preset.methods.items():
        setting = setting_of(method, problem, size)
        if budget == COMPUTE and name != preset.baseline:
            of_baseline = costs.get(setting.step_key, {}).get("of_baseline")
            if of_baseline is None:
                continue
            steps = max(round(size.steps / of_baseline), 1)
            setting = setting_of(method, problem, size, steps)
        settings[name] = setting
    return settings


def table_of(
    name: str, preset: Preset, budget: str, settings: dict[str, Setting], seeds, confirm: bool
) -> Table:
    """The table of a preset's settings on a problem."""
    rows = {
        method: Row.of(setting, [each for each in preset.against(method) if each in settings])
        for method, setting in settings.items()
    }
    problem = settings[preset.baseline].problem
    return Table(name, problem, budget, confirm, rows, tuple(seeds))
