"""Reading what others saved: EDM's snapshots and training states, state dicts and diffusers
folders.
"""

import argparse
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from helpers import DATA, golden_of
from helpers.edm import ADM, SONG, network_record
from tdkern.cli import main
from tdkern.integrations import PickleError, convert, load_converted
from tdkern.networks import DhariwalUNet, EDMPrecond, SongUNet, VEPrecond, VPPrecond, iDDPMPrecond
from tdkern.training import CheckpointError, load_network

SNAPSHOT = DATA / "edm_snapshot_tiny.pkl"


def golden():
    return golden_of("edm_snapshot_tiny")


def metadata(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["tdkern"])


# --- EDM's files


def test_snapshot(tmp_path):
    """Every module_src in it raises SystemExit, so this also says that none is executed."""
    before = set(sys.modules)
    done = convert(SNAPSHOT, tmp_path / "model.safetensors")
    assert not {
        name
        for name in set(sys.modules) - before
        if name.startswith(("dnnlib", "torch_utils", "training"))
    }
    assert done == (
        f"{tmp_path / 'model.safetensors'}: ema of edm_snapshot_tiny.pkl, EDMPrecond(SongUNet), 8 "
        "pixels, 4 classes: "
        "149 tensors, 189,587 numbers; left out: loss_fn, augment_pipe, dataset_kwargs"
    )
    data = golden()
    state = {name[6:]: tensor for name, tensor in data.items() if name.startswith("state/")}
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys() and all(
        torch.equal(saved[name], state[name]) for name in state
    )

    net, meta = load_converted(tmp_path / "model.safetensors")
    D = net(data["x"], data["sigma"], data["class_labels"])
    torch.testing.assert_close(D, data["D"], atol=1e-6, rtol=1e-6)
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    assert meta == metadata(tmp_path / "model.safetensors")
    assert meta["source"] == "edm_snapshot_tiny.pkl" and meta["network"] == {
        "class": "EDMPrecond",
        "arguments": {"sigma_data": 0.5},
        "model": "SongUNet",
        "precision": "fp32",
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 4,
        "model_arguments": {
            "img_resolution": 8,
            "in_channels": 3,
            "out_channels": 3,
            "label_dim": 4,
            "augment_dim": 9,
            "model_channels": 16,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attn_resolutions": [4],
            "dropout": 0.13,
            "embedding_type": "positional",
            "encoder_type": "standard",
            "decoder_type": "standard",
            "channel_mult_noise": 1,
            "resample_filter": [1, 1],
        },
    }


@pytest.mark.parametrize(
    "form, precond, model, model_arguments, settings",
    [
        ("pickle", EDMPrecond, SongUNet, SONG, {"sigma_data": np.float64(0.6)}),
        ("zip", EDMPrecond, SongUNet, SONG, {"sigma_data": np.float64(0.6)}),
        ("legacy", EDMPrecond, SongUNet, SONG, {"sigma_data": np.float64(0.6)}),
        (
            "pickle",
            VPPrecond,
            SongUNet,
            SONG,
            {"beta_d": 19.0, "beta_min": 0.2, "M": 900, "epsilon_t": 1e-4},
        ),
        ("pickle", VEPrecond, SongUNet, SONG, {"sigma_min": 0.03, "sigma_max": 90.0}),
        ("zip", iDDPMPrecond, DhariwalUNet, ADM, {"C_1": 0.002, "C_2": 0.009, "M": 800}),
    ],
)
def test_networks_in_every_form(
    tmp_path, persistence, form, precond, model, model_arguments, settings
):
    saved, net = network_record(precond, model, model_arguments, settings)
    if form == "pickle":
        (tmp_path / "a").write_bytes(pickle.dumps({"loss_fn": None, "ema": saved}))
    else:
        torch.save(
            {"net": saved, "optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}},
            tmp_path / "a",
            _use_new_zipfile_serialization=form == "zip",
        )
    done = convert(tmp_path / "a", tmp_path / "a.safetensors")
    assert f"{precond.__name__}({model.__name__})" in done
    assert done.endswith("left out: loss_fn" if form == "pickle" else "left out: optimizer_state")
    got, _ = load_converted(tmp_path / "a.safetensors")
    assert type(got) is precond and all(
        getattr(got, name, value) == value for name, value in settings.items()
    )
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(2) if model_arguments["label_dim"] else None
    assert torch.equal(got(x, 1.5, labels), net(x, 1.5, labels))


def test_generate_asks_a_network_at_its_own_levels(tmp_path, persistence, monkeypatch):
    saved, net = network_record(
        iDDPMPrecond, DhariwalUNet, ADM, {"C_1": 0.001, "C_2": 0.008, "M": 1000}
    )
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
    convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    levels = []
    monkeypatch.setattr(
        "tdkern.cli.generate.sample",
        lambda net, network, seeds, sigmas, **_: (
            levels.extend(sigmas.tolist()) or torch.zeros(1, 3, 8, 8).byte()
        ),
    )
    result = CliRunner().invoke(
        main,
        [
            "generate",
            "--network",
            str(tmp_path / "a.safetensors"),
            "--grid",
            str(tmp_path / "a.png"),
            "--seeds",
            "0",
            "--steps",
            "5",
            "--sigma-max",
            "1e6",
        ],
    )
    assert result.exit_code == 0, result.output
    assert (
        levels[0] == pytest.approx(net.sigma_max)
        and levels[-1] == 0
        and all(level in net.u.tolist() for level in levels)
    )


def test_half_precision_is_for_a_gpu(tmp_path, persistence):
    saved, _ = network_record(EDMPrecond, SongUNet, SONG, {"sigma_data": 0.5}, use_fp16=True)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
    convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    got, meta = load_converted(tmp_path / "a.safetensors")
    assert meta["network"]["precision"] == "fp16" and got.dtype is None


def test_a_network_that_tdkern_has_not(tmp_path, persistence):
    saved, net = network_record(EDMPrecond, SongUNet, SONG, {"sigma_data": 0.5})
    saved.record["class_name"] = "Precond"  # EDM2's
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved, "encoder": None}))
    done = convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    assert (
        "ema of a.pkl, Precond(SongUNet), which tdkern has not, so its tensors under their own "
        "names: "
        in done
        and done.endswith("left out: encoder")
    )
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert (
        all(torch.equal(got[name], tensor) for name, tensor in net.state_dict().items())
        and metadata(tmp_path / "a.safetensors")["network"] is None
    )
    with pytest.raises(
        CheckpointError, match=r"a.safetensors: holds tensors, and no network that tdkern has"
    ):
        load_converted(tmp_path / "a.safetensors")


@pytest.fixture
def refused(tmp_path, persistence):
    """A pickle of a network described by other arguments is refused, and nothing is written."""

    def check(message, wrapper=EDMPrecond, error=CheckpointError, *, model=None, **wrapped):
        kind, given = (SongUNet, SONG) if wrapper is EDMPrecond else (DhariwalUNet, ADM)
        saved, _ = network_record(wrapper, kind, given, WRAPPED[wrapper])
        state = saved.record["state"]
        state.update(wrapped)
        state["_modules"]["model"].record["state"]["_init_kwargs"] = given | (model or {})
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
        with pytest.raises(error, match=message):
            convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
        assert list(tmp_path.iterdir()) == [tmp_path / "a.pkl"]

    return check


WRAPPED = {EDMPrecond: {"sigma_data": 0.5}, iDDPMPrecond: {"M": 10}}
NO_NETWORK = "a.pkl: does not describe a network of tdkern .*"


def test_a_network_with_other_tensors_is_refused(refused):
    shapes = r"model.dec.* must be \[.*\], got \[.*\]"
    refused(f"a.pkl: does not match the network: {shapes}", model={"model_channels": 4})


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_blocks": 10**9},
        {"unknown": 1},
        {"a\nb": 1},
        {"img_resolution": 16},
        {"in_channels": 4},
        {"label_dim": 3},
        {"dropout": "0.1"},
        {"model_channels": 10**30},
        {"channel_mult": "x"},
        {"channel_mult": 7},
    ],
)
def test_arguments_of_no_network_are_refused(refused, wrong):
    refused(rf"{NO_NETWORK}\)$", model=wrong)


def test_arguments_that_would_take_too_much_are_refused(refused):
    refused(f"{NO_NETWORK}a list of more than 100 numbers", model={"attn_resolutions": [4] * 101})
    lists = dict.fromkeys("abcdefghijklmnopqrstuvwxyz", [0] * 50_000)
    refused("a.pkl: refused: it has more than 1,000,000 operations", error=PickleError, model=lists)
    refused(f"{NO_NETWORK}an argument of its preconditioning is not a number", sigma_data="0.5")
    refused(f"{NO_NETWORK}more times than a million", iDDPMPrecond, M=10**12)


# --- state dicts


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_state_dict(tmp_path, form):
    torch.manual_seed(0)
    tied = torch.randn(4)
    # has int64, and attributes beside its items
    state = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()
    state |= {
        "transposed": torch.randn(3, 5).T,
        "view": torch.randn(10)[3:7:2],
        "bf16": torch.randn(3).bfloat16(),
        "half": torch.randn(3).half(),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor(True),
        "tied.a": tied,
        "tied.b": tied,
        "weight": torch.nn.Parameter(torch.randn(2)),
    }
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=form == "zip")
    done = convert(tmp_path / "model.pt", tmp_path / "model.safetensors")
    assert done.endswith(
        f"the tensors of model.pt under their own names: {len(state)} tensors, "
        f"{sum(map(torch.numel, state.values())):,} numbers; "
        "left out: 0 entries that are no tensors"
    )
    got = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert got.keys() == state.keys()
    for name, tensor in torch.load(tmp_path / "model.pt", weights_only=True).items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor.detach()), name


def test_nested_state_dicts(tmp_path):
    tensors = {
        "net": {"a.weight": torch.ones(2)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "step": 7,
    }
    torch.save(tensors, tmp_path / "training-state-1.pt")
    done = convert(tmp_path / "training-state-1.pt", tmp_path / "a.safetensors")
    assert done.endswith("left out: 2 entries that are no tensors")
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {name: tensor.tolist() for name, tensor in got.items()} == {
        "net.a.weight": [1, 1],
        "optimizer.state.0.step": 3,
    }


WEIGHTS = ("weight", "bias")
ENTRIES = "entries that are no tensors"
FAULTS = {  # the names of the tensors, and what is left out
    "emamodel.pt": (
        [f"unet.{name}" for name in WEIGHTS] + [f"ema.shadow_params.{i}" for i in range(2)],
        f"7 {ENTRIES}",
    ),
    "ema_alone.pt": (["shadow_params.0", "shadow_params.1"], f"7 {ENTRIES}"),
    "list_of_state_dicts.pt": ([f"models.0.{name}" for name in WEIGHTS], f"0 {ENTRIES}"),
    "same_dict_twice.pt": (
        [f"{place}.{name}" for place in ("model", "ema") for name in WEIGHTS],
        f"0 {ENTRIES}",
    ),
    "config_in_two_places.pt": ([f"model.{name}" for name in WEIGHTS], f"2 {ENTRIES}"),
    "dit_like.pt": (
        [f"{place}.{name}" for place in ("model", "ema") for name in WEIGHTS],
        f"1 {ENTRIES}: args (argparse.Namespace)",
    ),
    "expanded.pt": (["w"], f"0 {ENTRIES}"),
}


def at(value, name):
    """What torch.load gave under a name of `convert`."""
    while name:
        if type(value) in (list, tuple):
            key, _, name = name.partition(".")
            value = value[int(key)]
        elif name in value:
            value, name = value[name], ""
        else:
            key, _, name = name.partition(".")
            value = value[key]
    return value


@pytest.mark.parametrize("name", FAULTS)
def test_files_that_lost_tensors_or_were_refused(tmp_path, name):
    names, left = FAULTS[name]
    done = convert(DATA / "faults" / name, tmp_path / "a.safetensors")
    assert f": {len(names)} tensors, " in done and done.endswith(f"; left out: {left}")
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    with torch.serialization.safe_globals([argparse.Namespace]):
        value = torch.load(DATA / "faults" / name, weights_only=True)
    assert sorted(got) == sorted(names)
    assert all(torch.equal(got[name], at(value, name)) for name in names)


def test_safetensors_is_said_to_need_no_conversion(tmp_path):
    """Whatever its name is; so too a file of `convert`."""
    plain = DATA / "faults" / "plain.safetensors"
    shutil.copy(plain, tmp_path / "weights.bin")
    convert(SNAPSHOT, tmp_path / "ours.safetensors")
    for path in (plain, tmp_path / "weights.bin", tmp_path / "ours.safetensors"):
        with pytest.raises(CheckpointError) as raised:
            convert(path, tmp_path / "a.safetensors")
        assert str(raised.value) == (
            f"{path}: is safetensors already, so there is nothing to convert; tdkern generate "
            "reads it if tdkern convert or save_network wrote it"
        )
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_tensors_in_tuples_and_arrays_beside_them(tmp_path, form):
    state, shared = torch.nn.Linear(2, 2).state_dict(), [torch.randn(3)]
    arrays = [
        np.random.default_rng(0).standard_normal((5, 7)),
        np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        np.arange(3, dtype=">f4"),
        np.array(2.5, np.float16),
        np.array([True, False]),
        np.arange(200, dtype=np.uint8),
        np.zeros((0, 2)),
    ]
    value = ((state, {"a": shared}), {"b": shared}, {"array": arrays, "words": np.array(["a"])})
    if form == "pickle":
        (tmp_path / "a").write_bytes(pickle.dumps(value, 4))
    else:
        torch.save(value, tmp_path / "a", _use_new_zipfile_serialization=form == "zip")
    done = convert(tmp_path / "a", tmp_path / "a.safetensors")
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    expected = {f"0.0.{name}": tensor for name, tensor in state.items()}
    expected |= {"0.1.a.0": shared[0], "1.b.0": shared[0]}
    for i, array in enumerate(arrays):
        expected[f"2.array.{i}"] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    assert got.keys() == expected.keys() and done.endswith(f"left out: 1 {ENTRIES}")
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def test_a_file_that_is_mostly_an_array(tmp_path):
    """Its bytes are read, decoded and copied, and none of this is more than a file may ask for."""
    array = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8)
    torch.save({"array": array, "again": array}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(np.array_equal(got[name].numpy(), array) for name in ("array", "again"))


@pytest.mark.parametrize("pipeline", [False, True])
def test_diffusers(tmp_path, pipeline):
    folder = tmp_path / "ddpm" / ("unet" if pipeline else "")
    folder.mkdir(parents=True)
    config = {"_class_name": "UNet2DModel", "sample_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(
        {"conv_in.weight": torch.ones(2, 3)}, folder / "diffusion_pytorch_model.safetensors"
    )
    done = convert(tmp_path / "ddpm", tmp_path / "a.safetensors")
    assert (
        "UNet2DModel of ddpm, which tdkern has not, so its tensors under their own names and its "
        "config: 1 tensors, 6 numbers" in done
    )
    assert metadata(tmp_path / "a.safetensors") == {
        "format": 1,
        "network": None,
        "source": "ddpm",
        "diffusers": config,
    }
    (folder / "config.json").write_text("[1]")
    with pytest.raises(
        CheckpointError,
        match=r"ddpm: no diffusers folder with config.json and diffusion_pytorch_model.safetensors",
    ):
        convert(tmp_path / "ddpm", tmp_path / "b.safetensors")


# --- what a user may do wrong


def test_destination(tmp_path):
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(
        ValueError, match=r"convert: DST must not be there yet, got .*mine.safetensors; remove it"
    ):
        convert(SNAPSHOT, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"convert: DST must end in .safetensors, got .*model.pt"):
        convert(SNAPSHOT, tmp_path / "model.pt")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("mine.safetensors", "mine")
    ]


def test_sources_without_a_network(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(PickleError, match=r"empty: refused: it is damaged"):
        convert(tmp_path / "empty", tmp_path / "a.safetensors")
    with pytest.raises(PickleError, match=r"absent: cannot be read"):
        convert(tmp_path / "absent", tmp_path / "a.safetensors")
    for value in ({"step": 3}, [3, "a"]):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(
            CheckpointError, match=r"a.pt: no tensors in it; give a file that holds a network"
        ):
            convert(tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_loading_other_files(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"a.safetensors: not a file of tdkern convert"):
        load_converted(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(
        CheckpointError, match=r"a.safetensors: not a file of tdkern convert \(KeyError: 'tdkern'\)"
    ):
        load_converted(path)
    safetensors.torch.save_file(
        {"a": torch.ones(1)}, path, {"tdkern": json.dumps({"format": 2, "network": None})}
    )
    with pytest.raises(
        CheckpointError, match=r"a.safetensors: in format 2; this tdkern reads format 1"
    ):
        load_converted(path)
    for network in ({"class": "EDMPrecond"}, [1], 3):
        safetensors.torch.save_file(
            {"a": torch.ones(1)}, path, {"tdkern": json.dumps({"format": 1, "network": network})}
        )
        with pytest.raises(
            CheckpointError, match=r"a.safetensors: does not describe a network of tdkern"
        ):
            load_converted(path)


def test_command_line(tmp_path):
    def run(*args):
        return CliRunner().invoke(main, list(map(str, args)))

    model = tmp_path / "model.safetensors"
    result = run("convert", SNAPSHOT, model)
    assert result.exit_code == 0 and "EDMPrecond(SongUNet), 8 pixels, 4 classes" in result.output
    result = run("convert", SNAPSHOT, model)
    assert result.exit_code == 1 and result.output.startswith(
        "Error: convert: DST must not be there yet"
    )
    result = run(
        "generate",
        "--network",
        model,
        "--outdir",
        tmp_path / "images",
        "--seeds",
        "5",
        "--steps",
        "2",
        "--class",
        "3",
    )
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(tmp_path / "images")) == ["000005.png", "generate.json"]
    assert load_network(model)[1]["network"]["label_dim"] == 4
