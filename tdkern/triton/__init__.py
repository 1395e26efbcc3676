"""The ops in Triton.

Importing this registers the `.triton` overloads, for CUDA tensors or, in Triton's interpreter, for
CPU tensors.
"""

from importlib import import_module

from ..ops import OPS

for _stem in sorted({op.stem for op in OPS.values() if "triton" in op.backends}):
    import_module(f".{_stem}", __name__)
