"""Generators of random numbers that others seed, put back afterwards: an evaluation must not change a training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from megatron_deepseek.device import count_accelerators


@contextmanager
def kept_generators() -> Iterator[None]:
    """Let the block seed and use the generators of random, numpy and torch, and give them their states back."""
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(count_accelerators())):
            yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
