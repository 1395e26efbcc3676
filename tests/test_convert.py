"""Reading what others saved: EDM's snapshots and training states, state dicts, diffusers folders; and what hostile files come to."""
import io
import json
import os
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from tdkern.cli import main
from tdkern.integrations import PickleError, PickleFile, convert, load_converted
from tdkern.networks import DhariwalUNet, EDMPrecond, SongUNet, VEPrecond, VPPrecond, iDDPMPrecond
from tdkern.training import CheckpointError, load_network

DATA = Path(__file__).parent / "data"
SNAPSHOT = DATA / "edm_snapshot_tiny.pkl"
SONG = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 2, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [4], "dropout": 0.1, "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1]}
ADM = {"img_resolution": 8, "in_channels": 3, "out_channels": 6, "label_dim": 0, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
       "attn_resolutions": [4], "dropout": 0.1}


def golden():
    with np.load(DATA / "edm_snapshot_tiny.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def metadata(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["tdkern"])


# --- EDM's files


def test_snapshot(tmp_path):
    """Every module_src in it raises SystemExit, so this also says that none is executed."""
    before = set(sys.modules)
    done = convert(SNAPSHOT, tmp_path / "model.safetensors")
    assert not {name for name in set(sys.modules) - before if name.startswith(("dnnlib", "torch_utils", "training"))}
    assert done == (f"{tmp_path / 'model.safetensors'}: ema of edm_snapshot_tiny.pkl, EDMPrecond(SongUNet), 8 pixels, 4 classes: "
                    "149 tensors, 189,587 numbers; left out: loss_fn, augment_pipe, dataset_kwargs")
    data = golden()
    state = {name[6:]: tensor for name, tensor in data.items() if name.startswith("state/")}
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)

    net, meta = load_converted(tmp_path / "model.safetensors")
    D = net(data["x"], data["sigma"], data["class_labels"])
    torch.testing.assert_close(D, data["D"], atol=1e-6, rtol=1e-6)
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    assert meta == metadata(tmp_path / "model.safetensors")
    assert meta["source"] == "edm_snapshot_tiny.pkl" and meta["network"] == {
        "class": "EDMPrecond", "arguments": {"sigma_data": 0.5}, "model": "SongUNet", "precision": "fp32", "img_resolution": 8, "img_channels": 3,
        "label_dim": 4, "model_arguments": {
            "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4, "augment_dim": 9, "model_channels": 16, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.13, "embedding_type": "positional", "encoder_type": "standard",
            "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1]}}


class Record:
    """Pickled as EDM's persistence pickles an object."""

    def __init__(self, class_name, **state):
        self.record = {"type": "class", "version": 6, "module_src": "raise SystemExit\n", "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.record,)


@pytest.fixture
def persistence(monkeypatch):
    """The module that EDM's pickles name, for writing them."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("executed")

    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


def record(module, **extra):
    """A module as EDM's persistence has it."""
    children = OrderedDict((name, record(child)) for name, child in module._modules.items() if child is not None)
    buffers = OrderedDict((name, buffer) for name, buffer in module._buffers.items() if buffer is not None)
    return Record(type(module).__name__, training=False, _parameters=OrderedDict(module._parameters), _buffers=buffers,
                  _non_persistent_buffers_set=set(), _modules=children, **extra)


def network_record(precond, model, model_arguments, settings, **attributes):
    """The record of a network of EDM's, and the network."""
    torch.manual_seed(0)
    net = precond(model(**model_arguments), **{name: float(value) if isinstance(value, np.generic) else value for name, value in settings.items()})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = record(net, _init_args=(), _init_kwargs={}, img_resolution=8, img_channels=3, label_dim=model_arguments["label_dim"], **settings, **attributes)
    made.record["state"]["_modules"]["model"].record["state"] |= {"_init_args": (), "_init_kwargs": model_arguments}
    return made, net.eval()


@pytest.mark.parametrize("form, precond, model, model_arguments, settings", [
    ("pickle", EDMPrecond, SongUNet, SONG, {"sigma_data": np.float64(0.6)}),
    ("zip", EDMPrecond, SongUNet, SONG, {"sigma_data": np.float64(0.6)}),
    ("legacy", EDMPrecond, SongUNet, SONG, {"sigma_data": np.float64(0.6)}),
    ("pickle", VPPrecond, SongUNet, SONG, {"beta_d": 19.0, "beta_min": 0.2, "M": 900, "epsilon_t": 1e-4}),
    ("pickle", VEPrecond, SongUNet, SONG, {"sigma_min": 0.03, "sigma_max": 90.0}),
    ("zip", iDDPMPrecond, DhariwalUNet, ADM, {"C_1": 0.002, "C_2": 0.009, "M": 800}),
])
def test_networks_in_every_form(tmp_path, persistence, form, precond, model, model_arguments, settings):
    saved, net = network_record(precond, model, model_arguments, settings)
    if form == "pickle":
        (tmp_path / "a").write_bytes(pickle.dumps({"loss_fn": None, "ema": saved}))
    else:
        torch.save({"net": saved, "optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}}, tmp_path / "a",
                   _use_new_zipfile_serialization=form == "zip")
    done = convert(tmp_path / "a", tmp_path / "a.safetensors")
    assert f"{precond.__name__}({model.__name__})" in done
    assert done.endswith("left out: loss_fn" if form == "pickle" else "left out: optimizer_state")
    got, _ = load_converted(tmp_path / "a.safetensors")
    assert type(got) is precond and all(getattr(got, name, value) == value for name, value in settings.items())
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(2) if model_arguments["label_dim"] else None
    assert torch.equal(got(x, 1.5, labels), net(x, 1.5, labels))


def test_generate_asks_a_network_at_its_own_levels(tmp_path, persistence, monkeypatch):
    saved, net = network_record(iDDPMPrecond, DhariwalUNet, ADM, {"C_1": 0.001, "C_2": 0.008, "M": 1000})
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
    convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    levels = []
    monkeypatch.setattr("tdkern.cli.generate.sample", lambda net, network, seeds, sigmas, **_: levels.extend(sigmas.tolist()) or torch.zeros(1, 3, 8, 8).byte())
    result = CliRunner().invoke(main, ["generate", "--network", str(tmp_path / "a.safetensors"), "--grid", str(tmp_path / "a.png"), "--seeds", "0",
                                       "--steps", "5", "--sigma-max", "1e6"])
    assert result.exit_code == 0, result.output
    assert levels[0] == pytest.approx(net.sigma_max) and levels[-1] == 0 and all(level in net.u.tolist() for level in levels)


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
    assert "ema of a.pkl, Precond(SongUNet), which tdkern has not, so its tensors under their own names: " in done and done.endswith("left out: encoder")
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in net.state_dict().items()) and metadata(tmp_path / "a.safetensors")["network"] is None
    with pytest.raises(CheckpointError, match=r"a.safetensors: holds tensors, and no network that tdkern has"):
        load_converted(tmp_path / "a.safetensors")


def test_a_network_with_other_tensors_is_refused(tmp_path, persistence):
    saved, _ = network_record(EDMPrecond, SongUNet, SONG, {"sigma_data": 0.5})
    saved.record["state"]["_modules"]["model"].record["state"]["_init_kwargs"] = SONG | {"model_channels": 4}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
    with pytest.raises(CheckpointError, match=r"a.pkl: does not match the network: model.dec.* must be \[.*\], got \[.*\]"):
        convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    for wrong in ({"num_blocks": 10**9}, {"unknown": 1}, {"a\nb": 1}, {"img_resolution": 16}, {"in_channels": 4}, {"label_dim": 3}, {"dropout": "0.1"},
                  {"model_channels": 10**30}, {"channel_mult": "x"}, {"channel_mult": 7}):
        saved.record["state"]["_modules"]["model"].record["state"]["_init_kwargs"] = SONG | wrong
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
        with pytest.raises(CheckpointError, match=r"a.pkl: does not describe a network of tdkern .*\)$"):
            convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    saved, _ = network_record(EDMPrecond, SongUNet, SONG, {"sigma_data": 0.5})
    saved.record["state"]["_modules"]["model"].record["state"]["_init_kwargs"] = SONG | {"attn_resolutions": [4] * 101}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
    with pytest.raises(CheckpointError, match=r"a.pkl: does not describe a network of tdkern .*a list of more than 100 numbers"):
        convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    saved.record["state"]["_modules"]["model"].record["state"]["_init_kwargs"] = SONG | dict.fromkeys("abcdefghijklmnopqrstuvwxyz", [0] * 50_000)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
    with pytest.raises(PickleError, match=r"a.pkl: refused: it has more than 1,000,000 operations"):
        convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    saved, _ = network_record(EDMPrecond, SongUNet, SONG, {"sigma_data": 0.5})
    saved.record["state"]["sigma_data"] = "0.5"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
    with pytest.raises(CheckpointError, match=r"a.pkl: does not describe a network of tdkern .*an argument of its preconditioning is not a number"):
        convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    saved, _ = network_record(iDDPMPrecond, DhariwalUNet, ADM, {"M": 10})
    saved.record["state"]["M"] = 10**12
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": saved}))
    with pytest.raises(CheckpointError, match=r"a.pkl: does not describe a network of tdkern .*more times than a million"):
        convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pkl"]


# --- state dicts


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_state_dict(tmp_path, form):
    torch.manual_seed(0)
    tied = torch.randn(4)
    state = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()  # has int64, and attributes beside its items
    state |= {"transposed": torch.randn(3, 5).T, "view": torch.randn(10)[3:7:2], "bf16": torch.randn(3).bfloat16(), "half": torch.randn(3).half(),
              "empty": torch.zeros(0, 3), "flag": torch.tensor(True), "tied.a": tied, "tied.b": tied, "weight": torch.nn.Parameter(torch.randn(2))}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=form == "zip")
    done = convert(tmp_path / "model.pt", tmp_path / "model.safetensors")
    assert done.endswith(f"the tensors of model.pt under their own names: {len(state)} tensors, {sum(map(torch.numel, state.values())):,} numbers; "
                         "left out: 0 entries that are no tensors")
    got = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert got.keys() == state.keys()
    for name, tensor in torch.load(tmp_path / "model.pt", weights_only=True).items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor.detach()), name


def test_nested_state_dicts(tmp_path):
    tensors = {"net": {"a.weight": torch.ones(2)}, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}, "step": 7}
    torch.save(tensors, tmp_path / "training-state-1.pt")
    done = convert(tmp_path / "training-state-1.pt", tmp_path / "a.safetensors")
    assert done.endswith("left out: 2 entries that are no tensors")
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {name: tensor.tolist() for name, tensor in got.items()} == {"net.a.weight": [1, 1], "optimizer.state.0.step": 3}


@pytest.mark.parametrize("pipeline", [False, True])
def test_diffusers(tmp_path, pipeline):
    folder = tmp_path / "ddpm" / ("unet" if pipeline else "")
    folder.mkdir(parents=True)
    config = {"_class_name": "UNet2DModel", "sample_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({"conv_in.weight": torch.ones(2, 3)}, folder / "diffusion_pytorch_model.safetensors")
    done = convert(tmp_path / "ddpm", tmp_path / "a.safetensors")
    assert "UNet2DModel of ddpm, which tdkern has not, so its tensors under their own names and its config: 1 tensors, 6 numbers" in done
    assert metadata(tmp_path / "a.safetensors") == {"format": 1, "network": None, "source": "ddpm", "diffusers": config}
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"ddpm: no diffusers folder with config.json and diffusion_pytorch_model.safetensors"):
        convert(tmp_path / "ddpm", tmp_path / "b.safetensors")


# --- what a user may do wrong


def test_destination(tmp_path):
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"convert: DST must not be there yet, got .*mine.safetensors; remove it"):
        convert(SNAPSHOT, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"convert: DST must end in .safetensors, got .*model.pt"):
        convert(SNAPSHOT, tmp_path / "model.pt")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mine.safetensors", "mine")]


def test_sources_without_a_network(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(PickleError, match=r"empty: refused: it is damaged"):
        convert(tmp_path / "empty", tmp_path / "a.safetensors")
    with pytest.raises(PickleError, match=r"absent: cannot be read"):
        convert(tmp_path / "absent", tmp_path / "a.safetensors")
    for value in ({"step": 3}, [torch.ones(2)]):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"a.pt: no tensors in it; give a file that holds a network"):
            convert(tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_loading_other_files(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"a.safetensors: not a file of tdkern convert"):
        load_converted(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"a.safetensors: not a file of tdkern convert \(KeyError: 'tdkern'\)"):
        load_converted(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"tdkern": json.dumps({"format": 2, "network": None})})
    with pytest.raises(CheckpointError, match=r"a.safetensors: in format 2; this tdkern reads format 1"):
        load_converted(path)
    for network in ({"class": "EDMPrecond"}, [1], 3):
        safetensors.torch.save_file({"a": torch.ones(1)}, path, {"tdkern": json.dumps({"format": 1, "network": network})})
        with pytest.raises(CheckpointError, match=r"a.safetensors: does not describe a network of tdkern"):
            load_converted(path)


def test_command_line(tmp_path):
    def run(*args):
        return CliRunner().invoke(main, list(map(str, args)))

    model = tmp_path / "model.safetensors"
    result = run("convert", SNAPSHOT, model)
    assert result.exit_code == 0 and "EDMPrecond(SongUNet), 8 pixels, 4 classes" in result.output
    result = run("convert", SNAPSHOT, model)
    assert result.exit_code == 1 and result.output.startswith("Error: convert: DST must not be there yet")
    result = run("generate", "--network", model, "--outdir", tmp_path / "images", "--seeds", "5", "--steps", "2", "--class", "3")
    assert result.exit_code == 0, result.output
    assert os.listdir(tmp_path / "images") == ["000005.png"]
    assert load_network(model)[1]["network"]["label_dim"] == 4


# --- hostile files


class Evil:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def storage_bytes(obj):
    """`obj` in the place of a storage that torch.save wrote into a pickle."""
    stream = io.BytesIO()
    torch.save(obj, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def opcodes(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


def glob(name):
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage_from(data):
    """The call that reads a storage from bytes."""
    return glob("torch.storage._load_from_bytes") + b"B" + struct.pack("<I", len(data)) + data + b"\x85R"


def tensor_of(numel, size, stride, offset=b"K\x00", count=None):
    """A pickle {"a": tensor} with a storage of `numel` float32 that says it has `count`, viewed with `size` and `stride`."""
    data = storage_bytes(torch.zeros(numel)._typed_storage())
    if count is not None:
        head, tail = data.rsplit(b"K" + bytes([numel]), 1)
        data = head + b"\x8a\x08" + struct.pack("<q", count) + tail[:-8 - 4 * numel] + struct.pack("<q", count) + tail[-4 * numel:]
    pack = [b"\x8a\x08" + struct.pack("<q", n) for n in (*size, *stride)]
    sizes, strides = (b"(" + b"".join(part) + b"t" for part in (pack[:len(size)], pack[len(size):]))
    return opcodes(b"}", text("a"), glob("torch._utils._rebuild_tensor_v2"), b"(", storage_from(data), offset, sizes, strides, b"\x89Nt", b"Rs")


def module(children, parameters=b"}", more=b""):
    """The record of a module of no class of EDM's, from the pickles of its dicts."""
    state = b"}" + text("_parameters") + parameters + b"s" + text("_buffers") + b"}s" + text("_modules") + children + b"s" + more
    record = glob("torch_utils.persistence._reconstruct_persistent_obj")
    return record + b"}" + text("class_name") + text("A") + b"s" + text("state") + state + b"s\x85R"


def nested_modules(levels):
    """Modules each of which holds the next one twice: 2^levels paths."""
    inner = module(b"}")
    for _ in range(levels):
        inner = module(b"}" + text("x") + inner + b"q\x00s" + text("y") + b"h\x00s")
    return opcodes(b"}", text("ema"), inner, b"s")


HOSTILE = {
    "os.system": (lambda flag: pickle.dumps({"ema": Evil(os.system, f"touch {flag}")}), r"it names '(posix|nt).system', which no saved network needs"),
    "eval": (lambda flag: pickle.dumps(Evil(eval, f"open({str(flag)!r}, 'w')")), "it names 'builtins.eval'"),
    "exec, protocol 0": (lambda flag: b"cbuiltins\nexec\n(S'1'\ntR.", "it names 'builtins.exec'"),
    "getattr, as of torch": (lambda flag: opcodes(glob("torch.load"), text(str(flag)), b"\x85R"), "it names 'torch.load'"),
    "in an argument": (lambda flag: pickle.dumps(OrderedDict(a=Evil(os.system, f"touch {flag}"))), r"it names '(posix|nt).system'"),
    "in a storage": (lambda flag: opcodes(storage_from(storage_bytes(Evil(os.system, f"touch {flag}")))), r"it names '(posix|nt).system'"),
    "a storage in a storage": (lambda flag: opcodes(storage_from(storage_bytes(torch.zeros(2)._typed_storage()).replace(
        b"ctorch\nFloatStorage\n", b"ctorch.storage\n_load_from_bytes\n"))), "it names 'torch.storage._load_from_bytes'"),
    "a plain pickle as a storage": (lambda flag: opcodes(storage_from(opcodes(b"K\x01"))), "a storage is not as torch.save writes it"),
    "a call of a value": (lambda flag: opcodes(text("eval"), text("1"), b"\x85R"), "a Global should be where a str is"),
    "a name that is no string": (lambda flag: opcodes(b"K\x01K\x02\x93"), "a str should be where a int is"),
    "INST": (lambda flag: b"(S'1'\nios\nsystem\n.", "it has the operation"),
    "OBJ": (lambda flag: opcodes(b"(", glob("collections.OrderedDict"), b"o"), "it has the operation OBJ, which no saved network needs"),
    "EXT1": (lambda flag: opcodes(b"\x82\x01"), "it has the operation EXT1"),
    "DUP": (lambda flag: opcodes(b"]", b"2a" * 10), "it has the operation DUP"),
    "a persistent id": (lambda flag: opcodes(b"K\x01\x85Q"), "it has the operation BINPERSID"),
    "state of a global": (lambda flag: opcodes(glob("collections.OrderedDict"), b"}b"), "a Call should be where a Global is"),
    "underflow": (lambda flag: opcodes(b"\x86"), "it is damaged"),
    "underflow of a mark": (lambda flag: opcodes(b"t"), "it is damaged"),
    "an unknown memo": (lambda flag: opcodes(b"h\x07"), "it is damaged"),
    "nothing": (lambda flag: opcodes(), "it is damaged"),
    "no stop": (lambda flag: b"\x80\x04}", "it is damaged"),
    "an unhashable key": (lambda flag: opcodes(b"}]K\x01s"), "a list is a key"),
    "an odd number of items": (lambda flag: opcodes(b"}(K\x01u"), "it is damaged"),
    "8 EiB of bytes": (lambda flag: b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"x.", "it is damaged"),
    "2 GiB of bytes": (lambda flag: b"\x80\x04B" + struct.pack("<I", 2**31) + b"x.", "it is damaged"),
    "a memo of 2^32": (lambda flag: opcodes(b"]r" + struct.pack("<I", 2**32 - 1)), "no tensors in it"),
    "deep lists": (lambda flag: opcodes(b"]" * 100_000, b"a" * 99_999), "no tensors in it"),
    "deep tuples": (lambda flag: opcodes(b")" + b"\x85" * 150_000), "no tensors in it"),
    "a deep tuple as a key": (lambda flag: opcodes(b"})" + b"\x85" * 150_000 + b"Ns"), "a tuple is a key"),
    "deep dicts": (lambda flag: opcodes((b"}" + text("a")) * 5_000, b"}", b"s" * 5_000), "nested too deep"),
    "a dict in itself": (lambda flag: opcodes(b"}q\x00" + text("a") + b"h\x00s"), "in two places"),
    "2^30 modules": (lambda flag: nested_modules(30), "in two places"),
    "POP": (lambda flag: opcodes(b"N0"), "it has the operation POP"),
    "a tensor of 2^40": (lambda flag: tensor_of(2, [2**40], [0]), "larger than its storage"),
    "a tensor beyond its storage": (lambda flag: tensor_of(2, [2], [2**40]), "it is damaged"),
    "a tensor before its storage": (lambda flag: tensor_of(2, [1], [1], offset=b"J\xff\xff\xff\xff"), "it is damaged"),
    "a negative size": (lambda flag: tensor_of(4, [-1, -2], [1, 1]), "it is damaged"),
    "a size of words": (lambda flag: tensor_of(2, [], []).replace(b"(t(t", b"(J\x00\x00\x00\x40" + text("aaaa") + b"t(t"), "a int should be where a str is"),
    "a storage of 2^50": (lambda flag: tensor_of(2, [1], [1], count=2**50), "what it asks to copy is larger than the file"),
    "the same bytes a thousand times": (lambda flag: opcodes(glob("_codecs.encode"), b"q\x00", text("x" * 10**6), b"q\x01(",
                                                             b"h\x00h\x01\x85R" * 1000, b"t"), "what it asks to copy is larger than the file"),
    "the same set a thousand times": (lambda flag: opcodes(glob("builtins.set"), b"q\x00](" + b"NK\x01" * 10_000 + b"eq\x01(",
                                                           b"h\x00h\x01\x85R" * 1000, b"t"), "it has more than 1,000,000 operations"),
    "integers of one hash": (lambda flag: opcodes(b"}(", *(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(100_000)), b"u"),
                             "a key is an integer beyond 2\\^60"),
    "parameters that two modules share": (lambda flag: opcodes(b"}", text("ema"), module(
        b"}" + text("a") + module(b"}", b"}q\x07") + b"s" + text("b") + module(b"}", b"h\x07") + b"s"), b"s"), "in two places"),
    "a name of a megabyte": (lambda flag: tensor_of(2, [2], [1]).replace(text("a"), text("a" * 10**6)), "a tensor's name is 'aaaa"),
    "a name of two lines": (lambda flag: tensor_of(2, [2], [1]).replace(text("a"), text("a\nb")), r"a tensor's name is 'a\\nb'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, name):
    """Each is refused with one line that names the file, executes nothing, and takes little memory."""
    make, message = HOSTILE[name]
    path, flag = tmp_path / "hostile.pkl", tmp_path / "executed"
    path.write_bytes(make(flag))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as raised:
            convert(path, tmp_path / "a.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(path))
    assert not flag.exists() and os.listdir(tmp_path) == ["hostile.pkl"]
    assert peak < 2**27


def test_the_hostile_pickles_are_what_they_say(tmp_path):
    """The unpickler of Python does execute them: the tests above would see it."""
    flag = tmp_path / "executed"
    pickle.loads(HOSTILE["os.system"][0](flag))
    assert flag.exists()
    flag.unlink()
    pickle.loads(HOSTILE["eval"][0](flag))
    assert flag.exists()
    (tmp_path / "fine.pkl").write_bytes(tensor_of(2, [2], [1]))
    convert(tmp_path / "fine.pkl", tmp_path / "fine.safetensors")
    assert safetensors.torch.load_file(tmp_path / "fine.safetensors")["a"].tolist() == [0, 0]


def test_a_storage_is_read_once(tmp_path, monkeypatch):
    """However many tensors are made of it: a small file could make its reader copy for hours."""
    big = torch.arange(100_000)
    torch.save({str(i): big[i] for i in range(1000)}, tmp_path / "a.pt")
    reads, real = [], zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda archive, info: reads.append(info.filename) or real(archive, info))
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert sorted(reads) == ["a/byteorder", "a/data.pkl", "a/data/0"]
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["7"].item() == 7


def test_operations_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("tdkern.integrations.pickles.MAX_OPERATIONS", 1000)
    storage = storage_from(storage_bytes(torch.zeros(2)._typed_storage())).replace(b"B", b"q\x00B", 1).replace(b"\x85R", b"q\x01\x85R")
    again = b"h\x00h\x01\x85R"  # four operations that make the storage of its bytes once more, which has many
    for made, message in ((b"]" * 990, "no tensors in it"), (b"]" * 1010, "more than 1,000 operations"),
                          (storage + again * 5, "no tensors in it"), (storage + again * 100, "more than 1,000 operations")):
        (tmp_path / "a.pkl").write_bytes(opcodes(made))
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "a.pkl", tmp_path / "a.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda files: files | {"archive/data.pkl": pickle.dumps(Evil(os.system, "exit 1"))}, r"it names '(posix|nt).system'"),
    (lambda files: {name: data for name, data in files.items() if not name.endswith("data/0")}, "it is damaged"),
    (lambda files: {name: data[:4] if name.endswith("data/0") else data for name, data in files.items()}, "it is damaged"),
    (lambda files: {name: b"big" if name.endswith("byteorder") else data for name, data in files.items()}, "not in little-endian order"),
    (lambda files: {"other/file": b""}, "it is damaged"),
])
def test_hostile_zips_are_refused(tmp_path, change, message):
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        files = {"archive/" + name.partition("/")[2]: good.read(name) for name in good.namelist()}
    for name, compression, made in (("stored", zipfile.ZIP_STORED, change(files)), ("bomb", zipfile.ZIP_DEFLATED, files), ("claim", zipfile.ZIP_STORED, files)):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as file:
            for entry, data in made.items():
                file.writestr(entry, data)
            if name == "claim":  # the directory is written on closing
                file.infolist()[0].file_size = file.infolist()[0].compress_size = 2**31
        with pytest.raises(PickleError, match={"stored": message, "bomb": "a zip that torch.save did not write", "claim": "what it asks to copy"}[name]):
            convert(tmp_path / name, tmp_path / "a.safetensors")


def test_tensors_that_share_a_storage_cannot_fill_memory(tmp_path):
    big = torch.zeros(10_000)
    torch.save({str(i): big for i in range(100)}, tmp_path / "a.pt")
    with pytest.raises(PickleError, match="its tensors are larger than the file"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_names_that_collide_are_refused(tmp_path):
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(PickleError, match=r"two tensors are named 'a.b'"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_damaged_snapshots_are_refused(tmp_path):
    """Cut anywhere it is refused; with bytes changed anywhere, it is refused or read, and nothing else."""
    data = SNAPSHOT.read_bytes()
    path = tmp_path / "cut.pkl"
    for length in [1, 2, 11, 500, 1500, 60_000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(PickleError, match=r"cut.pkl: refused: it is damaged"):
            PickleFile(path)
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(15):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 20):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            convert(path, tmp_path / f"{i}.safetensors")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 5
