"""What a step of each method costs, all measured side by side."""

import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from ..benchmark.clock import LOSS, OPTIMIZER, Clock
from ..benchmark.rounds import measure
from ..benchmark.steps import Step
from .grid import Setting
from .training import Tell, Training

SECONDS = 12.0  # of measuring, at least three rounds
DRAWS = 8  # data and labels that steps take in turns: making them is no part of a step


def measure_costs(settings: dict[str, Setting], tell: Tell) -> dict:
    """The time and memory of a step of every method, on one thread.

    A step is from clean data to new weights and averages: the loss's draws, its networks, the
    backward pass and the optimizer. Methods are run in turns, in rounds.

    Args:
        settings: by the methods' names; the first is the baseline.
        tell: is given the share of the work that is done.

    Returns:
        A line of a results file: by `Setting.step_key` ms, the median of the rounds; of_baseline,
        that of the quotients in a round; and memory_mib. A method that cannot be run has an error.
    """
    made: list[str] = []

    def told(name: str) -> None:
        tell(0.5 * len(made) / len(settings))
        made.append(name)

    steps = {name: _Steps(setting).of_draws for name, setting in settings.items()}
    rows = measure(steps, torch.device("cpu"), SECONDS, told)
    costs = {}
    for row in rows:
        name = row["name"]
        cost = {"name": name}
        if "error" in row:
            cost["error"] = row["error"]
        else:
            cost |= {"ms": row["ms"], "of_baseline": row["of_first"], "rounds": row["rounds"]}
            cost["memory_mib"] = memory_of_a_step(settings[name])
        costs[settings[name].step_key] = cost
        tell(0.5 + 0.5 * len(costs) / len(settings))
    baseline = next(iter(settings.values()))
    return {
        "kind": "cost",
        "baseline": baseline.step_key,
        "costs": costs,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }


class _Steps:
    """The steps of a method, and what they need."""

    def __init__(self, setting: Setting):
        self.setting, self.count = setting, 0

    def of_draws(self) -> Step:
        """What runs a step and marks its end."""
        self.training = Training(self.setting, seed=0)
        self.draws = [(self.training.draw(), self.training.reference()) for _ in range(DRAWS)]
        return self.step

    def step(self, clock: Clock) -> None:
        """One step, with fresh noise."""
        training, loss = self.training, self.training.loss
        draw, reference = self.draws[self.count % DRAWS]
        batch = loss.pair(draw.images, **draw.level)
        clock.mark(LOSS)
        training.step(batch, draw.labels, reference, self.count % self.setting.steps)
        clock.mark(OPTIMIZER)
        self.count += 1


def memory_of_a_step(setting: Setting) -> float:
    """The most memory that a step's tensors have at once, in MiB.

    They are the networks, averages and moments, which stay, and what the step makes on top, by
    PyTorch's own record of what is allocated.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the record tells stderr that it begins
    steps, clock = _Steps(setting), Clock(torch.device("cpu"))
    step = steps.of_draws()
    step(clock)
    steps.training.optimizer.zero_grad()  # the record must see the gradients come
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as record:
        step(clock)
    return (_kept_bytes(steps.training) + _peak_bytes(record)) / 2**20


def _kept_bytes(training: Training) -> int:
    """Of what stays between two steps."""
    tensors = [*training.net.parameters(), *training.net.buffers()]
    for average in training.averages:
        tensors += [*average.module.parameters(), *average.module.buffers()]
    for state in training.optimizer.state.values():
        tensors += [each for each in state.values() if isinstance(each, torch.Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors)


def _peak_bytes(record: torch.profiler.profile) -> int:
    """The most that was allocated at once beyond what was there at first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    changes = [each for each in events if each.get("name") == "[memory]"]
    total = peak = 0
    for each in sorted(changes, key=lambda each: each["ts"]):
        total += each["args"]["Bytes"]
        peak = max(peak, total)
    return peak
