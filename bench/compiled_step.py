"""Forward, loss and backward of a training step under torch.compile: how much in one graph.

    python bench/compiled_step.py [ROUNDS]

The networks alone, which is `tdkern train --compile`; networks and loss in one graph; and these
with their backward, which Dynamo traces where it is told to. Steps are taken in turn in one thread,
so that whatever else the machine does falls on all alike; a ratio is the median over rounds.
"""

import statistics
import sys
import time

import torch

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


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    images = torch.randn(SHAPE) / 2
    ways = (eager, networks_compiled, with_the_loss, with_the_backward)
    made = {make.__name__: make() for make in ways}
    times = {name: [] for name in made}
    for number in range(rounds + 1):
        torch.manual_seed(number)
        batch, found = LOSS.pair(images), {}
        for name in made if number % 2 else reversed(made):
            found[name], took = gradient(*made[name], batch)
            if number:
                times[name].append(took)
            else:
                print(f"{name}: the first step took {took:.0f} s", flush=True)
        for name, own in found.items():
            error = (own - found["eager"]).norm() / found["eager"].norm()
            assert error < 1e-5, f"{name} has another gradient, by {error:.1e}"
    for name, own in times.items():
        pairs = zip(own, times["networks_compiled"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name}: {statistics.median(own) * 1e3:.1f} ms, {ratio:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
