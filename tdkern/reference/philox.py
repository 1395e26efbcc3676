"""Philox4x32-10 and Box-Muller in plain PyTorch: the counter-based normal numbers that every
backend draws.
"""

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor, rounds: int = 10) -> Tensor:
    """Philox4x32 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), in int64
    arithmetic that keeps 32 bits.

    counter: [..., 4] int64 holding uint32; key: [..., 2] as counter, broadcast against it. Returns
        [..., 4], as counter.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    key_0, key_1 = key.unbind(-1)
    for _ in range(rounds):
        # the products may wrap around; the 64 bits are still right
        product_0 = c0 * 0xD2511F53
        product_1 = c2 * 0xCD9E8D57
        c0 = (product_1 >> 32 & WORD) ^ c1 ^ key_0
        c1 = product_1 & WORD
        c2 = (product_0 >> 32 & WORD) ^ c3 ^ key_1
        c3 = product_0 & WORD
        key_0 = key_0 + 0x9E3779B9 & WORD
        key_1 = key_1 + 0xBB67AE85 & WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 bits, as int64, to two float64 normals: sqrt(-2 ln u) (cos, sin)(angle) with
    u = (a + 1/2) / 2^32.

    b's low 30 bits, as a signed number, are an angle in [-pi/4, pi/4); bit 31 is its cosine's sign,
    and bit 30 swaps cosine and sine.
    """
    radius = torch.sqrt(-2 * torch.log((a.double() + 0.5) / 2**32))
    angle = ((b + 2**29 & 2**30 - 1) - 2**29).double() * (math.pi / 4 / 2**29)
    cosine, sine = torch.cos(angle) * (1 - 2 * (b >> 31)), torch.sin(angle)
    swap = (b >> 30 & 1).bool()
    return radius * torch.where(swap, sine, cosine), radius * torch.where(swap, cosine, sine)


def words(
    batch: int,
    blocks: int,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
    first_sample: int = 0,
) -> Tensor:
    """[batch, blocks, 4] int64: Philox at the counters (block, sample, offset, offset >> 32 << 1 |
    stream), with the 64 bits of `seed` as its key.
    """

    def number(value: int | Tensor) -> Tensor:
        return torch.as_tensor(value & WORD, device=device).reshape(())

    block = torch.arange(blocks, device=device)
    sample = first_sample + torch.arange(batch, device=device)[:, None]
    counter = torch.stack(
        torch.broadcast_tensors(block, sample, number(offset), number(offset >> 32 << 1 | stream)),
        -1,
    )
    return philox4x32(counter, torch.stack([number(seed), number(seed >> 32)]))


def normals(
    batch: int,
    n: int,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
    first_sample: int = 0,
) -> Tensor:
    """[batch, n] float64 unit normals; element k of a sample comes from word k % 4 of block k
    // 4.
    """
    w0, w1, w2, w3 = words(batch, -(-n // 4), seed, offset, stream, device, first_sample).unbind(-1)
    return torch.stack([*box_muller(w0, w1), *box_muller(w2, w3)], -1).flatten(1)[:, :n]
