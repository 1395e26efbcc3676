"""No import turns back, and nothing reaches into another module's insides."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tdkern
from helpers import ROOT
from tdkern.ops import OPS

STEMS = {op.stem for op in OPS.values()}
ROOT = ROOT / "tdkern"


def _modules():
    """The package's files by the names of their modules."""
    modules = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = _modules()


def _imports(name, modules=None, text=None):
    """(module, name taken from it) of every import of the package in a module, lazy ones
    included.
    """
    modules = MODULES if modules is None else modules
    is_package = text is None and modules[name].name == "__init__.py"
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(modules[name].read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in modules)
        if not isinstance(node, ast.ImportFrom):
            continue
        source = node.module
        if node.level:
            base = package.split(".")
            base = base[: len(base) - node.level + 1]
            source = ".".join([*base, node.module] if node.module else base)
        if source.partition(".")[0] != "tdkern":
            continue
        for alias in node.names:
            whole = f"{source}.{alias.name}"
            is_module = whole in modules or alias.name == "_C"  # which is compiled
            yield (whole, None) if is_module else (source, alias.name)


def _circle(edges):
    """A way from a module back to itself; empty if there is none."""
    done = set()

    def visit(name, way):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def test_no_import_turns_back():
    assert _circle({name: {module for module, _ in _imports(name)} for name in MODULES}) == []


def test_a_circle_is_found():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    lazy = "def f():\n    from ..training import checkpoint\n    from ._x import _y\n"
    modules = {"tdkern.training": Path("__init__.py"), "tdkern.io.a": Path("a.py")}
    assert list(_imports("tdkern.io.a", modules, lazy)) == [
        ("tdkern.training", "checkpoint"),
        ("tdkern.io._x", "_y"),
    ]


@pytest.mark.parametrize("name", MODULES)
def test_only_ops_import_the_reference(name):
    if not name.startswith(("tdkern.ops", "tdkern.reference")):
        assert [
            module for module, _ in _imports(name) if module.startswith("tdkern.reference")
        ] == []


def _private(name):
    """The private names that a module takes from others, which are no modules themselves."""
    private = [
        (module, taken) for module, taken in _imports(name) if taken and taken.startswith("_")
    ]
    return [(module, taken) for module, taken in private if not taken.endswith("__")]


@pytest.mark.parametrize("name", MODULES)
def test_no_private_names_of_others(name):
    assert _private(name) == []


# What a package gives has another name than its modules, but for an op, whose files all bear its
# name, and for the U-Nets, whose module is named in pickles.
NAMED_ALIKE = {"tdkern.networks": {"unet"}, "tdkern.ops": STEMS, "tdkern.reference": STEMS}


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name].name == "__init__.py"])
def test_a_package_gives_nothing_by_the_name_of_its_module(name):
    taken = {taken for _, taken in _imports(name) if taken}
    alike = {each for each in taken if f"{name}.{each}" in MODULES}
    assert alike <= NAMED_ALIKE.get(name, {"info"} if name == "tdkern" else set())


def test_info_is_one_thing_however_it_is_imported():
    code = "import tdkern; import tdkern.info; print(tdkern.info()['tdkern'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert done.stdout.strip() == tdkern.__version__, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_the_cache_does_not_bring_the_backends(name):
    """A cache of tensors is a module of its own, which imports nothing of the package."""
    assert not any(
        taken == "tensor_cache" for module, taken in _imports(name) if module != "tdkern._cache"
    )
    assert name != "tdkern._cache" or list(_imports(name)) == []
