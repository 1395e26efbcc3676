"""Small images and runs for the driver's tests."""

import faulthandler
import io
import json
import multiprocessing
import os
import random
import resource
import socket
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image

# every step is a tick, with a training state after each and a snapshot after every third
TINY = {
    "arch": "ddpmpp",
    "cbase": 4,
    "cres": [1],
    "batch": 8,
    "lr_rampup_kimg": 0.024,
    "ema": 2e-4,
    "tick": 0.008,
    "snap": 3,
    "dump": 1,
    "workers": 0,
    "augment": 0.0,
}

# a fresh process for every run without importing torch anew: the children are forks of a process
# that has only imported
children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(
    ["tdkern.training", "torch._dynamo", "safetensors.torch", "PIL.Image"]
)


def options_of(**given):
    """A run's options, those of its loss beside them."""
    from tdkern.training.options import Options, nested

    return Options(**nested({}, given))


def by_flag(options):
    """The options in a run's file by the flags that they had when they were published."""
    from tdkern.cli.options import ALIASES, SAME_FLAG

    options = options | options["loss"]
    names = {alias.replace("-", "_"): name for name in ALIASES for alias in ALIASES[name]} | {
        flag: name for name, flag in SAME_FLAG.items()
    }
    published = {flag: options[name] for flag, name in names.items() if name in options}
    return options | published | {"loss_type": "td" if options["td"] else "edm"}


def two_steps(net):
    """In place of the training loop's `preview_levels`, in a process of its own too."""
    from tdkern.schedules import EDM

    return EDM(steps=2).sigmas()


def numbers_of_curves(levels, ticks):
    """In place of the training loop's `draw_curves`: what it would draw, in no time."""
    return json.dumps([levels, [tick["grad_norm"] for tick in ticks]]).encode()


def quick_pictures():
    """In a process of its own: what a run draws is not what its tests should take time for."""
    from tdkern.training import record

    record.preview_levels, record.draw_curves = two_steps, numbers_of_curves


def invoked(*args, code=0):
    """click's result of a command, which must end with this code."""
    from click.testing import CliRunner

    from tdkern.cli import main

    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def tdkern_(*args, code=0):
    """What a command prints; it must end with this code."""
    return invoked(*args, code=code).output


def as_child(log=os.devnull):
    """What a process of a test does first: one thread, and a file of what it has to say.

    A process that still runs after a minute and a half says there where it stands.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.stderr = open(log, "w")
    faulthandler.dump_traceback_later(90, file=sys.stderr)


def _command(args, log, hook):
    """In a process of its own: a command, with what it prints in a file."""
    from tdkern.cli import main

    as_child(log)
    sys.stdout = sys.stderr
    quick_pictures()
    if hook:
        hook()
    try:
        main([str(arg) for arg in args], prog_name="tdkern")
    finally:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        log.with_suffix(".mib").write_text(str(most // 1024))


def started(args, log, hook=None):
    """A running process of a command; hook: of a module, called in it first."""
    process = children.Process(target=_command, args=(args, log, hook))
    process.start()
    return process


def ended(args, log, hook=None, seconds=60):
    """The exit code of a command in a process of its own, and what it printed."""
    process = started(args, log, hook)
    process.join(seconds)
    assert process.exitcode is not None, f"still going after {seconds} s"
    return process.exitcode, log.read_text()


class Detector:
    """In place of Inception: two features of an image."""

    dim = 2
    name = "inception"
    identity = "inception-v3"

    def __init__(self, *_):
        pass

    def __call__(self, images):
        return images.float().flatten(2).mean(2)[:, :2]


def flags(options):
    """The command line of some options."""
    words = []
    for name, value in options.items():
        value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", value]
    return words


def train_args(data, run_dir, duration, options):
    """The words of `tdkern train` that start a run in a directory of its own."""
    place = ("--data", data, "--outdir", run_dir, "--nosubdirs")
    return ["train", *place, "--duration", duration, *flags(options)]


def _as_torchrun(rank, world, port, log, work, args):
    as_child(log)
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    work(rank, *args)


def _free_port():
    """A port that nobody listens at, below those that the system gives to connections: another
    test's connection may take one of those at any time.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")


def started_processes(count, work, *args, context=children, logs=None):
    """Processes that call work(rank, *args), under the environment that torchrun sets.

    work: of a module.
    context: multiprocessing's; "fork" makes them children of this process.
    logs: a folder of what each of them says; without, nobody hears it.
    """
    port = _free_port()
    heard = [f"{logs}/{rank}" if logs else os.devnull for rank in range(count)]
    ranks = [
        context.Process(target=_as_torchrun, args=(rank, count, port, heard[rank], work, args))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    return ranks


def in_processes(count, work, *args, seconds=100):
    """Calls work(rank, *args) in so many processes, which must all end well."""
    with tempfile.TemporaryDirectory() as logs:
        ranks = started_processes(count, work, *args, logs=logs)
        for process in ranks:
            process.join(seconds)
            process.kill()
        said = {path.name: path.read_text()[-2000:] for path in Path(logs).iterdir()}
    assert [process.exitcode for process in ranks] == [0] * count, said


def in_two_processes(work, *args):
    in_processes(2, work, *args)


def pixels(count=10, shape=(3, 8, 8), seed=0):
    """Random images [count, C, H, W] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def png(image):
    """A PNG file's bytes for [C, H, W] uint8."""
    file = io.BytesIO()
    PIL.Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(
        file, format="png"
    )
    return file.getvalue()


def data_set(path, images, labels=None):
    """Write a zip, or a folder, in EDM's layout; `labels` is dataset.json's list, in the images'
    order.
    """
    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(len(images))]
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    if labels is not None:
        files["dataset.json"] = json.dumps(
            {"labels": [[name, label] for name, label in zip(names, labels, strict=True)]}
        ).encode()
    return raw_data_set(path, files)


def raw_data_set(path, files):
    """Write files, {name: bytes}, into a zip or a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, data in files.items():
                zipped.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path
