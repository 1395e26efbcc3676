"""Steps measured side by side: in rounds, each of which runs every one of them."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from .clock import PARTS, Clock
from .steps import Step

LEAST_ROUNDS, MOST_ROUNDS = 3, 200
BURST, MOST_STEPS = 0.05, 20  # seconds of steps in a row, and how many steps at most


def measure(
    steps: dict[str, Callable[[], Step]],
    device: torch.device,
    seconds: float,
    tell: Callable[[str], None],
) -> list[dict]:
    """A row for each step: medians over rounds, in ms.

    Each round runs a burst of every step, and the next begins one further on, so that what else the
    machine does meets all alike.

    Args:
        steps: what makes each, by its name, as `steps_of` has them.
        device: where they run.
        seconds: when to stop; at least three rounds are run, and warming up comes on top.
        tell: is given a step's name before it is made.

    Returns:
        Rows with name, ms, min_ms, rounds, of_first (ms over the first row's) and parts (ms of each
        of `clock.PARTS`); or name and error, in one line, of a step that cannot be run here.

    Raises:
        Exception: whatever the first step raises.
    """
    ready, errors = {}, {}
    for number, (name, make) in enumerate(steps.items()):
        tell(name)
        try:
            step = make()
            _run(step, device, 2)  # also compiles
            once = sum(_run(step, device, 1).values()) / 1e3
            ready[name] = step, max(1, min(MOST_STEPS, round(BURST / max(once, 1e-6))))
        except Exception as error:
            if number == 0:
                raise
            first_line = (str(error).strip().splitlines() or [""])[0]
            errors[name] = f"{type(error).__name__}: {first_line[:200]}"
    samples = defaultdict(list)
    began = time.monotonic()
    rounds = 0
    names = list(ready)
    while rounds < MOST_ROUNDS:
        if rounds >= LEAST_ROUNDS and time.monotonic() - began >= seconds:
            break
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            step, count = ready[name]
            samples[name].append(_run(step, device, count))
        rounds += 1
    rows = [_row(name, samples[name], samples[names[0]]) for name in names]
    return rows + [{"name": name, "error": error} for name, error in errors.items()]


def _run(step: Step, device: torch.device, count: int) -> dict[str, float]:
    """Milliseconds of each part of a step, a mean over some steps in a row."""
    clock = Clock(device)
    clock.start()
    for _ in range(count):
        step(clock)
    return {part: ms / count for part, ms in clock.read().items()}


def _row(name: str, samples: list[dict[str, float]], first: list[dict[str, float]]) -> dict:
    totals, theirs = ([sum(parts.values()) for parts in each] for each in (samples, first))
    medians = {part: statistics.median(each.get(part, 0.0) for each in samples) for part in PARTS}
    return {
        "name": name,
        "ms": statistics.median(totals),
        "min_ms": min(totals),
        "rounds": len(samples),
        # of the same rounds, in which the machine was as busy with both
        "of_first": statistics.median(
            ours / other for ours, other in zip(totals, theirs, strict=True)
        ),
        "parts": medians,
    }
