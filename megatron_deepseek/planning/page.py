"""docs/planning.md, made by `python tools/plan.py table > docs/planning.md`: what fits where, and how we know."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_deepseek.model.architecture.presets import PRESETS
from megatron_deepseek.planning import anchors, page_time, sizing
from megatron_deepseek.planning.gpus import Gpu, find_gpu, load_gpus
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import all_ranks, worst
from megatron_deepseek.planning.page_text import TEXT
from megatron_deepseek.planning.report import GIB
from megatron_deepseek.planning.tasks import Task, cache_bytes_of_token
from megatron_deepseek.settings import Settings

Parse = Callable[[str, int], Settings]  # arguments of a run, and its ranks

MODELS = (("deepseek-v2-lite", "V2-Lite"), ("deepseek-v2", "V2"), ("deepseek-v3", "V3, R1"))
OTHERS = tuple(preset for preset in PRESETS if preset.name not in ("tiny", *(name for name, _ in MODELS)))
TASKS = (("pretrain", "pre-training, full fine-tuning"), ("lora", "LoRA"), ("qlora", "QLoRA"), ("grpo", "GRPO"),
         ("serve", "serving"))
USERS, CONTEXT = 64, 8192
GPU_NAMES = ("h100", "h200", "b200")
_MOST_SHARED = 32  # ranks of a rollout engine


def page(parse: Parse) -> str:
    """Return the whole page."""
    settings = {name: parse(f"--bf16 --model {name} --recompute-granularity full", 1) for name, _ in MODELS}
    return TEXT.format(
        anchors="\n".join(anchors.rows(parse)), science="\n".join(anchors.science_rows(parse)),
        ladder="\n".join(ladder(parse)), counts="\n".join(counts(settings, find_gpu("h100"))),
        fewest="\n".join(fewest(settings)), others="\n".join(other_rows(parse)), gpus="\n".join(gpu_rows()),
        times="\n".join(page_time.rows(parse)), table4=page_time.table_4(), users=USERS, context=CONTEXT)


def task_of(name: str, gpus: int) -> Task:
    """Return a task of the page: users and context as it says, rollout engines on up to 32 ranks, FP8 not used."""
    return Task(name, users=USERS, context=CONTEXT, rollout_ranks=min(gpus, _MOST_SHARED))


def counts(settings: dict[str, Settings], gpu: Gpu) -> Iterator[str]:
    """Yield a row for each number of GPUs and model: what the fullest rank may need for each task, and the layout."""
    for name, title in MODELS:
        for gpus in sizing.COUNTS:
            cells = []
            for task, _ in TASKS:
                found = sizing.sized(settings[name], gpus, gpu, task_of(task, gpus))
                mark = {"fits": "", "tight": " ?", "oom": " ✗"}[found.verdict]
                cells.append(f"{found.memory.high / GIB:,.0f}{mark} ({found.words})")
            yield f"| {title} | {gpus} | " + " | ".join(cells) + " |"


def fewest(settings: dict[str, Settings]) -> Iterator[str]:
    """Yield a row for each model and task: the fewest GPUs of each kind that hold it without doubt."""
    for name, title in MODELS:
        for task, words in TASKS:
            cells = []
            for gpu in map(find_gpu, GPU_NAMES):
                found = next(((gpus, each) for gpus in sizing.COUNTS for each in [
                    sizing.sized(settings[name], gpus, gpu, task_of(task, gpus))] if each.verdict == "fits"), None)
                cells.append("none of these" if found is None else f"{found[0]} ({found[1].words})")
            yield f"| {title} | {words} | " + " | ".join(cells) + " |"


def other_rows(parse: Parse) -> Iterator[str]:
    """Yield a row for each other released model: the fewest H100 for each task."""
    gpu = find_gpu("h100")
    for preset in OTHERS:
        settings = parse(f"--bf16 --model {preset.name} --recompute-granularity full", 1)
        cells = []
        for task in ("finetune", "lora", "qlora", "serve"):
            found = sizing.fewest(settings, gpu, task_of(task, 1))
            cells.append("none of these" if found is None else f"{found[0]} ({found[1].words})")
        model = preset.config
        yield (f"| {preset.name} | {model.main_parameters() / 1e9:.2f} | " + " | ".join(cells)
               + f" | {cache_bytes_of_token(model) / 1000:.0f} |")


LADDER = (
    ("as the report: FP8, modules recomputed", "--fp8-format e4m3 --recompute-granularity selective"),
    ("bf16, nothing recomputed", ""),
    ("bf16, modules recomputed", "--recompute-granularity selective"),
    ("FP8, whole layers recomputed", "--fp8-format e4m3 --recompute-granularity full"),
    ("the same, 32 micro-batches", "--fp8-format e4m3 --recompute-granularity full --global-batch-size 4096"),
    ("the same, moments in bf16", "--fp8-format e4m3 --recompute-granularity full --global-batch-size 4096 "
     "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"),
    ("FP8, whole layers recomputed, 1F1B", "--fp8-format e4m3 --recompute-granularity full --pipeline-schedule 1F1B"),
    ("bf16, modules recomputed, 1F1B", "--recompute-granularity selective --pipeline-schedule 1F1B"))


def ladder(parse: Parse) -> Iterator[str]:
    """Yield rows of V3 on 2,048 GPUs in the report's layout, from what it says to what fits."""
    base = ("--bf16 --model deepseek-v3 --pipeline-model-parallel-size 16 --pipeline-schedule DualPipeV "
            "--expert-model-parallel-size 64 ")
    for words, arguments in LADDER:
        batch = "" if "--global-batch-size" in arguments else "--global-batch-size 15360 "
        job = Job(parse(base + batch + arguments, 2048))
        most = worst(all_ranks(job))
        even = worst(all_ranks(replace(job, imbalance=1.25), 1.25))
        yield (f"| {words} | {most.states.device / GIB:.1f} | {most.receive / GIB:.1f} | "
               f"{most.activations / GIB:.1f} | {most.peak_bytes / GIB:.1f} | {even.peak_bytes / GIB:.1f} | "
               f"{most.low / GIB:.0f} to {most.high / GIB:.0f} |")


def gpu_rows() -> Iterator[str]:
    """Yield a row for each known GPU."""
    for gpu in load_gpus().values():
        fp8 = "-" if gpu.fp8_tflops is None else f"{gpu.fp8_tflops:g}"
        yield (f"| {gpu.name} | {gpu.bf16_tflops:g} / {fp8} | {gpu.memory_bytes / GIB:.1f} | {gpu.memory_tb_s:g} | "
               f"{gpu.scale_up_gb_s:g} x {gpu.scale_up_gpus} | {gpu.network_gb_s:g} | {', '.join(gpu.sources)} |")
