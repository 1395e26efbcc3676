"""The demo: that its comparison is paired, that its words follow from its numbers, and that it
writes what it says.
"""

import dataclasses
import io
import json
from itertools import islice

import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from tdkern.cli import main
from tdkern.demo import (
    FAMILIES,
    STUDY,
    Config,
    conclusion,
    from_json,
    report,
    run_study,
    to_json,
)
from tdkern.demo.families import BANDS, Levels
from tdkern.demo.study import Run, draws, train
from tdkern.demo.tables import Difference
from tdkern.evaluation.mixture import GaussianMixture, denoiser_error
from tdkern.networks import MLP, EDMPrecond

pytestmark = pytest.mark.xdist_group("demo")
RING = GaussianMixture.ring()
METHODS, BUDGETS, LEVELS = STUDY.losses, STUDY.budgets, STUDY.levels
SMALL = Config(seeds=3, iterations=20, compute=1.4, width=16, points=64)


@pytest.fixture(scope="module")
def study():
    return run_study(SMALL)


def test_every_method_gets_the_same_noisy_data():
    noises = []
    for draw in islice(draws(SMALL, RING, STUDY), 50):
        batches = [draw.pair(loss) for loss in METHODS.values()]
        for batch in batches:
            torch.testing.assert_close(batch.x_t, batches[1].x_t, rtol=1e-5, atol=1e-6)
            assert batch.x0 is draw.images and batch.levels[:, 0].equal(draw.level["sigma"])
        assert (
            all(batch.x_tp.equal(batches[1].x_tp) for batch in batches[2:])
            and batches[0].x_tp is None
        )
        noises.append(draw.noise["noise"])
    noise = torch.cat(noises).flatten()  # 4800 numbers
    assert noise.mean().abs() < 0.06 and (noise.std() - 1).abs() < 0.05


def test_draws_are_the_same_at_every_call_and_differ_between_seeds():
    def images(config):
        return torch.cat([draw.images for draw in islice(draws(config, RING, STUDY), 3)])

    assert images(SMALL).equal(images(SMALL))
    assert not images(SMALL).equal(images(dataclasses.replace(SMALL, seed=1)))


@pytest.mark.parametrize("method", ["EDM", "TD"])
def test_a_seed_trains_as_it_would_alone(method):
    """The loss, Adam and the averages keep the models of a batched network apart."""
    torch.manual_seed(0)
    net = EDMPrecond(MLP(2, 16, 2, SMALL.seeds))
    together = Run(SMALL, METHODS[method], net, 20)
    single = EDMPrecond(MLP(2, 16, 2))
    single.load_state_dict({name: tensor[1:2] for name, tensor in net.state_dict().items()})
    alone = Run(dataclasses.replace(SMALL, seeds=1), METHODS[method], single, 20)
    for step, draw in enumerate(islice(draws(SMALL, RING, STUDY), 20)):
        together.step(draw, step)
        part = slice(SMALL.batch, 2 * SMALL.batch)
        alone.step(
            type(draw)(
                draw.images[part],
                *({key: values[part] for key, values in kind.items()} for kind in draw[1:]),
            ),
            step,
        )
    for name, tensor in alone.ema.module.state_dict().items():
        torch.testing.assert_close(
            together.ema.module.state_dict()[name][1:2], tensor, rtol=1e-3, atol=1e-4
        )


def test_methods_start_equal_and_learn():
    config = dataclasses.replace(SMALL, width=64)
    runs = train(config, RING, STUDY, {name: METHODS[name] for name in ("EDM", "TD")}, 300, "test")
    torch.manual_seed(config.seed)
    start = EDMPrecond(MLP(2, config.width, config.num_blocks, config.seeds))
    before = LEVELS.overall(
        denoiser_error(start, RING, Levels.sigma, num_models=config.seeds, n=128)
    )
    for run in runs.values():
        after = LEVELS.overall(
            denoiser_error(run.ema.module, RING, Levels.sigma, num_models=config.seeds, n=128)
        )
        assert (after < 0.8 * before).all()
        assert run.curve_steps[-1] == 300 and run.curve[-1].equal(after)
        assert run.curve[0].gt(run.curve[-1]).all()


def test_levels_fill_the_bands_and_weigh_as_training_does():
    for i, (lo, hi, count) in enumerate(BANDS):
        inside = Levels.sigma[Levels.band == i]
        assert len(inside) == count and lo < inside.min() and inside.max() < hi
    # 32,000
    drawn = torch.cat(
        [
            draw.level["sigma"]
            for draw in islice(draws(dataclasses.replace(SMALL, seeds=100), RING, STUDY), 20)
        ]
    )
    for i, (lo, hi, _) in enumerate(BANDS):
        assert LEVELS.share[Levels.band == i].sum().item() == pytest.approx(
            ((drawn > lo) & (drawn < hi)).double().mean().item(), abs=0.012
        )
    error = torch.arange(1.0, 21.0, dtype=torch.float64).repeat(2, 1)
    assert LEVELS.by_band(error)[0, :2].tolist() == pytest.approx([3.5, 7.5])
    assert LEVELS.by_band(error)[0, -1].item() == pytest.approx(
        (error[0] * LEVELS.share).sum().item() / LEVELS.share.sum().item()
    )


def test_one_seed_gives_the_same_numbers_again(study):
    again, other = run_study(SMALL), run_study(dataclasses.replace(SMALL, seed=1))
    for name, outcome in study.outcomes.items():
        for key in ("error", "distance", "curve", "samples"):
            assert getattr(again.outcomes[name], key).equal(getattr(outcome, key)), (name, key)
        assert not other.outcomes[name].error.equal(outcome.error)
    assert again.exact_distance.equal(study.exact_distance)


def test_study_leaves_torch_as_it_was():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="a seed of EDM diverged"):
        run_study(dataclasses.replace(SMALL, iterations=3, lr=1e30))
    assert torch.get_num_threads() == threads and torch.get_rng_state().equal(state)


def test_equal_compute(study):
    assert list(study.outcomes) == [*METHODS, "EDM, 1.40x iterations"]
    assert [outcome.iterations for outcome in study.outcomes.values()] == [20] * len(METHODS) + [28]
    measured = run_study(dataclasses.replace(SMALL, seeds=2, compute=None))
    ratio = measured.outcomes["TD"].step_ms / measured.outcomes["EDM"].step_ms
    assert measured.compute == pytest.approx(max(ratio, 1), abs=0.006)
    assert list(measured.outcomes.values())[-1].iterations == round(20 * measured.compute)


def test_difference_is_paired():
    values = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 8.0]])
    baseline = torch.tensor([[2.0, 4.0], [3.0, 6.0], [4.0, 2.0]])
    first, second = Difference.of(values, baseline)
    # lower by 1 of 3 in every seed, though the seeds overlap
    assert first == (pytest.approx(-100 / 3), 0, 3) and first.clear
    assert second == (
        pytest.approx(50),
        pytest.approx(100 / 4 * torch.tensor([1.0, -1.0, 6.0]).std().item() / 3**0.5),
        1,
    )
    assert not second.clear


def with_td(study, error_factor, distance_factor):
    """The study with TD's numbers made multiples of both baselines', whose seeds are 10 % apart."""
    seeds = torch.tensor([[0.9], [1.0], [1.1]], dtype=torch.float64)
    error, distance = seeds * torch.ones(len(Levels.sigma)), seeds * torch.ones(len(BUDGETS))
    outcomes = {
        name: dataclasses.replace(outcome, error=error, distance=distance)
        for name, outcome in study.outcomes.items()
    }
    outcomes["TD"] = dataclasses.replace(
        outcomes["TD"], error=error_factor * error, distance=distance_factor * distance
    )
    return dataclasses.replace(study, outcomes=outcomes)


@pytest.mark.parametrize(
    ("factor", "words"),
    [(0.5, "lower at"), (2.0, "higher at"), (1.0, "not clearly different anywhere")],
)
def test_conclusion_says_what_the_numbers_say(study, factor, words):
    text = conclusion(with_td(study, factor, factor))
    assert text.count(words) == 4  # error and distance, at equal steps and at equal compute
    assert not any(
        other in text
        for other in ("lower at", "higher at", "not clearly different")
        if other not in words
    )
    assert text.count(f"({100 * (factor - 1):+.0f} %)") == (
        0 if factor == 1 else 2 * (len(BANDS) + 1 + len(BUDGETS))
    )


def test_conclusion_tells_bands_apart(study):
    factors = torch.tensor([0.8, 1.0, 1.3, 1.0, 1.0], dtype=torch.float64)
    error, distance = (
        conclusion(with_td(study, factors[Levels.band], 1))
        .split("; at equal compute")[0]
        .split("its sample distance")
    )
    assert (
        "lower at sigma 0.02-0.2 (-20 %), higher at sigma 0.4-4 (+30 %)" in error
        and "not clearly different elsewhere" in error
    )
    assert "not clearly different anywhere" in distance


def test_command_writes_tables_picture_and_numbers(tmp_path):
    result = CliRunner().invoke(
        main,
        [
            "demo",
            "--outdir",
            str(tmp_path / "new"),
            "--seeds",
            "2",
            "--iterations",
            "20",
            "--compute",
            "1.2",
        ],
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "demo.json",
        "demo.png",
        "demo.txt",
    ]
    numbers = json.loads((tmp_path / "new/demo.json").read_bytes())
    assert (
        numbers["config"] | {"seeds": 2, "iterations": 20, "seed": 0, "compute": 1.2}
        == numbers["config"]
    )
    names = [*METHODS, "EDM, 1.20x iterations"]
    assert list(numbers["methods"]) == names
    lines = result.output.splitlines()
    for name in names:
        assert torch.tensor(numbers["methods"][name]["error"]).shape == (2, len(Levels.sigma))
        distance = torch.tensor(numbers["methods"][name]["distance"], dtype=torch.float64).mean(0)
        assert any(
            line.split() == [*name.split(), *(f"{value:.3g}" for value in distance.tolist())]
            for line in lines
        ), name
    assert " ".join(numbers["conclusion"].split()) in " ".join(result.output.split())
    picture = PIL.Image.open(io.BytesIO((tmp_path / "new/demo.png").read_bytes()))
    assert (
        picture.width > 1000
        and len(picture.convert("RGB").resize((200, 100)).getcolors(20_000)) > 50
    )


def test_report_fits_a_terminal(study):
    assert max(map(len, report(study).splitlines())) <= 120


def test_command_refuses_before_it_works(tmp_path):
    (tmp_path / "file").write_text("")
    for option, value, message in (
        ("--outdir", tmp_path / "file", "is a file"),
        ("--outdir", tmp_path / "file/x", "Not a directory"),
        ("--seeds", 1, "x>=2"),
    ):
        result = CliRunner().invoke(main, ["demo", option, str(value)])
        assert result.exit_code != 0 and message in result.output and "it/s" not in result.output


def test_a_study_comes_back_from_its_numbers(study):
    """With the same tables, and a picture of samples to four digits."""
    again = from_json(json.loads(json.dumps(to_json(study, None))))
    assert report(again) == report(study)
    for name, outcome in study.outcomes.items():
        assert again.outcomes[name].curve.equal(outcome.curve)
        torch.testing.assert_close(
            again.outcomes[name].samples, outcome.samples.double(), rtol=0, atol=6e-5
        )
    assert again.exact_samples.shape == study.exact_samples.shape
    assert from_json(to_json(study, "edm")).family is FAMILIES["edm"]
