"""Published speeds of V3 against planned ones, for docs/planning.md (page.py)."""

from collections.abc import Callable, Iterator

from megatron_deepseek.planning.engines import MEGATRON
from megatron_deepseek.planning.gpus import find_gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.operations import step_of_operations
from megatron_deepseek.planning.step_time import step_time
from megatron_deepseek.settings import Settings

Parse = Callable[[str, int], Settings]

# (GPUs, GPU, tokens a second and GPU, plan's schedule, arguments); NVIDIA-NeMo/Megatron-Bridge docs/performance-summary
# but for the first, arXiv 2505.09343 table 4. All at 4,096 tokens with balanced experts.
PUBLISHED = (
    (2048, "h800", 1542, "DualPipe", "--fp8-format e4m3 --mtp-num-layers 0 --pipeline-model-parallel-size 16 "
     "--expert-model-parallel-size 64 --global-batch-size 15360"),
    (256, "b200", 2815, None, "--fp8-format e4m3 --pipeline-model-parallel-size 16 --expert-model-parallel-size 8 "
     "--global-batch-size 4096"),
    (256, "b200", 3328, None, "--fp8-format e4m3 --pipeline-model-parallel-size 8 --expert-model-parallel-size 32 "
     "--num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4096"),
    (256, "b300", 3131, None, "--fp8-format e4m3 --pipeline-model-parallel-size 16 --expert-model-parallel-size 8 "
     "--global-batch-size 4096"),
    (256, "gb200", 3139, None, "--mtp-num-layers 0 --pipeline-model-parallel-size 4 --expert-model-parallel-size 64 "
     "--num-virtual-stages-per-pipeline-rank 4 --global-batch-size 4096"),
    (256, "gb200", 4912, None, "--fp8-format e4m3 --pipeline-model-parallel-size 4 --expert-model-parallel-size 64 "
     "--num-virtual-stages-per-pipeline-rank 4 --global-batch-size 4096"),
    (256, "gb300", 6338, None, "--fp8-format e4m3 --pipeline-model-parallel-size 2 --expert-model-parallel-size 32 "
     "--num-virtual-stages-per-pipeline-rank 8 --global-batch-size 4096"))
TABLE_4 = {"F": 1.13, "B": 1.99, "W": 0.48, "pair": 13.95}  # seconds of a step
OPTIMIZER, STEP = 0.29, 19.926


def rows(parse: Parse) -> Iterator[str]:
    """Yield a row for each published run."""
    for gpus, name, published, schedule, arguments in PUBLISHED:
        gpu = find_gpu(name)
        settings = parse(f"--model deepseek-v3 --bf16 --moe-router-force-load-balancing --moe-ranks-per-node "
                         f"{gpu.scale_up_gpus} {arguments}", gpus)
        planned = step_time(Job(settings, MEGATRON, schedule), gpu).tokens_per_second_per_gpu
        layout, form = settings.layout, "FP8" if settings.run.fp8_format else "BF16"
        words = (f"{form}, PP{layout.pp} {schedule or settings.pipeline.schedule}, EP{layout.ep}, "
                 f"{settings.batch.global_batch_size:,} sequences")
        yield f"| {gpus:,} {name} | {words} | {published:,} | {planned:,.0f} | {planned / published - 1:+.0%} |"


def table_4() -> str:
    """Return the simulated step of table 4 in words."""
    seconds = step_of_operations("DualPipe", 16, 120, TABLE_4) + OPTIMIZER
    return f"{seconds:.2f} s, measured {STEP:.2f} s ({seconds / STEP - 1:+.1%})"
