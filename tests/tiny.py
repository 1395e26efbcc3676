"""Small images and runs for the driver's tests."""
import io
import json
import multiprocessing
import zipfile

import numpy as np
import PIL.Image

# every step is a tick, with a training state after each and a snapshot after every third
TINY = {"arch": "ddpmpp", "cbase": 4, "cres": [1], "batch": 8, "lr_rampup_kimg": 0.024, "ema": 2e-4, "tick": 0.008, "snap": 3, "dump": 1, "workers": 0}

# a fresh process for every run without importing torch anew: the children are forks of a process that has only imported
children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["tdkern.training", "torch._dynamo", "safetensors.torch", "PIL.Image"])


def two_steps(net):
    """In place of the training loop's `preview_levels`, in a process of its own too."""
    from tdkern.schedules import EDM

    return EDM(steps=2).sigmas()


def tdkern_(*args, code=0):
    """What a command prints; it must end with this code."""
    from click.testing import CliRunner

    from tdkern.cli import main

    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


def pixels(count=10, shape=(3, 8, 8), seed=0):
    """Random images [count, C, H, W] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def png(image):
    """A PNG file's bytes for [C, H, W] uint8."""
    file = io.BytesIO()
    PIL.Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, format="png")
    return file.getvalue()


def data_set(path, images, labels=None):
    """Write a zip, or a folder, in EDM's layout; `labels` is dataset.json's list, in the images' order."""
    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(len(images))]
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    if labels is not None:
        files["dataset.json"] = json.dumps({"labels": [[name, label] for name, label in zip(names, labels, strict=True)]}).encode()
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
