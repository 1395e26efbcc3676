"""How much of the exchange of gradients lies within the backward: one traced step of two processes.

    python bench/overlap.py OUT.json.gz [--batch 8] [--cbase 128]

Two processes on this machine, with gloo, train the network of the CIFAR-10 preset. The file is what
Perfetto and chrome://tracing open, reduced to the backward's nodes, the all-reduces of gradient
buckets and the optimizer, and has beside it, under "summary", for each process:

    step_ms               the traced step
    backward_ms           from the first node of autograd to the end of the last; that
                          DistributedDataParallel then waits for the last buckets is no part of it
    all_reduces           buckets
    all_reduce_ms         time with at least one of them under way
    share_within_backward how much of that time lies within the backward
    waited_ms             from the end of the backward to that of the last all-reduce
"""

import argparse
import gzip
import json
import os
import socket
import tempfile
from pathlib import Path

import torch
from measure import random_images
from torch.profiler import ProfilerActivity, profile

from tdkern.training import Options, Trainer
from tdkern.training.distributed import joined

NODE = "autograd::engine::evaluate_function: "
ALL_REDUCE = "gloo:all_reduce"
OPTIMIZER = "Optimizer.step#"
STEP = "training step"
PROCESSES = 2
WARM_UP = 3  # steps: DistributedDataParallel orders its buckets by the first
SHORTEST = 20  # microseconds of a node in the trace; the summary is of all

Span = tuple[str, float, float]  # name, begin and end in microseconds


def traced_step(trainer: Trainer, batch: int) -> list[Span]:
    """The spans of a step after some to warm up, by the machine's clock."""
    images = torch.stack([trainer.dataset[i][0] for i in range(batch)])
    labels = torch.zeros(batch, 0)
    for _ in range(WARM_UP):
        trainer.train_step(images, labels)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        torch.distributed.barrier()
        with torch.profiler.record_function(STEP):
            trainer.train_step(images, labels)
    return [
        (event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3)
        for event in trace.profiler.kineto_results.events()
        if event.name().startswith((NODE, ALL_REDUCE, OPTIMIZER, STEP))
    ]


def union(spans: list[Span]) -> list[tuple[float, float]]:
    """What spans cover together, as spans that do not touch."""
    joined_spans: list[list[float]] = []
    for _, begin, end in sorted(spans, key=lambda span: span[1]):
        if joined_spans and begin <= joined_spans[-1][1]:
            joined_spans[-1][1] = max(joined_spans[-1][1], end)
        else:
            joined_spans.append([begin, end])
    return [(begin, end) for begin, end in joined_spans]


def summary(spans: list[Span]) -> dict:
    """The numbers of one process; see above."""
    nodes, buckets = (
        [span for span in spans if span[0].startswith(name)] for name in (NODE, ALL_REDUCE)
    )
    (step,) = (end - begin for name, begin, end in spans if name == STEP)
    first, last = min(begin for _, begin, _ in nodes), max(end for _, _, end in nodes)
    under_way = union(buckets)
    total = sum(end - begin for begin, end in under_way)
    within = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in under_way)
    return {
        "step_ms": round(step / 1e3, 1),
        "backward_ms": round((last - first) / 1e3, 1),
        "all_reduces": len(buckets),
        "all_reduce_ms": round(total / 1e3, 1),
        "share_within_backward": round(within / total, 3),
        "waited_ms": round(max(0.0, under_way[-1][1] - last) / 1e3, 1),
    }


def trace_events(rank: int, spans: list[Span]) -> list[dict]:
    """The spans as Chrome's format has them: a row for all-reduces that are under way at once."""
    found, free = [], []
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        if name.startswith(NODE) and end - begin < SHORTEST:
            continue
        row = 0
        if name == ALL_REDUCE:
            row = next((i for i, until in enumerate(free) if until <= begin), len(free))
            free[row : row + 1] = [end]
            row += 1
        found.append(
            {
                "name": name.removeprefix(NODE),
                "ph": "X",
                "pid": rank,
                "tid": row,
                "ts": round(begin),
                "dur": round(end - begin),
            }
        )
    return found


def of_a_process(rank: int, port: int, data: str, folder: str, given: dict) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined() as process:
        options = Options(data=data, gpus=PROCESSES, workers=0, **given)
        trainer = Trainer(options, process)
        spans = traced_step(trainer, options.batch // PROCESSES)
        parameters = sum(param.numel() for param in trainer.net.parameters())
    Path(folder, f"{rank}.json").write_text(json.dumps([parameters, spans]))


def measured(given: dict, resolution: int) -> dict:
    """The file's content; given: options of the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        data = str(random_images(Path(folder), given["batch"], resolution))
        torch.multiprocessing.spawn(of_a_process, (port, data, folder, given), PROCESSES)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    parameters, spans = ranks[0][0], from_the_first([spans for _, spans in ranks])
    return {
        "summary": {
            "torch": torch.__version__,
            "processes": PROCESSES,
            "threads": 1,
            "batch": given["batch"],
            "resolution": resolution,
            "parameters": parameters,
            "by process": [summary(own) for own in spans],
        },
        "traceEvents": [
            event for rank, own in enumerate(spans) for event in trace_events(rank, own)
        ],
    }


def from_the_first(spans: list[list[Span]]) -> list[list[Span]]:
    """The processes' spans from when the first of them began its step."""
    start = min(begin for own in spans for name, begin, _ in own if name == STEP)
    return [[(name, begin - start, end - start) for name, begin, end in own] for own in spans]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help=".json or .json.gz")
    parser.add_argument("--batch", type=int, default=8, help="of both processes together")
    parser.add_argument("--cbase", type=int, default=128, help="base width of the network")
    parser.add_argument("--resolution", type=int, default=32)
    args = parser.parse_args()
    found = measured({"batch": args.batch, "cbase": args.cbase}, args.resolution)
    text = json.dumps(found, separators=(",", ":")).encode()
    args.out.write_bytes(gzip.compress(text, mtime=0) if args.out.suffix == ".gz" else text)
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
