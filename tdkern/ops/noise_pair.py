"""`noise_pair`: the coupled noisy pair, with its normal numbers drawn in the kernel, in one
launch."""

import numpy as np
import torch
from torch import Tensor

from .. import reference
from . import _backends, _modes
from ._checks import check_tensor, kind_of
from ._dtypes import FLOAT_NAMES, FLOATS

COUPLINGS = ("markov", "shared")


def noise_pair(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha_p: Tensor,
    sigma_p: Tensor,
    *,
    coupling: str = "markov",
    seed: int | Tensor,
    offset: int | Tensor = 0,
    first_sample: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The coupled pair (x_t, x_t') of noisy data, x_t' nearer to the data.

    x_tp = alpha_p x0 + sigma_p n1, and for "markov" the forward transition from there,
    x_t = a x_tp + sqrt(max(sigma^2 - a^2 sigma_p^2, 0)) n2 with a = alpha / alpha_p; for "shared"
    x_t = alpha x0 + sigma n1 (docs/mathematics.md). n1 and n2 are unit normals from Philox4x32-10
    (Salmon et al., SC 2011) and Box-Muller, functions of (seed, offset, sample, element, n1 or n2)
    alone: every backend, precision, batch size and memory layout draws the same ones, and n1 is the
    same for both couplings.

    Args:
        x0: [B, ...], clean data. float32, float64, bfloat16 or float16; any strides. At most 2^32
            samples of 2^34 elements.
        alpha, sigma: [B] float64, the level of x_t; any stride. sigma >= 0, checked on the CPU
            alone: a GPU would have to be waited for. A NaN gives NaN.
        alpha_p, sigma_p: as alpha and sigma, the level of x_tp; alpha_p is not 0.
        coupling: "markov" or "shared".
        seed: the key. An int in [-2^63, 2^64), of which the 64 bits count, or an int64 tensor [1]
            on x0's device, which a CUDA graph reads anew in each replay.
        offset: the step: another offset is an independent draw. An int in [0, 2^63), or a tensor as
            seed (63 bits count).
        first_sample: the index of x0's first sample in a larger batch, in [0, 2^32 - B]. Parts of a
            batch, on one device or on many, draw with one seed what the whole batch would draw.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        (x_t, x_tp), as x0, in x0's layout where its channels come first or last, else contiguous.
        Half precision is rounded once, on writing.

    Raises:
        ValueError: a wrong shape, dtype, device or range. RuntimeError: no such backend here.

    No gradients; in forward mode the tangents of all arguments. Deterministic: "cpp" gives the same
    bits with any number of threads and on every x86-64 processor. Backends draw the same words;
    their float32 normals lie within 5e-7 (1 + |n|) of the float64 ones, these within 1e-14
    (1 + |n|). No host synchronisation.
    """
    tensors, draw = (x0, alpha, sigma, alpha_p, sigma_p), (seed, offset, first_sample)
    try:
        return _on_backend(*tensors, coupling, *draw, backend)
    except _backends.REFUSED:
        _check_integer("seed", seed)
        _check_integer("offset", offset)
        _check(*tensors, *draw)  # says in full which argument is wrong
        raise


def _on_backend(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha_p: Tensor,
    sigma_p: Tensor,
    coupling: str,
    seed: int | Tensor,
    offset: int | Tensor,
    first_sample: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`noise_pair` on the backend that fits."""
    tensors = (x0, alpha, sigma, alpha_p, sigma_p)
    backend = _backends.resolve("noise_pair", backend, x0.device)
    if backend not in ("cpp", "cuda") or torch.compiler.is_compiling():  # they check too
        _check(*tensors, seed, offset, first_sample)
    if coupling not in COUPLINGS:
        raise ValueError(
            f"noise_pair: coupling must be one of {', '.join(COUPLINGS)}, got {coupling!r}"
        )
    if _modes.can_check_values(sigma, sigma_p):
        for name, level in (("sigma", sigma), ("sigma_p", sigma_p)):
            if level.numel() > 0 and level.min().item() < 0:
                raise ValueError(f"noise_pair: {name} must be >= 0, got {level.min().item()}")
    key = (0, seed) if isinstance(seed, Tensor) else (_seed_bits(seed), None)
    counter = (0, offset) if isinstance(offset, Tensor) else (_offset(offset), None)
    args = (*tensors, coupling == "shared", *key, *counter, first_sample)
    with torch.no_grad():  # leaves tangents be: in forward mode the reference gives them too
        if backend == "reference":
            return _reference(*args)
        return _backends.call("noise_pair", backend, args)


def _seed_bits(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"noise_pair: seed must be in [-2^63, 2^64), got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _offset(offset: int) -> int:
    if not 0 <= offset < 2**63:
        raise ValueError(f"noise_pair: offset must be in [0, 2^63), got {offset}")
    return offset


def _check_integer(name: str, value: int | Tensor) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer | torch.SymInt | Tensor):
        raise ValueError(
            f"noise_pair: {name} must be an int or an int64 tensor, got {kind_of(value)}"
        )


def _check_first(value: int, batch: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer | torch.SymInt):
        raise ValueError(f"noise_pair: first_sample must be an int, got {kind_of(value)}")
    if not 0 <= value <= 2**32 - batch:
        raise ValueError(f"noise_pair: first_sample must be in [0, 2^32 - B], got {value}")


def _check(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha_p: Tensor,
    sigma_p: Tensor,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    first_sample: int,
) -> None:
    levels = {"alpha": alpha, "sigma": sigma, "alpha_p": alpha_p, "sigma_p": sigma_p}
    integers = {"seed": seed, "offset": offset}
    for name, tensor in {"x0": x0, **levels}.items():
        check_tensor("noise_pair", name, tensor)
    for name, value in integers.items():
        if isinstance(value, Tensor):
            check_tensor("noise_pair", name, value)
        if value is not None:
            _check_integer(name, value)
    if x0.ndim < 1:
        raise ValueError("noise_pair: x0 must have shape [B, ...], got []")
    _check_first(first_sample, x0.shape[0])  # len() would fix the batch of a compiled call
    if x0.dtype not in FLOATS:
        raise ValueError(f"noise_pair: x0 must be {FLOAT_NAMES}, got {x0.dtype}")
    columns = [(name, level, x0.shape[:1], torch.float64) for name, level in levels.items()]
    columns += [
        (name, value, torch.Size([1]), torch.int64)
        for name, value in integers.items()
        if isinstance(value, Tensor)
    ]
    for name, tensor, shape, dtype in columns:
        if tensor.shape != shape:
            raise ValueError(
                f"noise_pair: {name} must have shape {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"noise_pair: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != x0.device:
            raise ValueError(f"noise_pair: {name} must be on {x0.device}, got {tensor.device}")


def output_like(x0: Tensor) -> Tensor:
    """An output before it is written: in x0's own layout if its channels come first or last, else
    contiguous."""
    own = torch.empty_like(x0)
    kept = own.is_contiguous() or (own.ndim >= 3 and own.movedim(1, -1).is_contiguous())
    return own if kept else torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)


def _fake(
    x0, alpha, sigma, alpha_p, sigma_p, shared, seed, seed_at, offset, offset_at, first_sample
):
    # a tensor on "meta" brings an eager call here too
    _check(x0, alpha, sigma, alpha_p, sigma_p, seed_at, offset_at, first_sample)
    return output_like(x0), output_like(x0)


def _reference(
    x0, alpha, sigma, alpha_p, sigma_p, shared, seed, seed_at, offset, offset_at, first_sample
):
    seed, offset = seed if seed_at is None else seed_at, offset if offset_at is None else offset_at
    return reference.noise_pair(
        x0, alpha, sigma, alpha_p, sigma_p, shared, seed, offset, first_sample
    )


_backends.define("noise_pair", _fake, _reference)
