"""A model to serve: weights of spread, and a byte-level tokenizer with DeepSeek's control tokens, as a checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch
from chat_tokenizers import ALL, write_tokenizer
from native_checkpoints import write_native
from small_engines import V3_MTP, hash_of, spread

from megatron_deepseek.checkpoint.convert.assets import DIRECTORY
from megatron_deepseek.checkpoint.convert.names import native_places
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.model.architecture.config import ModelConfig


def write_served(root: Path, config: ModelConfig = V3_MTP, tokens=ALL, **more) -> Path:
    """Write --save of a training, with the tokenizer beside the weights, and return it."""
    folder = write_tokenizer(root / DIRECTORY, tokens, **more)
    config = replace(config, vocab_size=build_tokenizer("HuggingFaceTokenizer", folder).vocab_size)
    return write_native(root, spread_state(config), config)


def spread_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return spread weights by the names under which checkpoints keep them."""
    state = {}
    for place in native_places(config):
        generator = torch.Generator().manual_seed(hash_of(place.whole))
        state["model." + place.whole] = spread(place.whole, torch.Size(place.whole_shape), generator)
    return state
