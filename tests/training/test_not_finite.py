"""What is not finite is told: images, numbers, options, and runs that learn nothing."""

import json

import pytest
import torch

from helpers.run_dirs import (
    OK,
    line,
    printed,
)
from helpers.runs import poison
from helpers.tiny import (
    TINY,
    flags,
    options_of,
    tdkern_,
)
from tdkern.training import Trainer, checkpoint, sample
from tdkern.training.checkpoint import SNAPSHOT, STATE, find, read
from tdkern.training.sampling import NotFinite

pytestmark = pytest.mark.usefixtures("short_previews")


@pytest.mark.parametrize(
    "sampler",
    ["heun", "euler", "ddim", "ddpm", "dpmpp", "unipc", "multistep", "onestep", "ablation"],
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_images_that_are_not_finite_are_refused(tmp_path, sampler, value):
    printed(tmp_path / "run", duration=8e-6)
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
    output = printed(tmp_path / "run")
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
    output = printed(
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
    output = printed(tmp_path / "run", "--lr", "1e38", "--lr-rampup-kimg", "0", code=1)
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
        printed(tmp_path / "run", duration=40e-6).count("Warning: no step was taken since image 8")
        == 1
    )
