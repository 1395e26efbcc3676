"""`tdkern bench`, on tiny networks of one's own."""

import importlib
import json
import math
import sys

import pytest
import torch
from matplotlib.image import imread

from helpers.tiny import invoked
from tdkern.benchmark import rounds, steps
from tdkern.benchmark.clock import PARTS, Clock
from tdkern.benchmark.published import edm_loss, td_edm_loss, update_average
from tdkern.benchmark.steps import Setting, steps_of
from tdkern.ema import EMA
from tdkern.losses import EDMLoss, TDEDMLoss
from tdkern.networks import EDMPrecond

module = importlib.import_module("tdkern.cli.bench")
NETWORKS = '''
import torch
from tdkern.networks import EDMPrecond

class Shade(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, c_noise, *labels):
        return (self.slope * x).sin()

class Own(Shade):
    """No network of tdkern's: its denoised image alone."""
    def forward(self, x, sigma, *args, **kwargs):
        return super().forward(x, sigma) / (1 + sigma.reshape(-1, 1, 1, 1))

class Labelled(Own):
    label_dim = 3
    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        assert class_labels.shape == (len(x), 3) and (class_labels.sum(1) == 1).all()
        return super().forward(x, sigma) + class_labels.mean()

class Makers:
    @staticmethod
    def edm():
        return EDMPrecond(Shade())

class Frozen(Own):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

class Tall(Own):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[:, :2]

class Two(Own):
    def forward(self, *args, **kwargs):
        return (super().forward(*args, **kwargs),)

class Fails(Own):
    def forward(self, x, sigma):
        raise RuntimeError("first line\\nsecond line")

network = Own()
number = 3

def no_network():
    return 3

def fails():
    raise KeyError("no such file")
'''
ROWS = [
    "without TD",
    "published style",
    "tdkern",
    "AdamEMA",
    "TD at 0.3 < sigma < 5",
    "bfloat16 target",
    "bfloat16 networks",
    "torch.compile",
    "AdamEMA, window, bfloat16 target",
]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    (tmp_path / "their_networks.py").write_text(NETWORKS)
    (tmp_path / "broken_module.py").write_text("import tdkern\nraise OSError('no disk\\nat all')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    # what it compiles is torch's affair, and takes seconds
    monkeypatch.setattr(torch, "compile", lambda module: module)

    def bench(model, *args, code=0):
        args = ("--shape", "3,4,4", "--batch", "4", "--seconds", "0", "--device", "cpu", *args)
        return invoked("bench", "--model", model, *args, code=code)

    yield bench
    sys.modules.pop("their_networks", None)


@pytest.mark.parametrize("name", ["Own", "Labelled", "Makers.edm", "network"])
def test_every_step_is_measured(bench, tmp_path, name):
    output = bench(f"their_networks:{name}", "--outdir", "out").stdout
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (written["shape"], written["batch"], written["device"]) == ([3, 4, 4], 4, "cpu")
    assert [row["name"] for row in written["rows"]] == ROWS
    lines = output.splitlines()
    assert all(part in lines[0] for part in PARTS)
    for row, line in zip(written["rows"], lines[1:], strict=True):
        assert row["rounds"] == rounds.LEAST_ROUNDS and 0 < row["min_ms"] <= row["ms"]
        assert list(row["parts"]) == list(PARTS) and row["parts"]["network forward"] > 0
        assert (row["parts"]["target forward"] > 0) == (row["name"] != "without TD")
        assert row["name"] in line and f"{row['ms']:.3f}" in line
        assert math.isfinite(row["of_first"])
    assert written["rows"][0]["of_first"] == 1
    picture = imread(tmp_path / "out" / "bench.png")
    assert picture.ndim == 3 and picture.std() > 0.05


def test_a_lever_that_cannot_be_had_is_a_line(bench, tmp_path, monkeypatch):
    def compile(module):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", compile)
    output = bench("their_networks:Own", "--outdir", "out").stdout
    (row,) = [
        row
        for row in json.loads((tmp_path / "out/bench.json").read_text())["rows"]
        if "error" in row
    ]
    assert row == {"name": "torch.compile", "error": "RuntimeError: no compiler"}
    assert "torch.compile" in output and "cannot be run here: RuntimeError: no compiler" in output


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "--model must be MODULE:FACTORY, got 'nothing'"),
        (
            "no_such_module:make",
            "no_such_module cannot be imported (ModuleNotFoundError: No module",
        ),
        ("broken_module:make", "broken_module cannot be imported (OSError: no disk)"),
        ("their_networks:nothing", "their_networks has no nothing"),
        ("their_networks:number", "must be a function that makes a network, got int"),
        ("their_networks:no_network", "no_network() must return an nn.Module, got int"),
        ("their_networks:fails", "fails() failed (KeyError: 'no such file')"),
        ("their_networks:Frozen", "the network has no parameter to train"),
        (
            "their_networks:Fails",
            "net(x, sigma) of x [4, 3, 4, 4] failed (RuntimeError: first line",
        ),
        ("their_networks:Tall", "must be the denoised image, of x's shape, got [4, 2, 4, 4]; tdk"),
        ("their_networks:Two", "must be the denoised image, of x's shape, got <class 'tuple'>; "),
    ],
)
def test_a_wrong_network_is_one_line(bench, tmp_path, model, message):
    last = bench(model, code=2 if model == "nothing" else 1).output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and message in last and len(last) < 350
    assert not (tmp_path / "tdkern-bench").exists()


@pytest.mark.parametrize("missing", ["", "build it again"])
def test_it_says_where_there_are_no_kernels(bench, monkeypatch, missing):
    backends = {"cpp": missing, "cuda": "no GPU", "triton": "no GPU"}
    monkeypatch.setattr(module, "info", lambda: {"backends": backends})
    stderr = bench("their_networks:Own", "--no-compile").stderr
    said = "Warning: tdkern's ops are plain PyTorch here (cpp: build it again)" in stderr
    assert said == bool(missing)


def test_compiling_may_be_left_out(bench, tmp_path):
    bench("their_networks:Own", "--no-compile")
    rows = json.loads((tmp_path / "tdkern-bench" / "bench.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [name for name in ROWS if name != "torch.compile"]


def test_a_gpu_that_is_not_there_is_one_line(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = bench("their_networks:Own", "--device", "cuda", code=2).output
    assert "Error: --device cuda: torch finds no GPU here" in refused


@pytest.mark.parametrize("shape", ["3,0,4", "a", "", "3,-4,4"])
def test_a_wrong_shape_is_one_line(bench, shape):
    last = bench("their_networks:Own", "--shape", shape, code=2).output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and "--shape" in last


def test_seconds_bound_the_rounds(monkeypatch):
    """Measuring goes on for as long as was asked, and not for more rounds than are of use."""
    setting = setting_of(EDMPrecond(Shade()))
    plain = steps_of(setting)["without TD"]
    monkeypatch.setattr(rounds, "MOST_ROUNDS", 7)
    told, cpu = [], torch.device("cpu")
    rows = rounds.measure({"a": plain, "b": plain}, cpu, 60.0, told.append)
    assert told == ["a", "b"] and [row["rounds"] for row in rows] == [7, 7]
    rows = rounds.measure({"a": plain, "b": plain}, cpu, 0.0, told.append)
    assert [row["rounds"] for row in rows] == [3, 3]
    with pytest.raises(ZeroDivisionError):
        rounds.measure({"a": lambda: 1 / 0, "b": plain}, cpu, 0.0, told.append)


# ---- what the steps do --------------------------------------------------------------------------


class Shade(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([0.3, 0.5, -0.2]))

    def forward(self, x, c_noise, *labels):
        return (self.slope[:, None, None] * x).sin() + c_noise[:, None, None, None]


def setting_of(net, B=6):
    torch.manual_seed(0)
    return Setting(net, EMA(net), torch.randn(B, 3, 4, 4) / 2)


def test_the_plain_losses_are_tdkerns(monkeypatch):
    """Of the same draws; the target network runs on the samples that have a TD term alone."""
    net, target, asked = EDMPrecond(Shade()), EDMPrecond(Shade()), []
    with torch.no_grad():
        target.model.slope.mul_(0.7)
    setting = setting_of(net, B=64)
    draws, given = [], {}
    real, unit = torch.randn, torch.randn_like

    def recorded(*args, **kwargs):
        draws.append(unit(*args) if isinstance(args[0], torch.Tensor) else real(*args, **kwargs))
        return draws[-1]

    target.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    for loss, plain, names in (
        (EDMLoss(), lambda: edm_loss(net, setting.images, (), 0.5), ("noise",)),
        (
            TDEDMLoss(weight="online", k_idx=9.0),
            lambda: td_edm_loss(net, target, setting.images, (), 0.5, k_idx=9.0),
            ("noise_p", "noise"),
        ),
    ):
        draws.clear()
        monkeypatch.setattr(torch, "randn", recorded)
        monkeypatch.setattr(torch, "randn_like", recorded)
        theirs = plain()
        monkeypatch.setattr(torch, "randn", real)
        monkeypatch.setattr(torch, "randn_like", unit)
        sigma, *noises = draws
        given = dict(zip(names, noises, strict=True))
        batch = loss.pair(setting.images, sigma=(1.2 * sigma - 1.2).exp().double(), **given)
        terms = loss.evaluate(net, target, batch)
        torch.testing.assert_close(theirs, terms.loss, rtol=2e-4, atol=2e-5)
    assert asked[0] == terms.valid.sum() < 64


@pytest.mark.parametrize("name", ROWS)
def test_every_step_trains_the_network_and_moves_its_average(monkeypatch, name):
    monkeypatch.setattr(torch, "compile", lambda module: module)
    monkeypatch.setattr(steps, "LR", 0.1)
    monkeypatch.setattr(steps, "DECAY", 0.5)
    setting = setting_of(EDMPrecond(Shade()))
    net, average = setting.net.model.slope, setting.target.module.model.slope
    first, clock = net.detach().clone(), Clock(torch.device("cpu"))
    step = steps_of(setting)[name]()
    for _ in range(2):
        before = average.clone()
        clock.start()
        step(clock)
        torch.testing.assert_close(average, (before + net) / 2, rtol=1e-5, atol=1e-6)
        assert set(clock.read()) <= set(PARTS) and sum(clock.read().values()) > 0
    assert (net != first).all() and average.requires_grad is False
    assert setting.net.dtype is None and setting.target.module.dtype is None
    assert not setting.net._forward_hooks and not setting.net._forward_pre_hooks


def test_bfloat16_reaches_networks_of_every_kind():
    class Own(Shade):
        def forward(self, x, sigma, *args, **kwargs):
            seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(x, sigma)

    seen, clock = [], Clock(torch.device("cpu"))
    for net, expected in (
        (Own(), [(torch.float32, False), (torch.float32, True)]),
        (EDMPrecond(Own()), [(torch.float32, False), (torch.bfloat16, False)]),
    ):
        seen.clear()
        clock.start()
        steps_of(setting_of(net))["bfloat16 target"]()(clock)
        assert seen == expected


def test_the_plain_average():
    net, average = Shade(), Shade()
    torch.nn.init.zeros_(average.slope)
    update_average(average, net, 0.75)
    torch.testing.assert_close(average.slope, net.slope / 4)
