"""EDM's and the published loop: the losses by their calls, the target, the sampler."""

import copy
import pickle
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.examples import example, lines_changed, same_tensors
from tdkern.ema import EMA, target_decay
from tdkern.integrations import attach_target, convert, edm
from tdkern.integrations.edm import TDLoss, edm_sampler
from tdkern.integrations.published import SETTINGS, TARGET_DECAY, published_loss
from tdkern.integrations.published import TDLoss as PublishedTDLoss
from tdkern.losses import TDEDMLoss
from tdkern.networks import EDMPrecond, iDDPMPrecond, unet
from tdkern.optim import AdamEMA, RAdamEMA
from tdkern.schedules import EDM
from tdkern.training import load_network


def tiny(label_dim=0, precond=EDMPrecond):
    torch.manual_seed(0)
    net = precond(unet("ddpmpp", 8, 3, label_dim, cbase=4, cres=[1], dropout=0.0))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def gradient_of(net):
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    net.zero_grad()
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_the_example_runs_saves_and_resumes(tmp_path):
    """What it writes converts, and a resumed run goes on with the target that was saved."""
    loop = example("edm_loop")
    torch.manual_seed(0)
    loop.train(tmp_path)
    saved = torch.load(tmp_path / "training-state-000000.pt", weights_only=False)
    state = saved["optimizer_state"]["tdkern_target"]
    assert state["step"] == 4
    assert "ema of" in convert(
        tmp_path / "network-snapshot-000000.pkl", tmp_path / "model.safetensors"
    )
    load_network(tmp_path / "model.safetensors")
    (tmp_path / "again").mkdir()
    loop.train(tmp_path / "again", 0, resume_state_dump=tmp_path / "training-state-000000.pt")
    again = torch.load(tmp_path / "again/training-state-000000.pt", weights_only=False)
    resumed = again["optimizer_state"]["tdkern_target"]
    assert resumed["step"] == 4 and same_tensors(resumed["module"], state["module"])
    assert not same_tensors(resumed["module"], saved["net"])  # a target, and no copy


def test_lines_changed():
    assert lines_changed("edm_loop") == 3 and lines_changed("published_loop") == 3


def test_the_gradient_is_edms_by_edms_own_line():
    """The sum over elements, over the batch: that of `gradient_scale`; EDM's mean is reported."""
    net, images = tiny(2), torch.rand(4, 3, 8, 8) * 2 - 1
    labels = torch.eye(2)[torch.tensor([0, 1, 1, 0])]
    loss_fn = TDLoss(sigma_data=0.5, decay=0.9)
    loss_fn.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    torch.manual_seed(1)
    loss = loss_fn(net=net, images=images, labels=labels, augment_pipe=None)
    assert loss.shape == images.shape
    loss.sum().mul(1 / 4).backward()
    ours = gradient_of(net)
    torch.manual_seed(1)
    plain = TDEDMLoss()(net, loss_fn.target, images, labels, gradient_scale=images[0].numel() / 4)
    plain.sum().backward()
    torch.testing.assert_close(ours, gradient_of(net))
    torch.testing.assert_close(loss.mean(), plain.mean() * 4 / images[0].numel())


def test_a_loss_without_a_target_says_what_to_do():
    loss_fn, net = TDLoss(), tiny()
    with pytest.raises(
        ValueError, match=r"TDLoss: it has no target network yet; call attach\(net, optimizer\)"
    ):
        loss_fn(net=net, images=torch.rand(2, 3, 8, 8))
    loss_fn.attach(net, torch.optim.Adam(net.parameters()))
    again = pickle.loads(pickle.dumps(loss_fn))  # as into EDM's snapshots
    assert again.target is None and again.loss == loss_fn.loss
    assert len(pickle.dumps(loss_fn)) < 2000


@pytest.mark.parametrize("name", ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_networks_by_edms_arguments(name):
    """As its loop constructs them: by `class_name` and the arguments that train.py passes."""
    interface = {"img_resolution": 8, "img_channels": 3, "label_dim": 2}
    passed = {"model_channels": 4, "channel_mult": [1], "dropout": 0.13, "use_fp16": False}
    song = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
    net = getattr(edm, name)(**interface, model_type="SongUNet", **passed, **song)
    assert type(net).__name__ == name and net.model.num_blocks == 4
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 3, 2)
    assert net.model.out_channels == (6 if name == "iDDPMPrecond" else 3)
    assert net(torch.randn(2, 3, 8, 8), 1.0, torch.eye(2)).shape == (2, 3, 8, 8)
    half = getattr(edm, name)(**interface, **passed | {"use_fp16": True})
    assert half.dtype == torch.float16
    default = "SongUNet" if name in ("VPPrecond", "VEPrecond") else "DhariwalUNet"
    assert type(half.model).__name__ == default
    with pytest.raises(ValueError, match=f"{name}: model_type must be SongUNet or Dhariwal.*'MLP'"):
        getattr(edm, name)(**interface, model_type="MLP")
    with pytest.raises(TypeError, match="unknown"):
        getattr(edm, name)(**interface, unknown=1)


def test_settings_of_a_network_by_edms_arguments():
    net = edm.EDMPrecond(8, 3, sigma_data=0.6, sigma_max=50.0, model_channels=4, channel_mult=[1])
    assert (net.sigma_data, net.sigma_min, net.sigma_max) == (0.6, 0.0, 50.0)


# --- the target


def test_the_target_follows_each_step_that_is_made():
    net = tiny()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss_fn, by_hand = TDLoss(), EMA(net)
    loss_fn.attach(net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    made = 0
    for step in range(5):
        loss = loss_fn(net=net, images=torch.rand(2, 3, 8, 8)).mean()
        scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 2:  # GradScaler leaves that step out
            by_hand.update(net, target_decay(0.999, made))
            made += 1
    assert same_tensors(loss_fn.target.module, by_hand.module)
    assert optimizer.state_dict()["tdkern_target"]["step"] == 4


OPTIMIZERS = {
    "AdamEMA": (AdamEMA, {}),
    "RAdamEMA": (RAdamEMA, {}),
    "AdamEMA with the scale": (AdamEMA, {"takes_grad_scale": True}),
    "fused Adam": (torch.optim.Adam, {"fused": True}),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_target_stays_where_the_optimizer_leaves_a_step_out(name, scaled):
    """By itself, as AdamEMA does, or by GradScaler's word, as torch's fused optimizers do; nothing
    is read back for it.
    """
    kind, options = OPTIMIZERS[name]
    if kind is torch.optim.Adam and not scaled:
        return  # which looks at no gradient
    net = tiny()
    optimizer = kind(net.parameters(), lr=0.1, **options)
    target = attach_target(net, optimizer, decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    for step in range(4):
        expected, before = copy.deepcopy(target), copy.deepcopy(target.module)
        loss = TDEDMLoss()(net, target, torch.rand(2, 3, 8, 8)).mean()
        scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
        with NothingRead() if not scaled or options else nullcontext():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        expected.update(net, 0.5)
        assert same_tensors(target.module, before) == (step == 2)
        assert step == 2 or same_tensors(target.module, expected.module)


class NothingRead(TorchDispatchMode):
    """Refuses to hand a tensor's number to Python, which would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_two_averages_of_one_optimizer_need_two_names():
    """Its state holds one of a name: the other would be lost, and load what is not its own."""
    net = tiny()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    averages = attach_target(net, optimizer), attach_target(net, optimizer, decay=0.9, name="ema")
    with pytest.raises(ValueError, match="has a target 'target' already"):
        attach_target(net, optimizer)
    net(torch.rand(1, 3, 8, 8), 1.0).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    again = attach_target(net, other), attach_target(net, other, decay=0.9, name="ema")
    other.load_state_dict(state)
    assert all(map(same_tensors, again, averages))


def test_a_state_without_a_target_warns_and_begins_with_a_copy():
    net, other = tiny(), tiny()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    state = torch.optim.SGD(net.parameters(), lr=0.1).state_dict()
    optimizer, loss_fn = torch.optim.SGD(net.parameters(), lr=0.1), TDLoss()
    loss_fn.attach(net, optimizer)
    net.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="attach_target: the optimizer's state has no tdkern_targ"):
        optimizer.load_state_dict(state)
    assert same_tensors(loss_fn.target.module, net)
    wrong = optimizer.state_dict()
    wrong["tdkern_target"]["module"].pop("model.map_layer0.bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*model.map_layer0.bias"):
        optimizer.load_state_dict(wrong)


def test_a_state_that_is_refused_leaves_the_target_alone():
    """Whichever part of it is refused, and then nothing of the optimizer is replaced either."""
    net = tiny()
    optimizer, loss_fn = AdamEMA(net.parameters(), lr=0.1), TDLoss()
    loss_fn.attach(net, optimizer)
    before = copy.deepcopy(loss_fn.target.module.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    for tensor in state["tdkern_target"]["module"].values():
        tensor.zero_()
    state["param_groups"][0]["lr"] = 0.5
    refused, torn = copy.deepcopy(state), copy.deepcopy(state)
    refused["param_groups"][0]["amsgrad"] = True
    torn["tdkern_target"]["module"].popitem()
    for other, error in ((refused, ValueError), (torn, RuntimeError)):
        with pytest.raises(error):
            optimizer.load_state_dict(other)
        now = loss_fn.target.module.state_dict()
        assert all(torch.equal(now[name], before[name]) for name in before)
        assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not any(tensor.any() for tensor in loss_fn.target.module.state_dict().values())


# --- the published settings


def test_the_published_preset():
    """lambda .5, k 3, delta .2, "online"; decay .999 from the first step; the gradient is EDM's
    over the number of the batch's elements.
    """
    assert {name: asdict(published_loss())[name] for name in SETTINGS} == {
        "lambda_base": 0.5,
        "k_idx": 3.0,
        "one_idx": 0.2,
        "weight": "online",
    }
    net, images = tiny(), torch.rand(4, 3, 8, 8)
    optimizer, by_hand = torch.optim.SGD(net.parameters(), lr=0.1), EMA(net)
    loss_fn = PublishedTDLoss(sigma_data=0.5)
    loss_fn.attach(net, optimizer)
    torch.manual_seed(1)
    loss_fn(net=net, images=images).sum().mul(1 / 4).backward()
    ours = gradient_of(net)
    torch.manual_seed(1)
    per_sample = published_loss()(net, loss_fn.target, images)
    (per_sample.sum() * images[0].numel() / 4).backward()
    torch.testing.assert_close(ours * images.numel(), gradient_of(net))
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        by_hand.update(net, TARGET_DECAY)
    assert TARGET_DECAY == 0.999 and same_tensors(loss_fn.target.module, by_hand.module)


def test_the_published_example_runs():
    net, target = example("published_loop").train(steps=2)
    assert not same_tensors(net, target.module)


# --- the sampler


class Foreign:
    """A network of another program, of EDM's interface and no more."""

    sigma_min, sigma_max = 0.01, 50.0

    def __init__(self, net):
        self.net = net

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        return self.net(x, sigma, class_labels)


def plain_sampler(net, latents, labels, randn_like, steps, churn):
    """Algorithm 2 of arXiv 2206.00364, step by step."""
    S_churn, S_min, S_max, S_noise = churn
    levels = EDM(steps, max(0.002, net.sigma_min), min(80.0, net.sigma_max)).sigmas()[:-1]
    levels = torch.cat([net.round_sigma(levels), levels.new_zeros(1)])
    x = latents.double() * levels[0]
    for sigma, after in pairwise(levels):
        gamma = min(S_churn / steps, 2**0.5 - 1) if S_min <= sigma <= S_max else 0.0
        hat = net.round_sigma(sigma * (1 + gamma))
        x_hat = x + (hat**2 - sigma**2).sqrt() * S_noise * randn_like(x)
        d = (x_hat - net(x_hat, hat, labels).double()) / hat
        x = x_hat + (after - hat) * d
        if after > 0:
            d_after = (x - net(x, after, labels).double()) / after
            x = x_hat + (after - hat) * (d + d_after) / 2
    return x


@pytest.mark.parametrize("churn", [(0.0, 0.0, float("inf"), 1.0), (8.0, 0.05, 20.0, 1.003)])
def test_edm_sampler(churn):
    net = tiny(3).eval()
    latents, labels = torch.randn(2, 3, 8, 8), torch.eye(3)[[2, 0]]
    S_churn, S_min, S_max, S_noise = churn
    options = {"S_churn": S_churn, "S_min": S_min, "S_max": S_max, "S_noise": S_noise}
    unconditional = tiny(precond=iDDPMPrecond).eval()
    for own, given in ((net, labels), (Foreign(net), labels), (unconditional, None)):
        with torch.no_grad():
            torch.manual_seed(2)
            expected = plain_sampler(own, latents, given, torch.randn_like, 5, churn)
            torch.manual_seed(2)
            x = edm_sampler(own, latents, given, num_steps=5, **options)
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
