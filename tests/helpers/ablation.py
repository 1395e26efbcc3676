"""Quick doubles of what `tdkern ablate` trains and measures, and results files made of them."""

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

from tdkern.ablation import ablate
from tdkern.ablation.grid import setting_of
from tdkern.ablation.presets import PRESETS, SIZES
from tdkern.ablation.tables import settings_of, table_of

COST = {"ms": 1.0, "memory_mib": 2.0, "rounds": 3}


def square(x, tell):
    """A job of some tenths of a second."""
    for i in range(3):
        time.sleep(0.05)
        tell(i / 3)
    return x * x


def fail(*_):
    raise ValueError("a job\nthat cannot be done")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(mark, tell):
    """Is killed at the first try, of which it leaves a mark."""
    if not Path(mark).exists():
        Path(mark).touch()
        die()
    return "done"


def times(tell):
    """In which process a job of half a second ran, and from when to when."""
    began = time.monotonic()
    time.sleep(0.5)
    return os.getpid(), began, time.monotonic()


def error_of(setting, seed):
    """What the double of `train` measures."""
    return 1 + 0.1 * seed + (0.25 if setting.td else 0.0) + setting.steps / 1000


def quick_train(setting, seed, tell):
    """A job's line, without training."""
    time.sleep(0.1)
    tell(0.5)
    measures = {"error/all": error_of(setting, seed), "map/9": 2.0}
    return {
        "kind": "job",
        "key": setting.key,
        "seed": seed,
        "setting": asdict(setting),
        "measures": measures,
    }


def train_but_without_weight(setting, seed, tell):
    """`quick_train`, which fails where the TD term has no weight."""
    if setting.loss.get("weight") == "none":
        fail()
    return quick_train(setting, seed, tell)


def quick_costs(settings, tell):
    """The line of costs where a step with TD costs twice as much as one without."""
    costs = {
        each.step_key: COST | {"name": name, "of_baseline": 2.0 if each.td else 1.0}
        for name, each in settings.items()
    }
    return {"kind": "cost", "baseline": next(iter(settings.values())).step_key, "costs": costs}


def with_doubles():
    """In a process of its own: the command's jobs are quick."""
    ablate.train, ablate.measure_costs = quick_train, quick_costs


def lines_of(path):
    """The lines of a results file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_results(path, numbers, preset="paper-weights", seeds=range(8), confirm=False):
    """Add a preset's table on the mixture to a results file, and return the file.

    Args:
        numbers: `numbers(name, seed)`, the measures of a method, None for a job that is not there,
            or a text for one that failed.
    """
    table, size = PRESETS[preset], SIZES["mixture"]
    settings = settings_of(table, "mixture", size, "steps", {})
    whole = {name: setting_of(each, "mixture", size) for name, each in table.methods.items()}
    lines = [quick_costs(whole, None)]
    lines.append(table_of(preset, table, "steps", settings, seeds, confirm).line())
    for name, setting in settings.items():
        for seed in seeds:
            found, line = numbers(name, seed), {"key": setting.key, "seed": seed}
            if isinstance(found, str):
                lines.append(line | {"kind": "failed", "error": found})
            elif found is not None:
                line |= {"kind": "job", "setting": asdict(setting)}
                lines.append(line | {"measures": found})
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path
