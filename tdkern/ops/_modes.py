"""Under which of PyTorch's modes and transforms a call runs, and what it may therefore do."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)
# torch.compile of earlier versions cannot trace the count: there a transform inside a compiled
# function finds no rule for the op, and says so.
COMPILES_TRANSFORMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
_count_of_modes = torch._C._len_torch_dispatch_stack
_jit_trace = torch._C._get_tracing_state


if COMPILES_TRANSFORMS:
    _count_of_transforms = torch._C._functorch.get_dynamic_layer_stack_depth
else:

    def _count_of_transforms() -> int:
        if torch.compiler.is_compiling():
            return 0
        return torch._C._functorch.get_dynamic_layer_stack_depth()


def forward_mode() -> bool:
    """Whether tensors may carry tangents: inside `forward_ad.dual_level`, `torch.func.jvp`,
    `jacfwd` and `linearize`."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether PyTorch must see through the op: in forward mode, and under every transform of
    torch.func.

    The ops then compute by the reference, whose operations have all of PyTorch's rules.
    """
    return forward_ad._current_level >= 0 or _count_of_transforms() > 0


def ordinary() -> bool:
    """Whether no transform sees the call and `torch.jit.trace` does not record it."""
    return forward_ad._current_level < 0 and _count_of_transforms() == 0 and _jit_trace() is None


def batched(upstream: Tensor) -> bool:
    """Whether a gradient stands for many (`is_grads_batched`), or is a transform's: a backward pass
    does not see the transform itself."""
    return torch._C._functorch.is_legacy_batchedtensor(
        upstream
    ) or torch._C._functorch.is_functorch_wrapped_tensor(upstream)


def unwatched(*tensors: Tensor) -> bool:
    """Whether nothing but autograd sees what is done with these.

    Not so while `torch.compile`, `torch.export`, `make_fx` or `torch.jit.trace` trace the call, for
    fake, batched and distributed tensors and for any other subclass, and under any mode that
    watches operations.
    """
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return False
    return not torch.compiler.is_compiling() and _count_of_modes() == 0 and ordinary()


def can_check_values(*tensors: Tensor) -> bool:
    """Whether a check may look at the values: no device is waited for, and no trace or transform
    would see the look.
    """
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    return unwatched(*tensors)


def written(tensors: list[Tensor]) -> None:
    """Let autograd notice a write to tensors that it may have saved."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
