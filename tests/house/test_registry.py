"""One place for a thing: every op's files bear its name, and a family is named as data in the
registry, in presets, tests and documents alone.
"""

import ast
import re
import runpy
import sys

import pytest

from helpers import ROOT, TESTS
from tdkern.families import FAMILIES
from tdkern.ops import OPS

STEMS = {op.stem for op in OPS.values()}
PACKAGE = ROOT / "tdkern"
UNET = ("tiles", "group_norm", "branch_sum")  # Triton's kernels that are no ops


def names_in(folder, pattern, *others):
    """The stems of a folder's files, without those of `others`."""
    return {path.stem for path in folder.glob(pattern)} - {*others}


@pytest.mark.parametrize(
    "found",
    [
        names_in(PACKAGE / "ops", "[!_]*.py"),
        names_in(PACKAGE / "reference", "[!_]*.py", "philox"),
        names_in(PACKAGE / "triton", "[!_]*.py", "lists", *UNET),
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

# Where a family may be named: the registry, presets, the demo's settings, and a test at length.
NAMED_IN = (
    "tdkern/families.py",
    "tdkern/training/presets.py",
    "tdkern/demo/families.py",
    "bench/reliability/kills.py",
)
# Other things that have a family's name.
WITHOUT_TD = {"edm"}  # `--loss-type edm`, EDM's word for --td 0
PRECONDITIONINGS = {"edm", "ct"}  # of `td_coef`
DISCRETIZATIONS = {"vp", "ve", "iddpm", "edm", "flow"}  # and schedules and scalings, of `ablation`
OTHERS = {
    "csrc/include/td_coef.h": PRECONDITIONINGS,
    "tdkern/cli/generate.py": DISCRETIZATIONS,
    "tdkern/cli/options.py": WITHOUT_TD,
    "tdkern/cli/train.py": WITHOUT_TD,
    "tdkern/losses/ct.py": PRECONDITIONINGS,
    "tdkern/ops/td_coef.py": PRECONDITIONINGS,
    "tdkern/reference/td_coef.py": PRECONDITIONINGS,
    "tdkern/samplers/__init__.py": {"ddpm", "flow"},  # the sampler, and a time to step in
    "tdkern/samplers/ddpm_ddim.py": {"ddpm"},
    "tdkern/samplers/edm.py": {"flow"},
    "tdkern/samplers/generalised.py": DISCRETIZATIONS,
    "tdkern/training/sampling.py": DISCRETIZATIONS,
    "tdkern/triton/td_coef.py": PRECONDITIONINGS,
}


def words_of(path):
    """The texts in a file that are one word, as a name is where it is data."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"[\"'](\w+)[\"']", text))
    nodes = ast.walk(ast.parse(text))
    return {node.value for node in nodes if isinstance(node, ast.Constant)}


def test_families_are_named_in_their_registry_alone():
    """What `git grep` finds of them as data, but for tests and documents."""
    folders = ("tdkern", "bench", "csrc", "examples", "cmake", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    kinds = {".py", ".h", ".cuh", ".cpp", ".cu", ".txt", ".cmake", ".toml", ".sh"}
    found, others = {}, {}
    for path in files:
        if path.suffix not in kinds and path.name not in ("Makefile", "run"):
            continue
        name = str(path.relative_to(ROOT))
        named = words_of(path) & FAMILIES.keys()
        if named and name not in NAMED_IN:
            others[name] = named
        if more := named - OTHERS.get(name, set()):
            found[name] = more
    assert found.keys() <= {*NAMED_IN}
    assert OTHERS.keys() <= others.keys()  # what is excepted here is there
