"""One place for a thing: every op's files bear its name, and a family is named as data in the
registry, in presets and in the demo's settings alone.
"""

import ast
import runpy
import sys

import pytest

from helpers import ROOT, TESTS
from tdkern.families import FAMILIES
from tdkern.ops import OPS

STEMS = {op.stem for op in OPS.values()}
PACKAGE = ROOT / "tdkern"


def names_in(folder, pattern, *others):
    """The stems of a folder's files, without those of `others`."""
    return {path.stem for path in folder.glob(pattern)} - {*others}


@pytest.mark.parametrize(
    "found",
    [
        names_in(PACKAGE / "ops", "[!_]*.py"),
        names_in(PACKAGE / "reference", "[!_]*.py", "philox"),
        names_in(PACKAGE / "triton", "[!_]*.py", "lists", "norm_silu"),
        names_in(ROOT / "csrc/cpu", "*.cpp"),
        names_in(ROOT / "csrc/cuda", "*.cu"),
        {path.stem.removesuffix("_math") for path in (ROOT / "csrc/include").glob("*_math.h")},
    ],
    ids=["ops", "reference", "triton", "cpu", "cuda", "math"],
)
def test_an_op_has_one_stem_everywhere(found):
    assert found == STEMS


def test_every_op_has_its_tests():
    assert STEMS <= {path.stem.removeprefix("test_") for path in (TESTS / "ops").glob("test_*.py")}


def test_the_campaign_tests_and_profiles_every_op(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench/gpu"), *sys.path])
    campaign = runpy.run_path(str(ROOT / "bench/gpu/campaign.py"), run_name="campaign")
    assert set(campaign["STEMS"]) == STEMS
    assert {f"tests/ops/test_{stem}.py" for stem in STEMS} <= set(campaign["OP_TESTS"])
    kernels = campaign["KERNELS"].removeprefix("regex:(").removesuffix(")").split("|")
    assert len(kernels) >= len(STEMS) and all(name.endswith("_kernel") for name in kernels)


# ---- families -----------------------------------------------------------------------------------

DATA = ("families.py", "training/presets.py", "demo/families.py")
# Other things that have a family's name: EDM's word for "without TD", discretizations and schedules
# of samplers, a sampler, and what `td_coef` knows of preconditioning.
OTHERS = {
    "cli/options.py": {"edm"},
    "cli/train.py": {"edm"},
    "cli/generate.py": {"edm", "flow"},
    "losses/ct.py": {"ct"},
    "ops/td_coef.py": {"edm", "ct"},
    "reference/td_coef.py": {"ct"},
    "samplers/__init__.py": {"ddpm", "flow"},
    "samplers/ablation.py": {"vp", "ve", "iddpm", "edm", "flow"},
    "samplers/ddim.py": {"ddpm"},
    "samplers/edm.py": {"flow"},
    "training/sampling.py": {"edm", "flow"},
    "triton/td_coef.py": {"ct"},
}


def test_families_are_named_in_their_registry_alone():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        texts = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        name = str(path.relative_to(PACKAGE))
        more = (texts & FAMILIES.keys()) - OTHERS.get(name, set())
        if more and name not in DATA:
            found[name] = more
    assert found == {}
