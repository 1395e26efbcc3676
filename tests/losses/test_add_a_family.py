"""The family that docs/add_a_family.md adds: it trains, resumes and samples by the ordinary
commands.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from helpers.families import Raw, continuous, draws, textbook
from tdkern.training import Options

PAGE = (ROOT / "docs" / "add_a_family.md").read_text()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page's code as one file."""
    path = tmp_path_factory.mktemp("family") / "my_family.py"
    path.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    return path


@pytest.fixture
def module(file):
    """The file, imported; its family is taken out again."""
    from tdkern.families import FAMILIES

    spec = importlib.util.spec_from_file_location("my_family", file)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["my_family"] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del FAMILIES["trig"], sys.modules["my_family"]


def command(file, *args, code=0):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, file, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done


def test_it_trains_resumes_and_samples(tmp_path, data, file):
    tiny = ["--cbase", 4, "--cres", 1, "--batch", 8, "--tick", 0.008, "--dump", 1, "--workers", 0]
    run = tmp_path / "run"
    start = [
        "train",
        "--family",
        "trig",
        "--data",
        data,
        "--outdir",
        run,
        "--nosubdirs",
        "--k-idx",
        2,
        "--sigma-max",
        40,
        *tiny,
    ]
    command(file, *start, "--duration", 16e-6)
    done = command(file, "train", "--resume", run, "--duration", 24e-6)
    assert "Going on" in done.stdout and "image 16 of 24" in done.stdout
    options = json.loads((run / "training_options.json").read_text())
    assert (
        options["family"] == "trig"
        and options["loss"]["k_idx"] == 2
        and options["loss"]["sigma_max"] == 40
        and options["loss"]["coupling"] == "markov"
    )
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [tick["kimg"] for tick in ticks] == [0.008, 0.016, 0.024] and all(
        math.isfinite(tick["loss"]) for tick in ticks
    )
    command(
        file,
        "generate",
        "--network",
        run,
        "--outdir",
        tmp_path / "images",
        "--seeds",
        "0-1",
        "--steps",
        2,
    )
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert "--sigma-max FLOAT" in command(file, "train", "--help").stdout
    assert (
        "td_sigma is for family edm, got family trig"
        in command(file, *start, "--td-sigma", "0.1,1", code=1).stderr
    )


def test_its_network_takes_the_fused_path(module):
    from tdkern.families import FAMILIES

    loss = module.TDTrigLoss()
    net = FAMILIES["trig"].network(loss, "ddpmpp", 8, 3, 0, cbase=4, cres=[1]).build()
    assert loss.fits(net) and type(net) is module.TrigPrecond and net.time_scale == 600
    low = FAMILIES["trig"].network(module.TDTrigLoss(sigma_max=40.0), "ddpmpp", 8, 3, 0, cbase=4)
    assert low.build().sigma_max == 40  # which is where `generate` begins
    with pytest.raises(ValueError, match="sigma_max must be positive"):
        Options(data="", family="trig", loss={"sigma_max": -3.0})
    t = torch.linspace(loss.schedule.t_min, loss.schedule.t_max, 9, dtype=torch.float64)
    torch.testing.assert_close(loss.schedule.time(loss.schedule.sigma_hat(t)), t)
    torch.testing.assert_close(net.input_scaling(loss.schedule.sigma_hat(t))[1], 600 * t)


@pytest.mark.parametrize("coupling", ["markov", "shared"])
def test_it_has_its_textbooks_loss(module, coupling):
    """The row that the page has for tests/helpers/families.py."""
    (row,) = re.findall(r'continuous\("trig".*', PAGE)
    family = eval(row, {"continuous": continuous, "math": math, "TDTrigLoss": module.TDTrigLoss})
    t, x0, noise, F, F_p = draws(family)
    for weight in ("pairwise", "pairwise_x0", "online", "none"):
        loss = family.loss(coupling, weight=weight)
        batch = family.pair(loss, x0, t, noise=noise)
        td, base, valid = textbook(family, coupling, None, "v", weight, batch, t, F, F_p)
        terms = loss.evaluate(Raw(F, loss), Raw(F_p, loss), batch)
        torch.testing.assert_close(terms.td, td, rtol=1e-7, atol=0)
        torch.testing.assert_close(terms.base, base, rtol=1e-7, atol=0)
        assert torch.equal(terms.valid, valid)
