"""`tdkern train` for consistency training, DDPM and flow matching, with and without TD: options,
steps, resume, samples.
"""

import json
import math
import sys
from dataclasses import asdict

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from helpers.runs import check_same, contents, resume, start, start_and_stop
from helpers.tiny import TINY, by_flag, data_set, options_of, pixels, tdkern_
from tdkern import samplers
from tdkern.ema import consistency_decay
from tdkern.families import FAMILIES, default_sampler, families_with
from tdkern.losses import (
    CTLoss,
    DDPMLoss,
    FlowLoss,
    TDCTLoss,
    TDDDPMLoss,
    TDEDMLoss,
    TDFlowLoss,
    TDVELoss,
    TDVPLoss,
)
from tdkern.losses.ct import lpips
from tdkern.losses.curricula import Exponential, Progressive
from tdkern.networks import Denoiser, DhariwalUNet, SongUNet
from tdkern.schedules import DDPM, EDM, FlowMatching, iDDPM
from tdkern.training import (
    Options,
    Trainer,
    checkpoint,
    formats,
    load_network,
    record,
    sample,
    sampling,
)
from tdkern.training.distributed import this_process

pytestmark = pytest.mark.usefixtures("short_previews")

RUNS = {
    "ct": {"start_scales": 3, "end_scales": 12, "base_weight": "karras", "batch_gpu": 4},
    "ddpm": {"prediction": "v", "beta_schedule": "cosine", "T": 50, "k": 3, "arch": "adm"},
    "iddpm": {"eta": 0.0},
    "flow": {"coupling": "shared", "steps": 9},
}


def image(path):
    return np.array(PIL.Image.open(path)).astype(int)


def batch(trainer, seed=0):
    labels = torch.eye(3)[torch.arange(trainer.options.batch) % 3]
    return torch.from_numpy(
        pixels(trainer.options.batch, seed=seed)
    ), labels if trainer.options.cond else labels[:, :0]


@pytest.mark.parametrize("td", [False, True], ids=["edm", "td"])
@pytest.mark.parametrize("family", RUNS)
def test_a_run(tmp_path, data, monkeypatch, family, td):
    """Killed and resumed it ends in the bits of a run in one go, and images come from its
    snapshot.
    """
    options = options_of(
        data=data,
        duration=56e-6,
        family=family,
        td=td,
        cond=True,
        **TINY | {"lr": 0.02, "augment": 0.5} | RUNS[family],
    )
    straight = start(options, tmp_path / "straight")

    start_and_stop(options, tmp_path / "resumed", monkeypatch)
    torch.rand(10)
    resume(tmp_path / "resumed")
    check_same(contents(tmp_path / "resumed"), contents(straight))

    ticks = [json.loads(line) for line in (straight / "stats.jsonl").read_text().splitlines()]
    assert len(ticks) == 7 and all(
        tick["skipped"] == 0 and math.isfinite(tick["loss"]) and tick["loss"] > 0 for tick in ticks
    )
    assert all(("td" in tick) == td for tick in ticks)
    assert not td or any(tick["valid"] > 0 and tick["td"] > 0 for tick in ticks)
    trainer = Trainer(options, this_process())
    assert trainer.loss.fits(trainer.net)  # the fused path
    net, meta = load_network(straight)
    assert (
        type(net) is type(trainer.net)
        and net.preconditioning == trainer.net.preconditioning
        and meta["network"] == trainer.network
    )
    check_images(straight, tmp_path / "grid.png", net, meta["network"], family)


def check_images(run, grid, net, network, family):
    """`generate` and the run's own preview draw what the family's sampler draws."""
    sampler = "onestep" if family == "ct" else "heun"
    assert default_sampler(net) == sampler
    steps = () if family == "ct" else ("--steps", 3)
    tdkern_("generate", "--network", run, "--grid", grid, "--seeds", "0-3", *steps)
    levels = net.round_sigma(EDM(3, max(0.002, net.sigma_min), min(80, net.sigma_max)).sigmas())
    for path, side, sigmas in (
        (grid, 2, levels),
        (run / "fakes-000000.056.png", 4, record.preview_levels(net)),
    ):
        images = sample(
            net, network, list(range(side**2)), sigmas, sampler=getattr(samplers, sampler)
        )
        tiles = images.unflatten(0, (side, side)).permute(0, 3, 1, 4, 2)
        expected = tiles.reshape(8 * side, 8 * side, 3).int().numpy()
        # A batch of another size may round otherwise.
        assert np.abs(image(path) - expected).max() <= 1
    assert image(grid).std() > 1


def test_networks_know_their_familys_levels(data):
    def net(**changes):
        return Trainer(options_of(data=data, duration=1e-3, **TINY | changes), this_process()).net

    path = DDPM(50, "cosine")
    ddpm = net(family="ddpm", T=50, beta_schedule="cosine", prediction="x0")
    assert ddpm.prediction == "x0"
    for t in (1, 17, 50):  # the network is told t - 1, as in the field
        assert ddpm.input_scaling(path.sigma_hat(torch.tensor([t])))[1].item() == pytest.approx(
            t - 1, abs=1e-6
        )
    # whose embedding is of times up to 1
    fourier = net(family="ddpm", T=50, beta_schedule="cosine", arch="ncsnpp")
    assert fourier.input_scaling(path.sigma_hat(torch.tensor([17])))[1].item() == pytest.approx(
        16 / 50, abs=1e-6
    )
    flow, levels = net(family="flow"), FlowMatching().sigma_hat([0.001, 0.25, 0.999])
    assert flow.input_scaling(levels)[1].tolist() == pytest.approx([1, 250, 999])
    assert torch.equal(net(family="iddpm").u, iDDPM().u)
    assert [net(family="flow", arch=arch).time_scale for arch in ("ncsnpp", "adm")] == [1, 1000]
    consistency = [net(family="ct", arch=arch) for arch in ("ncsnpp", "ddpmpp", "adm")]
    # OpenAI's; EDM's for the Fourier embedding
    assert [model.time_scale for model in consistency] == [
        0.25,
        250,
        250,
    ]
    with torch.no_grad():
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(consistency[1](x, 0.002), x)


def test_consistency_training_follows_its_curriculum(data, monkeypatch):
    """A step's levels and the decay of its target are those of its number: drawn from nothing that
    an earlier step left.
    """
    options = options_of(
        data=data,
        duration=80e-6,
        family="ct",
        td=False,
        **TINY | {"dropout": 0.0, "lr_rampup_kimg": 0.0},
    )
    assert (
        options.start_scales,
        options.end_scales,
        options.total_training_steps,
        options.start_ema,
    ) == (2, 150, 10, 0.9)
    trainer, seen, real = Trainer(options, this_process()), [], CTLoss.pair
    monkeypatch.setattr(
        CTLoss, "pair", lambda self, images: seen.append(self.num_scales) or real(self, images)
    )
    curriculum = Progressive(2, 150, 10)
    for step in (0, 1, 9):
        trainer.step = step
        before = [parameter.clone() for parameter in trainer.target.module.parameters()]
        trainer.train_step(*batch(trainer))
        decay = consistency_decay(0.9, 2, curriculum(step))
        for new, old, parameter in zip(
            trainer.target.module.parameters(), before, trainer.net.parameters(), strict=True
        ):
            torch.testing.assert_close(new, decay * old + (1 - decay) * parameter)
        assert trainer.statistics()["scales"] == curriculum(step)
    assert seen == [curriculum(0), curriculum(1), curriculum(9)] == [2, 48, 144]


def test_a_target_of_decay_0_is_the_network(data):
    options = options_of(
        data=data,
        duration=80e-6,
        family="ct",
        target_ema_mode="fixed",
        start_ema=0.0,
        scale_mode="fixed",
        **TINY | {"lr_rampup_kimg": 0.0},
    )
    trainer = Trainer(options, this_process())
    trainer.train_step(*batch(trainer))
    assert all(
        torch.equal(*pair)
        for pair in zip(trainer.target.module.parameters(), trainer.net.parameters(), strict=True)
    )


def test_a_longer_duration_keeps_the_curriculum():
    options = options_of(data="a", family="ct", duration=1e-3, batch=8)
    assert (
        options.total_training_steps == options.resumed(duration=2e-3).total_training_steps == 125
    )


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"family": "ct"}, TDCTLoss(Progressive(2, 150, 125))),
        ({"family": "ct", "scale_mode": "fixed", "td": False}, CTLoss(40)),
        (
            {
                "family": "ct",
                "scale_mode": "exponential",
                "base_norm": "huber",
                "base_weight": "inverse-step",
                "lognormal": [-1.1, 2.0],
                "td": False,
            },
            CTLoss(
                Exponential(10, 1280, 125),
                base_norm="huber",
                base_weight="inverse-step",
                lognormal=(-1.1, 2.0),
            ),
        ),
        (
            {
                "family": "ct",
                "scale_mode": "progressive",
                "start_scales": 4,
                "end_scales": 20,
                "total_training_steps": 50,
                "base_norm": "l1",
                "lambda_base": 0.1,
                "one_idx": 0.5,
                "coupling": "shared",
                "weight": "online",
            },
            TDCTLoss(
                Progressive(4, 20, 50),
                base_norm="l1",
                lambda_base=0.1,
                one_idx=0.5,
                coupling="shared",
                weight="online",
            ),
        ),
        ({"family": "ddpm"}, TDDDPMLoss()),
        (
            {"family": "ddpm", "td": False, "prediction": "x0", "T": 100},
            DDPMLoss(100, prediction="x0"),
        ),
        (
            {
                "family": "ddpm",
                "k": 5,
                "prediction": "v",
                "beta_schedule": "cosine",
                "eta": 0.5,
                "lambda_base": 1.0,
                "weight": "none",
            },
            TDDDPMLoss(
                k=5, prediction="v", beta_schedule="cosine", eta=0.5, lambda_base=1.0, weight="none"
            ),
        ),
        (
            {"family": "iddpm", "coupling": "shared"},
            TDDDPMLoss(beta_schedule="cosine", coupling="shared"),
        ),
        ({"family": "flow", "td": False}, FlowLoss()),
        (
            {"family": "flow", "steps": 30, "k_idx": 2.0, "one_idx": 0.5, "eta": 0.0},
            TDFlowLoss(steps=30, k_idx=2.0, one_idx=0.5, eta=0.0),
        ),
        ({"family": "vp", "eta": 0.0}, TDVPLoss(eta=0.0)),
    ],
)
def test_losses_of_the_options(changes, expected):
    assert options_of(data="", duration=1e-3, batch=8, **changes).make_loss() == expected


# what the version before these families saved, with every option of the loss changed
BEFORE = {
    "data": "a",
    "cond": False,
    "arch": "ddpmpp",
    "precond": "edm",
    "duration": 200.0,
    "batch": 512,
    "batch_gpu": 512,
    "cbase": None,
    "cres": None,
    "lr": 0.001,
    "lr_rampup_kimg": 10000,
    "lr_decay": "none",
    "ema": 0.5,
    "dropout": 0.13,
    "augment": 0.12,
    "xflip": False,
    "precision": "fp32",
    "loss_type": "td",
    "lambda_edm": 0.25,
    "k_idx": 2.0,
    "one_idx": 0.5,
    "td_coupling": "shared",
    "td_weight": "online",
    "td_sigma": [0.3, 5.0],
    "target_ema_tau": 0.99,
    "target_copy": 7,
    "steps": 20,
    "tick": 50,
    "snap": 50,
    "dump": 50,
    "seed": 0,
    "workers": 1,
    "transfer": None,
    "gpus": 1,
}


def test_options_of_the_version_before_mean_the_same():
    options = Options(**formats.options_of_today(2, dict(BEFORE)))
    saved = asdict(options)
    flat = saved | saved["loss"] | {"loss_type": "td" if options.td else "edm"}
    assert {name: flat[formats.RENAMED.get(name, name)] for name in BEFORE} == BEFORE
    assert options.loss.keys() == FAMILIES["edm"].options.keys() and options.loss["td_share"] == 1
    # that version kept the newest state alone
    assert (saved["keep"], saved["keep_every"]) == (
        1,
        0,
    )
    new = saved.keys() - BEFORE.keys() - {"family", "td", "loss", "keep", "keep_every"}
    # what an option that has come since does where it is not given
    came = {name: saved[name] for name in new if saved[name] is not None}
    flags = ("shard", "compile", "cuda_graph", "bench", "cache", "uncertainty")
    fids = {"fid_every": 0, "fid_num": 50000, "fid_steps": [5, 9, 18]}
    off = dict.fromkeys(flags, False) | fids
    assert came == off | {"optim": "adam", "weight_decay": 0.0, "ls": 1.0}
    assert options.make_loss() == TDEDMLoss(
        lambda_base=0.25,
        k_idx=2.0,
        one_idx=0.5,
        coupling="shared",
        weight="online",
        td_sigma=(0.3, 5.0),
        steps=20,
    )
    older = BEFORE | {"precond": "ve", "td_sigma": None, "one_idx": 1.0}
    assert Options(**formats.options_of_today(2, older)).make_loss() == TDVELoss(
        lambda_base=0.25, k_idx=2.0, coupling="shared", weight="online", steps=20
    )
    new = Options(data="")
    assert (
        new.target_ema_tau,
        new.loss["steps"],
        new.loss["k_idx"],
        new.dropout,
        Options(data="", family="ct").dropout,
    ) == (0.999, 18, 1, 0.13, 0)


OTHER = {
    "td_sigma": [0.1, 1.0],
    "eta": 1.0,
    "k_idx": 1.0,
    "one_idx": 1.0,
    "steps": 18,
    "target_ema_tau": 0.9,
    "target_copy": 3,
    "T": 10,
    "beta_schedule": "linear",
    "prediction": "eps",
    "base_norm": "l2",
    "base_weight": "snr",
    "lognormal": [0.0, 1.0],
    "scale_mode": "fixed",
    "start_scales": 9,
    "end_scales": 9,
    "total_training_steps": 9,
    "target_ema_mode": "fixed",
    "start_ema": 0.5,
}
CT = (
    "base_norm",
    "lognormal",
    "scale_mode",
    "start_scales",
    "end_scales",
    "total_training_steps",
    "target_ema_mode",
    "start_ema",
)
TIMES = ("T", "beta_schedule", "prediction")
REFUSED = {
    "edm": ("eta", *TIMES, *CT),
    "ct": ("td_sigma", "eta", "k_idx", "steps", "target_ema_tau", "target_copy", *TIMES),
    "ddpm": ("td_sigma", "k_idx", "one_idx", "steps", *CT),
    "iddpm": ("td_sigma", "k_idx", "one_idx", "steps", *TIMES, *CT),
    "flow": ("td_sigma", *TIMES, *CT),
    "vp": ("td_sigma", *TIMES, *CT),
    "ve": ("td_sigma", *TIMES, *CT),
}


@pytest.mark.parametrize("family", REFUSED)
def test_an_option_that_does_nothing_is_refused(family):
    refused = []
    for name, value in OTHER.items():
        try:
            options_of(data="", family=family, **{name: value})
        except ValueError as error:
            assert (
                str(error).startswith(f"{name} is for family ")
                and str(error).endswith(f", got family {family}")
                and "\n" not in str(error)
            )
            refused.append(name)
    assert refused == [name for name in OTHER if name in REFUSED[family]]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"scale_mode": "fixed", "end_scales": 9},
            "end_scales is for scale_mode progressive, exponential, got scale_mode fixed",
        ),
        (
            {"scale_mode": "fixed", "total_training_steps": 9},
            "total_training_steps is for scale_mode progressive, exponential, easy, got scale_mode "
            "fixed",
        ),
        (
            {"scale_mode": "no"},
            "scale_mode must be one of fixed, progressive, exponential, easy, got 'no'",
        ),
        ({"target_ema_mode": "no"}, "target_ema_mode must be fixed or adaptive, got 'no'"),
        ({"start_ema": 1.0}, r"start_ema must be in \[0, 1\), got 1.0"),
        ({"start_ema": 0.0}, "start_ema must be above 0 with target_ema_mode adaptive, got 0"),
        ({"start_scales": 0}, "start_scales must be at least 1, got 0"),
        ({"start_scales": 200}, "end_scales must be at least 200, got 150"),
        ({"scale_mode": "fixed", "start_scales": 1}, "steps must be at least 2"),
        (
            {"scale_mode": "exponential", "duration": 1e-6},
            "Exponential: total_steps must be at least 8, got 1",
        ),
        ({"base_norm": "no"}, "base_norm must be one of l2, l1, huber, lpips, got 'no'"),
        ({"lognormal": [0.0, 0.0]}, r"lognormal must be \(P_mean, P_std\) with P_std > 0"),
        (
            {"td_share": 0.5},
            f"td_share is for family {', '.join(families_with('td_share'))}, got family ct",
        ),
        ({"family": "ddpm", "k": 1.5}, "k must be a whole number from 1 to T - 1 = 999, got 1.5"),
        (
            {"family": "ddpm", "k": 10, "T": 10},
            "k must be a whole number from 1 to T - 1 = 9, got 10",
        ),
        ({"family": "ddpm", "prediction": "no"}, "prediction must be one of eps, x0, v, got 'no'"),
        ({"family": "flow", "eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        options_of(**{"data": "", "family": "ct", **changes}).make_loss()


@pytest.mark.parametrize(
    "flags",
    [
        {
            "precond": "ct",
            "loss_norm": "huber",
            "weight_schedule": "truncated-snr",
            "lognormal": [-1.1, 2.0],
            "scale_mode": "exponential",
            "start_scales": 4,
            "end_scales": 64,
            "total_training_steps": 400,
            "target_ema_mode": "fixed",
            "start_ema": 0.5,
            "td_weight": "pairwise",
        },
        {
            "precond": "ddpm",
            "diffusion_steps": 20,
            "noise_schedule": "cosine",
            "prediction": "x0",
            "td_eta": 0.25,
            "k_idx": 2.0,
        },
    ],
    ids=["ct", "ddpm"],
)
def test_flags_are_those_of_consistency_models(tmp_path, data, flags):
    args = ["--cbase", 4, "--cres", 1, "--batch", 8]
    for name, value in flags.items():
        args += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else value]
    output = tdkern_("train", "--dry-run", "--data", data, "--outdir", tmp_path, *args)
    options = by_flag(json.loads(output[: output.index("\n}") + 2]))
    assert {name: options[name] for name in flags} == flags


def test_a_flag_of_another_family_is_refused(tmp_path, data):
    start = ["train", "--dry-run", "--data", data, "--outdir", tmp_path]
    output = tdkern_(*start, "--precond", "flow", "--start_scales", 3, code=1)
    assert output.strip() == "Error: start_scales is for family ct, got family flow"


def test_lpips_is_asked_for_before_training(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "piq", None)
    lpips.cache_clear()
    flags = [
        "train",
        "--dry-run",
        "--outdir",
        tmp_path,
        "--precond",
        "ct",
        "--loss-norm",
        "lpips",
        "--batch",
        8,
        "--cbase",
        4,
        "--cres",
        1,
    ]
    assert (
        "base_norm 'lpips' needs piq"
        in tdkern_(*flags, "--data", data, code=1).strip().splitlines()[-1]
    )
    grey = data_set(tmp_path / "grey.zip", pixels(2, (1, 8, 8)))
    assert (
        tdkern_(*flags, "--data", grey, code=1).strip()
        == "Error: base_norm lpips needs images of 3 channels, got 1"
    )


def test_a_denoisers_unet_is_exported_to_diffusers(tmp_path):
    spec = FAMILIES["flow"].network(FlowLoss(), "adm", 4, 3, 0, cbase=128, cres=[1], dropout=0.1)
    net = spec.build()
    checkpoint.write(
        tmp_path, checkpoint.SNAPSHOT, 8, net.state_dict(), {"network": spec.to_json()}
    )
    assert "to be called with c_in x and c_noise of Denoiser" in tdkern_(
        "convert", "--diffusers", tmp_path, tmp_path / "unet"
    )


@pytest.mark.parametrize("cls", [SongUNet, DhariwalUNet])
def test_a_denoiser_calls_a_unet_as_the_other_wrappers_do(cls):
    """One-hot labels, zeros where there are none, augment labels; the parameters' names; a learned
    variance is left out.
    """
    torch.manual_seed(0)
    unet = cls(
        8, 3, 6, label_dim=2, augment_dim=9, model_channels=4, channel_mult=[1], num_blocks=1
    ).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.3)
    net = Denoiser(unet, "velocity", time_scale=1000.0)
    assert net.state_dict().keys() == {f"model.{name}" for name in unet.state_dict()}
    x = torch.randn(2, 3, 8, 8)
    sigma = torch.tensor([0.5, 3.0])
    labels = torch.eye(2)
    augment = torch.randn(2, 9)
    scaled, t = x / (1 + sigma)[:, None, None, None], 1000 * sigma / (1 + sigma)
    with torch.no_grad():
        for given in ((labels, augment), (None, None), (labels, None)):
            expected = unet(scaled, t, torch.zeros(2, 2) if given[0] is None else labels, given[1])[
                :, :3
            ]
            torch.testing.assert_close(net(x, sigma, *given, raw=True), expected)
        assert net(x, sigma, labels).shape == x.shape


def test_previews_ask_about_levels_that_the_network_knows(data):
    net = Trainer(options_of(data=data, duration=1e-3, family="iddpm", **TINY), this_process()).net
    levels = sampling.preview_levels(net)
    assert (
        len(levels) == 19
        and torch.isin(levels, net.u).all()
        and levels[-1] == 0
        and (levels.diff() < 0).all()
    )


def test_levels_that_are_one_to_the_network(data):
    """A sampler that must descend takes fewer steps; Heun's method takes EDM's."""
    net = Trainer(options_of(data=data, duration=1e-3, family="iddpm", **TINY), this_process()).net
    edms, _ = sampling.sampling_levels(net, "heun", 150)
    assert len(edms) == 151 and (edms.diff() == 0).any()
    for sampler in ("ddim", "ddpm", "dpmpp", "unipc", "multistep"):
        levels, options = sampling.sampling_levels(net, sampler, 150)
        assert len(levels) < 150 and torch.isin(levels, net.u).all()
        # which refuses levels that do not fall
        getattr(samplers, sampler)(lambda x, sigma: 0 * x, torch.zeros(1), levels, **options)
