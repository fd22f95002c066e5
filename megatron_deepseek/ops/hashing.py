"""Random numbers as a function of what they are for: a counter and a key, on any device and in any order.

The generator is SplitMix64 (Steele, Lea, Flood 2014) used as a counter-based one.
"""

import hashlib

import torch

ELEMENTS_AT_A_TIME = 1 << 22  # elements drawn at a time, to bound the memory of the integer arithmetic


def _signed(value: int) -> int:
    """Return a 64-bit constant as the int64 that torch computes with."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 to the right logically; torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def split_mix(counter: torch.Tensor, key: int | torch.Tensor) -> torch.Tensor:
    """Return 64 well-mixed bits for each int64 counter."""
    z = counter * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ shift_right(z, 31)


def stream_key(name: str) -> int:
    """Return the key of the stream of random numbers that is called `name`, a signed 64-bit integer."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def uniform(index: torch.Tensor, key: int | torch.Tensor) -> torch.Tensor:
    """Return a float64 in [0, 1), a multiple of 2**-53, for each int64 `index` of the stream `key`."""
    return shift_right(split_mix(index, key), 11).double() / (1 << 53)
