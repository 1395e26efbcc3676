"""Whole training steps of a DDPM++ at 32x32, and the 18-step sampler, on one GPU.

    python bench/gpu/steps.py OUT.jsonl [--part step|compile] [--seconds S] [--skip N] [--tiny]

A line of JSON for each case as soon as it is measured, in order of worth, until the time is up. A
case has its line, with a failure, before it begins: what ends the process, or an error that leaves
CUDA unusable, is that case's, and another process goes on behind it (--skip).
A step takes clean images to new weights and averages: EDM's average and, where there is one, the
target network. "published" is the same step as the published training loops write it: the plain
network (bench_network.py), the loss as separate passes (published.py), torch's Adam, gradients
cleaned and averages moved one parameter at a time. "torch's norms" is ours without the network's
Triton kernels. "driver" is a step of `tdkern train` itself, and with --cuda-graph the graph that it
captures: whether the weights are the same bits as without.
"""

import argparse
import gc
import io
import json
import signal
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
from bench_loss_path import published_draw
from bench_network import make_plain
from measure import DEVICE
from published import eager_td_edm

from tdkern.data.files import write_atomic
from tdkern.ema import EMA
from tdkern.losses import CTLoss, EDMLoss, TDCTLoss, TDEDMLoss
from tdkern.networks import CTPrecond, EDMPrecond, half, unet
from tdkern.optim import AdamEMA
from tdkern.samplers import heun
from tdkern.schedules import EDM
from tdkern.training import Trainer
from tdkern.training.distributed import this_process
from tdkern.training.graph import WARM_UP
from tdkern.training.options import Options, nested

TORCHS = "torch's norms"
FUSES = half.fuses
LR, DECAYS = 1e-3, (0.9993, 0.999)  # of the average and of the target network
WINDOW = (0.3, 5.0)
MOST = 60  # seconds of a case on a GPU, of which the longest took 15: then it hangs
UNUSABLE = 3  # exit code: a case has left CUDA in an error that every call after it returns
CUT_OFF = "it was begun, and its process ended"


@dataclass(frozen=True)
class Case:
    """A training step: which loss, whose code, in which arithmetic, how launched, on how much."""

    loss: str
    style: str = "tdkern"
    precision: str = "bf16"
    mode: str = "eager"
    batch: int = 256


@dataclass(frozen=True)
class Sampler:
    """18 steps of Heun's method of a small network, 64 images; called step by step or replayed."""

    mode: str


@dataclass(frozen=True)
class Driver:
    """A step of `tdkern train`: also its draws, augmentation, averages and statistics."""

    mode: str
    batch: int = 256


OPS = {Case: "step", Sampler: "sampler", Driver: "driver"}  # as the rows call them


def cases(part: str) -> list[Case | Sampler | Driver]:
    """The cases of a part, those first that an aim asks for."""
    if part == "compile":
        return [Case("TD+EDM", mode="compile"), Case("EDM", mode="compile")]
    three = ("EDM", "TD+EDM", "TD+EDM window")
    main = [Case(loss) for loss in three]
    main += [Case("TD+EDM", "published"), Case("TD+EDM", mode="graph")]
    main += [
        Case("TD+EDM", style, precision)
        for precision in ("fp32", "tf32")
        for style in ("published", "tdkern")
    ]
    main += [Driver("eager"), Driver("graph")]
    main += [Case(loss, mode="graph") for loss in three if loss != "TD+EDM"]
    main += [Sampler("eager"), Sampler("graph")]
    main += [Case(loss, TORCHS) for loss in ("TD+EDM", "EDM")]
    main += [Case("CT"), Case("TD+CT"), Case("CT", mode="graph"), Case("TD+CT", mode="graph")]
    main += [Case("EDM", precision=precision) for precision in ("fp32", "tf32")]
    others = [
        Case(loss, mode=mode, batch=batch)
        for batch in (64, 512)
        for mode in ("graph", "eager")
        for loss in three
    ]
    return main + others + [Case("TD+EDM", "published", batch=batch) for batch in (64, 512)]


# ---- one step -----------------------------------------------------------------------------------


def set_arithmetic(precision: str) -> None:
    """float32 products of convolutions and matrices in TF32 or not, as `torch.backends` has it."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def make_net(case: Case, tiny: bool):
    torch.manual_seed(0)
    resolution = 8 if tiny else 32
    model = unet("ddpmpp", resolution, 3, cbase=8 if tiny else None, cres=[1] if tiny else None)
    net = (CTPrecond if "CT" in case.loss else EDMPrecond)(model).to(DEVICE)
    net.dtype = torch.bfloat16 if case.precision == "bf16" else None
    if case.style == "published":
        make_plain(net)
    return net


def loss_of(case: Case):
    if case.loss == "TD+EDM window":
        windowed = TDEDMLoss(weight="online", td_sigma=WINDOW)
        return replace(windowed, td_share=windowed.window_share(case.batch))
    return {
        "EDM": EDMLoss,
        "TD+EDM": lambda: TDEDMLoss(weight="online"),
        "CT": CTLoss,
        "TD+CT": TDCTLoss,
    }[case.loss]()


def tdkern_step(case: Case, net, ema, target, images):
    averages = [average for average in (ema, target) if average is not None]
    optimizer = AdamEMA(
        net.parameters(),
        LR,
        averages=[a.module.parameters() for a in averages],
        decays=DECAYS[: len(averages)],
    )
    loss, scale = loss_of(case), images[0].numel() / len(images)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss(net, target and target.module, images, gradient_scale=scale).sum().backward()
        optimizer.step()

    return step


def published_step(net, ema, target, images):
    optimizer = torch.optim.Adam(net.parameters(), LR)
    one = torch.ones(len(images), dtype=torch.float64, device=DEVICE)
    networks = [(ema.module, DECAYS[0]), (target.module, DECAYS[1])]

    def step():
        optimizer.zero_grad(set_to_none=True)
        sigma = (1.2 * torch.randn(len(images), dtype=torch.float64, device=DEVICE) - 1.2).exp()
        x_t, x_tp, levels, _, valid = published_draw(images, sigma, one)
        with torch.no_grad():
            out_target = target.module(x_tp, levels[:, 2], raw=True).float()
        out = net(x_t, levels[:, 0], raw=True).float()
        loss = eager_td_edm(out, out_target, images, x_t, x_tp, levels, valid)
        (loss.sum() * (images[0].numel() / len(images))).backward()
        for param in net.parameters():
            torch.nan_to_num(param.grad, nan=0, posinf=1e5, neginf=-1e5, out=param.grad)
        optimizer.step()
        with torch.no_grad():
            for module, decay in networks:
                for average, param in zip(module.parameters(), net.parameters(), strict=True):
                    average.copy_(param.detach().lerp(average, decay))

    return step


def make_step(case: Case, tiny: bool):
    set_arithmetic(case.precision)
    net = make_net(case, tiny)
    ema, target = EMA(net), EMA(net) if case.loss != "EDM" else None
    if case.mode == "compile":
        for each in (net, target and target.module):
            if each is not None:
                # Without a GPU Inductor's C++ would take minutes and tell nothing.
                each.model = torch.compile(each.model, backend="aot_eager" if tiny else "inductor")
    size = 8 if tiny else 32
    images = torch.randn(case.batch, 3, size, size, device=DEVICE) / 2
    if case.style == "published":
        return published_step(net, ema, target, images)
    return tdkern_step(case, net, ema, target, images)


# ---- the driver's own step -----------------------------------------------------------------------


def write_images(path: Path, size: int) -> Path:
    """A data set of noise."""
    import PIL.Image

    pixels = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
    with zipfile.ZipFile(path, "w") as file:
        for i, image in enumerate(pixels):
            png = io.BytesIO()
            PIL.Image.fromarray(image).save(png, "png")
            file.writestr(f"{i}.png", png.getvalue())
    return path


def driver_of(case: Driver, data: Path, tiny: bool, mode: str) -> Trainer:
    """A new run of the same options and seed; on a CPU there is no graph."""
    options = {"data": str(data), "batch": case.batch, "duration": 1.0, "precision": "bf16"}
    options |= {"cbase": 8, "cres": [1]} if tiny else {}
    graph = mode == "graph" and DEVICE == "cuda"
    return Trainer(Options(**nested({}, options | {"cuda_graph": graph})), this_process())


def measured_driver(case: Driver, tiny: bool, seconds: float) -> dict:
    """Of steps like that of the first in one run's place, and whether another's bits are the same.

    The other is not captured. cuDNN's kernels are those that a run has without --bench.
    """
    set_arithmetic("fp32")
    torch.backends.cudnn.deterministic = True
    size = 8 if tiny else 32
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder) / "images.zip", size)
        ours, other = (driver_of(case, data, tiny, mode) for mode in (case.mode, "eager"))
    images = torch.randint(256, (case.batch, 3, size, size), dtype=torch.uint8).to(DEVICE)
    labels = torch.zeros(case.batch, 0, device=DEVICE)
    for trainer in (ours, other):
        for _ in range(WARM_UP + 2):
            trainer.train_step(images, labels)
    expected, found = other.tensors(), ours.tensors()
    row = {"same_bits": all(torch.equal(found[name], expected[name]) for name in expected)}
    del other, expected, found
    step = lambda: ours.train_step(images, labels)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        row |= {"host_waits": measure.syncs(step), **measure.launches(step)}
    row |= timed(step, seconds)
    torch.backends.cudnn.deterministic = False
    if DEVICE == "cuda":
        row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row | {"images_per_s": 1e3 * case.batch / row["ms"]}


# ---- measuring ----------------------------------------------------------------------------------


def timed(step, seconds: float) -> dict:
    """The median time of a step in ms, of steps that follow each other without a wait between."""
    if DEVICE == "cuda":
        times = measure.events(step, seconds)
        return {"ms": 1e3 * sorted(times)[len(times) // 2], "rounds": len(times)}
    start = time.perf_counter()
    step()
    return {"ms": 1e3 * (time.perf_counter() - start), "rounds": 1}


def measured(case: Case | Sampler | Driver, tiny: bool, seconds: float) -> dict:
    half.fuses = (lambda x: False) if getattr(case, "style", "") == TORCHS else FUSES
    if isinstance(case, Sampler):
        return measured_sampler(case.mode, tiny, seconds)
    if tiny:
        case = replace(case, batch=4)
    if isinstance(case, Driver):
        return measured_driver(case, tiny, seconds)
    step = make_step(case, tiny)
    for _ in range(1 if tiny else 3):
        step()
    row = {}
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        if case.mode == "graph":
            step = measure.captured([step])
        else:
            row |= {"host_waits": measure.syncs(step), **measure.launches(step)}
    row |= timed(step, seconds)
    if DEVICE == "cuda":
        row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row | {"images_per_s": 1e3 * case.batch / row["ms"]}


def measured_sampler(mode: str, tiny: bool, seconds: float) -> dict:
    torch.manual_seed(0)
    size = 8 if tiny else 32
    model = unet("ddpmpp", size, 3, cbase=8 if tiny else 64, cres=[1] if tiny else [1, 2])
    net = EDMPrecond(model, dtype=torch.bfloat16).to(DEVICE).eval().requires_grad_(False)
    sigmas = EDM(steps=18).sigmas()
    x = torch.randn(2 if tiny else 64, 3, size, size, device=DEVICE) * sigmas[0].item()

    def sample():
        return heun(net, x, sigmas)

    sample()
    row = {"host_waits": measure.syncs(sample)} if DEVICE == "cuda" else {}
    step = measure.captured([sample]) if mode == "graph" and DEVICE == "cuda" else sample
    return row | timed(step, seconds)


def attempt(*args) -> dict:
    """What was measured, or how it failed: a failing case must not cost the next its turn."""
    try:
        return measured(*args)
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {str(error)[:600]}"}
    finally:
        torch.backends.cudnn.deterministic = False  # the driver's case may have failed under it
        torch._dynamo.reset()
        gc.collect()


def usable() -> bool:
    """Whether this process can go on; what is free returns to the GPU."""
    try:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return True
    except RuntimeError as error:
        print(f"CUDA is unusable: {error}", flush=True)
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=["step", "compile"], default="step")
    parser.add_argument("--seconds", type=float, default=100, help="no case begins after these")
    parser.add_argument("--skip", type=int, default=0, help="so many cases, which have their lines")
    parser.add_argument("--each", type=float, default=0.6, help="seconds of timing a case")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal without a GPU")
    args = parser.parse_args()
    ends = time.monotonic() + args.seconds
    rows = args.out.read_text().splitlines() if args.out.exists() else []
    for case in cases(args.part)[args.skip :]:
        if time.monotonic() > ends:
            break
        start = time.monotonic()
        row = {"op": OPS[type(case)], **asdict(case)}
        begun = json.dumps(row | {"failure": CUT_OFF})
        write_atomic(args.out, "\n".join([*rows, begun, ""]).encode())
        if DEVICE == "cuda" and args.part == "step":
            signal.alarm(MOST)  # ends the process, whatever it waits for
        row |= attempt(case, args.tiny, args.each)
        good = usable()
        signal.alarm(0)
        row["took_s"] = round(time.monotonic() - start, 1)
        rows.append(json.dumps(row))
        write_atomic(args.out, "\n".join([*rows, ""]).encode())
        print(row, flush=True)
        if not good:
            sys.exit(UNUSABLE)


if __name__ == "__main__":
    main()
