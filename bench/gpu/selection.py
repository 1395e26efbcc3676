"""A call of every op, for the sanitizers: python bench/gpu/selection.py BACKEND. Small, with packs
and with tails; the results are checked.

Inputs are drawn, and the reference computed, on the CPU: a sanitizer patches every kernel that
runs, and torch's are not what is looked at.
"""

import sys

import torch

from tdkern.ops import OPS, tensors_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (107, 8192 + 16, 20_003)  # one chunk; two, in packs alone; several with a tail


def on(device, value):
    """A copy of an argument on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    return [on(device, part) for part in value] if isinstance(value, list) else value


def computed(op, arguments, backend, device):
    """What a call gives on a backend and, where it has a gradient, that of an upstream gradient
    that is not 1."""
    arguments = {name: on(device, value) for name, value in arguments.items()}
    if not op.differentiable:
        return op.results(arguments, backend)
    differentiated = arguments[op.differentiable].requires_grad_()
    results = op.results(arguments, backend)
    upstream = [
        torch.linspace(0.5, 2, result.numel(), device="cpu").view(result.shape).to(result)
        for result in results
    ]
    return [*results, *torch.autograd.grad(results, differentiated, upstream)]


def compare(op, arguments, backend):
    """A backend's results are close to the reference's."""
    ours = computed(op, arguments, backend, "cpu" if backend == "cpp" else "cuda")
    expected = computed(op, arguments, "reference", "cpu")
    for result, other in zip(ours, expected, strict=True):
        actual, wanted = result.detach().cpu().double(), other.detach().double()
        torch.testing.assert_close(actual, wanted, rtol=0.02, atol=0.02)


def run(backend, ops=OPS):
    for op in ops.values():
        for dtype in DTYPES:
            for size in SIZES:
                for arguments in op.calls((2, size), dtype):
                    compare(op, arguments, backend)
                if not tensors_of(list(op.example((2, size), dtype).values()))[0].ndim > 1:
                    break  # its arguments are one number for each sample: the size changes nothing


if __name__ == "__main__":
    run(sys.argv[1])
    print("every op ran")
