"""Consistency training with and without TD: golden vectors of the published code, curricula, norms,
and training in 2-D.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import golden_of
from tdkern.ema import EMA, consistency_decay
from tdkern.losses import CTLoss, TDCTLoss, TDEDMLoss
from tdkern.losses.ct import lpips
from tdkern.losses.curricula import Exponential, Progressive
from tdkern.networks import MLP, CTPrecond
from tdkern.ops import td_coef
from tdkern.schedules import EDM

F64 = torch.float64


def error(ours, theirs):
    """The worst sample's relative L2 distance."""
    ours, theirs = (tensor.detach().double().reshape(len(tensor), -1) for tensor in (ours, theirs))
    return ((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-300)).max().item()


class Given(nn.Module):
    """A model whose output is given; remembers what it was called with."""

    def __init__(self, out):
        super().__init__()
        self.out, self.calls = nn.Parameter(out.clone()), []

    def forward(self, x, c_noise, class_labels, augment_labels):
        self.calls.append((x, c_noise))
        return self.out


# ---- golden -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["td_ct_ns10", "td_ct_ns40", "td_ct_ns151"])
def test_golden(name, backend):
    golden = golden_of(name)
    sd, s_min, s_max, rho, lambda_td, one_idx = (
        float(golden[key])
        for key in ("sigma_data", "sigma_min", "sigma_max", "rho", "lambda_td", "one_idx")
    )
    schedule = (int(golden["num_scales"]), sd, s_min, s_max, rho)
    boundary = golden["boundary"].bool()
    x0, noise, index = golden["x0"].double(), golden["noise"].double(), golden["indices"]
    for norm in ("l2", "l1"):
        for weighting in ("uniform", "karras", "snr"):
            for weight, key in (
                ("none", f"{norm}_w0_{weighting}"),
                ("pairwise_x0", f"{norm}_w1_{weighting}"),
            ):
                loss = TDCTLoss(
                    *schedule, norm, weighting, lambda_td, one_idx, weight, backend=backend
                )
                batch = loss.pair(x0, index=index, noise=noise)
                net, target = (
                    CTPrecond(Given(golden[F].double()), sd, s_min, s_max) for F in ("F_t", "F_tp")
                )
                terms = loss.evaluate(net, target, batch)
                terms.loss.mean().backward()
                loss_ct, share = golden[f"loss_ct__{key}"], lambda_td + boundary.double()
                assert error(terms.loss, golden[f"loss__{key}"]) < 1e-12
                assert error(terms.td, golden[f"loss_td__{key}"]) < 1e-12 and torch.equal(
                    terms.valid, ~boundary
                )
                assert error(terms.base, share * loss_ct) < 1e-12
                assert error(net.model.out.grad, golden[f"grad_F_t__{key}"]) < 1e-12
                assert target.model.out.grad is None
                assert len(target.model.calls) == 1, "one target forward a step"

                baseline = CTLoss(*schedule, norm, weighting, backend=backend)
                terms = baseline.evaluate(net, target, baseline.pair(x0, index=index, noise=noise))
                assert (
                    error(terms.loss, loss_ct) < 1e-12
                    and not terms.valid.any()
                    and (terms.td == 0).all()
                )

    for column, key in enumerate(("t", "t_prev", "t2", "t2_prev")):
        assert error(batch.levels[:, column], golden[key]) < 1e-12, key
    assert error(batch.x_t, golden["x_t"]) < 1e-12 and error(batch.x_tp, golden["x_t2"]) < 1e-12
    assert (
        error(batch.coef[:, 4], golden["A_t"]) < 1e-11
        and error(batch.coef[:, 5][~boundary], golden["A_t2"][~boundary]) < 1e-11
    )
    assert error(batch.coef[:, 6][~boundary], golden["w_td"][~boundary]) < 1e-11
    (x, c_noise), (x_p, c_noise_p) = net.model.calls[0], target.model.calls[0]
    assert (
        error(c_noise, golden["net_time_t"]) < 1e-12
        and error(c_noise_p, golden["net_time_t2"]) < 1e-12
    )
    assert error(x, golden["c_in_t"].view(-1, 1, 1, 1) * golden["x_t"]) < 1e-12
    assert error(x_p, golden["c_in_t2"].view(-1, 1, 1, 1) * golden["x_t2"]) < 1e-12
    assert error(net(batch.x_t, batch.levels[:, 0]), golden["f_t"]) < 1e-12


@pytest.mark.parametrize("kind", ["a", "b"])
def test_scalings_and_weightings_golden(kind):
    golden = golden_of("cm_tables")
    sigma = golden["scal_sigma"]
    sd = float(golden[f"scal_{kind}_sigma_data"])
    s_min = float(golden[f"scal_{kind}_sigma_min"])
    net = CTPrecond(nn.Identity(), sd, s_min)
    c_in, c_noise = net.input_scaling(sigma)
    c_skip, c_out = net.preconditioning.skip_scale(sigma)
    assert error(c_noise, golden["net_time"]) < 1e-12
    for ours, name in ((c_skip, "c_skip"), (c_out, "c_out"), (c_in, "c_in")):
        assert error(ours, golden[f"scal_{kind}_boundary_{name}"]) < 1e-12, name
    for weighting in ("snr", "snr+1", "karras", "truncated-snr", "uniform"):
        coef, _ = td_coef(
            sigma,
            precond="ct",
            sigma_data=sd,
            sigma_min=s_min,
            lambda_base=0.0,
            td_sigma=(-1.0, 0.0),
            base_weight=weighting,
        )
        expected = golden[f"weight_{kind}_{weighting.replace('+', '_plus_').replace('-', '_')}"]
        assert error(coef[:, 7], expected) < 1e-12, weighting
        assert error(coef[:, 0], c_skip) < 1e-12 and error(coef[:, 1], c_out) < 1e-12


def test_curricula_golden():
    golden = golden_of("cm_ema_scales")
    for mode in ("fixed_progressive", "adaptive_progressive_a", "adaptive_progressive_b"):
        start_decay, s0, s1, total = (
            golden[f"{mode}_{key}"].item()
            for key in ("start_ema", "start_scales", "end_scales", "total_steps")
        )
        curriculum = Progressive(s0, s1, total)
        steps, scales = golden[f"{mode}_step"].tolist(), golden[f"{mode}_scales"].tolist()
        assert [curriculum(step) for step in steps] == scales, mode
        if mode.startswith("adaptive"):
            assert [
                consistency_decay(start_decay, s0, number) for number in scales
            ] == pytest.approx(golden[f"{mode}_ema"].tolist(), rel=1e-14)


def test_exponential_curriculum():
    """iCT's own example: 10 to 1280 scales in eight spans."""
    curriculum = Exponential(10, 1280, 400_000)
    assert [
        curriculum(step) for step in (0, 49_999, 50_000, 149_999, 349_999, 350_000, 399_999, 10**9)
    ] == [11, 11, 21, 41, 641, 1281, 1281, 1281]
    # K' = floor(9 / (log2 5 + 1)) = 2
    assert [Exponential(10, 50, 9)(step) for step in range(10)] == [
        11,
        11,
        21,
        21,
        41,
        41,
        51,
        51,
        51,
        51,
    ]


# ---- draws, curriculum, norms -------------------------------------------------------------------


def test_at_a_step():
    loss = TDCTLoss(Progressive(2, 150, 1000), base_norm="huber", lambda_base=0.7)
    assert (
        loss.at(0).num_scales == 2
        and loss.at(1000).num_scales == 151
        and loss.at(1000).lambda_base == 0.7
    )
    assert loss.at(0)(CTPrecond(MLP()), CTPrecond(MLP()), torch.zeros(3, 2)).shape == (3,)
    assert (fixed := CTLoss()).at(5) is fixed
    with pytest.raises(
        ValueError,
        match=r"TDCTLoss: num_scales must be a number, got a curriculum: use loss.at\(step\)",
    ):
        loss.pair(torch.zeros(1, 2))


def test_draws():
    """Indices even, or as a log-normal level falls between the schedule's; one noise for both
    states.
    """
    torch.manual_seed(0)
    B, N = 20_000, 12
    images = torch.zeros(B, 2, dtype=F64)
    even, lognormal = CTLoss(N), CTLoss(N, lognormal=(-1.1, 2.0))
    levels = td_coef(torch.arange(N), from_index=True, steps=N)[1][:, 0]
    cdf = torch.special.ndtr((levels.log() + 1.1) / 2.0)
    for loss, p in (
        (even, torch.full((N - 1,), 1 / (N - 1), dtype=F64)),
        (lognormal, -cdf.diff() / (cdf[0] - cdf[-1])),
    ):
        batch = loss.pair(images)
        counts = (batch.levels[:, :1] == levels[:-1]).sum(0)
        assert counts.sum() == B
        assert ((counts - B * p).abs() < 4.5 * (B * p * (1 - p)).sqrt() + 1).all()
        noise = batch.x_t / batch.levels[:, :1]
        assert abs(noise.mean()) < 4 / (2 * B) ** 0.5 and abs(noise.var() - 1) < 4 / B**0.5
        torch.testing.assert_close(batch.x_tp / batch.levels[:, 2:3], noise)


@pytest.mark.parametrize("lognormal", [None, (-1.1, 2.0)])
def test_nothing_waits_for_the_device(lognormal):
    """On the device "meta" there are no values, so whatever asked for one would raise."""
    batch = TDCTLoss(base_weight="inverse-step", lognormal=lognormal).pair(
        torch.zeros(4, 3, device="meta")
    )
    assert batch.coef.device.type == batch.x_t.device.type == "meta" and batch.x_tp.shape == (4, 3)


def test_inverse_step_weighting():
    batch, plain = (
        TDCTLoss(20, base_weight=weighting).pair(torch.zeros(19, 1), index=torch.arange(19))
        for weighting in ("inverse-step", "uniform")
    )
    assert (
        error(batch.coef[:, 7], plain.coef[:, 7] / (batch.levels[:, 0] - batch.levels[:, 2]))
        < 1e-12
    )
    assert torch.equal(batch.coef[:, :7], plain.coef[:, :7])


def networks():
    torch.manual_seed(1)
    nets = [CTPrecond(MLP(12, num_blocks=1), time_scale=0.25).double() for _ in range(2)]
    for net in nets:
        nn.init.normal_(net.model.output.weight)
    return nets


@pytest.mark.parametrize("norm", ["l2", "l1", "huber"])
def test_fused_and_plain_network(norm):
    """A callable that gives D only has the same loss and gradient; n times "huber" is iCT's."""
    net, target = networks()
    loss = TDCTLoss(base_norm=norm)
    batch = loss.pair(torch.randn(8, 12, dtype=F64), index=torch.arange(0, 40, 5))
    results = []
    for online, other in (
        (net, target),
        (lambda *args, **labels: net(*args), lambda *args, **labels: target(*args)),
    ):
        terms = loss.evaluate(online, other, batch)
        results.append((terms.loss, *torch.autograd.grad(terms.loss.sum(), net.parameters())))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-9, atol=1e-12)
    if norm == "huber":
        d = (net(batch.x_t, batch.levels[:, 0]) - target(batch.x_tp, batch.levels[:, 2])).norm(
            dim=1
        )
        c = 0.00054 * 12**0.5
        # none of these indices leaves the schedule
        torch.testing.assert_close(12 * terms.base, 0.5 * ((d**2 + c**2).sqrt() - c))


def test_boundary_condition():
    net, _ = networks()
    x = torch.randn(3, 12, dtype=F64)
    torch.testing.assert_close(net(x, 0.002), x, rtol=1e-12, atol=1e-14)


def test_lpips_through_a_stand_in(monkeypatch):
    """piq is not here: a module of its name with LPIPS's signature. What is tested is what
    surrounds it.
    """
    calls = []

    class LPIPS:
        def __init__(self, replace_pooling, reduction):
            assert replace_pooling and reduction == "none"
            self.mean, self.std, self.weights = torch.zeros(1), torch.ones(1), [torch.ones(1)]

        def __call__(self, x, y):
            calls.append((x, y))
            return (x - y).square().mean((1, 2, 3))

    monkeypatch.setitem(sys.modules, "piq", SimpleNamespace(LPIPS=LPIPS))
    lpips.cache_clear()
    net, target = networks()
    images = torch.rand(4, 3, 2, 2, dtype=F64) * 2 - 1
    flat = [CTPrecond(nn.Sequential(), time_scale=0.25) for _ in range(2)]
    for wrapper, inner in zip(flat, (net, target), strict=True):
        wrapper.model = Flat(inner.model)
    loss, l2 = TDCTLoss(base_norm="lpips", base_weight="snr"), TDCTLoss(base_weight="snr")
    batch = loss.pair(images, index=torch.tensor([3, 20, 30, 38]))
    terms, plain = loss.evaluate(*flat, batch), l2.evaluate(*flat, batch)
    assert torch.equal(terms.td, plain.td) and terms.valid.tolist() == [True, True, True, False]
    with torch.no_grad():
        D, D_p = flat[0](batch.x_t, batch.levels[:, 0]), flat[1](batch.x_tp, batch.levels[:, 2])
    for given, expected in zip(calls[0], (D, D_p), strict=True):
        assert given.shape == (4, 3, 224, 224)
        torch.testing.assert_close(
            given, torch.nn.functional.interpolate((expected + 1) / 2, size=224, mode="bilinear")
        )
    weight = torch.tensor([0.5, 0.5, 0.5, 1.5]) * batch.levels[:, 0] ** -2
    torch.testing.assert_close(
        terms.base, weight * (calls[0][0] - calls[0][1]).square().mean((1, 2, 3))
    )
    assert (
        torch.autograd.grad(terms.base.sum(), net.model.output.weight)[0].abs().sum() > 0
        and not calls[0][1].requires_grad
    )
    monkeypatch.setitem(sys.modules, "piq", None)
    lpips.cache_clear()
    with pytest.raises(
        ImportError,
        match=r"base_norm 'lpips' needs piq and torchvision: `pip install tdkern\[lpips\]`",
    ):
        loss.evaluate(*flat, batch)


def test_lpips_copies_nothing_from_the_host_in_a_step(monkeypatch):
    """piq keeps numbers of its own where it made them, and copies them in every call."""
    made = []

    class LPIPS:
        def __init__(self, replace_pooling, reduction):
            self.mean, self.std, self.weights = torch.zeros(1), torch.ones(1), [torch.ones(1)]
            made.append(self)

        def __call__(self, x, y):
            return (x - y).mean((1, 2, 3))

    monkeypatch.setitem(sys.modules, "piq", SimpleNamespace(LPIPS=LPIPS))
    lpips.cache_clear()
    D = torch.rand(4, 3, 2, 2, device="meta")
    assert lpips()(D, D).shape == (4,)
    kept = (made[0].mean, made[0].std, *made[0].weights)
    assert [each.device.type for each in kept] == ["meta"] * 3
    lpips.cache_clear()


class Flat(nn.Module):
    """A model of points as one of images."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, *args):
        return self.model(x.flatten(1), *args).view(x.shape)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: CTLoss(base_norm="l3"),
            "CTLoss: base_norm must be one of l2, l1, huber, lpips, got 'l3'",
        ),
        (
            lambda: TDCTLoss(base_weight="edm"),
            r"TDCTLoss: base_weight must be one of karras, uniform, snr, snr\+1, truncated-snr, "
            r"inverse-step, min-snr, soft-min-snr, p2, or a callable, got 'edm'",
        ),
        (lambda: CTLoss(huber_c=0.1), "huber_c must be None with base_norm 'l2', got 0.1"),
        (
            lambda: CTLoss(lognormal=(0.0, 0.0)),
            r"CTLoss: lognormal must be \(P_mean, P_std\) with P_std > 0, got \(0.0, 0.0\)",
        ),
        (
            lambda: CTLoss(lognormal=(-50.0, 1.0)),
            r"CTLoss: lognormal must have levels between sigma_min and sigma_max, got \(-50.0, "
            r"1.0\)",
        ),
        (lambda: CTLoss(1), "steps must be at least 2, got 1"),
        (
            lambda: CTLoss(Progressive(), sigma_data=0.0),
            "sigma_data must be a positive number, got 0.0",
        ),
        (
            lambda: TDCTLoss(lambda_base=-1.0),
            "TDCTLoss: lambda_base must be a number >= 0, got -1.0",
        ),
        (lambda: TDCTLoss(coupling="both"), "coupling must be 'markov' or 'shared', got 'both'"),
        (
            lambda: CTLoss().pair(torch.zeros(2, 3), index=torch.zeros(3, dtype=torch.int64)),
            r"CTLoss: index must have shape \[2\], got \[3\]",
        ),
        (
            lambda: CTLoss().pair(torch.zeros(2, 3), index=torch.tensor([0, 39])),
            "CTLoss: index must be from 0 to 38, got values from 0 to 39",
        ),
        (
            lambda: TDCTLoss().pair(torch.zeros(2, 3), index=torch.tensor([-1, 0])),
            "TDCTLoss: index must be from 0 to 38, got values from -1 to 0",
        ),
        (
            lambda: CTLoss()(CTPrecond(MLP()), None, torch.zeros(2, 2)),
            "CTLoss: target_net must be a network, got None",
        ),
        (lambda: Progressive(2, 1), "Progressive: end_scales must be at least 2, got 1"),
        (lambda: Exponential(0), "Exponential: start_scales must be at least 1, got 0"),
        (lambda: Exponential(20, 10), "Exponential: end_scales must be at least 20, got 10"),
        (lambda: Exponential(10, 1280, 7), "Exponential: total_steps must be at least 8, got 7"),
        (
            lambda: consistency_decay(0.0, 2, 10),
            r"consistency_decay: rate must be in \(0, 1\) and num_scales at least 2, got 0.0 and "
            r"10",
        ),
        (
            lambda: consistency_decay(0.9, 2, 1),
            r"consistency_decay: rate must be in \(0, 1\) and num_scales at least 2, got 0.9 and 1",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- what it does -------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["the denoiser", "the consistency function"])
def test_td_target(at):
    """For Gaussian data its slope is off by what the docstring says, by much less from CT's optimum
    than from the denoiser.
    """
    torch.manual_seed(0)
    loss, sd, B = TDCTLoss(), 0.5, 50_000
    power, documented = (1, (13, 22, 26, 25)) if at == "the denoiser" else (0.5, (0, 1, 2, 3))
    optimum = lambda x, sigma, **_: (sd**2 / (sd**2 + sigma.reshape(-1, 1) ** 2)) ** power * x
    for t, rounded in zip((0.5, 1.0, 2.0, 4.0), documented, strict=True):
        batch = loss.pair(sd * torch.randn(B, 1, dtype=F64), index=EDM(40).index(t).expand(B))
        D = optimum(batch.x_t, batch.levels[:, 0]).requires_grad_()
        terms = loss.evaluate(lambda *_, D=D, **__: D, optimum, batch)
        (A, A_p, w_td), t_p = batch.coef[0, 4:7], batch.levels[0, 2]
        to_target = -torch.autograd.grad(terms.td.sum(), D)[0] / (2 * w_td * A**2)
        r, D = A_p / A, D.detach()
        slope = (to_target * D).mean() / (D**2).mean()
        standard_error = (to_target - slope * D).std() / D.std() / B**0.5
        denoiser = sd**2 / (sd**2 + t**2)
        shrink = (sd**2 / (sd**2 + t_p**2)) ** power * (sd**2 + t * t_p) / (sd**2 + t**2)
        expected = ((1 - r) * denoiser + r * shrink) / denoiser**power - 1
        assert abs(100 * expected - rounded) < 0.5 and abs(slope - expected) < 4 * standard_error, t


@pytest.mark.parametrize("family", [CTLoss, TDCTLoss])
def test_one_step_samples_improve_over_training(family):
    """Data of two points, improved consistency training's recipe: the cost of carrying one-step
    samples to the data, early and late.
    """
    torch.manual_seed(0)
    steps = 400
    loss = family(
        Exponential(4, 32, steps),
        base_norm="huber",
        base_weight="inverse-step",
        lognormal=(-1.1, 2.0),
    )
    points = torch.tensor([[0.6, 0.4], [-0.6, -0.4]])
    net = CTPrecond(MLP(width=32, num_blocks=1), time_scale=0.25)
    target, optimizer = EMA(net), torch.optim.Adam(net.parameters(), 3e-3)
    latents = 80 * torch.randn(512, 2)
    costs = []
    for step in range(steps + 1):
        if step in (0, 50, steps):
            with torch.no_grad():
                samples = net(latents, 80.0)
            nearer = (samples @ points[0]).argsort(descending=True)  # half of them to each point
            costs.append(
                (samples[nearer] - points.repeat_interleave(256, 0)).norm(dim=1).mean().item()
            )
        optimizer.zero_grad()
        loss.at(step)(net, target.module, points[torch.randint(2, (128,))]).mean().backward()
        optimizer.step()
        target.update(net, 0.0)
    assert costs[1] < 0.9 * costs[0] and costs[2] < 0.75 * costs[1], costs


@pytest.mark.parametrize("loss", [CTLoss(), TDCTLoss()], ids=lambda loss: type(loss).__name__)
def test_a_loss_is_one_graph(loss):
    """torch.compile takes the draws, both networks and the loss as a whole, TD's options too."""
    torch._dynamo.reset()

    def step(images):
        net = lambda x, sigma, **conditions: x * 0.5
        return loss.evaluate(net, net, loss.pair(images)).loss

    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, traced):
        torch.manual_seed(0)
        results.append(call(torch.linspace(-1, 1, 96).view(2, 3, 4, 4)))
    torch.testing.assert_close(*results)


def test_a_loss_is_made_under_any_default_dtype_and_device():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert CTLoss(base_norm="huber") == CTLoss(base_norm="huber")
            TDCTLoss()
            TDEDMLoss()
    finally:
        torch.set_default_dtype(torch.float32)
