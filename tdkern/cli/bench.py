"""`tdkern bench`."""

import importlib
import json
import os
import sys
from pathlib import Path

import click
import torch
from torch import nn

from .. import info
from ..benchmark.clock import PARTS
from ..benchmark.picture import draw_rows
from ..benchmark.rounds import measure
from ..benchmark.steps import COMPILED, Setting, steps_of
from ..data.files import one_line, write_atomic
from ..ema import EMA
from .types import Numbers, Real


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="MODULE:FACTORY",
    help="What makes the network, found from the current folder as Python finds it: a function of "
    "no arguments that returns an nn.Module with net(x, sigma) -> the denoised image.",
)
@click.option(
    "--shape",
    type=Numbers(int),
    required=True,
    metavar="C,H,W",
    help="Shape of an image, such as 3,32,32.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images in a step."
)
@click.option(
    "--seconds",
    type=Real(),
    default=60.0,
    show_default=True,
    help="How long to measure, beside warming up and compiling; three rounds at least are run.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device to measure on. [default: cuda, where there is a GPU]",
)
@click.option(
    "--no-compile", is_flag=True, help="Without torch.compile, which begins slowly on a CPU."
)
@click.option(
    "--outdir",
    type=click.Path(file_okay=False),
    default="tdkern-bench",
    show_default=True,
    metavar="DIR",
    help="Where bench.json and bench.png go.",
)
def bench(model, shape, batch, seconds, device, no_compile, outdir):
    """What a training step costs on your own network, without TD and with it.

    Compared are EDM's loss in plain PyTorch, the TD loss as published training code has it, ours,
    and ours with AdamEMA, with the TD term on a share of the batch, in bfloat16 and under
    torch.compile; each from clean images to new weights and their average, in interleaved rounds.
    Prints medians and where the time goes. The network is trained on noise and thrown away.

    \b
    tdkern bench --model mynetworks:make_unet --shape 3,32,32 --batch 64
    """
    if min(shape) < 1:
        raise click.UsageError(f"--shape must be positive numbers, got {','.join(map(str, shape))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no GPU here; see python -m tdkern.info")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = _network(model).to(device).train()
    setting = _setting(model, net, shape, batch, device)
    Path(outdir).mkdir(parents=True, exist_ok=True)  # before the work
    _tell_backends(device)
    steps = steps_of(setting)
    if no_compile:
        del steps[COMPILED]
    rows = measure(steps, device, seconds, lambda name: click.echo(f"Warming up: {name}", err=True))
    about = {
        "model": model,
        "shape": shape,
        "batch": batch,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "info": info(),
    }
    click.echo("\n".join(_table(rows)))
    title = f"{model}, {batch} of {'x'.join(map(str, shape))}, {about['device']}"
    write_atomic(Path(outdir, "bench.png"), draw_rows(rows, title))
    text = json.dumps(about | {"rows": rows}, indent=1)
    write_atomic(Path(outdir, "bench.json"), text.encode())
    click.echo(f"Written to {outdir}: bench.json, bench.png", err=True)


def _network(model: str) -> nn.Module:
    """The network that a user's factory makes; every error names the flag."""
    module_name, colon, path = model.partition(":")
    if not (module_name and colon and path):
        raise click.UsageError(f"--model must be MODULE:FACTORY, got {model!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        raise _wrong(model, f"{module_name} cannot be imported", error) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise click.ClickException(f"--model {model}: {module_name} has no {path}")
        found = getattr(found, name)
    if not callable(found):
        raise click.ClickException(
            f"--model {model}: must be a function that makes a network, got {type(found).__name__}"
        )
    try:
        net = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise _wrong(model, f"{path}() failed", error) from error
    if not isinstance(net, nn.Module):
        raise click.ClickException(
            f"--model {model}: {path}() must return an nn.Module, got {type(net).__name__}"
        )
    if not any(param.requires_grad for param in net.parameters()):
        raise click.ClickException(f"--model {model}: the network has no parameter to train")
    return net


def _setting(
    model: str, net: nn.Module, shape: list[int], batch: int, device: torch.device
) -> Setting:
    """What the steps are given, tried once."""
    images = torch.randn(batch, *shape, device=device) / 2
    inner = getattr(net, "model", net)
    classes = getattr(net, "label_dim", getattr(inner, "label_dim", 0)) or 0
    labels: tuple = ()
    if classes:
        drawn = torch.randint(classes, (batch,), device=device)
        labels = (nn.functional.one_hot(drawn, classes).to(images.dtype),)
    call = f"net(x, sigma{', class_labels' if classes else ''}) of x {list(images.shape)}"
    try:
        with torch.no_grad():
            denoised = net(images, torch.ones(batch, device=device), *labels)
    except Exception as error:
        raise _wrong(model, f"{call} failed", error) from error
    if not isinstance(denoised, torch.Tensor) or denoised.shape != images.shape:
        found = list(denoised.shape) if isinstance(denoised, torch.Tensor) else type(denoised)
        raise click.ClickException(
            f"--model {model}: {call} must be the denoised image, of x's shape, got {found}; "
            "tdkern.networks.Denoiser makes one of a network that predicts eps, v or a velocity"
        )
    return Setting(net, EMA(net), images, labels)


def _tell_backends(device: torch.device) -> None:
    """Say so where tdkern's ops would be measured without their kernels."""
    kernels = ("cuda", "triton") if device.type == "cuda" else ("cpp",)
    missing = info()["backends"]
    if all(missing[name] for name in kernels):
        reasons = "; ".join(f"{name}: {missing[name]}" for name in kernels)
        click.echo(f"Warning: tdkern's ops are plain PyTorch here ({reasons})", err=True)


def _wrong(model: str, what: str, error: Exception) -> click.ClickException:
    first_line = (str(error).strip().splitlines() or [""])[0]
    reason = one_line(f"{type(error).__name__}: {first_line}")[:200]
    return click.ClickException(f"--model {model}: {what} ({reason})")


def _table(rows: list[dict]) -> list[str]:
    """A line for each row; times in ms."""
    width = max(len(row["name"]) for row in rows)
    head = [f"{'step, ms':<{width}}", f"{'median':>9}", f"{'of first':>8}"]
    lines = [" ".join([*head, *(f"{part:>{max(len(part), 8)}}" for part in PARTS)])]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['name']:<{width}} cannot be run here: {row['error']}")
            continue
        numbers = [f"{row['name']:<{width}}", f"{row['ms']:>9.3f}", f"{row['of_first']:>7.2f}x"]
        parts = (f"{row['parts'][part]:>{max(len(part), 8)}.3f}" for part in PARTS)
        lines.append(" ".join([*numbers, *parts]))
    return lines
