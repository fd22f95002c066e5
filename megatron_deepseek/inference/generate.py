"""Generates text from a checkpoint or a Hugging Face directory: tools/generate.py --load DIR --prompt "...".

One process computes the whole sequence again for every token: enough to see what a model has learned. A cache of
latents and a server are not here yet.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.convert.assets import DIRECTORY
from megatron_deepseek.checkpoint.convert.huggingface import open_huggingface
from megatron_deepseek.checkpoint.integrity import check_sizes, read_checksums
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.loadable import checkpoint_directory, native_architecture, refuse_damage
from megatron_deepseek.checkpoint.tracker import is_huggingface
from megatron_deepseek.data.tokenizer import Tokenizer, build_tokenizer
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import shape_stages
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job


@torch.no_grad()
def generate(model: DeepseekStage, prompt: list[int], num_tokens: int, temperature: float, top_p: float,
             seed: int, eod: int | None, num_ids: int | None = None) -> Iterator[int]:
    """Sample up to `num_tokens` ids after `prompt`, each from the nucleus of probability `top_p`; stop at `eod`.

    A temperature of 0 takes the most likely token. `num_ids`: those of the tokenizer; the rows of the vocabulary behind
    them, with which it is padded, are never taken.
    """
    limit, device = model.rope_2SD.shape[1], model.rope_2SD.device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = next_token_logits(model, torch.tensor([tokens[-limit:]], device=device))
        token = sample(logits[:num_ids].float().cpu(), temperature, top_p, generator)
        if token == eod:
            return
        tokens.append(token)
        yield token


def next_token_logits(model: DeepseekStage, tokens_1S: torch.Tensor) -> torch.Tensor:
    """Return the logits [V] after the last of `tokens_1S`. Padding after it does not change a causal model's answer."""
    length, limit = tokens_1S.shape[1], model.rope_2SD.shape[1]
    padded = torch.nn.functional.pad(tokens_1S, (0, limit - length))
    labels = padded.unsqueeze(1)  # nobody reads them; their shape asks for the main prediction alone
    state, *_ = model.states(padded, MicroBatch(Rows(labels, torch.zeros_like(labels))), StepContext(1))
    return model.logits(state[:, length - 1:length])[0, 0]


def sample(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return an id from the smallest set of tokens whose probabilities reach `top_p` (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / temperature).softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


@dataclass(frozen=True)
class Request:
    """A checked request for text. `prompt` are ids, of which the model sees the last `seq_length`."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer
    prompt: list[int]
    seq_length: int


def check_request(args: argparse.Namespace) -> Request:
    """Return the request that `args` make, checked before anything is built.

    Raise ValueError, of one line, for anything in `args` and the files that they name that cannot work.
    """
    _check_text(args.prompt)
    directory = checkpoint_directory(args.load, args.ckpt_step)
    config = _architecture(directory)
    seq_length = args.seq_length or min(args.usual_seq_length, config.max_position_embeddings)
    if seq_length > config.max_position_embeddings:
        raise ValueError(f"--seq-length {seq_length} is longer than the model's max_position_embeddings "
                         f"{config.max_position_embeddings}")
    tokenizer = build_tokenizer(args.tokenizer_type, _tokenizer_model(args, directory))
    prompt = prompt_ids(tokenizer, args.prompt)
    if max(prompt) >= config.vocab_size:
        raise ValueError(f"the prompt has id {max(prompt)} with --tokenizer-model {args.tokenizer_model or directory}, "
                         f"but {directory} has vocab_size {config.vocab_size}")
    return Request(directory, config, tokenizer, prompt, seq_length)


def _architecture(directory: Path) -> ModelConfig:
    """Return the architecture in `directory` without MTP modules, which text does not need. Check the files."""
    if is_huggingface(directory):
        return open_huggingface(directory, without_mtp=True).config
    refuse_damage(directory, check_sizes(directory, read_checksums(directory) or {}))
    return replace(native_architecture(directory), num_nextn_predict_layers=0)


def _tokenizer_model(args: argparse.Namespace, directory: Path) -> str | None:
    """Return the --tokenizer-model that was given, or else the tokenizer that came with the weights."""
    if args.tokenizer_model is not None or args.tokenizer_type != "HuggingFaceTokenizer":
        return args.tokenizer_model
    kept = directory if is_huggingface(directory) else directory.parent / DIRECTORY
    if not (kept / "tokenizer.json").is_file():
        raise ValueError(f"--load {args.load} has no tokenizer.json with it: --tokenizer-model must name one")
    return str(kept)


def _check_text(text: str) -> None:
    """Raise ValueError if `text` is not UTF-8: Python makes a lone surrogate of each byte that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--prompt {text!r} is not UTF-8: character {error.start} is no text") from error


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of `text`, after the token that begins a document where the tokenizer asks for it.

    An empty text begins a document too: with that token, or else with the end of a document before it.
    """
    ids = tokenizer.encode(text)
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos]:
        return [tokenizer.bos, *ids]
    return ids or [tokenizer.eod]


def continuation(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """Return the text that `tokens` add to that of `prompt`.

    Decoded by themselves, `tokens` would lose the blank before their first word: tokenizers in the manner of
    SentencePiece leave it out at the beginning of a text, and the NullTokenizer writes it between ids.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(tokens)


def load_model(request: Request) -> DeepseekStage:
    """Build the whole main model on this process and load its weights."""
    config = request.config
    whole = Stage(embedding=True, layers=tuple(range(config.num_hidden_layers)), mtp=(), loss=True)
    device = choose_device()
    join_job(device, timeout_minutes=10)
    (model,) = shape_stages(config, [whole], build_meshes(Layout(), device), request.seq_length)
    model.to_empty(device=device)
    checkpoint.load_weights(request.directory, [model])
    return model.eval()
