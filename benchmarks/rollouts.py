"""Samples of a rollout per second of processor time: the engine of rl/rollout/, and transformers' `generate`, by which
TRL writes its completions where no server does.

    python benchmarks/rollouts.py [--ends N] [--max-tokens N]

The tiny preset with its initial weights, float32, one thread: 16 prompts of 32 tokens, 8 samples each, temperature 1.
With `--ends N` as many of 8,192 ids end a completion, so that lengths differ; without it all have the greatest length.
Ours has the log-probabilities of its tokens too; `generate` makes none. Takes one process, and turns.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_deepseek.model.architecture.presets import TINY
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.planning.pipeline_balance import stages
from megatron_deepseek.rl.rollout.engine import RolloutEngine, seed_of
from megatron_deepseek.rl_settings import RolloutSettings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

PROMPTS, GROUP, LENGTH = 16, 8, 32


def our_way(prompts: torch.Tensor, ends: list[int], max_tokens: int) -> Callable[[], int]:
    """Return what makes a rollout and returns the number of its tokens."""
    longest = LENGTH + max_tokens
    spec = TrainingSpec(TINY, stages(TINY, 1, longest), "none", longest, 1,
                        BuildOptions(precision=Precision(torch.float32)))
    rollout = RolloutSettings(prompts=PROMPTS, group_size=GROUP, max_tokens=max_tokens)
    engine = RolloutEngine(Trainer(spec, build_meshes(Layout(), torch.device("cpu"))), rollout, None, ends, longest)
    ids, seeds = [tuple(row) for row in prompts.tolist()], [seed_of(0, 0, number) for number in range(PROMPTS)]

    def run() -> int:
        engine.refresh()
        return sum(len(sample.tokens) for group in engine.generate(ids, seeds, rollout, 1.0) for sample in group)

    return run


def their_way(prompts: torch.Tensor, ends: list[int], max_tokens: int) -> Callable[[], int]:
    """Return the same by transformers, whose rows are computed until the longest has ended."""
    fields = {name: value for name, value in TINY.to_hf_dict().items() if name not in ("architectures", "model_type")}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**fields)).eval()
    rows = prompts.repeat_interleave(GROUP, 0)

    def run() -> int:
        found = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=max_tokens, do_sample=True,
                               top_k=0, pad_token_id=0, eos_token_id=ends or None)[:, LENGTH:]
        return int((found != 0).sum())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ends", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    prompts = torch.randint(2, TINY.vocab_size, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    ways = {name: way(prompts, list(range(2, 2 + args.ends)), args.max_tokens)
            for name, way in (("ours", our_way), ("transformers", their_way))}
    for _ in range(args.runs):
        for name, way in ways.items():
            before = time.process_time()
            tokens = way()
            seconds = time.process_time() - before
            print(f"{name}: {PROMPTS * GROUP / seconds:.1f} samples and {tokens / seconds:,.0f} tokens a second",
                  flush=True)


if __name__ == "__main__":
    main()
