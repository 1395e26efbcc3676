"""Forward, loss and backward of a training step under torch.compile: how much in one graph.

    python bench/compiled_step.py bench/results/compiled_step.json [ROUNDS]

The networks alone, which is `tdkern train --compile`; networks and loss in one graph; and these
with their backward, which Dynamo traces where it is told to. Steps are taken in turn in one thread,
so that whatever else the machine does falls on all alike; times are of the processor, and a ratio
is the median over rounds. Every way's gradient must be the eager one's.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from tdkern.data.files import write_atomic
from tdkern.ema import EMA
from tdkern.losses import TDEDMLoss
from tdkern.networks import EDMPrecond, SongUNet

SHAPE, CHANNELS = (16, 3, 16, 16), 32
LOSS = TDEDMLoss(weight="online")
SCALE = 3 * 16 * 16 / 16


def networks():
    torch.manual_seed(0)
    settings = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    net = EDMPrecond(SongUNet(SHAPE[-1], 3, 3, model_channels=CHANNELS, **settings))
    return net, EMA(net).module


def of(net, target, batch):
    return LOSS.evaluate(net, target, batch, gradient_scale=SCALE).loss.sum()


def eager():
    net, target = networks()
    return net, lambda batch: of(net, target, batch).backward()


def networks_compiled():
    net, target = networks()
    compiled = torch.compile(net), torch.compile(target)
    return net, lambda batch: of(*compiled, batch).backward()


def with_the_loss():
    net, target = networks()
    compiled = torch.compile(of, fullgraph=True)
    return net, lambda batch: compiled(net, target, batch).backward()


def with_the_backward():
    net, target = networks()
    compiled = torch.compile(lambda batch: of(net, target, batch).backward(), fullgraph=True)

    def step(batch):
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            compiled(batch)

    return net, step


def gradient(net, step, batch):
    """[elements], and the seconds of processor that it took."""
    net.zero_grad(set_to_none=True)
    start = time.process_time()
    step(batch)
    took = time.process_time() - start
    return torch.cat([param.grad.flatten() for param in net.parameters()]), took


def main(rounds: int) -> dict:
    torch.set_num_threads(1)
    images = torch.randn(SHAPE) / 2
    ways = (eager, networks_compiled, with_the_loss, with_the_backward)
    made = {make.__name__: make() for make in ways}
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        torch.manual_seed(number)
        batch, found = LOSS.pair(images), {}
        for name in made if number % 2 else reversed(made):
            found[name], took = gradient(*made[name], batch)
            if number:
                times[name].append(took)
            else:
                first[name] = took
        for name, own in found.items():
            error = (own - found["eager"]).norm() / found["eager"].norm()
            assert error < 1e-5, f"{name} has another gradient, by {error:.1e}"
    return {
        "shape": SHAPE,
        "torch": torch.__version__,
        "rounds": rounds,
        "ways": {
            name: {
                "ms": round(1e3 * statistics.median(own), 1),
                "of_the_driver": round(ratio(own, times["networks_compiled"]), 3),
                "first_s": round(first[name]),
            }
            for name, own in times.items()
        },
    }


def ratio(times: list[float], others: list[float]) -> float:
    """The median of the ratios by round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


if __name__ == "__main__":
    path, *given = sys.argv[1:]
    result = main(*map(int, given or ["30"]))
    write_atomic(Path(path), (json.dumps(result, indent=1) + "\n").encode())
