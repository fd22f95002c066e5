"""What only some releases of torch can do: marks for tests of it."""

import pytest
import torch

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

keeps_bytes = pytest.mark.skipif(VERSION < (2, 13), reason="FSDP keeps parameters of bytes from torch 2.13 on")
knows_who_needs_gradients = pytest.mark.skipif(
    VERSION < (2, 13), reason="pipeline stages say from torch 2.13 on whether they need a gradient")
