"""Every op of the registry against the reference and the floor; competitors are in its own file."""

import pytest
from measure import DEVICE, name, sizes

from tdkern.ops import OPS


@pytest.mark.parametrize("competitor", ["tdkern", "reference", "copy"])
@pytest.mark.parametrize("shape", sizes((512, 3, 32, 32)), ids=name)
@pytest.mark.parametrize("op", OPS)
def bench_every_op(compare, op, shape, competitor):
    backend = "auto" if competitor == "tdkern" else "reference"
    moved = OPS[op].floor(OPS[op].example(shape, device=DEVICE))

    def make():
        arguments = OPS[op].example(shape, device=DEVICE)
        return lambda: OPS[op].results(arguments, backend)

    compare(op, f"example {name(shape)}", competitor, make, moved=moved, seconds=0.3)
