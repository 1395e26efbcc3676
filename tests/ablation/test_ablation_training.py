"""A job of an ablation: paired draws, the methods' own ways, and the same numbers every time."""

from dataclasses import replace

import pytest
import torch

from tdkern.ablation import training
from tdkern.ablation.costs import measure_costs, memory_of_a_step
from tdkern.ablation.grid import POWER_AVERAGE, STABLE_TARGET, Method, Size, setting_of
from tdkern.ablation.problems import PROBLEMS, Problem
from tdkern.ablation.rivals import WIDTHS
from tdkern.ablation.training import Training, train
from tdkern.demo import FAMILIES
from tdkern.networks import SongUNet

SIZE = Size(steps=3, batch=8)
METHODS = {
    "EDM": Method(),
    "TD": Method(td=True),
    "k 3": Method(td=True, loss={"k_idx": 3.0}),
    "shared": Method(td=True, loss={"coupling": "shared"}),
    "window": Method(td=True, loss={"td_sigma": [0.3, 5.0], "td_share": "window"}),
}
RIVALS = {
    "stable target": Method(rival=STABLE_TARGET),
    "TD, stable target": Method(td=True, rival=STABLE_TARGET),
    "TD, power average": Method(td=True, rival=POWER_AVERAGE),
}
HALVES = {
    "fp32": Method(td=True),
    "bf16 target": Method(td=True, target_precision="bf16"),
    "bf16": Method(td=True, precision="bf16"),
}


class Pixels(Problem):
    """Images without a known denoiser, with classes, and a U-Net."""

    name = "pixels"
    image_shape = (3, 8, 8)
    label_dim = 3

    def sample(self, n, generator):
        images = torch.rand(n, *self.image_shape, generator=generator) - 0.5
        return images, torch.eye(3)[torch.randint(3, (n,), generator=generator)]

    def denoise(self, x, sigma, labels=None):
        raise AssertionError("not known")

    def network(self):
        return SongUNet(
            8, 3, 3, label_dim=3, model_channels=8, channel_mult=[1], num_blocks=1, dropout=0.0
        )


class QuickMeasures:
    """In place of `Measures`."""

    def __init__(self, problem, seed):
        self.problem = problem

    def errors(self, net):
        images, labels = self.problem.sample(4, torch.Generator().manual_seed(0))
        denoised = net(images + 1.0, torch.ones(4), labels)
        return {"error/all": (denoised - images).square().mean().item()}

    def __call__(self, net):
        return self.errors(net)


@pytest.fixture(autouse=True)
def quick_measures(monkeypatch):
    """On one thread, as jobs are."""
    monkeypatch.setattr(training, "Measures", QuickMeasures)
    training.measures_of.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    training.measures_of.cache_clear()


def setting(method, problem="mixture", size=SIZE):
    return setting_of(method, problem, size)


def nothing(share):
    pass


def test_all_methods_have_the_same_start_and_the_same_noisy_data():
    runs = {name: Training(setting(method), seed=3) for name, method in METHODS.items()}
    first = runs["EDM"]
    for _ in range(20):
        draws = {name: run.draw() for name, run in runs.items()}
        pairs = {name: draw.pair(runs[name].loss) for name, draw in draws.items()}
        for name, pair in pairs.items():
            assert pair.x0.equal(pairs["EDM"].x0) and pair.sigma.equal(pairs["EDM"].sigma)
            torch.testing.assert_close(pair.x_t, pairs["EDM"].x_t, rtol=1e-5, atol=1e-5)
            same_start = zip(runs[name].net.parameters(), first.net.parameters(), strict=True)
            assert all(own.equal(theirs) for own, theirs in same_start)
    other = Training(setting(METHODS["EDM"]), seed=4).draw()
    assert not other.images.equal(Training(setting(METHODS["EDM"]), seed=3).draw().images)


def test_the_pair_is_one_of_a_markov_path():
    """x_t' has its own noise, of variance 1, and x_t what comes on top, independent of it."""
    run = Training(setting(METHODS["TD"], size=Size(steps=1, batch=20_000)), seed=0)
    pair = run.draw().pair(run.loss)
    near, far = pair.levels[:, 2, None, None, None], pair.levels[:, 0, None, None, None]
    first = ((pair.x_tp - pair.x0) / near).flatten()
    on_top = ((pair.x_t - pair.x_tp) / (far**2 - near**2).sqrt()).flatten()
    moments = torch.stack([first, on_top])[:, torch.isfinite(on_top)].cov()
    torch.testing.assert_close(moments, torch.eye(2, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("name", [*METHODS, *RIVALS])
def test_a_job_gives_the_same_numbers_every_time(name):
    given = setting((METHODS | RIVALS)[name])
    lines = [train(given, 0, nothing) for _ in range(2)]
    assert lines[0]["measures"] == lines[1]["measures"]
    assert lines[0]["key"] == given.key and lines[0]["seed"] == 0 and lines[0]["skipped"] == 0
    assert train(given, 1, nothing)["measures"] != lines[0]["measures"]
    if "power" in name:
        assert lines[0]["width"] in WIDTHS


def test_a_rival_changes_the_numbers_and_so_does_td():
    longer = Size(steps=30, batch=8)  # of few steps all averages are the last weights
    numbers = {
        name: train(setting(method, size=longer), 0, nothing)["measures"]["error/all"]
        for name, method in (METHODS | RIVALS).items()
    }
    assert len({*numbers.values()}) == len(numbers)


def test_precisions_and_labels_reach_the_networks(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "pixels", Pixels)
    weights = {}
    for name, method in HALVES.items():
        run = Training(setting(method, "pixels"), seed=0)
        draw = run.draw()
        run.step(draw.pair(run.loss), draw.labels, None, 0)
        weights[name] = torch.cat([param.flatten() for param in run.net.parameters()])
        for labelled in (run.net.model.map_label, run.target.module.model.map_label):
            assert labelled.weight.shape[1] == 3
        assert run.net.model.map_label.weight.grad.any()
    assert weights["fp32"].dtype == torch.float32
    near = [(weights[name] - weights["fp32"]).abs().max().item() for name in HALVES]
    assert near[0] < near[1] <= near[2] <= 2.1 * SIZE.lr  # Adam's first step is lr either way


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"ddim"}))
def test_every_family_trains_with_td_and_without(family):
    """Those of the demo; DDIM is DDPM with other means."""
    for td in (False, True):
        run = Training(setting(Method(family=family, td=td)), seed=0)
        before = [param.clone() for param in run.net.parameters()]
        for step in range(2):
            draw = run.draw()
            run.step(draw.pair(run.loss), draw.labels, None, step)
        moved = [not own.equal(old) for own, old in zip(run.net.parameters(), before, strict=True)]
        assert all(param.isfinite().all() for param in run.net.parameters()) and any(moved)
        assert (
            run.ema.module.training is False and (run.target is not None) == run.setting.has_target
        )


def test_what_diverged_is_an_error(monkeypatch):
    monkeypatch.setattr(QuickMeasures, "errors", lambda self, net: {"error/all": float("nan")})
    with pytest.raises(FloatingPointError, match="diverged: error/all is not finite"):
        train(setting(Method()), 0, nothing)


def test_costs_are_measured_side_by_side(monkeypatch):
    monkeypatch.setattr("tdkern.ablation.costs.SECONDS", 0.0)
    settings = {name: setting(METHODS[name]) for name in ("EDM", "TD")}
    settings["broken"] = replace(settings["TD"], rival="none such")
    shares = []
    line = measure_costs(settings, shares.append)
    first, second, third = (line["costs"][each.step_key] for each in settings.values())
    assert line["baseline"] == settings["EDM"].step_key and shares[-1] == 1.0
    assert first["of_baseline"] == 1.0 and second["of_baseline"] > 1.0
    assert min(first["ms"], first["memory_mib"]) > 0 and "error" not in third


def test_memory_is_what_the_tensors_take():
    """Of a target network: one more of the network's parameters, and the batch of its forward."""
    run = Training(setting(METHODS["TD"]), seed=0)
    weights = sum(param.numel() for param in run.net.parameters()) * 4 / 2**20
    without, with_td = (memory_of_a_step(setting(METHODS[name])) for name in ("EDM", "TD"))
    assert 5 * weights < without < 7 * weights  # with an average, gradients and two moments
    assert 0.9 * weights < with_td - without < 2 * weights
