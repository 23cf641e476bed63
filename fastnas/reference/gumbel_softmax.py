"""Gumbel-softmax with counter-based noise, in plain PyTorch.

Concrete relaxation of a categorical choice: SNAS (Xie et al., 2019), equation 5; Jang et al., 2017, equation 2. The
generator is Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * factor``; halves of 16 bits keep every product inside int64."""
    high = a * (factor >> 16)
    low = a * (factor & 0xFFFF)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK


def philox(counter: Sequence[Tensor], key: tuple[int | Tensor, int | Tensor]) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors of 32-bit words from four counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


def random_bits(count: int, seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """``count`` 32-bit words (int64): word ``i % 4`` of the block with counter ``i // 4`` and key ``seed``."""
    block = torch.arange((count + 3) // 4, device=device)
    zero = torch.zeros_like(block)
    words = philox((block & _MASK, block >> 32, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten()[:count]


def gumbel_from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise, ``-log(-log u)``, from 32-bit words.

    ``u = (floor(bits / 2^9) + 1/2) 2^-23`` is exact in float32 and lies in [2^-24, 1 - 2^-24], so that the
    noise is finite for every word: between -2.82 and 16.64.
    """
    u = ((bits >> 9).to(dtype) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def gumbel_softmax(logits: Tensor, tau: float | Tensor = 1.0, *, seed: int | Tensor, hard: bool = False) -> Tensor:
    """See :func:`fastnas.ops.gumbel_softmax`; differentiable any number of times, in ``tau`` also."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    bits = random_bits(logits.numel(), seed, logits.device)
    noisy = logits.to(dtype) + gumbel_from_bits(bits, dtype).view(logits.shape)
    if noisy.numel() == 0:
        return noisy.to(logits.dtype)
    # Softmax does not see a shift; taking the maximum away before the division keeps small tau finite.
    shifted = noisy - noisy.detach().amax(-1, keepdim=True)
    soft = torch.softmax(shifted / tau, dim=-1)
    if hard:
        index = shifted.argmax(-1, keepdim=True)
        one_hot = torch.zeros_like(soft).scatter(-1, index, 1.0)
        soft = one_hot + (soft - soft.detach())
    return soft.to(logits.dtype)
