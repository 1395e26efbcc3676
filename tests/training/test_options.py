"""Options come from fields alone: flags, files, presets, and what an older version wrote."""

import json

import pytest
import torch

from helpers import DATA
from helpers.tiny import TINY, invoked, options_of, tdkern_
from tdkern.cli.options import ALIASES, SAME_FLAG
from tdkern.cli.train import train as command
from tdkern.families import FAMILIES
from tdkern.fields import flags_of
from tdkern.losses import TDDDPMLoss, TDEDMLoss
from tdkern.training import Options, Trainer, load_network, train
from tdkern.training.checkpoint import SNAPSHOT, STATE, CheckpointError, find, read, read_options
from tdkern.training.distributed import this_process
from tdkern.training.formats import as_json
from tdkern.training.presets import PRESETS

FORMAT2 = DATA / "format2_ddpm"  # a run of DDPM with TD that tdkern wrote before
TINY_FLAGS = ["--cbase", 4, "--cres", 1, "--batch", 8, "--duration", 8e-6, "--workers", 0]

pytestmark = pytest.mark.usefixtures("short_previews")


def dry_run(*args):
    """The options that --dry-run prints, which are all that it writes to stdout."""
    return json.loads(invoked("train", "--dry-run", *args).stdout)


# --- flags


def test_every_field_is_a_flag_under_its_own_name():
    flags = {parameter.name: parameter for parameter in command.params}
    own = {name for family in FAMILIES.values() for name in family.options}
    assert flags_of(Options).keys() - {"gpus"} | own <= flags.keys()
    for name in flags_of(Options).keys() - {"gpus"} | own:
        assert f"--{name.replace('_', '-')}" in flags[name].opts
        assert flags[name].help and "\n" not in flags[name].help
    for name, aliases in ALIASES.items():
        assert {f"--{alias}" for alias in aliases} <= set(flags[name].opts)


def test_aliases_are_flags_alone():
    """In Python and in files each thing has one name."""
    every = flags_of(Options).keys() | {
        name for family in FAMILIES.values() for name in family.options
    }
    aliases = {alias.replace("-", "_") for names in ALIASES.values() for alias in names}
    assert not aliases & every and set(SAME_FLAG) <= every
    for alias in aliases:
        with pytest.raises((TypeError, ValueError)):
            options_of(data="", **{alias: "edm"})


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (
            ["--precond", "ddpm", "--loss-type", "edm", "--diffusion-steps", 20],
            {"family": "ddpm", "td": False, "T": 20},
        ),
        (["--family", "ddpm", "--td", "0", "--T", 20], {"family": "ddpm", "td": False, "T": 20}),
        (
            ["--precond", "iddpm", "--k-idx", 3, "--td-eta", 0.5],
            {"family": "iddpm", "k": 3, "eta": 0.5},
        ),
        (
            ["--lambda-edm", 0.1, "--td-weight", "pairwise-x0", "--td_coupling", "shared"],
            {"lambda_base": 0.1, "weight": "pairwise_x0", "coupling": "shared"},
        ),
        (
            ["--lambda-td", 0.1, "--family", "ct", "--loss-norm", "l1"],
            {"lambda_base": 0.1, "family": "ct", "base_norm": "l1"},
        ),
        (["--td-sigma", "0.3,5"], {"td_sigma": [0.3, 5.0]}),
        (
            ["--precision", "bf16", "--target-precision", "fp16"],
            {"precision": "bf16", "target_precision": "fp16"},
        ),
    ],
)
def test_flags(data, flags, changes):
    expected = options_of(
        data=data, cbase=4, cres=[1], batch=8, duration=8e-6, workers=0, **changes
    )
    assert dry_run("--data", data, *TINY_FLAGS, *flags) == as_json(expected)


# --- files


def test_a_runs_own_file_starts_the_same_run_again(tmp_path, data):
    """What --dry-run prints is such a file too."""
    flags = [
        "--data",
        data,
        *TINY_FLAGS,
        "--augment",
        0.5,
        "--td-sigma",
        "0.3,5",
        "--cond",
        "--tick",
        0.008,
    ]
    tdkern_("train", "--outdir", tmp_path / "a", "--nosubdirs", *flags)
    printed = tmp_path / "printed.json"
    printed.write_text(invoked("train", "--dry-run", *flags).stdout)
    states = []
    for run, config in (("b", tmp_path / "a" / "training_options.json"), ("c", printed)):
        tdkern_("train", "--outdir", tmp_path / run, "--nosubdirs", "--config", config)
    for run in "abc":
        states.append((find(tmp_path / run, STATE) / "tensors.safetensors").read_bytes())
        assert (tmp_path / run / "training_options.json").read_text() == printed.read_text().rstrip(
            "\n"
        )
    assert states[0] == states[1] == states[2]


def test_flags_count_before_a_file(tmp_path, data):
    file = tmp_path / "options.json"
    file.write_text(json.dumps(as_json(options_of(data=data, duration=8e-6, one_idx=0.5, **TINY))))
    seen = dry_run("--config", file, "--k-idx", 2, "--seed", 7)
    assert (seen["loss"]["one_idx"], seen["loss"]["k_idx"], seen["seed"], seen["batch"]) == (
        0.5,
        2.0,
        7,
        8,
    )
    output = tdkern_("train", "--config", file, "--preset", "td-window", code=2)
    assert "--preset and --config exclude each other" in output
    assert "leave out --preset and --config" in tdkern_(
        "train", "--resume", tmp_path, "--config", file, code=2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"gpus": "2"}, "gpus must be a whole number, got '2'"),
        ({"batch": 8.5}, "batch must be a whole number, got 8.5"),
        ({"batch": True}, "batch must be a whole number, got True"),
        ({"batch": 0}, "batch must be positive, got 0"),
        ({"batch_gpu": 0}, "batch_gpu must be positive, got 0"),
        ({"duration": None}, "duration must be a finite number, got None"),
        ({"duration": float("inf")}, "duration must be positive, got inf"),
        ({"lr": "fast"}, "lr must be a finite number, got 'fast'"),
        ({"optim": "sgd"}, "optim must be adam or radam, got 'sgd'"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"clip": 0}, "clip must be positive, got 0"),
        ({"power_ema": [0.05, 0.3]}, "power_ema must be above 0 and at most 12^-0.5, got [0.05"),
        ({"lr_decay": "linear"}, "lr_decay must be none or cosine, got 'linear'"),
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16, got 'fp8'"),
        ({"td": "yes"}, "td must be true or false, got 'yes'"),
        ({"arch": "resnet"}, "arch must be one of ddpmpp, ncsnpp, adm, got 'resnet'"),
        ({"arch": ["adm"]}, "arch must be text, got ['adm']"),
        ({"cres": "1,2"}, "cres must be a list of numbers or nothing, got '1,2'"),
        ({"cres": []}, "cres must be a list of numbers or nothing, got []"),
        ({"cres": [1, 0]}, "cres must be positive, got [1, 0]"),
        ({"cbase": 3}, "cbase must be positive and even, got 3"),
        ({"snap": 10**30}, "snap must be a whole number, got 1000"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        (
            {"loss": {"td_sigma": [0.1, float("inf")]}},
            "td_sigma must be a finite number, got [0.1, inf]",
        ),
        ({"data": 3}, "data must be text, got 3"),
        ({"dropout": 1.5}, "dropout must be in [0, 1), got 1.5"),
        ({"loss": 3}, "loss must be the family's own options by name, got 3"),
        ({"loss": {"T": 3}}, "T is for family ddpm, got family edm"),
        (
            {"loss": {"temperature": 3}},
            "loss must hold base_weight, lambda_base, steps, k_idx, one_idx, coupling, weight, "
            "td_sigma, td_share, got 'temperature'",
        ),
        ({"loss": {"k_idx": "far"}}, "k_idx must be a finite number, got 'far'"),
        ({"loss": {"k_idx": -1}}, "k_idx must be a positive number, got -1"),
        ({"loss": {"steps": 18.5}}, "steps must be a whole number, got 18.5"),
        ({"loss": {"coupling": "no"}}, "coupling must be markov or shared, got 'no'"),
        (
            {"loss": {"weight": "no"}},
            "weight must be one of pairwise, pairwise_x0, online, none, got 'no'",
        ),
        ({"loss": {"td_sigma": [1]}}, "td_sigma must be 2 numbers or nothing, got [1]"),
        ({"loss": {"td_sigma": [5, 1]}}, "td_sigma must be (lo, hi) with lo < hi"),
        ({"loss": {"td_share": 0}}, "td_share must be above 0 and at most 1, got 0"),
        ({"learning_rate": 1}, "unexpected keyword argument 'learning_rate'"),
    ],
)
def test_bad_values_are_refused_in_one_line_wherever_they_stand(tmp_path, data, changes, message):
    """In a file that starts a run, and in the one that a killed run left to be resumed."""
    good = as_json(options_of(data=data, duration=8e-6, **TINY))
    bad = good | changes
    if isinstance(changes.get("loss"), dict):
        bad["loss"] = good["loss"] | changes["loss"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "training_options.json").write_text(json.dumps(bad))
    commands = [["--resume", run]]
    if "gpus" not in changes:  # of a new run they are those that are there
        commands.append(["--config", run / "training_options.json", "--outdir", tmp_path / "new"])
    for args in commands:
        output = tdkern_("train", *args, code=1)
        assert len(output.strip().splitlines()) == 1 and message in output
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("T", [1, 1_000_001, 2**54])
def test_discrete_times_are_as_many_as_a_table_holds(T):
    with pytest.raises(
        ValueError, match=r"T must be (at least 2 and at most a million|a whole number)"
    ):
        options_of(data="", family="ddpm", T=T)


@pytest.mark.parametrize("format", [True, 0, -1, 2.0, "4", None, float("nan")])
def test_a_format_that_is_no_number_of_one_is_refused(tmp_path, data, format):
    options = as_json(options_of(data=data, duration=8e-6, **TINY)) | {"format": format}
    (tmp_path / "a.json").write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match="its format is no number from 1 up"):
        read_options(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "3", "{", '{"format": 99}', '{"format": "new"}', '{"family": "edm"}', "\xff"],
)
def test_files_without_options_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    output = tdkern_("train", "--config", tmp_path / "a.json", "--outdir", tmp_path / "new", code=1)
    assert len(output.strip().splitlines()) == 1 and "a.json: " in output
    with pytest.raises(CheckpointError, match=r"nowhere.json: cannot be read"):
        read_options(tmp_path / "nowhere.json")


# --- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    options = Options(data="", **PRESETS[name])
    assert options.td == name.startswith("td-")
    again = Options(
        data="",
        **{key: value for key, value in as_json(options).items() if key not in ("format", "data")},
    )
    assert again == options


def test_what_presets_say():
    def loss(name):
        return Options(data="", **PRESETS[name]).make_loss()

    assert loss("td-cifar10") == TDEDMLoss()
    published = loss("td-cifar10-published")
    assert 0.88 < published.td_share < 0.9  # where its schedule ends
    assert published == TDEDMLoss(
        k_idx=3.0, one_idx=0.2, weight="online", td_share=published.td_share
    )
    window = loss("td-window")
    assert window.td_sigma == (0.3, 5.0) and 0.4 < window.td_share < 0.6
    assert (
        loss("ict-cifar10").num_scales(0) == 11 and loss("ict-cifar10").num_scales(399_999) == 1281
    )
    assert loss("td-ct-cifar10").base_norm == "lpips"
    by_radam = {name for name in PRESETS if Options(data="", **PRESETS[name]).optim == "radam"}
    assert by_radam == {"ct-cifar10", "ect-cifar10", "ict-cifar10", "td-ct-cifar10"}


def test_a_preset_on_the_command_line(data):
    seen = dry_run("--preset", "td-window", "--data", data, *TINY_FLAGS, "--one-idx", 0.5)
    assert (seen["cond"], seen["lr"], seen["batch"], seen["loss"]["one_idx"]) == (
        True,
        2e-4,
        8,
        0.5,
    )
    assert seen["loss"]["td_sigma"] == [0.3, 5.0]


# --- what an older version wrote


def test_a_snapshot_of_format_2_is_read():
    net, meta = load_network(FORMAT2)
    assert meta["format"] == 4
    assert net.prediction == "v" and type(net).__name__ == "Denoiser"
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    # as the version that wrote it gives it
    assert net(x, 2.0).double().pow(2).sum().item() == pytest.approx(14.101853380660192, rel=1e-5)


def test_a_state_of_format_2_goes_on(tmp_path, data):
    stored = find(FORMAT2, STATE)
    meta, tensors = read(stored, STATE)
    options = Options(**meta["options"])
    assert options.make_loss() == TDDDPMLoss(
        50, k=2, prediction="v", beta_schedule="cosine", weight="online", lambda_base=0.25, eta=0.5
    )
    assert options == Options(**read_options(FORMAT2 / "training_options.json"))
    trainer = Trainer(options.resumed(data=data, duration=24e-6), this_process(), stored)
    ours = trainer.tensors()
    assert trainer.step == 2 and ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensors[name]) for name in ours)
    (tmp_path / "run").mkdir()
    train(trainer, tmp_path / "run")
    assert read(find(tmp_path / "run", STATE), STATE)[0]["step"] == 3
    assert read(find(tmp_path / "run", SNAPSHOT), SNAPSHOT)[0]["network"] == meta["network"]
