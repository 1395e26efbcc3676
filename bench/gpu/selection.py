"""A call of every op, for the sanitizers: python bench/gpu/selection.py BACKEND. Small, with packs
and with tails; the results are checked.

Inputs are drawn, and the reference computed, on the CPU: a sanitizer patches every kernel that
runs, and torch's are not what is looked at.
"""

import sys

import torch
import torch.nn.functional as F

from tdkern.ops import OPS, tensors_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGES = ((2, 8, 3, 5), (3, 128, 16, 16), (1, 8, 72, 71))  # with tails; several tiles
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


def compare_unet():
    """Triton's kernels of a U-Net, which are no ops: networks call them."""
    from tdkern.triton.branch_sum import branch_sum, branch_sum_backward
    from tdkern.triton.group_norm import group_norm, group_norm_backward

    random = torch.Generator("cpu").manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=random, device="cpu")
    here = lambda value: on(DEVICE, value)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in IMAGES:
            batch, channels = shape[:2]
            x, branch = (draw(*shape).to(dtype, memory_format=torch.channels_last) for _ in "xb")
            add, weight, bias = draw(batch, channels).to(dtype), draw(channels), draw(channels)
            groups = min(32, channels // 4)
            wide = (x.double() + add.double()[:, :, None, None]).requires_grad_()
            normal = F.silu(F.group_norm(wide, groups, weight.double(), bias.double(), eps=1e-5))
            (gradient,) = torch.autograd.grad(normal, wide, branch.double())
            summed = (x.double() + branch.double() + bias.double()[:, None, None]) / 2
            x, branch, weight, bias, add = map(here, (x, branch, weight, bias, add))
            y, statistics = group_norm(x, groups, weight, bias, 1e-5, add)
            check(y, normal.detach())
            given = (x, groups, weight, bias, statistics, add, True)
            check(group_norm_backward(branch, *given).x, gradient)
            check(branch_sum(x, branch, bias, 0.5), summed)
            check(branch_sum_backward(x, 2.0)[0], 2 * x.cpu().double())


def check(found, wanted):
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0.03, atol=0.03)


def run(backend, ops=OPS):
    if backend == "triton":
        compare_unet()
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
