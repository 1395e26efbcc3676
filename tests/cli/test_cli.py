import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import tdkern.cli
from helpers import DATA
from helpers.tiny import Detector, by_flag, data_set, pixels, png, raw_data_set, tdkern_
from tdkern.cli.train import _make_run_dir
from tdkern.data.files import beside
from tdkern.networks import MLP, iDDPMPrecond
from tdkern.training.checkpoint import EVENTS

FLAGS = "--cbase 4 --cres 1 --batch 8 --tick 0.008 --workers 0 --lr-rampup-kimg 0".split()

pytestmark = pytest.mark.usefixtures("short_previews")


def options_of(*args):
    """The options that `tdkern train --dry-run` prints."""
    output = tdkern_("train", "--dry-run", *args)
    return by_flag(json.loads(output[: output.index("\n}") + 2]))


def image(path):
    return np.array(PIL.Image.open(path)).astype(int)


def test_train_then_generate(tmp_path, data):
    start = ["train", "--data", data, "--outdir", tmp_path / "runs", "--cond", "--desc", "try"]
    output = tdkern_(*start, "--duration", "16e-6", *FLAGS)
    run_dir = tmp_path / "runs" / "00000-images-cond-ddpmpp-edm-td-gpus1-batch8-fp32-try"
    assert f"Training in {run_dir}, image 0 of 16" in output
    assert "10 images [3, 8, 8], 3 label columns" in output
    for word in ("16.0/16.0", "img/s", "loss=", "td=", "base="):
        assert word in output
    names = {path.name for path in run_dir.iterdir()}
    assert {name for name in names if not EVENTS.fullmatch(name)} == {
        "curves-000000.016.png",
        "fakes-000000.016.png",
        "log.txt",
        "network-snapshot-000000.016",
        "reals.png",
        "stats.jsonl",
        "training-state-000000.016",
        "training_options.json",
    }

    images = tmp_path / "images"
    draw = ["generate", "--network", run_dir, "--outdir", images, "--seeds", "0-2,1005"]
    tdkern_(*draw, "--steps", "3", "--batch", "3", "--grid", tmp_path / "grid.png")
    assert sorted(path.name for path in images.iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "001005.png",
        "generate.json",
    ]
    grid = image(tmp_path / "grid.png")
    assert grid.shape == (16, 16, 3)
    assert np.array_equal(grid[8:, 8:], image(images / "001005.png"))

    snapshot = run_dir / "network-snapshot-000000.016"
    draw = ["generate", "--network", snapshot, "--outdir", tmp_path / "again", "--seeds", "1005"]
    defaults = ["--S_churn", "0", "--sigma-min=0.002", "--sigma_max=80"]
    tdkern_(*draw, "--steps", "3", "--subdirs", *defaults)
    again = image(tmp_path / "again" / "001000" / "001005.png")
    assert np.abs(again - grid[8:, 8:]).max() <= 1
    assert "class must be one of the network's 3 classes" in tdkern_(
        "generate", "--network", run_dir, "--outdir", tmp_path / "new", "--class", "3", code=1
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step."""
    run = tmp_path_factory.mktemp("run")
    data = data_set(run / "images.zip", pixels(), [i % 3 for i in range(10)])
    start = ["train", "--data", data, "--outdir", run, "--nosubdirs", "--duration", "8e-6"]
    tdkern_(*start, "--lr", "0.1", *FLAGS)
    return run


def test_generate_with_every_sampler(tmp_path, trained):
    images = {}

    def generate(name, words):
        grid = ["--grid", tmp_path / "grid.png", "--seeds", "0-3"]
        tdkern_("generate", "--network", trained, *grid, *words.split())
        images[name] = image(tmp_path / "grid.png")

    for sampler in ("heun", "euler", "ddim", "ddpm", "dpmpp", "unipc", "multistep"):
        generate(sampler, f"--sampler {sampler} --steps 5")
    generate("onestep", "--sampler onestep")
    generate("ddim 1", "--sampler ddim --steps 5 --eta 1")
    generate("unipc 3", "--sampler unipc --steps 5 --order 3")
    generate("clipped", "--sampler multistep --steps 5 --clip_denoised --sigma_max 20")
    generate("default", "--steps 5")
    generate("ablation", "--steps 5 --solver heun")
    generate("iddpm", "--steps 5 --disc iddpm")
    generate("vp", "--steps 5 --disc vp --schedule vp --scaling vp --solver euler --S_churn 1")
    same = [
        (a, b)
        for a, b in itertools.combinations(images, 2)
        if np.abs(images[a] - images[b]).max() <= 1
    ]
    assert same == [
        ("heun", "default"),
        ("heun", "ablation"),
        ("euler", "ddim"),
        ("ddpm", "ddim 1"),
        ("default", "ablation"),
    ]
    generate("one of multistep", "--sampler multistep --steps 1")
    assert np.array_equal(images["one of multistep"], images["onestep"])


@pytest.mark.parametrize(
    "words, message",
    [
        ("--sampler heun --eta 1", "--eta does nothing with --sampler heun"),
        ("--sampler heun --clip_denoised", "--clip_denoised does nothing with --sampler heun"),
        ("--sampler ddpm --eta 1", "--eta does nothing with --sampler ddpm"),
        ("--sampler ddim --S_churn 1", "--S_churn does nothing with --sampler ddim"),
        ("--sampler ddim --scaling vp", "--scaling does nothing with --sampler ddim"),
        ("--sampler dpmpp --order 1", "--order does nothing with --sampler dpmpp"),
        ("--sampler onestep --steps 2", "--steps does nothing with --sampler onestep"),
        ("--sampler onestep --rho 1", "--rho does nothing with --sampler onestep"),
        ("--sampler onestep --disc vp", "--disc does nothing with --sampler onestep"),
        ("--steps 1", "--steps must be at least 2 with heun, got 1"),
        ("--disc vp --rho 7", "--rho does nothing with --disc vp"),
    ],
)
def test_generate_refuses_flags_that_do_nothing(tmp_path, trained, words, message):
    grid = ["--grid", tmp_path / "grid.png", "--seeds", "0-3"]
    assert message in tdkern_("generate", "--network", trained, *grid, *words.split(), code=2)


def test_generate_keeps_to_the_networks_levels(tmp_path, monkeypatch):
    """Levels are moved to those that the network knows, and a sampler with a range of its own gets
    the same one.
    """
    module, net, seen = importlib.import_module("tdkern.cli.generate"), iDDPMPrecond(MLP()), {}

    def generate(*args):
        tdkern_(
            "generate",
            "--network",
            "a",
            "--grid",
            tmp_path / "a.png",
            "--seeds",
            "0",
            "--steps",
            "5",
            *args,
        )
        return seen["sigmas"]

    def sample(net, network, seeds, sigmas, **options):
        seen.update(options, sigmas=sigmas)
        return torch.zeros(len(seeds), 3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(module, "load_network", lambda *_: (net, {"network": {}}))
    monkeypatch.setattr(module, "sample", sample)
    sigmas = generate()
    assert (
        len(sigmas) == 6
        and torch.isin(sigmas, net.u).all()
        and sigmas[-2] == net.sigma_min > 0.002
        and sigmas[0].item() == pytest.approx(80, rel=0.01)
    )
    sigmas = generate("--sampler", "multistep", "--sigma_min", "0.5")
    assert len(sigmas) == 6 and seen["sigma_min"] == sigmas[-1].item() == pytest.approx(
        0.5, rel=0.01
    )
    sigmas = generate("--schedule", "vp", "--sigma_max", "60")
    assert (seen["sigma_min"], seen["sigma_max"]) == (net.sigma_min, 60) and sigmas[
        0
    ].item() == pytest.approx(60, rel=0.05)


def test_generate_shares_the_seeds_among_processes(tmp_path, data, monkeypatch):
    tdkern_(
        "train", "--data", data, "--outdir", tmp_path, "--nosubdirs", "--duration", "8e-6", *FLAGS
    )
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    for rank, seeds in (("0", [0, 1, 4]), ("1", [2, 3])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        tdkern_(
            "generate",
            "--network",
            tmp_path,
            "--outdir",
            tmp_path / rank,
            "--seeds",
            "0-4",
            "--batch",
            "2",
            "--steps",
            "2",
        )
        assert sorted(int(path.stem) for path in (tmp_path / rank).glob("*.png")) == seeds
    assert "--grid needs all images in one process" in tdkern_(
        "generate", "--network", tmp_path, "--grid", tmp_path / "a.png", code=2
    )


def test_resume_goes_on_in_the_runs_directory(tmp_path, data):
    tdkern_(
        "train",
        "--data",
        data,
        "--outdir",
        tmp_path / "long",
        "--nosubdirs",
        "--duration",
        "32e-6",
        "--bf16",
        *FLAGS,
    )
    run_dir = tmp_path / "run"
    tdkern_(
        "train",
        "--data",
        data,
        "--outdir",
        run_dir,
        "--nosubdirs",
        "--duration",
        "16e-6",
        "--bf16",
        *FLAGS,
    )
    output = tdkern_("train", "--resume", run_dir, "--duration", "24e-6")
    assert f"Going on in {run_dir}, image 16 of 24" in output
    tdkern_("train", "--resume", run_dir / "training-state-000000.024", "--duration", "32e-6")
    name = Path("training-state-000000.032", "tensors.safetensors")
    assert (run_dir / name).read_bytes() == (tmp_path / "long" / name).read_bytes()
    assert json.loads((run_dir / "training_options.json").read_text())["duration"] == 32e-6
    assert [
        json.loads(line)["kimg"] for line in (run_dir / "stats.jsonl").read_text().splitlines()
    ] == [0.008, 0.016, 0.024, 0.032]
    assert "image 32 of 32" in tdkern_("train", "--resume", run_dir)  # nothing to do is no error
    assert "batch is 8 in the run to resume, got 16" in tdkern_(
        "train", "--resume", run_dir, "--batch", "16", code=1
    )
    assert "precision is 'bf16' in the run to resume, got 'fp16'" in tdkern_(
        "train", "--resume", run_dir, "--fp16", code=1
    )
    assert "leave out --outdir" in tdkern_(
        "train", "--resume", run_dir, "--outdir", tmp_path, code=2
    )


def test_a_run_without_a_state_starts_again(tmp_path, data):
    tdkern_(
        "train",
        "--data",
        data,
        "--outdir",
        tmp_path / "run",
        "--nosubdirs",
        "--duration",
        "8e-6",
        *FLAGS,
    )
    expected = (tmp_path / "run" / "training-state-000000.008" / "tensors.safetensors").read_bytes()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "training_options.json").write_bytes(
        (tmp_path / "run" / "training_options.json").read_bytes()
    )
    assert "image 0 of 8" in tdkern_("train", "--resume", tmp_path / "killed")
    assert (
        tmp_path / "killed" / "training-state-000000.008" / "tensors.safetensors"
    ).read_bytes() == expected


def test_transfer_starts_from_a_snapshots_weights(tmp_path, data):
    tdkern_(
        "train",
        "--data",
        data,
        "--outdir",
        tmp_path / "first",
        "--nosubdirs",
        "--duration",
        "16e-6",
        *FLAGS,
    )
    flags = [
        "--data",
        data,
        "--nosubdirs",
        "--duration",
        "8e-6",
        "--seed",
        "1",
        "--transfer",
        tmp_path / "first",
        *FLAGS,
        "--lr",
        "1e-30",
    ]
    tdkern_("train", "--outdir", tmp_path / "second", *flags)
    tensors = [
        Path(tmp_path, run, f"network-snapshot-000000.0{nimg}", "tensors.safetensors").read_bytes()
        for run, nimg in (("first", "16"), ("second", "08"))
    ]
    assert tensors[0] == tensors[1]
    assert "does not match the network" in tdkern_(
        "train", "--outdir", tmp_path / "third", *flags, "--cond", code=1
    )


def test_run_directories_are_numbered(tmp_path, data):
    (tmp_path / "runs" / "00007-other").mkdir(parents=True)
    (tmp_path / "runs" / "notes").mkdir()
    for number in ("00008", "00009"):
        tdkern_(
            "train",
            "--data",
            data,
            "--outdir",
            tmp_path / "runs",
            "--duration",
            "8e-6",
            "--loss-type",
            "edm",
            *FLAGS,
        )
        assert (
            tmp_path
            / "runs"
            / f"{number}-images-uncond-ddpmpp-edm-edm-gpus1-batch8-fp32"
            / "reals.png"
        ).exists()


def _take_a_number(outdir, name, all_ready):
    """With the others of the same number: all have looked before the first makes a folder."""
    real = os.mkdir

    def mkdir(path, *args):
        if Path(path).name.startswith("00000-"):
            os.mkdir = real
            all_ready.wait(60)
        real(path, *args)

    os.mkdir = mkdir
    _make_run_dir(outdir, name)


def test_runs_that_start_at_once_get_a_number_each(tmp_path):
    """Whether or not their names differ."""
    fork = multiprocessing.get_context("fork")  # eight that need nothing imported
    all_ready = fork.Barrier(8)
    names = ["same"] * 4 + [f"other{i}" for i in range(4)]
    starters = [
        fork.Process(target=_take_a_number, args=(tmp_path / "runs", name, all_ready))
        for name in names
    ]
    for process in starters:
        process.start()
    for process in starters:
        process.join(60)
        assert process.exitcode == 0
    taken = [path.name.split("-") for path in (tmp_path / "runs").iterdir()]
    assert sorted(name for _, name in taken) == sorted(names)
    assert len({number for number, _ in taken}) == 8


def test_what_a_killed_command_left_is_removed_by_the_next(tmp_path, trained, monkeypatch):
    """And nothing else of that form."""
    monkeypatch.setattr("tdkern.cli.fid.make_detector", Detector)
    made = {
        "model.safetensors": ["convert", DATA / "edm_snapshot_tiny.pkl"],
        "000001.png": ["generate", "--network", trained, "--seeds", "1", "--steps", "2"],
        "grid.png": ["generate", "--network", trained, "--seeds", "1", "--steps", "2"],
        "packed.zip": ["dataset", trained / "images.zip", "--workers", "1"],
        "packed.npy": ["dataset", trained / "images.zip", "--workers", "1"],
        "ref.npz": ["fid", "ref", "--data", trained / "images.zip", "--workers", "0"],
    }
    flags = {"000001.png": ["--outdir"], "grid.png": ["--grid"], "ref.npz": ["--dest"]}
    beside_it = {"packed.json", "generate.json"}
    for name, args in made.items():
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        beside(folder / name).write_bytes(b"half of it")
        others = beside(folder / "another.png")
        others.write_text("of another call, or a user's")
        dest = folder if name == "000001.png" else folder / name
        tdkern_(*args, *flags.get(name, []), dest)
        left = {path.name for path in folder.iterdir()} - beside_it
        assert left == {name, others.name}


def test_a_run_is_not_overwritten(tmp_path, data):
    flags = [
        "--data",
        data,
        "--outdir",
        tmp_path / "run",
        "--nosubdirs",
        "--duration",
        "8e-6",
        *FLAGS,
    ]
    tdkern_("train", *flags)
    assert "holds a run; go on with it by --resume" in tdkern_("train", *flags, code=1)


def test_flags_reach_the_options(tmp_path, data):
    flags = {
        "arch": "adm",
        "precond": "edm",
        "duration": 0.5,
        "batch": 12,
        "batch-gpu": 3,
        "cbase": 8,
        "cres": [1, 2],
        "lr": 2e-3,
        "lr-rampup-kimg": 7.0,
        "lr-decay": "cosine",
        "ema": 0.25,
        "dropout": 0.2,
        "augment": 0.3,
        "loss-type": "edm",
        "lambda-edm": 0.25,
        "k-idx": 2.0,
        "one-idx": 0.5,
        "td-coupling": "shared",
        "td-weight": "pairwise_x0",
        "td-sigma": [0.3, 5.0],
        "target-ema-tau": 0.99,
        "steps": 20,
        "tick": 0.125,
        "snap": 5,
        "dump": 6,
        "seed": 9,
        "workers": 2,
    }
    args = [
        word
        for name, value in flags.items()
        for word in (f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else value)
    ]
    underscored = [
        word.replace("-", "_").replace("__", "--", 1) if str(word).startswith("--") else word
        for word in args
    ]
    assert underscored != args
    for given in (args, underscored):
        options = options_of("--data", data, "--outdir", tmp_path / "runs", *given)
        assert {name: options[name.replace("-", "_")] for name in flags} == flags
    assert not (tmp_path / "runs").exists()
    assert options_of("--data", data, "--outdir", tmp_path, *FLAGS)["augment"] == 0.12  # EDM's
    assert options_of("--data", data, "--outdir", tmp_path, *FLAGS, "--td-sigma", "0.3,5")[
        "td_share"
    ] == pytest.approx(0.49 + 0.5 * 8**-0.5, abs=2e-3)


@pytest.mark.parametrize(
    "given, cond, xflip, precision",
    [
        ([], False, False, "fp32"),
        (["--cond", "--xflip", "--fp16"], True, True, "fp16"),
        (["--cond=1", "--xflip=True", "--bf16=1"], True, True, "bf16"),
        (["--cond", "true", "--xflip", "0", "--fp16", "False"], True, False, "fp32"),
    ],
)
def test_switches_are_edms(tmp_path, data, given, cond, xflip, precision):
    options = options_of("--data", data, "--outdir", tmp_path, *given, *FLAGS)
    assert (options["cond"], options["xflip"], options["precision"]) == (cond, xflip, precision)


@pytest.mark.parametrize(
    "given, message, code",
    [
        (["--cres", "1,x"], "'1,x' is not a comma-separated list of numbers", 2),
        (["--cres", "1,4-2"], "'1,4-2' has a range that counts down, 4-2", 2),
        (["--td-sigma", "1"], "'1' must have 2 numbers", 2),
        (["--arch", "resnet"], "'resnet' is not one of", 2),
        (["--fp16", "--bf16"], "--fp16 and --bf16 exclude each other", 2),
        (["--batch-gpu", "3"], "batch must be a multiple of batch_gpu", 1),
        (["--k-idx", "-1"], "k_idx must be a positive number, got -1", 1),
        (["--td-sigma", "5,1"], "td_sigma must be (lo, hi) with lo < hi", 1),
        (["--data", "nowhere.zip"], "nowhere.zip: no such folder or zip", 1),
        (["--transfer", "nowhere"], "no network-snapshot-* in it", 1),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, data, given, message, code):
    output = tdkern_(
        "train", "--dry-run", "--data", data, "--outdir", tmp_path, *FLAGS, *given, code=code
    )
    assert message in output.strip().splitlines()[-1]


def test_train_needs_to_know_where(data):
    assert "give --data and --outdir, or --resume" in tdkern_("train", "--data", data, code=2)
    assert "no training-state-* in it" in tdkern_("train", "--resume", "nowhere", code=1)
    assert "give --outdir, --grid or both" in tdkern_("generate", "--network", "nowhere", code=2)
    assert "no network-snapshot-* in it" in tdkern_(
        "generate", "--network", "nowhere", "--outdir", "a", code=1
    )


def test_directories_that_cannot_be_made_are_refused(tmp_path, data):
    (tmp_path / "file").write_text("")
    output = tdkern_(
        "train",
        "--data",
        data,
        "--outdir",
        tmp_path / "file" / "runs",
        "--duration",
        "8e-6",
        *FLAGS,
        code=1,
    )
    assert "--outdir cannot be made" in output.strip().splitlines()[-1]
    tdkern_(
        "train",
        "--data",
        data,
        "--outdir",
        tmp_path / "run",
        "--nosubdirs",
        "--duration",
        "8e-6",
        *FLAGS,
    )
    output = tdkern_(
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "file" / "images",
        "--seeds",
        "0",
        "--steps",
        "2",
        code=1,
    )
    assert "Not a directory" in output.strip().splitlines()[-1]


def test_a_broken_image_stops_a_run_in_one_line(tmp_path):
    path = raw_data_set(tmp_path / "a.zip", {"0.png": png(pixels(1)[0]), "1.png": b"no image"})
    for workers in ("0", "1"):
        output = tdkern_(
            "train",
            "--data",
            path,
            "--outdir",
            tmp_path / "runs",
            "--duration",
            "8e-6",
            *FLAGS,
            "--workers",
            workers,
            code=1,
        )
        last = output.strip().splitlines()[-1]
        assert "a.zip: 1.png is not a readable image" in last
        assert "remove or replace it" in last


def _import_cli(monkeypatch):
    """A fresh import of tdkern.cli, under another name."""
    spec = importlib.util.spec_from_file_location(
        "fresh_cli", tdkern.cli.__file__, submodule_search_locations=tdkern.cli.__path__
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_cli", module)
    spec.loader.exec_module(module)
    return module


def test_without_click_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(
        SystemExit, match=r"^tdkern: click is not installed; run: pip install 'tdkern\[train\]'$"
    ):
        _import_cli(monkeypatch).main()


def test_without_tqdm_one_line_says_what_to_install(monkeypatch):
    for name in ("tqdm", "tdkern.cli.generate", "tdkern.training", "tdkern.training.loop"):
        monkeypatch.setitem(sys.modules, name, None) if name == "tqdm" else monkeypatch.delitem(
            sys.modules, name, raising=False
        )
    output = tdkern_("generate", "--network", "a", code=1)
    assert output.strip() == "Error: tqdm is not installed; run: pip install 'tdkern[train]'"


def test_help_names_every_command():
    output = tdkern_("--help")
    assert all(command in output for command in ("train", "generate", "demo"))
    for flag in ("--target-ema-tau", "--td-sigma", "--lr-decay", "--resume", "-n, --dry-run"):
        assert flag in tdkern_("train", "--help")
    assert "No such command 'evil'" in tdkern_("evil", code=2)


def test_numbers_of_seeds():
    from tdkern.cli.types import Numbers

    assert Numbers(int).convert("1,2,5-8", None, None) == [1, 2, 5, 6, 7, 8]
    assert Numbers(float, 2).convert("1e-1,80", None, None) == [0.1, 80.0]
    assert torch.tensor(Numbers(int).convert("0-63", None, None)).tolist() == list(range(64))
