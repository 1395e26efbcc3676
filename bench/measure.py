"""How a step is measured: its time, the memory that it takes beside its inputs and, on a GPU, its
launches and host synchronisations.

`TDKERN_BENCH_TINY=1` makes every size small: to see that all of it runs, not to time it. Its rows
are kept in the folder that TDKERN_BENCH_RESULTS names, or not at all.
"""

import math
import os
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = os.environ.get("TDKERN_BENCH_TINY") == "1"
LOOKED_FOR = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # by the names that Linux has


def instructions() -> list[str]:
    """Which of LOOKED_FOR the processor has."""
    with open("/proc/cpuinfo") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [each for each in LOOKED_FOR if each in flags]


# whether bfloat16 is faster than float32 here: without these a processor computes it in steps
HALF = DEVICE == "cuda" or bool({"avx512_bf16", "amx_bf16"} & set(instructions()))


def random_images(folder: Path, count: int, resolution: int) -> Path:
    """A data set of random images for `tdkern train`."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, resolution, resolution), np.uint8)
    np.save(folder / "images.npy", pixels)
    return folder / "images.npy"


def sizes(*shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes [B, ...] to measure."""
    return [(2, *shapes[0][1:])] if TINY else list(shapes)


def of_device(*, tiny, cpu, cuda):
    """The sizes for this run: to see that it runs, or to time it on this device."""
    if TINY:
        return tiny
    return cpu if DEVICE == "cpu" else cuda


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def compiled(fn, **options):
    """torch.compile(fn, **options) for the number of threads there is now, whatever was compiled
    before.
    """
    from torch._inductor import config

    torch._dynamo.reset()
    config.cpp.threads = torch.get_num_threads()
    return torch.compile(fn, **options)


def copy_of(moved: int):
    """The floor: a step that copies, and so moves as many bytes, half of them read and half
    written.
    """
    source = torch.randn(moved // 8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def negation_of(moved: int):
    """The floor of what works in place: a step that negates in place, and so reads as many bytes
    and writes them back.
    """
    values = torch.randn(moved // 8, device=DEVICE)
    return values.neg_


def peak_extra(step, device: str) -> int:
    """The most bytes of tensors on the device that step() holds at any time beside what there was
    before, what it returns included.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    # seldom, on a machine under load, a trace lacks some of its events
    return sorted(_traced_peak(step) for _ in range(3))[1]


def _traced_peak(step) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        # held until the trace ends, so that the trace has every allocation and no release of what
        # came before
        result = step()
    del result
    held = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


# ---- CUDA ---------------------------------------------------------------------------------------


def on_cuda(make, moved: int, seconds: float, rotate: bool) -> dict:
    """Times make()'s steps by events; counts launches and host synchronisations of one.

    Inputs: as many sets as are needed to move four times the L2, at most 64, taken in turn, each
        with outputs of its own. `median_us`
    is of steps launched one by one, so where they are short it is the host's time; `graph_us` of
    the same in a CUDA graph's replays, taken where all sets together are small and no step waits
    for the host.
    """
    cache = torch.cuda.get_device_properties().L2_cache_size
    count = min(64, max(1, math.ceil(4 * cache / moved))) if rotate else 1
    steps = [make() for _ in range(count)]
    held = [[step() for _ in range(2)][-1] for step in steps]
    row = {"sets": count, "extra_bytes": peak_extra(steps[0], "cuda"), "syncs": syncs(steps[0])}
    try:
        row |= launches(steps[0])
    except RuntimeError as error:  # the profiler is not everywhere allowed
        row["launches_error"] = str(error)

    def one_by_one():
        for i, step in enumerate(steps):
            held[i] = step()

    times = events(one_by_one, seconds)
    row |= {
        "median_us": statistics.median(times) / count * 1e6,
        "min_us": min(times) / count * 1e6,
        "rounds": len(times),
    }
    if rotate and row["syncs"] == 0 and moved < 2**28:
        try:
            row["graph_us"] = statistics.median(events(captured(steps), seconds)) / count * 1e6
        except RuntimeError as error:
            row["graph_error"] = str(error)
    return row


def events(run, seconds: float) -> list[float]:
    """Times of run() in s: as many rounds as fit in `seconds`, 3 to 200, each of as many runs as
    last 5 ms.
    """
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-6)
    runs = max(1, round(0.005 / once))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(int(min(200, max(3, seconds / once / runs)))):
        begin.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / runs)
    return times


def captured(steps):
    """The replay of a graph of all steps; their outputs live in it side by side."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [step() for step in steps]

    def replay():
        assert held
        graph.replay()

    return replay


def syncs(step) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def launches(step) -> dict:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    # Kineto's own events: torch's, made of them, take seconds where a step has thousands of
    # launches.
    events = [
        event.name()
        for event in trace.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]
    copies = [event for event in events if event.startswith(("Memcpy", "Memset"))]
    return {"launches": len(events) - len(copies), "copies": len(copies)}
