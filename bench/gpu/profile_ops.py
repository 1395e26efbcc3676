"""One call of every op on float32, for a profiler.

python bench/gpu/profile_ops.py BACKEND ELEMENTS
"""

import sys

from selection import computed

from tdkern.ops import OPS

SAMPLE = 3 * 32 * 32  # elements of a sample


def run(backend, elements, ops=OPS):
    for op in ops.values():
        arguments = op.example((max(1, elements // SAMPLE), SAMPLE))
        computed(op, arguments, backend, "cpu" if backend == "cpp" else "cuda")


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
    print("every op ran")
