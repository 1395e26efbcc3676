"""What EDM's users have and what any loop trains, on its way to `tdkern generate` and `fid`."""

import inspect
import json
import pickle
import types

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import tdkern
from helpers.edm import ADM, SONG, network_record
from helpers.tiny import in_two_processes, invoked
from tdkern.ema import EMA
from tdkern.evaluation.fid import Statistics, write_statistics
from tdkern.integrations import PickleError, convert, load_converted
from tdkern.losses import TDEDMLoss
from tdkern.networks import (
    CTPrecond,
    Denoiser,
    DhariwalUNet,
    EDMPrecond,
    SongUNet,
    VEPrecond,
    VPPrecond,
    iDDPMPrecond,
    unet,
)
from tdkern.networks.saved import CheckpointError
from tdkern.schedules import DDPM
from tdkern.training.distributed import leave

NEEDED = ("img_resolution", "in_channels", "out_channels")
WRAPPERS = {
    EDMPrecond: {"sigma_data": 0.5},
    VPPrecond: {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    VEPrecond: {"sigma_min": 0.02, "sigma_max": 100},
    iDDPMPrecond: {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}


def tiny(label_dim=0, **settings):
    """A network of 8 pixels that is not at its initial zeros."""
    torch.manual_seed(0)
    net = EDMPrecond(unet("ddpmpp", 8, 3, label_dim, cbase=4, cres=[1], **settings))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net.eval()


def saved(tmp_path, value, form="pickle"):
    """A file of `value`, as EDM's loop writes a snapshot, or a training state."""
    path = tmp_path / "saved"
    if form == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path)
    return path


def same(tmp_path, path, net, **call):
    """What `convert` says of a file, once its network has been seen to compute what `net` does."""
    done = convert(path, tmp_path / "model.safetensors")
    got, _ = load_converted(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    x = torch.randn(2, 3, 8, 8)
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    assert type(got) is type(net)
    assert torch.equal(got(x, 1.5, labels), net(x, 1.5, labels))
    return done


# --- arguments that a record leaves out


def test_records_without_arguments_have_edms_defaults(tmp_path, persistence):
    """EDM's own train.py never passes num_blocks: each argument in turn, of both U-Nets, whose
    defaults are those of EDM's constructors.
    """
    small = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8}
    small |= {"channel_mult": [1]}
    for model in (SongUNet, DhariwalUNet):
        saved_net, net = network_record(EDMPrecond, model, small, {})
        for name in ("img_resolution", "img_channels", "label_dim"):
            del saved_net.record["state"][name]
        done = same(tmp_path, saved(tmp_path, {"ema": saved_net}), net)
        assert f"EDMPrecond({model.__name__}), 8 pixels, 0 classes" in done
    song, adm = (inspect.signature(model).parameters for model in (SongUNet, DhariwalUNet))
    defaults = {name: p.default for name, p in song.items() if name not in NEEDED}
    assert defaults == {
        "label_dim": 0,
        "augment_dim": 0,
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "dropout": 0.10,
        "label_dropout": 0,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": (1, 1),
    }
    of_adm = {name: p.default for name, p in adm.items() if name not in NEEDED}
    others = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3}
    others |= {"attn_resolutions": (32, 16, 8)}
    assert of_adm == {name: defaults[name] for name in of_adm} | others


@pytest.mark.parametrize("precond", WRAPPERS)
def test_wrappers_without_arguments_have_edms_defaults(tmp_path, persistence, precond):
    saved_net, net = network_record(precond, SongUNet, SONG | {"label_dim": 0}, {})
    same(tmp_path, saved(tmp_path, {"ema": saved_net}), net)
    parameters = inspect.signature(precond).parameters
    assert {name: parameters[name].default for name in WRAPPERS[precond]} == WRAPPERS[precond]


def test_arguments_by_place_and_levels_of_sampling(tmp_path, persistence):
    saved_net, net = network_record(
        EDMPrecond, SongUNet, SONG, {"sigma_min": 0.01, "sigma_max": 50.0}
    )
    state = saved_net.record["state"]["_modules"]["model"].record["state"]
    state["_init_args"], state["_init_kwargs"] = (8, 3, 3), SONG | {}
    for name in NEEDED:
        del state["_init_kwargs"][name]
    path = saved(tmp_path, {"ema": saved_net})
    same(tmp_path, path, net)
    convert(path, tmp_path / "a.safetensors")
    got, _ = load_converted(tmp_path / "a.safetensors")
    assert (got.sigma_min, got.sigma_max) == (0.01, 50.0)
    state["_init_args"] = tuple(range(100))
    with pytest.raises(PickleError, match="was made with arguments that have no names"):
        convert(saved(tmp_path, {"ema": saved_net}), tmp_path / "b.safetensors")


# --- classes that no saved network names


class Own:
    """Someone's own class, of every way in which an object can be pickled."""

    def __init__(self, **state):
        vars(self).update(state)

    def method(self):
        return None


class OwnDict(dict):
    pass


class OwnList(list):
    pass


class NewArguments(Own):
    def __new__(cls, *, name=None):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"name": "x"}


BESIDE = {
    "an object": lambda: Own(a=1, tensor=torch.ones(2)),
    "a loss": lambda: TDEDMLoss(sigma_data=0.5),
    "a class": lambda: Own,
    "a method": lambda: Own(a=2).method,
    "a dict's subclass": lambda: OwnDict({"a": 1}),
    "a list's subclass": lambda: OwnList([1, 2]),
    "new arguments": lambda: NewArguments(),
    "unusual keys": lambda: {(1, 2): 3, 0.5: 1, b"a": 2, frozenset({1}): frozenset({(1, 2)})},
    "a namespace": lambda: types.SimpleNamespace(seed=2**70, device=torch.device("cpu")),
    "a dtype": lambda: [torch.float16, np.random.default_rng(0), slice(1, 2), 1 + 2j],
    "a big number": lambda: 1 << 5000,
}


@pytest.mark.parametrize("form", ["pickle", "zip"])
@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_the_network_is_left_out(tmp_path, persistence, form, name):
    saved_net, net = network_record(EDMPrecond, SongUNet, SONG, {})
    value = {"ema": saved_net, "loss_fn": BESIDE[name](), "dataset_kwargs": {}}
    done = same(tmp_path, saved(tmp_path, value, form), net)
    assert "; left out: loss_fn" in done and done.endswith(", dataset_kwargs")
    state = {"net": saved_net, "optimizer_state": {}, "more": BESIDE[name]()}
    assert "left out: optimizer_state, more" in same(tmp_path, saved(tmp_path, state, form), net)


def test_what_is_left_out_is_named_by_its_class(tmp_path, persistence):
    saved_net, net = network_record(EDMPrecond, SongUNet, SONG, {})
    value = {"ema": saved_net, "loss_fn": TDEDMLoss(), "augment_pipe": None}
    done = same(tmp_path, saved(tmp_path, value), net)
    assert done.endswith("left out: loss_fn (tdkern.losses.edm.TDEDMLoss), augment_pipe")


def test_a_network_of_any_key_comes_before_modules_that_cannot_be_read(tmp_path, persistence):
    saved_net, net = network_record(EDMPrecond, SongUNet, SONG, {})
    critic = Own(_parameters={}, _buffers={}, _modules={})
    done = same(tmp_path, saved(tmp_path, {"critic": critic, "generator": saved_net}), net)
    assert "generator of saved" in done and f"left out: critic ({Own.__module__}.Own)" in done


def test_what_lies_beside_a_state_dict_is_named_too(tmp_path):
    """A training state as most loops save it; tensors in it need names."""
    arguments = types.SimpleNamespace(lr=1e-3)
    state = {"model": tiny().state_dict(), "args": arguments, "epoch": 3, "sizes": {(1, 2): 3}}
    done = convert(saved(tmp_path, state, "zip"), tmp_path / "a.safetensors")
    assert done.endswith("left out: 3 entries that are no tensors: args (types.SimpleNamespace)")
    path = saved(tmp_path, {"model": {(1, 2): torch.ones(1)}}, "zip")
    with pytest.raises(PickleError, match="refused: a tensor's name has a tuple in it"):
        convert(path, tmp_path / "b.safetensors")


def test_an_unknown_class_in_the_network_is_refused_by_name(tmp_path, persistence):
    """As a module of it, a tensor, an argument and a hook; and a network of an unknown class."""
    name = f"{Own.__module__}.Own"

    def refused(change, why=f"it names '{name}', which no saved network needs"):
        saved_net, _ = network_record(EDMPrecond, SongUNet, SONG, {})
        state = saved_net.record["state"]
        model = state["_modules"]["model"].record["state"]
        change(state, model)
        path = saved(tmp_path, {"ema": saved_net})
        with pytest.raises(PickleError, match=why) as raised:
            convert(path, tmp_path / "a.safetensors")
        assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)

    module = Own(_parameters={}, _buffers={}, _modules={})
    refused(lambda state, model: state["_modules"].update(more=module))
    refused(lambda state, model: state["_parameters"].update(more=Own()))
    refused(lambda state, model: model["_init_kwargs"].update(dropout=Own()))
    hooks = {0: Own()}
    why = f"a module of its network has _forward_hooks, '{name}'"
    refused(lambda state, model: model.update(_forward_hooks=hooks), why)

    value = {"ema": Own(_parameters={}, _buffers={}, _modules={})}
    with pytest.raises(PickleError, match=f"it names '{name}', which no saved network needs"):
        convert(saved(tmp_path, value), tmp_path / "a.safetensors")


# --- networks of tdkern's own, and what holds a network


def own_networks():
    """Networks of every wrapper, with arguments that are not the defaults."""
    song, adm = SongUNet(**SONG | {"label_dim": 0}), DhariwalUNet(**ADM)
    betas = DDPM(40, "cosine").alphas_cumprod
    yield EDMPrecond(song, 0.6, dtype=torch.bfloat16)
    yield CTPrecond(song, sigma_max=70.0)
    yield VPPrecond(song, 19.0)
    yield VEPrecond(song, sigma_min=0.03)
    yield iDDPMPrecond(adm, M=300)
    yield Denoiser(song, "v", alphas_cumprod=betas, time_scale=0.5)
    yield Denoiser(song, "velocity", time_scale=1000)


@pytest.mark.parametrize("number", range(7))
def test_networks_of_tdkern_in_snapshots_and_in_files_of_their_own(tmp_path, number):
    net = list(own_networks())[number]
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    tdkern.save_network(net, tmp_path / "own.safetensors")
    loaded, meta = tdkern.load_network(tmp_path / "own.safetensors")
    assert meta["network"]["precision"] == ("bf16" if net.dtype else "fp32")
    convert(saved(tmp_path, {"ema": net, "loss_fn": TDEDMLoss()}), tmp_path / "b.safetensors")
    converted, also = tdkern.load_network(tmp_path / "b.safetensors")
    assert also["network"] == meta["network"]
    net.dtype, x = None, torch.randn(2, 3, 8, 8)
    expected = net.eval()(x, 1.5)
    assert torch.equal(loaded(x, 1.5), expected) and torch.equal(converted(x, 1.5), expected)
    assert (loaded.sigma_min, loaded.sigma_max) == (net.sigma_min, net.sigma_max)


def wrapped(net):
    """A network inside what loops put around it, or into it."""
    averaged = torch.optim.swa_utils.AveragedModel(net)
    inside = tiny()
    inside.model = torch.compile(inside.model, backend="eager")
    block = tiny()
    block.model.map_layer0 = torch.compile(block.model.map_layer0, backend="eager")
    return {
        "DataParallel": nn.DataParallel(net),
        "torch.compile": torch.compile(net, backend="eager"),
        "both": torch.compile(nn.DataParallel(net), backend="eager"),
        "EMA": EMA(net),
        "AveragedModel": averaged,
        "its U-Net compiled": inside,
        "a layer compiled": block,
    }


@pytest.mark.parametrize("name", wrapped(tiny()))
def test_networks_inside_wrappers(tmp_path, name):
    net = tiny()
    inside = wrapped(net)[name]
    tdkern.save_network(inside, tmp_path / "a.safetensors")
    loaded, _ = tdkern.load_network(tmp_path / "a.safetensors")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x, 1.5), net(x, 1.5))
    same(tmp_path, saved(tmp_path, {"net": inside}, "zip"), net)


def _save_from_two(rank, folder):
    """DistributedDataParallel, and fully_shard, whose parts are gathered."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    net = tiny()
    inside = nn.parallel.DistributedDataParallel(net)
    tdkern.save_network(inside, folder / f"ddp{rank}.safetensors")
    torch.save({"net": inside}, folder / f"ddp{rank}.pt")
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    tdkern.save_network(net, folder / "fsdp.safetensors")
    leave()


def test_networks_under_distributed_wrappers(tmp_path):
    in_two_processes(_save_from_two, tmp_path)
    net, x = tiny(), torch.randn(2, 3, 8, 8)
    for name in ("ddp0", "fsdp"):
        loaded, _ = tdkern.load_network(tmp_path / f"{name}.safetensors")
        assert torch.equal(loaded(x, 1.5), net(x, 1.5))
    same(tmp_path, tmp_path / "ddp1.pt", net)


def test_prefixes_of_state_dicts(tmp_path):
    """A state dict has the names that it has outside the wrappers, at any depth of the file."""
    tensors = tiny().state_dict()
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module."):
        torch.save({f"{prefix}{name}": value for name, value in tensors.items()}, tmp_path / "a")
        convert(tmp_path / "a", tmp_path / "a.safetensors")
        assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == tensors.keys()
        (tmp_path / "a.safetensors").unlink()
    kept = {"module.a": torch.ones(1), "b": torch.ones(1)}  # no wrapper gives such names
    torch.save({"state": kept}, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "a.safetensors")
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == {
        "state.module.a",
        "state.b",
    }


# --- averages as state dicts, and half precision


def test_an_average_that_is_a_state_dict(tmp_path):
    """It is what is wanted, with the network's description: under a wrapper's names, without the
    network's buffers, with entries of its own; and refused where a parameter is missing.
    """
    net = list(own_networks())[4].eval()  # has a buffer, "u"
    average = EMA(net).module
    for parameter in average.parameters():
        nn.init.normal_(parameter, std=0.1)
    tensors = {f"module.{name}": value for name, value in average.state_dict().items()}
    done = same(tmp_path, saved(tmp_path, {"net": net, "ema": tensors}, "zip"), average)
    assert "ema of saved" in done and done.endswith("left out: net")

    fewer = {name: value for name, value in average.state_dict().items() if name != "u"}
    fewer["step"] = torch.tensor(3)
    done = same(tmp_path, saved(tmp_path, {"net": net, "ema": fewer}, "zip"), average)
    assert "; without the ema's step; with net's u: " in done

    missing = {name: v for name, v in fewer.items() if not name.endswith("out_conv.bias")}
    with pytest.raises(
        CheckpointError,
        match=r"saved: its ema does not match the network: model.out_conv.bias must be \[6\], got "
        r"nothing; without its ema, net can be converted",
    ):
        convert(saved(tmp_path, {"net": net, "ema": missing}, "zip"), tmp_path / "b.safetensors")
    done = same(tmp_path, saved(tmp_path, {"net": net, "ema": {"a": torch.ones(1)}}, "zip"), net)
    assert "its ema has no tensor of the network's, and is left out" in done
    assert done.endswith("left out: ema")
    assert "net of saved" in same(tmp_path, saved(tmp_path, {"net": net, "ema": None}), net)


def test_weights_in_half_precision_are_named_and_serve(tmp_path, persistence):
    _, net = network_record(EDMPrecond, SongUNet, SONG, {})
    for dtype in (torch.float16, torch.bfloat16):
        half, _ = network_record(EDMPrecond, SongUNet, SONG, {})
        todo = [half.record["state"]]
        while todo:
            state = todo.pop()
            for name, value in state["_parameters"].items():
                if value is not None:
                    state["_parameters"][name] = value.to(dtype)
            todo += [child.record["state"] for child in state["_modules"].values()]
        halved = EDMPrecond(SongUNet(**SONG)).eval()
        halved.load_state_dict(net.state_dict())
        for parameter in halved.parameters():
            parameter.data = parameter.to(dtype).float()
        done = same(tmp_path, saved(tmp_path, {"ema": half}), halved)
        assert f"; its weights are {str(dtype)[6:]}: " in done


# --- save_network and load_network


def test_a_network_of_any_loop_reaches_generate_and_fid(tmp_path, monkeypatch):
    net = tiny(label_dim=3)
    target = EMA(net)
    tdkern.save_network(target, tmp_path / "model.safetensors")
    images = tmp_path / "images"
    command = ("generate", "--network", tmp_path / "model.safetensors", "--seeds", "0-1")
    invoked(*command, "--steps", "2", "--outdir", images, "--class", "2")
    assert len(list(images.glob("*.png"))) == 2

    class Features:  # in place of Inception
        dim = 6
        name = "inception"
        identity = "inception-v3"

        def __init__(self, *_):
            pass

        def __call__(self, images):
            return images.double().flatten(2)[..., :2].flatten(1)

    monkeypatch.setattr("tdkern.cli.fid.make_detector", Features)
    write_statistics(tmp_path / "ref.npz", Statistics(np.zeros(6), np.eye(6)))
    options = ("--num", "8", "--steps", "2", "--ref", tmp_path / "ref.npz")
    result = invoked("fid", "steps", "--network", tmp_path / "model.safetensors", *options)
    last = json.loads(result.output.strip().splitlines()[-1])
    assert last["results"][0]["steps"] == 2 and last["results"][0]["fid"] > 0


def test_save_network_refuses_tensors_that_load_network_would_not_take(tmp_path):
    path, net = tmp_path / "a.safetensors", tiny()
    nn.utils.parametrizations.weight_norm(net.model.map_layer0)
    with pytest.raises(ValueError, match=r"must have the tensors of a SongUNet .*map_layer0"):
        tdkern.save_network(net, path)
    assert not path.exists()
    nn.utils.parametrize.remove_parametrizations(net.model.map_layer0, "weight")
    tdkern.save_network(net, path)
    tdkern.load_network(path)


def test_save_network_refuses_what_no_file_can_describe(tmp_path):
    path = tmp_path / "a.safetensors"
    for net, got in (
        (nn.Linear(2, 2), "got Linear"),
        (SongUNet(**SONG), "got SongUNet"),
        (Denoiser(nn.Conv2d(3, 3, 1), "velocity"), "got Denoiser around _Called"),
    ):
        with pytest.raises(ValueError, match=rf"save_network: net must be a network of .*{got}$"):
            tdkern.save_network(net, path)
    with pytest.raises(ValueError, match=r"path must end in .safetensors, got .*a.pt"):
        tdkern.save_network(tiny(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"net.dtype must be half precision or None, got .*int8"):
        tdkern.save_network(EDMPrecond(SongUNet(**SONG), dtype=torch.int8), path)

    class OwnUNet(SongUNet):
        def __init__(self, callback):
            super().__init__(**SONG)

    with pytest.raises(ValueError, match="OwnUNet's callback must be plain numbers or text, got"):
        tdkern.save_network(EDMPrecond(OwnUNet(print)), path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path):
    path, net = tmp_path / "a.safetensors", tiny()
    tdkern.save_network(net, path)
    with torch.no_grad():
        next(net.parameters()).add_(1)
    tdkern.save_network(net, path)
    got, x = tdkern.load_network(path)[0], torch.randn(1, 3, 8, 8)
    assert torch.equal(got(x, 1.0), net(x, 1.0)) and list(tmp_path.iterdir()) == [path]


def test_edms_attributes_and_what_a_network_was_made_with():
    net = tiny(label_dim=3)
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 3, 3)
    wrapped_model = EDMPrecond(torch.compile(net.model, backend="eager"))
    assert wrapped_model.label_dim == 3
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(wrapped_model(x, 1.0), net(x, 1.0))  # labels None are zeros
    assert EDMPrecond(net.model, 0.6).init_arguments == {"sigma_data": 0.6}
    assert "save_network" in tdkern.__all__ and "load_network" in tdkern.__all__
    with pytest.raises(AttributeError, match="module 'tdkern' has no attribute 'nothing'"):
        _ = tdkern.nothing
