"""The training loop: steps, ticks, and the ways in which a run ends."""

import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..data import StepBatches
from . import checkpoint
from .distributed import shared, whole
from .lock import locked
from .prefetch import on_device
from .record import Record
from .signals import Stopped, StopRequest, readers
from .statistics import memory
from .trainer import Trainer, crossed, learning_rate

IDLE_TICKS = 10  # so many in a row without a step that was taken end a run


class Diverged(RuntimeError):
    """A run in which no step is taken any more; the message says why and what is saved."""


def train(trainer: Trainer, run_dir: Path | None) -> None:
    """Train to the end of the options' duration, saving on the way.

    Whatever ends it before, the state is saved first where it can be.

    Args:
        trainer: new, or going on from a training state.
        run_dir: where the first process writes; the others need none.

    Raises:
        Stopped: a signal or the time limit ended it; the state is saved.
        Diverged: no step is taken any more; the state of before is saved.
        LockedError: another process trains in this directory.
        ValueError, OSError, RuntimeError: data cannot be read, files cannot be written, memory or
            another process is lost.
    """
    with StopRequest(trainer.options.time_limit, trainer.process.world) as request:
        if trainer.process.rank > 0:
            _run(trainer, None, request)
            return
        with locked(run_dir) as held:
            record = Record(trainer, run_dir)
            if not held:
                record.warn(f"{run_dir}: this file system has no locks; start no second run in it")
            try:
                _run(trainer, record, request)
            except (Stopped, Diverged):
                raise
            except Exception:  # torchrun, which ends all at an error of one, lets this be saved
                record.rescue()
                raise
            finally:
                record.close()


def _run(trainer: Trainer, record: Record | None, request: StopRequest) -> None:
    """The steps of a run; the first process has a record."""
    options, process = trainer.options, trainer.process
    place = (trainer.step, options.total_steps, process.rank, process.world)
    order = StepBatches(len(trainer.dataset), options.batch, options.seed, *place)
    loader = torch.utils.data.DataLoader(
        trainer.dataset,
        batch_sampler=order,
        pin_memory=process.device.type == "cuda",
        **readers(options.workers),
    )
    with progress(trainer) as bar:
        _measure_fids(trainer, record, request)  # what a run that was stopped has not measured
        for images, labels in on_device(loader, process.device):
            trainer.train_step(images, labels)
            bar.update(options.batch)
            if crossed(trainer, 1):
                _tick(trainer, record, bar)
                _measure_fids(trainer, record, request)
            signum = request.asked()
            if signum and trainer.step < options.total_steps:
                _stop(trainer, record, request, signum)
    if record and trainer.meter:
        record.last_fids()


def progress(trainer: Trainer) -> tqdm:
    """The bar on the first process' terminal; in a file each of its states is a line."""
    hidden = trainer.process.rank > 0 or sys.stderr is None
    return tqdm(
        total=trainer.options.total_steps * trainer.options.batch,
        initial=trainer.nimg,
        unit="img",
        unit_scale=True,
        mininterval=0.1 if not hidden and sys.stderr.isatty() else 30,  # seconds between two states
        disable=hidden,
    )


def _tick(trainer: Trainer, record: Record | None, bar: tqdm) -> None:
    """Tell how training goes, and save what is due; all processes raise Diverged together."""
    options = trainer.options
    terms = trainer.statistics()
    if record:
        shown = terms | memory(trainer.process.device)
        bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        record.tick(terms)
        if trainer.idle:
            record.warn(
                "no step was taken since image "
                f"{trainer.nimg - options.batch * int(terms['skipped'])}: "
                "all had gradients that are not finite"
            )
    if trainer.idle >= IDLE_TICKS:
        raise Diverged(_diagnosis(trainer, terms, record))
    # A state of the first such tick has the weights of before it; later ones would only replace it.
    # To measure a FID takes long: a run that is ended meanwhile goes on with that.
    dumps = crossed(trainer, options.dump) or _measures(trainer)
    due = trainer.idle == 1 or (dumps and not trainer.idle)
    if due and trainer.not_finite():
        raise Diverged(_diagnosis(trainer, terms, record))
    snap = crossed(trainer, options.snap) and trainer.idle < 2
    weights = whole(trainer.ema.module.state_dict(), trainer.process) if snap else {}
    power = whole(trainer.power.state_dict(), trainer.process) if snap and trainer.power else {}
    tensors = whole(trainer.tensors(), trainer.process) if due else {}
    if record:
        if snap:
            record.snapshot(weights)
            if power:
                record.averages(power)
        if due:
            record.state(tensors)
        record.time = time.monotonic()  # what was saved is no part of the next tick


def _measures(trainer: Trainer) -> bool:
    """Whether FIDs are to be measured at this image."""
    due = trainer.step > 0 and crossed(trainer, trainer.options.fid_every)
    return trainer.meter is not None and due and not trainer.idle


def _measure_fids(trainer: Trainer, record: Record | None, request: StopRequest) -> None:
    """Measure the FIDs that are due at this image and not there yet; raises Stopped in between."""
    if not _measures(trainer):
        return
    todo = shared(record.unmeasured() if record else None, trainer.process)
    if not todo:
        return
    net = trainer.whole_average()
    path = record.run_dir / checkpoint.UNFINISHED_FID if record else None
    tell = record.log if record else print
    for steps in todo:
        signum, fid = trainer.meter.measure(net, steps, path, tell, request.asked)
        if signum:
            _stop(trainer, record, request, signum)
        if record:
            record.fid(fid, net.state_dict())
    if record:
        record.time = time.monotonic()


def _diagnosis(trainer: Trainer, terms: dict[str, float], record: Record | None) -> str:
    """Why no step is taken any more."""
    bad = trainer.not_finite()
    what = (
        f"{bad[0]} and {len(bad) - 1} more tensors are not finite"
        if bad
        else "the weights are finite"
    )
    lr = learning_rate(trainer.options, trainer.nimg)
    way = f"; {checkpoint.way_on(record.run_dir)}" if record else ""
    return (
        f"training has diverged at image {trainer.nimg}: gradients are not finite, {what}, the "
        "loss is "
        f"{terms['loss']:.4g}, the learning rate {lr:.4g}, precision "
        f"{trainer.options.precision}; "
        f"a new run needs a lower --lr, or --transfer from a snapshot of before{way}"
    )


def _stop(trainer: Trainer, record: Record | None, request: StopRequest, signum: int) -> None:
    """Save the state between two ticks and raise Stopped, in all processes."""
    statistics = trainer.unfinished_statistics()
    tensors = whole(trainer.tensors(), trainer.process)
    message = f"stopped by {signal.Signals(signum).name} at image {trainer.nimg}"
    if record:
        record.state(tensors, statistics)
        record.log(message)
        message += f": {checkpoint.way_on(record.run_dir)}"
    request.meet()
    raise Stopped(signum, message)
