"""Dropout that is a function of a seed: the mask is made again in backward and never stored.

Triton's kernels draw with Philox at a position's offset; `philox_uniform` is the same generator in PyTorch, bit for
bit, to check them with. PyTorch's own path draws with a torch.Generator, which is several times faster on a CPU: one
seed gives another mask there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_TO_UNIT = 4.6566127342e-10
"""Triton's factor from a 31-bit integer to [0, 1)."""


def as_seed(op: str, seed: int | Tensor | None, dropout_p: float) -> Tensor:
    """Return the seed as a (1,) int64 CPU tensor; without one it is drawn from PyTorch's CPU generator.

    The CPU generator is what torch.manual_seed sets and what activation checkpointing restores.

    Raises:
        ValueError: dropout_p outside [0, 1); a seed tensor of another kind.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p={dropout_p} must be in [0, 1)")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device.type != "cpu":
            raise ValueError(
                f"{op}: seed {tuple(seed.shape)} {seed.dtype} on {seed.device} must be one int64 on the CPU"
            )
        return seed.reshape(1)
    if seed is not None:
        return torch.tensor([seed], dtype=torch.int64, device="cpu")  # whatever the default device
    if dropout_p == 0:
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    return torch.randint(2**31 - 1, (1,), dtype=torch.int64, device="cpu")


def keep_mask(seed: Tensor, like: Tensor, dropout_p: float) -> Tensor:
    """Return a contiguous tensor of `like`'s shape and dtype: 1 where an element is kept, 0 where it is dropped.

    PyTorch's path; the same seed gives the same mask. Four 16-bit draws come out of each 64-bit one, which on a CPU
    takes a fifth of bernoulli_'s time; the chance is right to 2^-17.
    """
    count = like.numel()
    generator = torch.Generator(like.device).manual_seed(int(seed))
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device)
    draws = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    below = min(max(round((1 - dropout_p) * 2**16) - 2**15, 1 - 2**15), 2**15 - 1)
    kept = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return torch.lt(draws.view(like.shape), below, out=kept)


def philox_uniform(seed: int, offsets: Tensor) -> Tensor:
    """Return float32 in [0, 1) of the shape of `offsets` (int64): what tl.rand(seed, offsets) gives."""
    c = [offsets & _LOW, (offsets >> 32) & _LOW, torch.zeros_like(offsets), torch.zeros_like(offsets)]
    key_a, key_b = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high_b, low_b = _multiply(c[2], _MULTIPLIER_B)
        high_a, low_a = _multiply(c[0], _MULTIPLIER_A)
        c = [high_b ^ c[1] ^ key_a, low_b, high_a ^ c[3] ^ key_b, low_a]
        key_a, key_b = (key_a + _WEYL_A) & _LOW, (key_b + _WEYL_B) & _LOW
    signed = torch.where(c[0] >= 2**31, _LOW - c[0], c[0])  # ~x of a negative int32
    return signed.float() * torch.tensor(_TO_UNIT)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of x * factor, for x in [0, 2^32) as int64."""
    low_part, high_part = (x & 0xFFFF) * factor, (x >> 16) * factor  # each below 2^48
    middle = high_part + (low_part >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)
