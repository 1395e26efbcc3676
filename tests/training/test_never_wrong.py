"""What `docs/promises.md` says of results: what is not right is told, and nothing passed over."""

import functools
import importlib
import io
import json
import os
import stat
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

from helpers import DATA
from helpers.runs import poison
from helpers.tiny import (
    TINY,
    Detector,
    data_set,
    ended,
    flags,
    invoked,
    options_of,
    pixels,
    png,
    raw_data_set,
    tdkern_,
    train_args,
)
from tdkern.data import DatasetError, ImageDataset
from tdkern.evaluation.fid import Statistics, write_statistics
from tdkern.training import Trainer, checkpoint, load_network, sample
from tdkern.training.checkpoint import SNAPSHOT, STATE, find, read
from tdkern.training.sampling import NotFinite

pytestmark = pytest.mark.usefixtures("short_previews")
FAULTS = DATA / "faults"
OK = FAULTS / "ok.zip"


def start(run_dir, *args, data=OK, duration=24e-6, code=0, **changes):
    """What a run prints."""
    return tdkern_(
        *train_args(data, run_dir, duration, TINY | changes),
        *args,
        code=code,
    )


def line(output):
    """The last line, which must say it all."""
    last = output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and "Traceback" not in output, output
    return last


# not finite


@pytest.mark.parametrize(
    "sampler",
    ["heun", "euler", "ddim", "ddpm", "dpmpp", "unipc", "multistep", "onestep", "ablation"],
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_images_that_are_not_finite_are_refused(tmp_path, sampler, value):
    start(tmp_path / "run", duration=8e-6)
    poison(tmp_path / "run", float(value))
    args = [
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "images",
        "--seeds",
        "0-3",
        "--sampler",
        sampler,
    ]
    args += [] if sampler == "onestep" else ["--steps", "3"]
    said = line(tdkern_(*args, code=1))
    assert "not finite from the sampler's step 1 of" in said
    assert not list((tmp_path / "images").glob("*"))


def test_the_step_where_it_began_is_named():
    def net(x, sigma, class_labels=None):
        return x * (float("nan") if sigma[0] < 1 else 0.5)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, *args, **kwargs):
            return net(*args, **kwargs)

    network = {"label_dim": 0, "img_channels": 3, "img_resolution": 4}
    with pytest.raises(NotFinite, match=r"from the sampler's step 3 of 4 on, at noise level 0.5"):
        sample(Net(), network, [0, 1], torch.tensor([8.0, 2.0, 0.5, 0.1, 0.0]))


def test_a_grid_in_training_says_so_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tdkern.training.record.sample",
        lambda *args, **kwargs: (_ for _ in ()).throw(NotFinite("sample: not finite")),
    )
    output = start(tmp_path / "run")
    assert "Warning: fakes-000000.024.png is not written: sample: not finite" in output
    assert find(tmp_path / "run", STATE).name == "training-state-000000.024"


@pytest.mark.parametrize(
    "flag, value",
    [
        ("S_noise", "nan"),
        ("S_noise", "inf"),
        ("S_max", "nan"),
        ("rho", "inf"),
        ("rho", "nan"),
        ("eta", "inf"),
        ("sigma_min", "nan"),
        ("sigma_max", "nan"),
        ("S_churn", "nan"),
        ("S_min", "nan"),
    ],
)
def test_numbers_of_generate_are_finite(tmp_path, flag, value):
    output = tdkern_("generate", "--network", "a", "--outdir", tmp_path, f"--{flag}", value, code=2)
    assert "number" in output.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "name",
    [
        "duration",
        "tick",
        "lr",
        "lr-rampup-kimg",
        "ema",
        "dropout",
        "augment",
        "lambda-edm",
        "k-idx",
        "one-idx",
        "td-eta",
        "td-share",
        "target-ema-tau",
        "time-limit",
        "weight-decay",
        "clip",
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_options_of_train_are_finite(tmp_path, name, value):
    output = tdkern_(
        "train", "--data", OK, "--outdir", tmp_path, *flags(TINY), f"--{name}={value}", "-n", code=1
    )
    assert line(output) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"cbase": 0},
        {"cbase": -4},
        {"cbase": 3},
        {"cbase": 5},
        {"cres": "0"},
        {"cres": "2,0"},
        {"workers": -1},
        {"batch": 0},
        {"batch_gpu": -8},
        {"snap": -1},
        {"keep": 0},
        {"seed": -1},
        {"steps": 0},
        {"dropout": 2.0},
        {"dropout": -0.1},
    ],
)
def test_options_out_of_range_end_in_one_line(tmp_path, changes):
    values = TINY | changes
    output = tdkern_(
        "train", "--data", OK, "--outdir", tmp_path, "--duration", 8e-6, *flags(values), code=1
    )
    assert line(output) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, value",
    [
        ("data", 3),
        ("arch", None),
        ("cbase", "4"),
        ("cres", [1, "2"]),
        ("dropout", [0.1]),
        ("precision", "fp8"),
        ("lambda_base", "x"),
        ("k_idx", True),
        ("steps", 2.5),
        ("seed", "0"),
        ("gpus", 0),
        ("workers", None),
        ("transfer", 1),
        ("cond", "yes"),
        ("lr", None),
        ("td_sigma", "0.3,5"),
        ("weight", 3),
        ("snap", 10**30),
        ("batch", 8.0),
        ("cres", []),
    ],
)
def test_options_of_a_file_are_of_their_types(name, value):
    with pytest.raises(ValueError, match=name if name != "gpus" else "gpus"):
        options_of(**{"data": "a", name: value})


def test_a_run_that_learns_nothing_ends(tmp_path):
    output = start(
        tmp_path / "run", "--lr", "1e8", "--lr-rampup-kimg", "0", duration=1.6e-4, code=1
    )
    said = line(output)
    assert (
        "training has diverged at image" in said
        and "learning rate 1e+08" in said
        and "is saved; go on with" in said
    )
    state = find(tmp_path / "run", STATE)
    meta, tensors = read(state, STATE)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert output.count("Warning: no step was taken") == 10
    steps = [
        json.loads(entry) for entry in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()
    ]
    first = next(i for i in range(len(steps)) if all(entry["skipped"] for entry in steps[i:]))
    assert len(steps) == first + 10 and meta["step"] == first + 1
    assert not [
        path
        for path in checkpoint.checkpoints(tmp_path / "run", SNAPSHOT)
        if checkpoint.images_of(path) > 8 * (first + 1)
    ]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    output = start(tmp_path / "run", "--lr", "1e38", "--lr-rampup-kimg", "0", code=1)
    assert "tensors are not finite" in line(output) and "no state is saved" in line(output)
    assert checkpoint.checkpoints(tmp_path / "run", STATE) == []


def test_one_skipped_tick_warns_and_the_run_goes_on(tmp_path, monkeypatch):
    real = Trainer.train_step

    def train_step(self, *args):
        hook = next(self.net.parameters()).register_hook(
            lambda gradient: gradient * (float("nan") if self.step == 1 else 1)
        )
        real(self, *args)
        hook.remove()

    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert (
        start(tmp_path / "run", duration=40e-6).count("Warning: no step was taken since image 8")
        == 1
    )


# data


def train_dry(data, *args, code=0):
    return tdkern_(
        "train",
        "--data",
        data,
        "--outdir",
        "nowhere",
        "--duration",
        8e-6,
        *flags(TINY),
        *args,
        "-n",
        code=code,
    )


def test_hidden_files_are_no_part_of_the_data(tmp_path):
    output = train_dry(FAULTS / "hidden_folder.zip")
    assert "8 images" in output and "2 hidden" in output
    names = [
        "a.png",
        ".b.png",
        ".git/c.png",
        "x/.ipynb_checkpoints/d.png",
        "@eaDir/e.png",
        "__MACOSX/f.png",
        "x/g.png",
        "lost+found/h.png",
    ]
    for path in (tmp_path / "a.zip", tmp_path / ".hidden" / "folder"):
        path.parent.mkdir(exist_ok=True)
        assert ImageDataset(
            raw_data_set(path, {name: png(pixels(1)[0]) for name in names})
        ).names == ["a.png", "x/g.png"]


def test_other_endings_are_counted_and_named(tmp_path):
    output = train_dry(FAULTS / "other_formats.zip")
    assert (
        "8 images" in output
        and "Left out of" in output
        and "1 .bmp, 1 .jfif, 1 .tif, 1 .webp" in output
    )
    with pytest.raises(DatasetError, match=r"no \.png.* beside 2 \.webp"):
        ImageDataset(raw_data_set(tmp_path / "a.zip", {"a.webp": b"", "b.webp": b""}))


def test_linked_folders_are_followed_once(tmp_path):
    real = data_set(tmp_path / "real", pixels(8))
    for name in ("set", "loop", "twice"):
        (tmp_path / name).mkdir()
    (tmp_path / "set" / "y").symlink_to(real)
    (tmp_path / "set" / "link.png").symlink_to(real / "00000" / "img00000000.png")
    assert len(ImageDataset(tmp_path / "set")) == 9
    (tmp_path / "loop" / "x.png").write_bytes(png(pixels(1)[0]))
    (tmp_path / "loop" / "again").symlink_to(tmp_path / "loop")
    (tmp_path / "loop" / "up").symlink_to("..")
    assert len([name for name in ImageDataset(tmp_path / "loop").names if name.count("x.png")]) == 1
    (tmp_path / "twice" / "a").symlink_to(real)
    (tmp_path / "twice" / "b").symlink_to(real)
    assert len(ImageDataset(tmp_path / "twice")) == 8
    whole = tmp_path / "whole"
    whole.symlink_to(real)
    assert len(ImageDataset(whole)) == 8


def test_what_cannot_be_read_is_an_error(tmp_path):
    folder = data_set(tmp_path / "a", pixels(8))
    (folder / "dead.png").symlink_to(folder / "gone.png")
    with pytest.raises(DatasetError, match=r"dead.png cannot be read"):
        ImageDataset(folder)
    (folder / "dead.png").unlink()
    (folder / "dead").symlink_to(folder / "gone")  # no image: nothing is missed
    assert len(ImageDataset(folder)) == 8
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DatasetError, match=r"pipe.png is not a regular file"):
        ImageDataset(folder)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    folder = data_set(tmp_path / "a", pixels(8))
    real = os.scandir

    def scandir(path):
        if str(path).endswith("00001"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # a test as root is refused nothing
    with pytest.raises(DatasetError, match=r"the folder 00001 cannot be read .*Permission denied"):
        ImageDataset(folder)


def test_one_name_twice_is_an_error(tmp_path):
    path = data_set(tmp_path / "a.zip", pixels(2))
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("00000/img00000000.png", png(pixels(1)[0]))
    with pytest.raises(DatasetError, match=r"holds 00000/img00000000.png twice"):
        ImageDataset(path)


def _encoded(image, fmt="png", **options):
    file = io.BytesIO()
    image.save(file, format=fmt, **options)
    return file.getvalue()


def _turned(fmt):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return _encoded(PIL.Image.new("RGB", (8, 8)), fmt, exif=exif)


def _frames():
    frames = [PIL.Image.fromarray(image.transpose(1, 2, 0)) for image in pixels(3)]
    return _encoded(frames[0], "png", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "image, message",
    [
        (_turned("jpeg"), "EXIF orientation 6"),
        (_turned("png"), "EXIF orientation 6"),
        (_frames(), "got 3 frames"),
        (_encoded(PIL.Image.new("RGB", (8, 8)), transparency=(0, 0, 0)), "transparent colour"),
        (_encoded(PIL.Image.new("L", (8, 8)), transparency=0), "transparent colour"),
        (_encoded(PIL.Image.fromarray(np.zeros((8, 8), np.uint16))), "8 bits"),
        (_encoded(PIL.Image.new("1", (8, 8))), "Pillow mode 1"),
        (_encoded(PIL.Image.new("CMYK", (8, 8)), "jpeg"), "Pillow mode CMYK"),
    ],
    ids=[
        "jpeg turned",
        "png turned",
        "frames",
        "transparent",
        "transparent grey",
        "16 bits",
        "1 bit",
        "CMYK",
    ],
)
def test_pixels_that_are_not_all_the_file_says_are_refused(tmp_path, image, message):
    name = "b.jpg" if image[:2] == b"\xff\xd8" else "b.png"
    for path in ("a.zip", "folder"):
        dataset = ImageDataset(
            raw_data_set(tmp_path / path, {"a.png": png(pixels(1)[0]), name: image})
        )
        with pytest.raises(DatasetError, match=message):
            dataset[1]


@pytest.mark.parametrize("name", ["rgb16.zip", "rgb16_of_12bit.zip"])
def test_16_bits_are_refused(name):
    assert "must have 8 bits a channel, got 16" in line(train_dry(FAULTS / name, code=1))
    assert "must have 8 bits a channel, got 16" in line(
        tdkern_("fid", "ref", "--data", FAULTS / name, "--dest", "nowhere.npz", code=1)
    )


def test_upright_and_single_images_are_taken(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 1
    images = {
        "a.png": png(pixels(1)[0]),
        "b.jpg": _encoded(PIL.Image.new("RGB", (8, 8)), "jpeg", exif=exif),
        "c.jpg": _encoded(PIL.Image.new("RGB", (8, 8)), "jpeg", exif=b"Exif\0\0broken"),
    }
    assert len([image for image, _ in ImageDataset(raw_data_set(tmp_path / "a.zip", images))]) == 3


# labels


def test_classes_without_images_are_drawn_by_nobody(tmp_path):
    path = data_set(tmp_path / "a.zip", pixels(12), [0, 5, 9] * 4)
    output = start(tmp_path / "run", "--cond", "1", data=path, duration=8e-6)
    assert "Warning: 7 of the classes 0 to 9 have no images" in output
    net, meta = load_network(tmp_path / "run")
    assert meta["classes"] == [0, 5, 9]
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, sigma, class_labels=None):
            seen.extend(class_labels.argmax(1).tolist())
            return self.net(x, sigma, class_labels)

    sample(
        Spy(), meta["network"], list(range(64)), torch.tensor([1.0, 0.0]), classes=meta["classes"]
    )
    assert set(seen) == {0, 5, 9}
    args = [
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "images",
        "--seeds",
        "0-1",
        "--steps",
        "2",
    ]
    assert "class 3 had no image in training; classes with images are 0, 5, 9" in line(
        tdkern_(*args, "--class", "3", code=1)
    )
    tdkern_(*args, "--class", "9")
    tdkern_(*args)


def test_the_case_of_labels_from_1(tmp_path):
    start(tmp_path / "run", "--cond", "1", data=FAULTS / "labels_1_to_3.zip", duration=8e-6)
    assert load_network(tmp_path / "run")[1]["classes"] == [1, 2, 3]


def test_where_all_classes_have_images_seeds_give_what_they_gave(tmp_path, data):
    assert (
        ImageDataset(data, use_labels=True).classes is None and ImageDataset(data).classes is None
    )


def test_vector_labels_are_not_drawn(tmp_path):
    output = start(
        tmp_path / "run", "--cond", "1", data=FAULTS / "labels_vector.zip", duration=8e-6
    )
    # by labels of the data
    assert "not written" not in output and (tmp_path / "run" / "fakes-000000.008.png").exists()
    args = [
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "images",
        "--steps",
        "2",
        "--seeds",
        "0",
    ]
    assert "labels are vectors and no classes" in line(tdkern_(*args, code=1))
    assert "labels are vectors and no classes" in line(tdkern_(*args, "--class", "0", code=1))


@pytest.mark.parametrize(
    "labels, message",
    [
        ([[float("nan"), 1]] * 2, "is not finite in float32"),
        ([[1e300, 1]] * 2, "is not finite in float32"),
        ([[1.0], [float("inf")]], "is not finite in float32"),
        ([[10**400]] * 2, "is not finite in float32"),
        ([10**8, 0], "classes must be below 65536"),
        ([10**30, 0], "classes must be below 65536"),
        ([2**63, 0], "classes must be below 65536"),
        ([True, 0], "labels must all be classes"),
        ([[[1.0]], [[1.0]]], "labels must all be classes"),
    ],
)
def test_labels_that_cannot_be_are_refused(tmp_path, labels, message):
    path = data_set(tmp_path / "a.zip", pixels(2), labels)
    assert message in line(train_dry(path, "--cond", "1", code=1))


@pytest.mark.parametrize(
    "name", ["labels_nan.zip", "labels_2_to_63.zip", "labels_vector_bigint.zip"]
)
def test_the_cases_of_labels(name):
    line(train_dry(FAULTS / name, "--cond", "1", code=1))


def test_labels_that_are_missing_are_missing_where_they_are_looked_for(tmp_path):
    path = raw_data_set(
        tmp_path / "a.zip", {"images/a.png": png(pixels(1)[0]), "images/dataset.json": b"{}"}
    )
    assert "there is none at the top; it must not be in images" in line(
        train_dry(path, "--cond", "1", code=1)
    )


# data that changed


@pytest.mark.parametrize("change", ["fewer", "more", "pixels", "renamed", "labels", "none"])
def test_a_run_that_goes_on_on_other_data_says_so(tmp_path, change):
    images, labels = pixels(8), [i % 3 for i in range(8)]
    path = data_set(tmp_path / "a.zip", images, labels)
    start(tmp_path / "run", "--cond", "1", data=path, duration=8e-6)
    path.unlink()
    if change == "pixels":
        images = images[::-1]
    if change == "labels":
        labels = labels[::-1]
    if change == "fewer":
        images, labels = images[:7], labels[:7]
    if change == "more":
        images, labels = np.concatenate([images, images[:1]]), [*labels, 0]
    data_set(path, images, labels)
    if change == "renamed":
        files = {
            name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()
        }
        raw_data_set(
            path,
            {
                name.replace("img", "pic"): data.replace(b"img", b"pic")
                for name, data in files.items()
            },
        )
    output = tdkern_("train", "--resume", tmp_path / "run", "--duration", "16e-6")
    assert ("these are not the images and labels that the run was trained on" in output) == (
        change != "none"
    )


def test_the_same_data_as_a_folder_are_the_same(tmp_path):
    images = pixels(8)
    prints = [
        ImageDataset(data_set(tmp_path / name, images)).fingerprint()
        for name in ("a.zip", "folder")
    ]
    assert (
        prints[0]
        == prints[1]
        != ImageDataset(data_set(tmp_path / "b.zip", images[::-1])).fingerprint()
    )


# one line


def _nobody():
    """A user without the rights to override a folder's."""
    os.setgid(65534)
    os.setuid(65534)


@pytest.mark.parametrize("place", ["outdir", "numbered", "resume", "data", "transfer", "run"])
def test_what_may_not_be_used_ends_in_one_line(tmp_path, place):
    run_dir, data = tmp_path / "run", data_set(tmp_path / "data" / "a", pixels(8))
    start(run_dir, duration=8e-6)
    locked = {
        "outdir": tmp_path / "out",
        "numbered": tmp_path / "out",
        "resume": run_dir,
        "data": data.parent,
        "transfer": run_dir,
        "run": run_dir,
    }[place]
    locked.mkdir(exist_ok=True)
    args = {
        "outdir": ["--data", OK, "--outdir", tmp_path / "out", "--nosubdirs"],
        "numbered": ["--data", OK, "--outdir", tmp_path / "out"],
        "resume": ["--resume", run_dir, "--duration", "16e-6"],
        "run": ["--resume", run_dir],
        "data": ["--data", data, "--outdir", tmp_path / "x"],
        "transfer": ["--data", OK, "--outdir", tmp_path / "x", "--transfer", run_dir],
    }[place]
    new = [] if place in ("resume", "run") else ["--duration", 8e-6, *flags(TINY)]
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.getuid() and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    locked.chmod(0 if place in ("data", "transfer", "run") else 0o555)
    code, output = ended(
        ["train", *args, *new], tmp_path / "log", _nobody if os.getuid() == 0 else None
    )
    locked.chmod(0o755)
    assert code == 1 and line(output), output


@pytest.mark.parametrize("desc", ["lr=1e-3/ema", "x" * 250, "a\0b"])
def test_a_description_that_is_no_name_ends_in_one_line(tmp_path, desc):
    output = tdkern_(
        "train",
        "--data",
        OK,
        "--outdir",
        tmp_path,
        "--duration",
        8e-6,
        *flags(TINY),
        "--desc",
        desc,
        code=1,
    )
    assert line(output) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run and the statistics of images."""
    folder = tmp_path_factory.mktemp("made")
    args = ["--outdir", folder / "run", "--nosubdirs", "--duration", 8e-6]
    assert ended(["train", "--data", OK, *args, *flags(TINY)], folder / "log")[0] == 0
    write_statistics(folder / "ref.npz", Statistics(np.zeros(2), np.eye(2)))
    return folder


COMMANDS = {
    "train": ["--data", OK, "--nosubdirs", "--duration", 8e-6, *flags(TINY), "--outdir", "{out}"],
    "generate": "--network {made}/run --seeds 0 --steps 2 --outdir {out}".split(),
    "fid ref": ["--data", OK, "--workers", "0", "--dest", "{out}"],
    "fid steps": "--network {made}/run --ref {made}/ref.npz --steps 2 --num 8".split(),
    "dataset": [OK, "{out}.zip"],
    "convert": [DATA / "edm_snapshot_tiny.pkl", "{out}.safetensors"],
    "demo": "--seeds 2 --iterations 3 --compute 1 --outdir {out}".split(),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("streams", [["stderr"], ["stdin", "stdout"]])
def test_without_standard_streams_commands_run(tmp_path, made, command, streams):
    """As under a daemon: what they are for is there, and nothing was printed into it."""
    args = [str(arg).format(made=made, out=tmp_path / "out") for arg in COMMANDS[command]]
    hook = functools.partial(_without, streams)
    code, output = ended([*command.split(), *args], tmp_path / "log", hook)
    assert code == 0 and "Traceback" not in output, output
    assert command == "fid steps" or list(tmp_path.glob("out*"))


def _without(streams):
    importlib.import_module("tdkern.cli.fid").make_detector = Detector
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if name in streams:
            os.close(fd)
            setattr(sys, name, None)


def test_a_full_stdout_ends_in_one_line(tmp_path):
    """A run too, before it leaves anything."""
    args = ["train", "--data", OK, "--outdir", tmp_path / "runs", *flags(TINY)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "tdkern.cli", *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    said = result.stderr.strip().splitlines()
    assert result.returncode == 1 and said == ["Error: No space left on device"]
    assert list(tmp_path.iterdir()) == []


def test_an_unforeseen_error_is_one_line_too_and_a_traceback_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("tdkern.cli.train.Trainer", lambda *_: {}["no"])
    args = ["train", "--data", OK, "--outdir", tmp_path, *flags(TINY)]
    assert "unforeseen KeyError: 'no'" in line(tdkern_(*args, code=1))
    monkeypatch.setenv("TDKERN_TRACEBACK", "1")
    assert "Traceback" in tdkern_(*args, code=1)


def test_ctrl_c_before_the_first_step_is_130(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tdkern.cli.train.Trainer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert (
        "Aborted!"
        in invoked("train", "--data", OK, "--outdir", tmp_path, *flags(TINY), code=130).output
    )


@pytest.mark.parametrize(
    "path, message",
    [
        ("nowhere", "there is no such file or folder"),
        ("https://example.org/edm.pkl", "it is an address; fetch the file"),
        ("edm", "of tdkern in it, but EDM's; make one of them a file by tdkern convert"),
    ],
)
def test_what_to_do_about_a_network_that_is_none(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edm").mkdir()
    (tmp_path / "edm" / "network-snapshot-000100.pkl").write_bytes(b"")
    assert message in line(tdkern_("generate", "--network", path, "--outdir", "a", code=1))


def test_generate_finds_out_before_the_work(tmp_path, monkeypatch):
    start(tmp_path / "run", duration=8e-6)
    monkeypatch.setattr(
        "tdkern.cli.generate.sample", lambda *args, **kwargs: pytest.fail("sampled")
    )
    (tmp_path / "g").mkdir()
    (tmp_path / "file").write_text("")
    args = ["generate", "--network", tmp_path / "run", "--seeds", "0-3", "--steps", "2"]
    assert "is a folder" in line(tdkern_(*args, "--grid", tmp_path / "g", code=1))
    assert "file" in line(tdkern_(*args, "--grid", tmp_path / "file" / "x.png", code=1))
    assert "class-conditional" not in line(tdkern_(*args, "--outdir", tmp_path / "file", code=1))
    assert not list(tmp_path.glob(".*"))


def test_the_folder_of_a_grid_is_made_before_the_work(tmp_path, monkeypatch):
    start(tmp_path / "run", duration=8e-6)
    grid, real = tmp_path / "no" / "such" / "folder" / "x.png", sample

    def sample_there(*args, **kwargs):
        assert grid.parent.is_dir()
        return real(*args, **kwargs)

    monkeypatch.setattr("tdkern.cli.generate.sample", sample_there)
    args = ["generate", "--network", tmp_path / "run", "--seeds", "0-3", "--steps", "2"]
    tdkern_(*args, "--grid", grid)
    assert os.listdir(grid.parent) == ["x.png"]


def test_an_unconditional_network_has_no_class(tmp_path):
    start(tmp_path / "run", duration=8e-6)
    said = line(
        tdkern_(
            "generate",
            "--network",
            tmp_path / "run",
            "--outdir",
            tmp_path / "a",
            "--class",
            "1",
            "--seeds",
            "0",
            "--steps",
            "2",
            code=1,
        )
    )
    assert "this one has no classes, got 1" in said


def test_seeds_up_to_64_bits(tmp_path):
    start(tmp_path / "run", duration=8e-6)
    seeds = f"{2**63 - 1},{2**63},{2**64 - 2}"
    tdkern_(
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "a",
        "--seeds",
        seeds,
        "--steps",
        "2",
    )
    assert len({path.read_bytes() for path in (tmp_path / "a").iterdir()}) == 3
    assert "a seed must be in 0 .. 2^64 - 1" in line(
        tdkern_(
            "generate",
            "--network",
            tmp_path / "run",
            "--outdir",
            tmp_path / "a",
            "--seeds",
            2**64,
            "--steps",
            "2",
            code=1,
        )
    )
    tdkern_(
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "a",
        "--seeds",
        "0-99999999999",
        "--steps",
        "2",
        code=2,
    )


def test_a_converted_network_that_is_not_finite_is_refused(tmp_path):
    source = DATA / "edm_snapshot_tiny.pkl"
    tdkern_("convert", source, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    next(iter(tensors.values())).fill_(float("nan"))
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", meta)
    said = line(
        tdkern_(
            "generate",
            "--network",
            tmp_path / "b.safetensors",
            "--grid",
            tmp_path / "a.png",
            "--seeds",
            "0",
            "--steps",
            "2",
            code=1,
        )
    )
    assert "not finite from the sampler's step 1 of 2" in said
