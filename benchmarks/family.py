"""One training step of a small Qwen2, here and in transformers, from the same weights on the same batch.

    OMP_NUM_THREADS=2 python benchmarks/family.py [--bf16] [--output benchmarks/results/family.json]

As train_step.py does for DeepSeek-V3: both take turns in this process, with fused attention and fused AdamW. Four heads
of queries share each head of keys.
"""

import torch
import torch.distributed as dist
from train_step import Ours, Theirs, arguments, compare, random_batches, report
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.start import join_job

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=2, head_dim=32, qkv_bias=True, max_position_embeddings=4096)


def qwen2() -> Qwen2ForCausalLM:
    config = Qwen2Config(**MODEL.to_hf_dict())
    config._attn_implementation = "sdpa"
    return Qwen2ForCausalLM(config)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    join_job(torch.device("cpu"), 10)
    ours = Ours(MODEL, args.batch, args.seq_length, args.bf16, "inductor" if args.compile else None)
    theirs = Theirs(qwen2(), ours.weights(), args.bf16, args.compile)
    report(compare(MODEL, ours, theirs, random_batches(MODEL, args), args), args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
