"""Counter-based random numbers: pure functions of (seed, stream, index).

Every random number of training and sampling belongs to one sample, named by its global index. It does not depend on
the batch it is drawn in, on how many processes share the batch, or on what was drawn before; on the device it depends
only by the rounding of a logarithm and a cosine. So a resumed run is the same run, and an image's seed is the image.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), one sequence a sample, evaluated on whole tensors with
wrapping 64-bit arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer; steps from one word to the next
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def bits(seed: int, stream: str, index: Int[Tensor, " batch"], count: int) -> Int[Tensor, "batch count"]:
    """Independent uniform 64-bit integers.

    Args:
        seed: The run's seed.
        stream: What the numbers are for ("noise", "sigma"); streams are independent of each other.
        index: Global sample indices, int64.
        count: Numbers wanted for each sample.

    Returns:
        Signed 64-bit integers on the device of `index`.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little", signed=True)
    start = mix(index * GAMMA + key)
    steps = torch.arange(1, count + 1, device=index.device, dtype=torch.int64) * GAMMA
    return mix(start[:, None] + steps)


def uniform(seed: int, stream: str, index: Int[Tensor, " batch"], count: int) -> Float[Tensor, "batch count"]:
    """Independent uniform numbers in the open interval (0, 1), float64.

    Args:
        seed: The run's seed.
        stream: What the numbers are for.
        index: Global sample indices, int64.
        count: Numbers wanted for each sample.

    Returns:
        Multiples of 2^-52 plus 2^-53, so neither 0 nor 1 occurs.
    """
    return (_shift_right(bits(seed, stream, index, count), 12).double() + 0.5) * 2.0**-52


def normal(seed: int, stream: str, index: Int[Tensor, " batch"], shape: Sequence[int]) -> Float[Tensor, "batch ..."]:
    """Independent standard normal numbers, float32, by the Box-Muller transform.

    Args:
        seed: The run's seed.
        stream: What the numbers are for.
        index: Global sample indices, int64.
        shape: Shape of one sample.

    Returns:
        A tensor of shape `(len(index), *shape)`; at most 6.77 in absolute value (32-bit radii).
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    word = bits(seed, stream, index, half)
    radius = (((word & 0xFFFFFFFF).float() + 0.5) * 2.0**-32).clamp_(max=1.0).log_().mul_(-2.0).sqrt_()
    angle = _shift_right(word, 32).float().mul_(2.0 * math.pi * 2.0**-32)
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=2).flatten(1)
    return values[:, :count].reshape(len(index), *shape)


def permutation(seed: int, stream: str, epoch: int, count: int) -> Int[Tensor, " count"]:
    """A random order of `count` items, different in each epoch.

    Args:
        seed: The run's seed.
        stream: What the order is for.
        epoch: Which order.
        count: Number of items.

    Returns:
        Each of 0..count-1 once, int64, on the CPU.
    """
    return bits(seed, stream, torch.tensor([epoch]), count)[0].argsort(stable=True)


def mix(word: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64's finaliser: a bijection of 64-bit integers without visible structure.

    Args:
        word: int64, like a start plus a multiple of `GAMMA`.

    Returns:
        int64.
    """
    word = (word ^ _shift_right(word, 30)) * _MIX_1
    word = (word ^ _shift_right(word, 27)) * _MIX_2
    return word ^ _shift_right(word, 31)


def _shift_right(word: Tensor, by: int) -> Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (word >> by) & ((1 << (64 - by)) - 1)
