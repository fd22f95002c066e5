"""A DeepSeek-V3 layer beside transformers', and training steps of whole small models."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from gpu_pieces.timing import Bench, Case, Row, first_line
from torch import nn

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.presets import TINY, V2_LITE, V3
from megatron_deepseek.model.build import BuildOptions, Precision, shape_stages
from megatron_deepseek.model.positions import Positions
from megatron_deepseek.ops.fp8.encoding import quantize_both_ways
from megatron_deepseek.ops.fp8.weight import Fp8Weight
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.planning.flops import model_flops_per_token, peak_flops
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

# One of 32 ranks that share 256 experts has 8, and gets as many rows as it has tokens times 8: here every token goes to
# all of them, which is the same work.
V3_LAYER = replace(V3, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=8, n_group=1, topk_group=1,
                   vocab_size=128, num_nextn_predict_layers=0)
SMALL_LAYER = replace(TINY, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=4, n_group=1, topk_group=1,
                      vocab_size=128, num_nextn_predict_layers=0)
V2_LITE_CUT = replace(V2_LITE, num_hidden_layers=6)


@contextmanager
def one_rank():
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def layer_flops(config: ModelConfig, length: int) -> float:
    """Return the FLOPs of forward and backward of the layer without head, by the rules of model_flops_per_token."""
    head = 6.0 * config.hidden_size * config.vocab_size
    return length * (model_flops_per_token(config, length) - head)


def our_layer(config: ModelConfig, length: int, bench: Bench, fp8: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    stage = Stage(False, (0,), (), False)
    meshes = build_meshes(Layout(), bench.device)
    (part,) = shape_stages(config, [stage], meshes, length,
                           BuildOptions(precision=Precision(torch.bfloat16, None, fp8)))
    part.to_empty(device=bench.device)
    with torch.no_grad():
        for name, tensor in part.state_dict().items():
            norm, bias = name.endswith("norm.weight"), name.endswith("bias")
            tensor.fill_(float(norm)) if norm or bias else tensor.normal_(0, config.initializer_range)
    if fp8:
        hold_in_fp8(part)
    layer, positions = part.model.layers["0"], Positions(part.rope_2SD)
    return lambda x: layer(x, positions, 1)[0]


def hold_in_fp8(part: nn.Module) -> None:
    """Hold weights as FSDP gathers them: already quantised, which a step does once for all its micro-batches."""
    for module in part.modules():
        for name in getattr(module, "weight_gemms", {}):
            weight = getattr(module, name).detach()
            setattr(module, name, nn.Parameter(Fp8Weight(*quantize_both_ways(weight), weight.dtype)))


def their_layer(config: ModelConfig, length: int, bench: Bench) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import DeepseekV3Config, DeepseekV3Model

    theirs = DeepseekV3Config(**config.to_hf_dict())
    theirs._attn_implementation, theirs._experts_implementation = "sdpa", "grouped_mm"
    model = DeepseekV3Model(theirs).to(bench.device, torch.bfloat16)
    return lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state


def layer(bench: Bench) -> Iterator[Row]:
    """Measure forward and backward at sequence 4096; peak memory is that beyond weights and gradients."""
    config, length = (SMALL_LAYER, 64) if bench.small else (V3_LAYER, 4096)
    case = Case(f"hidden {config.hidden_size}, sequence {length}", {}, flops=layer_flops(config, length))
    makers = {"transformers, bf16": lambda: their_layer(config, length, bench),
              "ours, bf16": lambda: our_layer(config, length, bench, False),
              "ours, fp8": lambda: our_layer(config, length, bench, True)}
    for name, make in makers.items():
        try:
            with one_rank():
                yield _layer_row(bench, case, name, make(), config.hidden_size, length)
        except Exception as problem:  # whatever it is, the table is to go on
            yield Row(bench.piece, case.name, name, problem=first_line(problem))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _layer_row(bench: Bench, case: Case, name: str, run, width: int, length: int) -> Row:
    x = torch.randn(1, length, width, device=bench.device).bfloat16().requires_grad_()
    upstream = torch.randn_like(x)

    def step():
        x.grad = None
        run(x).backward(upstream)

    step()
    more = {}
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        more["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    seconds = bench.seconds(step, 20)
    if bench.device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name())):
        more["mfu"] = round(case.flops / seconds / peak, 3)
    return bench.row(case, name, seconds, **more)


def training(bench: Bench) -> Iterator[Row]:
    """Measure steps of the trainer on one device: forward, backward, clipping, AdamW; tokens/s of the median step."""
    tiny = TINY if not bench.small else replace(TINY, num_hidden_layers=2)
    sizes = [("tiny", tiny, 512, 4)] if bench.small else [
        ("tiny", tiny, 2048, 8), ("V2-Lite, 6 layers", V2_LITE_CUT, 4096, 4)]
    for name, config, length, batch in sizes:
        for precision in (Precision(torch.float32, torch.bfloat16), Precision(torch.float32, torch.bfloat16, True)):
            case = Case(name, {}, flops=batch * length * model_flops_per_token(config, length))
            backend = "ours, fp8" if precision.fp8 else "ours, bf16"
            try:
                with one_rank():
                    yield _training_row(bench, case, backend, config, length, batch, precision)
            except Exception as problem:  # whatever it is, the table is to go on
                yield Row(bench.piece, name, backend, problem=first_line(problem))
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


def _training_row(bench: Bench, case: Case, backend: str, config: ModelConfig, length: int, batch: int,
                  precision: Precision) -> Row:
    stage = Stage(True, tuple(range(config.num_hidden_layers)), tuple(range(config.num_nextn_predict_layers)), True)
    trainer = Trainer(TrainingSpec(config, (stage,), "1F1B", length, 1, BuildOptions(precision=precision)),
                      build_meshes(Layout(), bench.device))
    tokens = torch.randint(config.vocab_size, (batch, length + 1), device=bench.device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    made = Batch(tokens_BS=inputs, labels_BS=labels, weights_BS=torch.ones_like(labels, dtype=torch.float32))
    times, losses = [], []
    for _ in range(2 if bench.small else 8):
        begin = time.perf_counter()
        losses.append(trainer.train_step(made, 1e-4).losses.lm_loss)  # a number: waits for the device
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[1 if bench.small else 3:])
    more = {"tokens_per_second": round(batch * length / seconds), "first_loss": losses[0], "last_loss": losses[-1]}
    if bench.device.type == "cuda":
        more["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return bench.row(case, backend, seconds, **more)
