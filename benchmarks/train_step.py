"""One training step of a small DeepSeek-V3, here and in transformers, from the same weights on the same batch.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py [--bf16] [--compile] [--output benchmarks/results/train_step.json]

Both run in this process with the same threads and take turns, so a noisy machine slows both; `--clock cpu` counts the
process's time on all processors instead. A step is forward, backward, gradient clipping and fused AdamW. transformers
gets its fastest experts implementation, found by a trial of each; with --compile also each compiled by torch.compile,
and ours is trained by --compile. The output is the tokens/s of both (median), their ratio, the losses of every step,
which must agree, and the share of the measured GEMM rate that the model's multiply-adds reach.
"""

import argparse
import json
import os
import platform
import statistics
import time
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import join_job
from megatron_deepseek.planning.flops import model_flops_per_token
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LEARNING_RATE = 1e-3
OPTIMIZER = OptimizerSettings()
MODEL = ModelConfig(
    vocab_size=8192, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
    q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    moe_intermediate_size=128, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1,
    n_group=4, topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.5, max_position_embeddings=4096)


class Ours:
    def __init__(self, model: ModelConfig, batch: int, seq_length: int, bf16: bool,
                 compiler: str | None = None):
        layers = tuple(range(model.num_hidden_layers))
        spec = TrainingSpec(model, (Stage(True, layers, (), True),), "1F1B", seq_length, batch,
                    BuildOptions(precision=Precision(torch.float32, torch.bfloat16 if bf16 else None),
                                 compiler=compiler), OPTIMIZER)
        self.trainer = Trainer(spec, build_meshes(Layout(), torch.device("cpu")))

    def weights(self) -> dict[str, torch.Tensor]:
        (stage,) = self.trainer.stages
        return {name: parameter.to_local().clone() for name, parameter in stage.named_parameters()}

    def step(self, tokens: torch.Tensor) -> float:
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        batch = Batch(tokens_BS=inputs, labels_BS=labels, weights_BS=torch.ones_like(labels, dtype=torch.float32))
        return self.trainer.train_step(batch, LEARNING_RATE).losses.lm_loss


class Theirs:
    """A model of transformers with our weights, run as it is or as torch.compile makes it."""

    def __init__(self, model: torch.nn.Module, weights: dict[str, torch.Tensor], bf16: bool, compiled: bool = False):
        self.model = model
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected and all("e_score_correction_bias" in name or name == "lm_head.weight" for name in missing
                                      ), (missing, unexpected)
        self.model.train()
        self.bf16, self.run = bf16, torch.compile(model) if compiled else model
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=LEARNING_RATE, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2), eps=OPTIMIZER.adam_eps, fused=True)

    def step(self, tokens: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.run(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_grad)
        self.optimizer.step()
        return loss.item()


def deepseek_v3(experts: str) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(**MODEL.to_hf_dict())
    config._attn_implementation = "sdpa"
    config._experts_implementation = experts
    return DeepseekV3ForCausalLM(config)


def fastest(weights: dict[str, torch.Tensor], tokens: torch.Tensor, args: argparse.Namespace) -> tuple[Theirs, dict]:
    """Return transformers' fastest model, and the seconds of each kind."""
    seconds = {}
    for kind in product(("eager", "grouped_mm"), (False, True) if args.compile else (False,)):
        name, compiled = kind
        try:
            model = Theirs(deepseek_v3(name), weights, args.bf16, compiled)
            model.step(tokens)
            seconds[kind] = min(timed(model.step, tokens, clock=args.clock)[0] for _ in range(2))
        except (RuntimeError, ValueError) as error:
            print(f"transformers' {name} does not run here: {str(error).splitlines()[0]}")
    name, compiled = min(seconds, key=seconds.get)
    return Theirs(deepseek_v3(name), weights, args.bf16, compiled), {
        name + " compiled" * compiled: round(taken, 3) for (name, compiled), taken in seconds.items()}


def timed(step, *args, clock: str = "wall") -> tuple[float, float]:
    """Return the seconds of a step, of the wall's clock or of the processors', and its loss."""
    now = time.perf_counter if clock == "wall" else time.process_time
    begin = now()
    loss = step(*args)
    return now() - begin, loss


def gemm_rate(dtype: torch.dtype, clock: str, size: int = 2048) -> float:
    """Return the FLOP/s of a square GEMM, best of five, by the clock that steps are measured with."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    return 2 * size**3 / min(timed(torch.mm, a, b, clock=clock)[0] for _ in range(5))


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--bf16", action="store_true", help="ours with --bf16, transformers under autocast")
    parser.add_argument("--compile", action="store_true", help="ours with --compile, transformers by torch.compile")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time (wall)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, help="write the figures as JSON here too")
    return parser.parse_args()


def random_batches(model: ModelConfig, args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randint(0, model.vocab_size, (args.steps + 1, args.batch, args.seq_length + 1)).unbind()


def compare(model: ModelConfig, ours: Ours, theirs: Theirs, batches: tuple[torch.Tensor, ...],
            args: argparse.Namespace) -> dict:
    """Return the figures of both, which take turns."""
    runs = [(timed(ours.step, batch, clock=args.clock), timed(theirs.step, batch, clock=args.clock))
            for batch in batches]
    return summarize(model, runs, args)


def report(figures: dict, output: Path | None) -> None:
    for name, value in figures.items():
        print(f"{name:28s} {value}")
    if output:
        output.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    join_job(torch.device("cpu"), 10)
    batches = random_batches(MODEL, args)
    ours = Ours(MODEL, args.batch, args.seq_length, args.bf16, "inductor" if args.compile else None)
    theirs, trial = fastest(ours.weights(), batches[0], args)
    figures = compare(MODEL, ours, theirs, batches, args)
    report(figures | {"transformers_trial_seconds": trial}, args.output)
    dist.destroy_process_group()


def summarize(model: ModelConfig, runs, args) -> dict:
    tokens = args.batch * args.seq_length
    difference = max(abs(a[1] - b[1]) / b[1] for a, b in runs)
    our_rate = tokens / statistics.median(a[0] for a, _ in runs[1:])
    their_rate = tokens / statistics.median(b[0] for _, b in runs[1:])
    rate = gemm_rate(torch.bfloat16 if args.bf16 else torch.float32, args.clock)
    flops = model_flops_per_token(model, args.seq_length)
    return {
        "dtype": "bf16" if args.bf16 else "fp32", "compiled": args.compile, "clock": args.clock,
        "batch": args.batch, "seq_length": args.seq_length,
        "threads": torch.get_num_threads(), "steps": args.steps,
        "processor": platform.processor() or os.uname().machine,
        "torch": torch.__version__, "transformers": __import__("transformers").__version__,
        "ours_tokens_per_second": round(our_rate), "transformers_tokens_per_second": round(their_rate),
        "ratio": round(our_rate / their_rate, 2),
        "first_losses": (runs[0][0][1], runs[0][1][1]), "last_losses": (runs[-1][0][1], runs[-1][1][1]),
        "largest_relative_difference": difference, "gemm_gflops": round(rate / 1e9, 1),
        "ours_share_of_gemm": round(our_rate * flops / rate, 3),
        "transformers_share_of_gemm": round(their_rate * flops / rate, 3)}


if __name__ == "__main__":
    main()
