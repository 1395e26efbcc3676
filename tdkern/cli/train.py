"""`tdkern train`."""

import json
import os
import random
import re
import sys
import time
from pathlib import Path

import click

from ..data.files import one_line
from ..evaluation.detectors import BUILT_IN
from ..evaluation.fid import is_address
from ..training import CheckpointError, Options, Trainer, checkpoint
from ..training import train as train_
from ..training.distributed import joined
from ..training.formats import as_json
from ..training.lock import LockedError
from ..training.loop import Diverged
from ..training.options import nested
from ..training.presets import PRESETS
from ..training.signals import Stopped
from .errors import sentence
from .options import given_options, of_the_family, options_flags
from .types import on_command_line


@click.command()
@click.option("--outdir", metavar="DIR", help="Where run directories are made.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Start from these options.")
@click.option("--config", metavar="JSON", help="Start from the options in a run's own file.")
@options_flags
@click.option(
    "--resume",
    metavar="DIR",
    help="Go on with a run, or from a training state, in its own directory and with its own "
    "options.",
)
@click.option("--desc", metavar="TEXT", help="Added to the run directory's name.")
@click.option("--nosubdirs", is_flag=True, help="Write into --outdir itself.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the options and exit.")
def train(outdir, preset, config, resume, desc, nosubdirs, dry_run, **values):
    """Train a diffusion model on images.

    Flags that EDM and consistency_models have keep their meaning. For several GPUs: torchrun
    --standalone --nproc_per_node=8 -m tdkern.cli train ...

    \b
    tdkern train --outdir runs --data cifar10-train-32x32.zip --cond 1 --batch 256 --bf16
    tdkern train --outdir runs --data cifar10-train-32x32.zip --precond ct --weight-schedule karras
    tdkern train --resume runs/00000-cifar10-train-32x32-cond-ddpmpp-edm-td-gpus1-batch256-bf16
    """
    given = _absolute(given_options(values))
    with joined() as process:
        given["gpus"] = process.world
        if resume:
            _refuse_beside_resume(preset or config)
            run_dir, state, options = _find_run(Path(resume), given)
        else:
            state, options = None, _new_options(preset, config, given)
            if not outdir and not dry_run:
                raise click.UsageError("give --data and --outdir, or --resume")
        trainer = Trainer(options, process, state)
        if process.rank == 0:
            _describe(trainer)
        if dry_run:
            return
        if process.rank == 0:
            if not resume:
                run_dir = _make_run_dir(Path(outdir), None if nosubdirs else _name(trainer, desc))
            last = options.total_steps * options.batch
            place = f"{one_line(run_dir)}, image {trainer.nimg} of {last}"
            click.echo(f"{'Going on' if resume else 'Training'} in {place}")
        _run(trainer, run_dir if process.rank == 0 else None)


def _refuse_beside_resume(base: str | None) -> None:
    """Refuse flags that say what a run to resume says itself; base: --preset or --config."""
    if any(map(on_command_line, ("outdir", "desc", "nosubdirs"))):
        raise click.UsageError(
            "--resume goes on in the run's own directory; leave out --outdir, --desc and "
            "--nosubdirs"
        )
    if base:
        raise click.UsageError(
            "--resume has the run's own options; leave out --preset and --config"
        )


def _describe(trainer: Trainer) -> None:
    """Print the run's options, and to stderr what it trains on."""
    dataset, process = trainer.dataset, trainer.process
    click.echo(json.dumps(as_json(trainer.options), indent=2))
    parameters = sum(p.numel() for p in trainer.net.parameters())
    click.echo(
        f"{len(dataset)} images {list(dataset.image_shape)}, {dataset.label_dim} label columns, "
        f"{parameters:,} parameters, {process.world} x {process.device}",
        err=True,
    )
    if dataset.left_out:
        click.echo(one_line(f"Left out of {dataset.path}: {dataset.left_out}"), err=True)
    if dataset.classes:
        count = dataset.label_dim - len(dataset.classes)
        click.echo(
            f"Warning: {count} of the classes 0 to {dataset.label_dim - 1} have no images; "
            "nothing will be drawn of them",
            err=True,
        )


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
        raise click.ClickException(
            f"{sentence(error)}; {one_line(checkpoint.way_on(run_dir))}"
        ) from error


def _absolute(options: dict) -> dict:
    """Options with absolute paths: a run may be resumed from elsewhere."""
    paths = {name: options.get(name) for name in ("data", "transfer", "fid_ref", "fid_detector")}
    if is_address(paths["fid_ref"]):
        del paths["fid_ref"]
    if paths["fid_detector"] in list(BUILT_IN):
        del paths["fid_detector"]
    return options | {
        name: os.path.abspath(path)
        for name, path in paths.items()
        if path and isinstance(path, str)
    }


def _new_options(preset: str | None, config: str | None, given: dict) -> Options:
    """The options of a new run: those of a preset or of a file, and on top those that are given."""
    if preset and config:
        raise click.UsageError("--preset and --config exclude each other")
    base = {}
    if preset:
        base = PRESETS[preset]
    if config:
        base = checkpoint.read_options(Path(config))
    base = _absolute(base)
    if not given.get("data", base.get("data")):
        raise click.UsageError("give --data and --outdir, or --resume")
    given = of_the_family(given, given.get("family", base.get("family", Options.family)))
    try:
        return Options(**nested(base, given))
    except TypeError as error:
        raise _unknown(config, error) from error


def _unknown(source, error: Exception) -> CheckpointError:
    return CheckpointError(f"{source}: does not hold options of this version of tdkern ({error})")


def _find_run(path: Path, given: dict) -> tuple[Path, Path | None, Options]:
    """The run's directory, its training state and its options with those given.

    There is no state if the run was killed before the first.
    """
    run_dir = path.resolve().parent if checkpoint.is_checkpoint(path) else path
    saved = run_dir / "training_options.json"
    states = checkpoint.checkpoints(run_dir, checkpoint.STATE)
    if path == run_dir and saved.exists() and not states:
        state, source, options = None, saved, checkpoint.read_options(saved)
    else:
        state = source = checkpoint.find(path, checkpoint.STATE)
        options = checkpoint.read_meta(state, checkpoint.STATE).get("options")
    try:
        old = Options(**options)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _unknown(source, error) from error
    return run_dir, state, old.resumed(**of_the_family(given, old.family))


def _name(trainer: Trainer, desc: str | None) -> str:
    options = trainer.options
    parts = [
        trainer.dataset.name,
        "cond" if options.cond else "uncond",
        options.arch,
        options.family,
        "td" if options.td else "edm",
        f"gpus{options.gpus}",
        f"batch{options.batch}",
        options.precision,
    ]
    return "-".join(parts + [desc] if desc else parts)


def _make_run_dir(outdir: Path, name: str | None) -> Path:
    """The next numbered directory in `outdir`, or without a name `outdir` itself.

    It must not hold a run yet.
    """
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
        raise click.ClickException(
            f"--desc and the data's name must be part of a folder's name, got {one_line(name)}"
        )
    while True:
        number = max(_numbers(outdir), default=-1) + 1
        run_dir = outdir / f"{number:05d}-{name}"
        try:
            run_dir.mkdir()
        except FileExistsError:  # another process has just taken the number
            continue
        if _numbers(outdir).count(number) == 1:
            return run_dir
        # Another has, under another name. Whoever sees that gives way, and chance says who is next.
        run_dir.rmdir()
        time.sleep(random.SystemRandom().uniform(0, 0.1))


def _numbers(outdir: Path) -> list[int]:
    """Of the folders of runs that are there."""
    found = (re.match(r"\d+(?=-)", path.name) for path in outdir.iterdir())
    return [int(match[0]) for match in found if match]


def _check_free(outdir: Path) -> None:
    """Refuse a directory that holds a run, or other things' files of the names that a run
    writes.
    """
    if (outdir / "training_options.json").exists():
        raise click.ClickException(
            f"{outdir}: holds a run; go on with it by --resume, or give another --outdir"
        )
    for path in outdir.iterdir():
        ours = (
            path.name in checkpoint.RECORDS
            or checkpoint.NAME.fullmatch(path.name)
            or checkpoint.PICTURE.fullmatch(path.name)
            or checkpoint.BEST.fullmatch(path.name)
            or checkpoint.EVENTS.fullmatch(path.name)
        )
        if ours:
            raise click.ClickException(
                one_line(
                    f"{outdir}: holds {path.name}, which a run would write; give another --outdir"
                )
            )
