"""`ema_update_`: any number of averages of a whole parameter list, reading the parameters once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from . import _backends, _modes, _shards
from ._checks import check_number, check_tensor, check_tensors, kind_of, refuse_overlap
from ._dtypes import STORAGE_PAIRS, WIDE


def ema_update_(
    averages: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    decays: Sequence[float] | Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Exponential moving averages of a parameter list, in place.

    average_k <- decay_k average_k + (1 - decay_k) parameter.
    An element of a parameter that is not finite leaves that element of every average as it is.
    Computed as torch.lerp is, in float32, or in float64 for float64 averages. A decay of 0 copies,
    whatever the average held.

    Args:
        averages: K lists or tuples of tensors, each as long as `params`; tensor i with the shape
            and device of parameter i and with its dtype, or float32 beside a bfloat16 or float16
            parameter (an average in half precision loses changes smaller than its rounding). No
            average may overlap itself, another average or, but for its own, a parameter in memory.
        params: a list or tuple of tensors of any shapes, on one device. float32, float64, bfloat16
            or float16, also mixed; or DTensors, with averages that are distributed as they are. A
            parameter and its averages that lie in memory alike (dense, any order of dimensions) are
            worked on where they are; others go through copies.
        decays: K floats in [0, 1]; or a float32 or float64 tensor [K] of them on the CPU, read
            during the call, or on the parameters' device, where a CUDA graph reads it anew at each
            replay and nothing checks its range.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Raises:
        ValueError: an argument has the wrong length, shape, dtype, device or range. RuntimeError:
            no such backend here.

    No gradient. Deterministic: every element by itself. No host synchronisation. CUDA: one launch
    for up to 768 tensors of one dtype; Triton: one for every tensor.
    """
    try:
        _on_backend(averages, params, decays, backend)
    except _backends.REFUSED:
        _check_lists(averages, params)
        decays = checked_decays("ema_update_", decays)
        if not _shards.any_distributed(params, *averages):
            _check(averages, params, decays)  # says in full which argument is wrong
            raise
        _on_shards(averages, params, decays, backend)


def _on_backend(
    averages: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    decays: Sequence[float] | Tensor,
    backend: str,
) -> None:
    """`ema_update_` on the backend that fits; what that one checks itself is not checked before."""
    backend = _backends.resolve_lists("ema_update_", backend, params)
    decays = checked_decays("ema_update_", decays)
    sharded = len(params) > 0 and type(params[0]) not in _modes.PLAIN
    if sharded and _shards.any_distributed(params):
        return _on_shards(averages, params, decays, backend)
    checks_itself = backend in ("cpp", "cuda") and not torch.compiler.is_compiling()
    if not checks_itself or len(averages) != decays.numel():
        if _shards.any_distributed(params, *averages):
            return _on_shards(averages, params, decays, backend)
        _check(averages, params, decays)
    with torch.no_grad():
        if backend == "reference":
            return reference.ema_update_(averages, params, decays)
        flat = [avg for average in averages for avg in average]
        _backends.call("ema_update_", backend, (flat, params, decays))
    _modes.written(flat)


def _on_shards(
    averages: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    decays: Sequence[float] | Tensor,
    backend: str,
) -> None:
    named = {f"averages[{k}]": average for k, average in enumerate(averages)}
    local_params, *local_averages = _shards.local_rows("ema_update_", params, named, {})
    ema_update_(local_averages, local_params, _shards.local_of(decays), backend=backend)
    _modes.written([avg for average in averages for avg in average])


def checked_decays(op: str, decays: Sequence[float] | Tensor) -> Tensor:
    """The decays as a tensor; their values have been looked at where no device is waited for."""
    if isinstance(decays, Tensor):
        check_tensor(op, "decays", decays)
        values = decays.tolist() if decays.ndim == 1 and _modes.can_check_values(decays) else []
    else:
        if not isinstance(decays, list | tuple):
            raise ValueError(
                f"{op}: decays must be a list or tuple of K numbers, or a tensor [K], got "
                f"{kind_of(decays)}"
            )
        values = [*decays]
    try:
        inside = all(0 <= decay <= 1 for decay in values)
    except TypeError:
        for k, decay in enumerate(values):
            check_number(op, f"decays[{k}]", decay)
        raise
    if not inside:
        raise ValueError(f"{op}: decays must be in [0, 1], got {values}")
    if isinstance(decays, Tensor):
        return decays
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def check_one_decay_each(op: str, averages: Sequence[Sequence[Tensor]], decays: Tensor) -> None:
    """Refuse decays that are no tensor [K] of one for each average."""
    if decays.ndim != 1 or decays.dtype not in WIDE:
        raise ValueError(
            f"{op}: decays must be float32 or float64 of shape [K], got {decays.dtype} of "
            f"shape {list(decays.shape)}"
        )
    if len(averages) != len(decays):
        raise ValueError(
            f"{op}: decays must hold one decay for each of the {len(averages)} averages, "
            f"got {len(decays)}"
        )


def _check_lists(averages: Sequence[Sequence[Tensor]], params: Sequence[Tensor]) -> None:
    """Refuse what is no list of lists, or no list."""
    for name, lists in (("averages", averages), ("params", params)):
        if not isinstance(lists, list | tuple):
            raise ValueError(f"ema_update_: {name} must be a list or tuple, got {kind_of(lists)}")
    for k, average in enumerate(averages):
        if not isinstance(average, list | tuple):
            raise ValueError(
                f"ema_update_: averages[{k}] must be a list or tuple of tensors, got "
                f"{kind_of(average)}"
            )


def _check(averages: Sequence[Sequence[Tensor]], params: Sequence[Tensor], decays: Tensor) -> None:
    _check_lists(averages, params)
    check_tensors("ema_update_", "params", params)
    for k, average in enumerate(averages):
        check_tensors("ema_update_", f"averages[{k}]", average)
    check_one_decay_each("ema_update_", averages, decays)
    device = params[0].device if params else decays.device
    if decays.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"ema_update_: decays must be on the CPU or on the parameters' device {device}, got "
            f"{decays.device}"
        )
    for i, param in enumerate(params):
        if param.device != device:
            raise ValueError(
                f"ema_update_: params[{i}] must be on {device} as params[0] is, got {param.device}"
            )
    for k, average in enumerate(averages):
        if len(average) != len(params):
            raise ValueError(
                f"ema_update_: averages[{k}] must hold {len(params)} tensors, one for each "
                f"parameter, got {len(average)}"
            )
        for i, (avg, param, first) in enumerate(zip(average, params, averages[0], strict=True)):
            _check_average(f"averages[{k}][{i}]", i, avg, param, first)
    refuse_overlap(
        "ema_update_",
        {f"averages[{k}]": average for k, average in enumerate(averages)},
        {"params": params},
    )


def _check_average(name: str, i: int, avg: Tensor, param: Tensor, first: Tensor) -> None:
    """Refuse an average that does not belong to parameter i; first: the parameter's first one."""
    if avg.shape != param.shape:
        raise ValueError(
            f"ema_update_: {name} must have params[{i}]'s shape {list(param.shape)}, got "
            f"{list(avg.shape)}"
        )
    if avg.device != param.device:
        raise ValueError(f"ema_update_: {name} must be on {param.device}, got {avg.device}")
    if (param.dtype, avg.dtype) not in STORAGE_PAIRS:
        raise ValueError(
            f"ema_update_: {name} must have params[{i}]'s dtype, or float32 beside a bfloat16 or "
            f"float16 parameter, got {avg.dtype} beside {param.dtype}"
        )
    if avg.dtype != first.dtype:
        raise ValueError(
            f"ema_update_: {name} must have averages[0][{i}]'s dtype {first.dtype}, got {avg.dtype}"
        )


def lists_of(averages: Sequence[Tensor], params: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The K averages that an overload gets one behind another."""
    return [averages[i : i + len(params)] for i in range(0, len(averages), len(params))]


def _fake(averages, params, decays):
    # a tensor on "meta" brings an eager call here too
    _check(lists_of(averages, params), params, decays)


def _reference(averages, params, decays):
    reference.ema_update_(lists_of(averages, params), params, decays)


_backends.define("ema_update_", _fake, _reference)
