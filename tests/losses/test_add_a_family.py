"""The family that docs/add_a_family.md adds: in a copy of the package it is four files, passes the
tests over all families, and trains, resumes and samples by the ordinary commands; and outside of
the package it is one module.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, TESTS
from tdkern.training import Options

PAGE = (ROOT / "docs" / "add_a_family.md").read_text()
BLOCKS = re.findall(r"^```(?:python|text)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
MODULE = "\n\n".join(BLOCKS[:4])  # of the path, the losses, the wrapper and its arguments
FILE = "tdkern/losses/trig.py"
PLACES = (  # of the other blocks: the file, and what stands before them there
    ("tdkern/losses/__init__.py", "from .flow import FlowLoss, TDFlowLoss\n"),
    ("tdkern/losses/__init__.py", '    "TDTerms",\n'),
    ("tdkern/families.py", "    VPLoss,\n)\n"),
    ("tdkern/families.py", "FAMILIES = {\n"),
    ("tests/helpers/families.py", "import torch\n\n"),
    ("tests/helpers/families.py", "FAMILIES = [\n"),
)
OVER_ALL_FAMILIES = ["tests/losses/test_families.py", "tests/losses/test_optimum.py"]
TINY = ["--cbase", 4, "--cres", 1, "--batch", 8, "--tick", 0.008, "--dump", 1, "--workers", 0]


def test_a_family_is_four_files():
    assert len(BLOCKS) == 4 + len(PLACES) + 1  # the last is for outside of the package
    changed = {FILE, *(path for path, _ in PLACES)}
    assert len(changed) == 4
    assert {*re.findall(r"^\| `([\w/.]+)` \|", PAGE, re.MULTILINE)} == changed


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the package and of the tests over all families, with the page's files."""
    root = tmp_path_factory.mktemp("trig")
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "lib")
    shutil.copytree(ROOT / "tdkern", root / "tdkern", ignore=unwanted)
    (root / "tdkern/lib").symlink_to(ROOT / "tdkern/lib")
    shutil.copytree(TESTS / "helpers", root / "tests/helpers", ignore=unwanted)
    (root / "tests/losses").mkdir()
    for path in ("pyproject.toml", "tests/conftest.py", *OVER_ALL_FAMILIES):
        shutil.copy(ROOT / path, root / path)
    assert not (root / FILE).exists()
    (root / FILE).write_text(MODULE)
    for (path, before), text in zip(PLACES, BLOCKS[4:-1], strict=True):
        old = (root / path).read_text()
        assert old.count(before) == 1, path
        (root / path).write_text(old.replace(before, before + text))
    return root


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page's code as one module."""
    path = tmp_path_factory.mktemp("family") / "my_family.py"
    path.write_text(f"{MODULE}\n\n{BLOCKS[-1]}")
    return path


@pytest.fixture
def module(file):
    """The module, imported; its family is taken out again."""
    from tdkern.families import FAMILIES

    spec = importlib.util.spec_from_file_location("my_family", file)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["my_family"] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del FAMILIES["trig"], sys.modules["my_family"]


def python(*args, code=0, root=ROOT):
    """Python beside the package of a folder."""
    path = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_it_passes_the_tests_over_all_families(checkout):
    args = ["-m", "pytest", *OVER_ALL_FAMILIES, "-k", "trig", "-vv", "-p", "no:cacheprovider"]
    printed = python(*args, root=checkout).stdout
    ran = re.findall(r"::(\w+)\[.* PASSED", printed)
    assert set(ran) == {
        "test_cell",
        "test_markov_target_is_unbiased_and_varies_less",
        "test_shared_target_is_biased",
    }


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_it_trains_resumes_and_samples(tmp_path, data, where, request):
    root, start = ROOT, [request.getfixturevalue("file")]
    if where == "inside":
        root, start = request.getfixturevalue("checkout"), ["-m", "tdkern.cli"]
    run = tmp_path / "run"
    train = ["train", "--family", "trig", "--data", data, "--outdir", run, "--nosubdirs"]
    train += ["--k-idx", 2, "--sigma-max", 40, *TINY]
    python(*start, *train, "--duration", 16e-6, root=root)
    done = python(*start, "train", "--resume", run, "--duration", 24e-6, root=root)
    assert "Going on" in done.stdout and "image 16 of 24" in done.stdout
    options = json.loads((run / "training_options.json").read_text())
    assert (
        options["family"] == "trig"
        and options["loss"]["k_idx"] == 2
        and options["loss"]["sigma_max"] == 40
        and options["loss"]["coupling"] == "markov"
    )
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [tick["kimg"] for tick in ticks] == [0.008, 0.016, 0.024]
    assert all(math.isfinite(tick["loss"]) for tick in ticks)
    images = tmp_path / "images"
    draw = ["generate", "--network", run, "--outdir", images, "--seeds", "0-1", "--steps", 2]
    python(*start, *draw, root=root)
    assert len(list(images.glob("*.png"))) == 2
    if where == "outside":
        assert "--sigma-max FLOAT" in python(*start, "train", "--help").stdout
        refused = python(*start, *train, "--td-sigma", "0.1,1", code=1).stderr
        assert "td_sigma is for family edm, got family trig" in refused


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
