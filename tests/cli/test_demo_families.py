"""`tdkern demo --family`: every family trains and samples, on paired draws, and is measured against
what is exact.
"""

import json
from itertools import islice

import pytest
import torch
from click.testing import CliRunner

from tdkern.cli import main
from tdkern.demo import FAMILIES, STUDY, Config, report, run_study, study
from tdkern.demo.families import Levels
from tdkern.evaluation.mixture import GaussianMixture

RING = GaussianMixture.ring()


@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_and_samples(name, monkeypatch):
    """The error, for CT the distance of one-step samples, falls with training, for every method,
    and the report has it all.
    """
    monkeypatch.setattr(study, "CURVE", 4)
    family = FAMILIES[name]
    result = run_study(
        Config(
            seeds=2,
            iterations=160 if name == "ct" else 60,
            lr=6e-3,
            width=32,
            points=64,
            compute=1.0,
        ),
        family,
    )
    assert list(result.outcomes)[:-1] == list(family.losses)
    for outcome in result.outcomes.values():
        assert outcome.error.shape == (2, len(Levels.sigma)) and outcome.distance.shape == (
            2,
            len(family.budgets),
        )
        # EDM's start, F = 0, is close: see test_demo.py
        assert (outcome.curve[-1] < (1.0 if name == "edm" else 0.7) * outcome.curve[0]).all()
    text = report(result)
    assert max(map(len, text.splitlines())) <= 120
    for words in (*result.outcomes, family.sampler_name, family.exact_name):
        assert words in text


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_are_paired_and_their_levels_have_the_cdf(name):
    family, config = FAMILIES[name], Config(seeds=2, batch=2000)
    draw = next(islice(study.draws(config, RING, family), 1))
    batches = [draw.pair(loss) for loss in family.losses.values()]
    for batch in batches:
        torch.testing.assert_close(batch.x_t, batches[0].x_t, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.levels[:, 0], batches[0].levels[:, 0], rtol=1e-9, atol=0)
    noise = draw.noise["noise"]
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.05
    sigma = batches[0].levels[:, 0]
    for level in (0.1, 0.4, 4.0, 20.0):
        assert (sigma < level).double().mean().item() == pytest.approx(
            family.cdf(torch.tensor(level, dtype=torch.float64)).item(), abs=0.03
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exact_samples_the_data(name):
    """With the largest budget the sampler's own error is small; its noise is the same at every
    call.
    """
    family, samples = FAMILIES[name], study.Samples(Config(points=256), RING)
    distance, points = samples.distance(family.exact(RING), 1, family, family.budgets[-1:])
    assert distance.item() < 0.12
    again, _ = samples.distance(family.exact(RING), 1, family, family.budgets[-1:])
    assert torch.equal(distance, again) and points.shape == (256, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mlp_sees_edms_range(name):
    """Whatever the wrapper, c_noise goes from about -1.6 to 1.1 over the sampler's levels, and the
    input is of the size of 1.
    """

    class Record(torch.nn.Module):
        label_dim, num_models = 0, 1

        def forward(self, x, c_noise, *_):
            self.x, self.c_noise = x, c_noise
            return x

    family, mlp = FAMILIES[name], Record()
    sigma = family.sigmas(100)
    sigma = sigma[sigma > 0]
    family.network(mlp)((sigma**2 + 0.25).sqrt()[:, None].expand(-1, 2), sigma)
    assert mlp.c_noise[-1].item() == pytest.approx(-1.6, abs=0.06) and mlp.c_noise[
        0
    ].item() == pytest.approx(1.1, abs=0.01)
    assert mlp.x.min() > 0.4 and mlp.x.max() < 1.01


def test_models_of_a_batch_get_the_same_noise():
    family, samples = FAMILIES["ddpm"], study.Samples(Config(points=32), RING)
    one, points = samples.distance(RING.denoise, 1, family, (5,))
    three, first = samples.distance(RING.denoise, 3, family, (5,))
    assert torch.equal(points, first) and torch.equal(three, one.expand(3, 1))


def test_command_of_a_family(tmp_path):
    result = CliRunner().invoke(
        main,
        [
            "demo",
            "--family",
            "ddim",
            "--outdir",
            str(tmp_path),
            "--seeds",
            "2",
            "--iterations",
            "4",
            "--compute",
            "1",
        ],
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "demo-ddim.json",
        "demo-ddim.png",
        "demo-ddim.txt",
    ]
    numbers = json.loads((tmp_path / "demo-ddim.json").read_bytes())
    assert numbers["sampler"] == "DDIM" and list(numbers["methods"]) == [
        "DDPM",
        "TD",
        "TD, shared noise",
        "DDPM, 1.00x iterations",
    ]
    assert "Difference from DDPM, in %" in result.output and "share of training" in result.output


def test_default_is_edms_study():
    assert (
        STUDY.losses["EDM"] == FAMILIES["edm"].losses["EDM"]
        and STUDY.losses["TD"] == FAMILIES["edm"].losses["TD"]
    )
    assert len(STUDY.losses) == 4 and STUDY.budgets == FAMILIES["edm"].budgets
