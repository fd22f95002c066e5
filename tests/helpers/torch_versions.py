"""What only some releases of torch can do: for tests of it."""

import pytest
import torch

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

SPARES_GRADIENTS = VERSION >= (2, 13)  # pipelining sends none to stages whose output needs none; before, it does

keeps_bytes = pytest.mark.skipif(VERSION < (2, 13), reason="FSDP keeps parameters of bytes from torch 2.13 on")
