"""How many files a change takes, as the documents say: a sampler two, an option one. A family's
four are in tests/losses/test_add_a_family.py, an op's eleven in test_add_an_op.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import DATA, ROOT
from helpers.tiny import invoked

PAGE = (ROOT / "docs" / "add_a_sampler.md").read_text()


@pytest.fixture
def checkout(tmp_path):
    """A copy of the Python part."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "lib")
    shutil.copytree(ROOT / "tdkern", tmp_path / "tdkern", ignore=unwanted)
    return tmp_path


# calls of tdkern one after another in one process, which imports torch once
CALLS = """
import json, sys
from click.testing import CliRunner
from tdkern.cli import main

for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, words)
    print(json.dumps([result.exit_code, result.output]))
"""


def python(root, code, *args):
    """What some code prints with this tdkern."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tdkern(root, *calls):
    """[exit code, output] of each call of this tdkern."""
    printed = python(root, CALLS, json.dumps([[str(word) for word in words] for words in calls]))
    return [json.loads(line) for line in printed.splitlines()]


def insert(path, before, text):
    old = path.read_text()
    assert old.count(before) == 1
    path.write_text(old.replace(before, before + text))


def test_a_sampler_is_two_files(checkout):
    """That of docs/add_a_sampler.md draws nearly what Heun's draws."""
    files = re.findall(r"^`(tdkern/[\w/.]+)`\n\n```python\n(.*?)^```$", PAGE, re.M | re.S)
    line, entry = re.findall(r"^```python\n((?:from| {4}).*?)^```$", PAGE, re.M | re.S)
    assert len(files) == 1
    for name, text in files:
        (checkout / name).write_text(text)
    registry = checkout / "tdkern/samplers/__init__.py"
    insert(registry, "from .fewstep import dpmpp, unipc\n", line)
    insert(registry, "SAMPLERS = {\n", entry)
    network = checkout / "model.safetensors"
    invoked("convert", DATA / "edm_snapshot_tiny.pkl", network)
    code = """
import torch, sys
from tdkern.samplers import SAMPLERS, heun
from tdkern.schedules import EDM
from tdkern.training import load_network

net, _ = load_network(sys.argv[1])
sigmas = EDM(20).sigmas()
x = torch.randn(2, 3, 8, 8, dtype=torch.float64) * sigmas[0]
calls = []
count = lambda x, sigma: calls.append(1) or net(x, sigma)
drawn = SAMPLERS["midpoint"].sample(count, x, sigmas)
far = (drawn - heun(net, x, sigmas)).abs().max() / drawn.abs().max()
print(len(calls) == SAMPLERS["midpoint"].evaluations(20), bool(far < 0.05))
"""
    assert python(checkout, code, network) == "True True\n"
    asked = ["--network", network, "--seeds", "0-1", "--steps", 2, "--sampler", "midpoint"]
    ((ended, said),) = tdkern(checkout, ["generate", *asked, "--outdir", checkout / "images"])
    assert ended == 0, said
    assert len(list((checkout / "images").glob("*.png"))) == 2


def test_an_option_of_a_run_is_one_field(checkout, data):
    """One line gives the flag, its help, default and range, and its place in a run's file."""
    field = '    toy: float = flag(0.25, "A toy.", within=UNIT)\n'
    options = checkout / "tdkern/training/options.py"
    insert(options, '    cond: bool = flag(False, "Train a class-conditional network.")\n', field)
    start = ["train", "--dry-run", "--data", data, "--outdir", checkout]
    helped, printed, refused = tdkern(
        checkout, ["train", "--help"], [*start, "--toy", 0.75], [*start, "--toy", 1.5]
    )
    assert "--toy FLOAT A toy. [default: 0.25]" in re.sub(r"\s+", " ", helped[1])
    saved = json.loads(printed[1][: printed[1].index("\n}") + 2])
    assert saved["toy"] == 0.75
    assert refused[0] == 1 and "toy must be in [0, 1], got 1.5" in refused[1]
    (checkout / "options.json").write_text(json.dumps(saved))
    ((ended, again),) = tdkern(
        checkout, ["train", "--dry-run", "--config", checkout / "options.json"]
    )
    assert ended == 0 and '"toy": 0.75' in again
