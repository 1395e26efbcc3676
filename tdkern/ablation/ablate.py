"""The work of `tdkern ablate`: costs, tables and jobs, as far as a results file lacks them."""

from typing import NamedTuple

from ..data.files import first_of
from .costs import measure_costs
from .grid import Preset, Setting, Size, setting_of
from .jobs import Job, run_jobs
from .results import Results
from .tables import Table, costs_of, settings_of, table_of, tables_of
from .training import train


class Plan(NamedTuple):
    """What to compare.

    Attributes:
        name: of the table.
        problem: a name of `problems.PROBLEMS`.
        budgets: of `grid.BUDGETS`.
        confirm: whether the seeds are to be fresh ones.
    """

    name: str
    preset: Preset
    problem: str
    size: Size
    budgets: tuple[str, ...]
    seeds: tuple[int, ...]
    confirm: bool = False

    def settings(self) -> dict[str, Setting]:
        """The methods' settings at equal steps; raises ValueError where one cannot be made."""
        settings = {}
        for name, method in self.preset.methods.items():
            try:
                settings[name] = setting_of(method, self.problem, self.size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return settings


def ablate(plans: list[Plan], results: Results, workers: int) -> list[str]:
    """Do what plans ask for and a results file lacks.

    Args:
        plans: the plans.
        results: where a line for each finished job goes, as soon as it is finished.
        workers: jobs at a time.

    Returns:
        What failed, a line each. A failed job is done again by the next call.

    Raises:
        ValueError: a plan cannot be carried out, or would confirm by seeds that chose.
    """
    for plan in plans:
        _check_seeds(plan, tables_of(results.lines))
    failures: list[str] = []
    _run("measuring steps", _costs_to_measure(plans, results), 1, results, failures)
    tables = [table for plan in plans for table in _tables(plan, results, failures)]
    known = {table.key: table for table in tables_of(results.lines)}
    for table in tables:
        if table.key not in known or known[table.key].with_(table) != known[table.key]:
            results.append(table.line())
    _run("training", _jobs_to_do(tables, results), workers, results, failures)
    return failures


def _run(title: str, jobs: list[Job], workers: int, results: Results, failures: list[str]) -> None:
    def done(job: Job, line: dict) -> None:
        results.append(line)
        for cost in line.get("costs", {}).values():
            if "error" in cost:
                failures.append(f"{cost['name']}: {cost['error']}")

    def failed(job: Job, error: str) -> None:
        failures.append(f"{job.name}: {error}")
        if job.work is train:
            setting, seed = job.arguments
            line = {"key": setting.key, "seed": seed, "error": error}
            results.append({"kind": "failed"} | line)

    run_jobs(jobs, workers, done, failed, title)


def _costs_to_measure(plans: list[Plan], results: Results) -> list[Job]:
    """One job for each plan some of whose methods were not measured beside its baseline yet."""
    jobs = []
    for plan in plans:
        settings = plan.settings()
        baseline = settings[plan.preset.baseline]
        known = costs_of(results.lines, baseline.step_key)
        new = {name: each for name, each in settings.items() if each.step_key not in known}
        if new:
            measured = {plan.preset.baseline: baseline} | new
            jobs.append(Job(f"costs on {plan.problem}", measure_costs, (measured,)))
    return jobs


def _tables(plan: Plan, results: Results, failures: list[str]) -> list[Table]:
    """A table for each budget; a method whose cost is not known has no place in `COMPUTE`."""
    baseline = plan.settings()[plan.preset.baseline]
    costs = costs_of(results.lines, baseline.step_key)
    seeds = plan.seeds if plan.preset.trains else ()
    tables = []
    for budget in plan.budgets:
        settings = settings_of(plan.preset, plan.problem, plan.size, budget, costs)
        missing = [name for name in plan.preset.methods if name not in settings]
        if missing:
            failures.append(f"no cost, so nothing at equal compute: {first_of(missing)}")
        tables.append(table_of(plan.name, plan.preset, budget, settings, seeds, plan.confirm))
    return tables


def _check_seeds(plan: Plan, known: list[Table]) -> None:
    """Raises ValueError where seeds that methods are chosen by would confirm the choice."""
    for table in known:
        same = (table.name, table.problem) == (plan.name, plan.problem)
        common = sorted({*table.seeds} & {*plan.seeds})
        if same and table.confirm != plan.confirm and common:
            raise ValueError(
                "--seeds must be others with --confirm than without: "
                f"{first_of([str(seed) for seed in common])} of {plan.name} on {plan.problem} are "
                "in the results already"
            )


def _jobs_to_do(tables: list[Table], results: Results) -> list[Job]:
    """The jobs that have no line yet, seed by seed, so that what there is at any time is paired."""
    done = {(line["key"], line["seed"]) for line in results.lines if line["kind"] == "job"}
    jobs: dict[tuple, Job] = {}
    seeds = sorted({seed for table in tables for seed in table.seeds})
    for seed in seeds:
        for table in tables:
            for name, row in table.rows.items():
                if seed in table.seeds and (row.key, seed) not in done:
                    setting = Setting(**row.setting)
                    title = f"{name} on {table.problem}, equal {table.budget}, seed {seed}"
                    size = setting.steps * setting.batch
                    jobs.setdefault((row.key, seed), Job(title, train, (setting, seed), size))
    return list(jobs.values())
