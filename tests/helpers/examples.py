"""The loops in examples/, as modules."""

import importlib.util
import sys

from helpers import ROOT

EXAMPLES = ROOT / "examples"


def example(name):
    """The module of examples/NAME.py, imported once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def lines_changed(name):
    """How many lines of an example are marked as those that differ from a loop without tdkern."""
    text = (EXAMPLES / f"{name}.py").read_text()
    return sum(line.endswith("# tdkern") for line in text.splitlines())


def same_tensors(first, second):
    """Whether two modules, or state dicts, have the same tensors, bit for bit."""
    states = [each if isinstance(each, dict) else each.state_dict() for each in (first, second)]
    same = states[0].keys() == states[1].keys()
    return same and all(bool((states[0][name] == states[1][name]).all()) for name in states[0])
