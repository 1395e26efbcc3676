"""`tdkern train`."""
import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import click

from ..data.files import one_line, read_file
from ..losses.ct import LOSS_NORMS, WEIGHTINGS
from ..losses.ddpm import PREDICTIONS
from ..ops.td_coef import WEIGHTS
from ..training import CheckpointError, Options, Trainer, checkpoint
from ..training import train as train_
from ..training.distributed import joined
from ..training.lock import LockedError
from ..training.loop import Diverged
from ..training.options import CURRICULA
from ..training.signals import Stopped
from .errors import sentence
from .types import Numbers, boolean, on_command_line


@click.command()
@click.option("--outdir", metavar="DIR", help="Where run directories are made.")
@click.option("--data", metavar="ZIP|DIR", help="Images, in EDM's layout.")
@boolean("--cond", "Train a class-conditional network.")
@click.option("--arch", type=click.Choice(["ddpmpp", "ncsnpp", "adm"]), default="ddpmpp", show_default=True, help="Network.")
@click.option("--precond", type=click.Choice(list(checkpoint.PRECONDS)), default="edm", show_default=True, help="Preconditioning and loss.")
@click.option("--duration", type=float, default=200.0, show_default=True, metavar="MIMG", help="Training duration, million images.")
@click.option("--batch", type=int, default=512, show_default=True, help="Images a step, over all processes.")
@click.option("--batch-gpu", type=int, help="Images of one forward pass; smaller needs less memory. [default: the process's share]")
@click.option("--cbase", type=int, help="Base width of the network. [default: by --arch]")
@click.option("--cres", type=Numbers(int), metavar="LIST", help="Width of each resolution, times the base. [default: by --arch]")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate.")
@click.option("--lr-rampup-kimg", type=float, metavar="KIMG", help="The learning rate rises for so long. [default: 5% of the duration, at most 10000]")
@click.option("--lr-decay", type=click.Choice(["none", "cosine"]), default="none", show_default=True, help="Fall of the learning rate over the duration.")
@click.option("--ema", type=float, default=0.5, show_default=True, metavar="MIMG", help="Half-life of the averaged weights.")
@click.option("--dropout", type=float, help="Dropout probability. [default: 0 with ct, else 0.13]")
@click.option("--augment", type=float, default=0.12, show_default=True, metavar="P", help="Probability of each augmentation, as in EDM; 0 for none.")
@boolean("--xflip", "Add every image's mirror image.")
@boolean("--fp16", "Half precision inside the network.")
@boolean("--bf16", "bfloat16 inside the network.")
@click.option("--loss-type", type=click.Choice(["edm", "td"]), default="td", show_default=True, help="The loss of --precond alone, or with the TD term.")
@click.option("--lambda-edm", type=float, default=0.5, show_default=True, help="Weight of the loss beside its TD term.")
@click.option("--k-idx", type=float, help="Distance from t to t', in steps; a whole number with ddpm. Not with ct. [default: 1]")
@click.option("--one-idx", type=float, help="Distance from t to tau, in steps. Not with ddpm. [default: 0.25 with edm and ct, else 1]")
@click.option("--td-coupling", type=click.Choice(["markov", "shared"]), default="markov", show_default=True, help="Noise of the pair; shared is biased.")
@click.option("--td-weight", type=click.Choice(WEIGHTS), help="Weight of the TD term. [default: pairwise_x0 with ct, else pairwise]")
@click.option("--td-eta", type=float, help="DDIM's eta of the means, with ddpm, vp, ve and flow. [default: 1, or 0 with --td-coupling shared]")
@click.option("--td-sigma", type=Numbers(float, 2), metavar="LO,HI", help="TD only at these noise levels, with edm. [default: at all]")
@click.option("--td-share", type=float, metavar="SHARE",
              help="The most of each batch that the target network runs on, highest noise first. [default: what --td-sigma needs, else 1]")
@click.option("--target-ema-tau", type=float, help="Decay of the target network, reached by a ramp. Not with ct. [default: 0.999]")
@click.option("--target-copy", type=int, metavar="STEPS",
              help="Copy the network into the target every so many updates. Not with ct. [default: the target is an average]")
@click.option("--target-precision", type=click.Choice(list(checkpoint.PRECISIONS)), help="Precision inside the target network. [default: the network's]")
@click.option("--steps", type=int, help="Noise levels of the TD term's index space. Not with ct and ddpm. [default: 18]")
@click.option("--diffusion-steps", type=int, help="Times T of ddpm. [default: 1000]")
@click.option("--noise-schedule", type=click.Choice(["linear", "cosine"]), help="Betas of ddpm. [default: linear]")
@click.option("--prediction", type=click.Choice(PREDICTIONS), help="What the network predicts, with ddpm. [default: eps]")
@click.option("--loss-norm", type=click.Choice(LOSS_NORMS), help="Distance of ct; huber is improved consistency training's. [default: l2]")
@click.option("--weight-schedule", type=click.Choice(WEIGHTINGS), help="Weight of a noise level, with ct. [default: uniform]")
@click.option("--lognormal", type=Numbers(float, 2), metavar="MEAN,STD", help="Log-normal noise levels of ct, -1.1,2 in improved ct. [default: drawn evenly]")
@click.option("--scale-mode", type=click.Choice(["fixed", *CURRICULA]), help="How the number of ct's noise levels grows. [default: progressive]")
@click.option("--start-scales", type=int, help="Steps between noise levels at the start; all levels with fixed. [default: by --scale-mode: 2, 10, 40]")
@click.option("--end-scales", type=int, help="Steps between noise levels at the end. [default: by --scale-mode: 150, 1280]")
@click.option("--total-training-steps", type=int, help="Training steps to that end. [default: those of the duration]")
@click.option("--target-ema-mode", type=click.Choice(["fixed", "adaptive"]), help="Whether the decay of ct's target grows too. [default: adaptive]")
@click.option("--start-ema", type=float, help="Decay of ct's target at the start; 0, with fixed, copies the network. [default: 0.9]")
@click.option("--tick", type=float, metavar="KIMG", help="How often to print progress. [default: 1% of the duration, at most 50]")
@click.option("--snap", type=int, default=50, show_default=True, metavar="TICKS", help="How often to save the averaged network and a grid; 0: at the end.")
@click.option("--dump", type=int, default=50, show_default=True, metavar="TICKS", help="How often to save the training state; 0: at the end.")
@click.option("--keep", type=int, default=1, show_default=True, metavar="K", help="How many of the newest training states stay.")
@click.option("--keep-every", type=int, default=0, show_default=True, metavar="N", help="Of every N dumps the state stays for good; 0: of none.")
@click.option("--time-limit", type=float, metavar="MIN", help="Save the state and end after so many minutes, as at SIGTERM. [default: none]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all randomness.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that read images.")
@click.option("--transfer", metavar="DIR", help="Start from the weights of a network snapshot, or of a run's newest.")
@click.option("--resume", metavar="DIR", help="Go on with a run, or from a training state, in its own directory and with its own options.")
@click.option("--desc", metavar="TEXT", help="Added to the run directory's name.")
@click.option("--nosubdirs", is_flag=True, help="Write into --outdir itself.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the options and exit.")
@click.pass_context
def train(ctx, outdir, resume, desc, nosubdirs, dry_run, fp16, bf16, **values):
    """Train a diffusion model on images.

    Flags that EDM and consistency_models have keep their meaning. For several GPUs: torchrun --standalone --nproc_per_node=8 -m tdkern.cli train ...

    \b
    tdkern train --outdir runs --data cifar10-train-32x32.zip --cond 1 --batch 256 --bf16
    tdkern train --outdir runs --data cifar10-train-32x32.zip --precond ct --weight-schedule karras
    tdkern train --resume runs/00000-cifar10-train-32x32-cond-ddpmpp-edm-td-gpus1-batch256-bf16
    """
    if fp16 and bf16:
        raise click.UsageError("--fp16 and --bf16 exclude each other")
    values["precision"] = "fp16" if fp16 else "bf16" if bf16 else "fp32"
    values |= {name: os.path.abspath(values[name]) for name in ("data", "transfer") if values[name]}  # a run may be resumed from elsewhere
    with joined() as process:
        values["gpus"] = process.world
        if resume:
            if any(map(on_command_line, ("outdir", "desc", "nosubdirs"))):
                raise click.UsageError("--resume goes on in the run's own directory; leave out --outdir, --desc and --nosubdirs")
            switches = {"precision"} if on_command_line("fp16") or on_command_line("bf16") else set()
            given = {name: value for name, value in values.items() if name in switches | {"gpus"} or on_command_line(name)}
            run_dir, state, options = _find_run(Path(resume), given)
        else:
            if not values["data"] or not outdir:
                raise click.UsageError("give --data and --outdir, or --resume")
            state, options = None, Options(**values)
        trainer = Trainer(options, process, state)
        if process.rank == 0:
            _describe(trainer)
        if dry_run:
            return
        if process.rank == 0:
            if not resume:
                run_dir = _make_run_dir(Path(outdir), None if nosubdirs else _name(trainer, desc))
            whole = options.total_steps * options.batch
            click.echo(f"{'Going on' if resume else 'Training'} in {one_line(run_dir)}, image {trainer.nimg} of {whole}")
        _run(trainer, run_dir if process.rank == 0 else None)


def _describe(trainer: Trainer) -> None:
    """Print the run's options and what it trains on."""
    dataset, process = trainer.dataset, trainer.process
    click.echo(json.dumps(dataclasses.asdict(trainer.options), indent=2))
    parameters = sum(p.numel() for p in trainer.net.parameters())
    click.echo(f"{len(dataset)} images {list(dataset.image_shape)}, {dataset.label_dim} label columns, "
               f"{parameters:,} parameters, {process.world} x {process.device}")
    if dataset.left_out:
        click.echo(one_line(f"Left out of {dataset.path}: {dataset.left_out}"))
    if dataset.classes:
        count = dataset.label_dim - len(dataset.classes)
        click.echo(f"Warning: {count} of the classes 0 to {dataset.label_dim - 1} have no images; nothing will be drawn of them", err=True)


def _run(trainer: Trainer, run_dir: Path | None) -> None:
    """Train; what ends it before the end becomes one line that says how to go on."""
    try:
        train_(trainer, run_dir)
    except Stopped as stopped:
        if run_dir:
            click.echo(one_line(stopped), err=True)
        sys.exit(128 + stopped.signum)
    except (Diverged, LockedError):
        raise
    except Exception as error:
        if run_dir is None:
            raise
        raise click.ClickException(f"{sentence(error)}; {one_line(checkpoint.way_on(run_dir))}") from error


def _find_run(path: Path, given: dict) -> tuple[Path, Path | None, Options]:
    """The run's directory, its training state (none if it was killed before the first) and its options with those given."""
    run_dir = path.resolve().parent if checkpoint.is_checkpoint(path) else path
    saved = run_dir / "training_options.json"
    if path == run_dir and saved.exists() and not checkpoint.checkpoints(run_dir, checkpoint.STATE):
        state, source = None, saved
        options = _read_options(saved)
    else:
        state = source = checkpoint.find(path, checkpoint.STATE)
        options = checkpoint.read_meta(state, checkpoint.STATE).get("options")
    try:
        old = Options(**options)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source}: does not hold options of this version of tdkern ({error})") from error
    if given["gpus"] != old.gpus:
        raise CheckpointError(f"{run_dir}: the run has {old.gpus} processes, got {given['gpus']}; start it by torchrun with --nproc_per_node={old.gpus}")
    return run_dir, state, old.resumed(**given)


def _read_options(path: Path) -> dict:
    try:
        return json.loads(read_file(path, checkpoint.MAX_META))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); start a new run") from error


def _name(trainer: Trainer, desc: str | None) -> str:
    options = trainer.options
    parts = [trainer.dataset.name, "cond" if options.cond else "uncond", options.arch, options.precond, options.loss_type,
             f"gpus{options.gpus}", f"batch{options.batch}", options.precision]
    return "-".join(parts + [desc] if desc else parts)


def _make_run_dir(outdir: Path, name: str | None) -> Path:
    """The next numbered directory in `outdir`, or without a name `outdir` itself, which must not hold a run yet."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        if name is None:
            _check_free(outdir)
            return outdir
        return _numbered(outdir, name)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--outdir cannot be made ({sentence(error)})") from error


def _numbered(outdir: Path, name: str) -> Path:
    if "/" in name or "\0" in name:
        raise click.ClickException(f"--desc and the data's name must be part of a folder's name, got {one_line(name)}")
    while True:
        numbers = [int(match[0]) for path in outdir.iterdir() if (match := re.match(r"\d+(?=-)", path.name))]
        run_dir = outdir / f"{max(numbers, default=-1) + 1:05d}-{name}"
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:  # another process has just taken the number
            continue


def _check_free(outdir: Path) -> None:
    """Refuse a directory that holds a run, or other things' files of the names that a run writes."""
    if (outdir / "training_options.json").exists():
        raise click.ClickException(f"{outdir}: holds a run; go on with it by --resume, or give another --outdir")
    for path in outdir.iterdir():
        ours = path.name in checkpoint.RECORDS or checkpoint.NAME.fullmatch(path.name) or checkpoint.GRID.fullmatch(path.name)
        if ours:
            raise click.ClickException(one_line(f"{outdir}: holds {path.name}, which a run would write; give another --outdir"))
