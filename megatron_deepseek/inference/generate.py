"""Text from a checkpoint: python -m megatron_deepseek.inference.generate --load DIR --tokenizer-model T --prompt "..."

One process, the whole sequence again for every token: enough to hear what a model has learned. A cache of latents and
a server are not here yet.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_deepseek.arguments.command_line import OneLineParser
from megatron_deepseek.arguments.ending import exit_status
from megatron_deepseek.checkpoint import distributed as checkpoint
from megatron_deepseek.checkpoint.loadable import checkpoint_directory
from megatron_deepseek.config import ModelConfig
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.model.build import shape_stages
from megatron_deepseek.model.deepseek import DeepseekStage, StepContext, Tally
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job


@torch.no_grad()
def generate(model: DeepseekStage, prompt: list[int], num_tokens: int, temperature: float, top_p: float,
             seed: int, eod: int | None) -> Iterator[int]:
    """Sample up to `num_tokens` ids after `prompt`, each from the nucleus of probability `top_p`; stops at `eod`.

    A temperature of 0 takes the most likely token.
    """
    limit, device = model.rope_2SD.shape[1], model.rope_2SD.device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = next_token_logits(model, torch.tensor([tokens[-limit:]], device=device))
        token = sample(logits.float().cpu(), temperature, top_p, generator)
        if token == eod:
            return
        tokens.append(token)
        yield token


def next_token_logits(model: DeepseekStage, tokens_1S: torch.Tensor) -> torch.Tensor:
    """Logits [V] after the last of `tokens_1S`; rows past the sequence do not change a causal model's answer."""
    length, limit = tokens_1S.shape[1], model.rope_2SD.shape[1]
    padded = torch.nn.functional.pad(tokens_1S, (0, limit - length))
    state, *_ = model.states(padded, padded.unsqueeze(1), StepContext((1,), 1, Tally()))
    return model.logits(state[:, length - 1:length])[0, 0]


def sample(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """An id from the smallest set of tokens whose probabilities reach `top_p` (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / temperature).softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def load_model(root: Path, seq_length: int) -> DeepseekStage:
    """The main model of the latest checkpoint in `root`, whole, on this process. MTP modules are left out."""
    directory = checkpoint_directory(root)
    config = ModelConfig.from_file(directory / "config.json")
    whole = Stage(embedding=True, layers=tuple(range(config.num_hidden_layers)), mtp=(), loss=True)
    device = choose_device()
    join_job(device, timeout_minutes=10)
    (model,) = shape_stages(config, [whole], build_meshes(Layout(), device), seq_length)
    model.to_empty(device=device)
    checkpoint.load_weights(directory, [model])
    return model.eval()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="generate", description="Continue a prompt with a trained model.")
    parser.add_argument("--load", type=Path, required=True, help="directory of checkpoints (--save of the training)")
    parser.add_argument("--tokenizer-type", default="HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", required=True, help="tokenizer.json or its directory")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely token")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seq-length", type=int, default=256, help="longest context that the model sees")
    parser.add_argument("--seed", type=int, default=1234)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    model = load_model(args.load, args.seq_length)
    prompt = tokenizer.encode(args.prompt)
    tokens = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_p, args.seed, tokenizer.eod)
    print(args.prompt + tokenizer.decode(list(tokens)))
    dist.destroy_process_group()
    return 0


def main(argv: list[str]) -> int:
    return exit_status("generate", lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
