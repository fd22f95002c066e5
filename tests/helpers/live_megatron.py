"""A model of ours and megatron-core's own of the same architecture exchange weights through torch_dist checkpoints."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from small_checkpoints import convert, write_hf
from small_models import lively

from megatron_deepseek.checkpoint.convert.names import hf_shapes
from megatron_deepseek.model.architecture.config import ModelConfig


@dataclass(frozen=True, eq=False)
class Exchange:
    """What came of it. `said`: the live model's logits of `tokens`, by "read" and "written", as megatron_model.py gives
    them; `directories`: by the same names the Hugging Face directories with the weights that it said them with.
    """

    tokens: torch.Tensor
    said: dict
    directories: dict[str, Path]


def exchange(root: Path, config: ModelConfig, length: int) -> Exchange:
    """Have a live model of megatron-core read random weights that are converted here, and write others, converted back.
    """
    generator = torch.Generator().manual_seed(3)
    weights = {name: lively(name, torch.Size(shape), generator).float() for name, shape in hf_shapes(config).items()}
    hf = write_hf(root / "hf", weights, config.to_hf_dict())
    assert convert("hf", "megatron", hf, root / "ours") == 0
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator)
    torch.save(tokens, root / "tokens.pt")
    files = ("hf/config.json", "tokens.pt", "ours/iter_0000000", "theirs", "said.pt")
    done = subprocess.run([sys.executable, Path(__file__).with_name("megatron_model.py"),
                           *(root / name for name in files)], text=True, capture_output=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert convert("megatron", "hf", root / "theirs", root / "back", "--assets", str(hf)) == 0
    return Exchange(tokens, torch.load(root / "said.pt"), {"read": hf, "written": root / "back"})
