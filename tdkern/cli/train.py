"""`tdkern train`."""
import json
import os
import re
from pathlib import Path

import click

from ..data import DatasetError
from ..training import CheckpointError, Options, Trainer, checkpoint
from ..training import train as run
from ..training.distributed import joined
from ..training.formats import as_json
from ..training.options import nested
from ..training.presets import PRESETS
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
        try:
            if resume:
                if any(map(on_command_line, ("outdir", "desc", "nosubdirs"))):
                    raise click.UsageError("--resume goes on in the run's own directory; leave out --outdir, --desc and --nosubdirs")
                if preset or config:
                    raise click.UsageError("--resume has the run's own options; leave out --preset and --config")
                run_dir, state, options = _find_run(Path(resume), given)
            else:
                state, options = None, _new_options(preset, config, given)
                if not outdir and not dry_run:
                    raise click.UsageError("give --data and --outdir, or --resume")
            trainer = Trainer(options, process, state)
            if process.rank == 0:
                click.echo(json.dumps(as_json(options), indent=2))
                click.echo(f"{len(trainer.dataset)} images {list(trainer.dataset.image_shape)}, {trainer.dataset.label_dim} label columns, "
                           f"{sum(p.numel() for p in trainer.net.parameters()):,} parameters, {process.world} x {process.device}", err=True)
        except (ValueError, ImportError) as error:  # lpips may not be installed
            raise click.ClickException(str(error)) from error
        if dry_run:
            return
        if process.rank == 0:
            if not resume:
                run_dir = _make_run_dir(Path(outdir), None if nosubdirs else _name(trainer, desc))
            click.echo(f"{'Going on' if resume else 'Training'} in {run_dir}, image {trainer.nimg} of {options.total_steps * options.batch}")
        try:
            run(trainer, run_dir if process.rank == 0 else None)
        except (DatasetError, CheckpointError) as error:  # from a worker process the message is a whole traceback, which ends in ours
            raise click.ClickException(str(error).strip().splitlines()[-1]) from error


def _absolute(options: dict) -> dict:
    """Options with absolute paths: a run may be resumed from elsewhere."""
    paths = {name: options.get(name) for name in ("data", "transfer")}
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
        raise CheckpointError(f"{config}: does not hold options of this version of tdkern ({error})") from error


def _find_run(path: Path, given: dict) -> tuple[Path, Path | None, Options]:
    """The run's directory, its training state and its options with those given.

    There is no state if the run was killed before the first.
    """
    run_dir = path.resolve().parent if path.resolve().name.startswith(checkpoint.STATE + "-") else path
    saved = run_dir / "training_options.json"
    if path == run_dir and saved.exists() and not any(run_dir.glob(f"{checkpoint.STATE}-*")):
        state, options = None, checkpoint.read_options(saved)
    else:
        state = checkpoint.find(path, checkpoint.STATE)
        options = checkpoint.read_meta(state, checkpoint.STATE)["options"]
    given = of_the_family(given, options["family"])
    try:
        return run_dir, state, Options(**options).resumed(**given)
    except TypeError as error:
        raise CheckpointError(f"{state or saved}: does not hold options of this version of tdkern ({error})") from error


def _name(trainer: Trainer, desc: str | None) -> str:
    options = trainer.options
    parts = [trainer.dataset.name, "cond" if options.cond else "uncond", options.arch, options.family, "td" if options.td else "edm",
             f"gpus{options.gpus}", f"batch{options.batch}", options.precision]
    return "-".join(parts + [desc] if desc else parts)


def _make_run_dir(outdir: Path, name: str | None) -> Path:
    """The next numbered directory in `outdir`, or without a name `outdir` itself.

    It must not hold a run yet.
    """
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--outdir cannot be made ({error})") from error
    if name is None:
        if (outdir / "training_options.json").exists():
            raise click.ClickException(f"{outdir}: holds a run; go on with it by --resume, or give another --outdir")
        return outdir
    numbers = [int(match[0]) for path in outdir.iterdir() if (match := re.match(r"\d+(?=-)", path.name))]
    run_dir = outdir / f"{max(numbers, default=-1) + 1:05d}-{name}"
    run_dir.mkdir()
    return run_dir
