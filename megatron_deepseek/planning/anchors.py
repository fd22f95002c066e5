"""Published memory of DeepSeek models, and what the same job comes to here, each for the engine that it was measured
on. The page shows these rows; tests/unit/planning/test_memory.py holds the differences.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_deepseek.planning.engines import MEGATRON, ZERO3, Engine, zero_stage
from megatron_deepseek.planning.gpus import find_gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import OOM, all_ranks, rank_memory, verdict, worst
from megatron_deepseek.planning.state_bytes import state_parts
from megatron_deepseek.settings import Settings

Parse = Callable[[str, int], Settings]

_GIB = 2**30
_V3 = "--bf16 --model deepseek-v3 --mtp-num-layers 0 "
_CUT = _V3 + "--num-layers 4 --moe-layer-freq ([0]*1+[1]*3) "


@dataclass(frozen=True)
class Anchor:
    """`published` GiB of `what`, in `source`; `measure` gives ours of a job of these arguments. `within`: how far we
    may be from it.
    """

    source: str
    what: str
    arguments: str
    ranks: int
    engine: Engine
    measure: Callable[[Job], float]
    published: float
    within: float

    def calculated(self, parse: Parse) -> float:
        """Return our number in GiB."""
        return self.measure(Job(parse(self.arguments, self.ranks), self.engine)) / _GIB


def _states(job: Job) -> float:
    return state_parts(job, 5).device


def _weights_and_gradients(job: Job) -> float:
    states = state_parts(job, 2)
    return states.weights.all + states.gradients.all


def _optimizer(job: Job) -> float:
    return state_parts(job, 2).optimizer.all


def _activations(job: Job) -> float:
    return rank_memory(job, 2).peak.kept


def _peak(job: Job) -> float:
    return worst(all_ranks(job)).peak_bytes


_ANALYSIS = _V3 + ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 16 --expert-model-parallel-size 8 "
                   "--pipeline-model-parallel-layout Etttt|(tttt|)*14tL --global-batch-size 512")
_MCORE = _V3 + ("--pipeline-model-parallel-size 4 --pipeline-schedule Interleaved1F1B --expert-model-parallel-size 64 "
                "--pipeline-model-parallel-layout Ettt|(tttt|)*14ttL --global-batch-size 4096")

ANCHORS = (
    *(Anchor("arXiv 2502.07846", f"states of 4 MoE layers, ZeRO stage {stage}", _ANALYSIS, 1024,
             zero_stage(stage, moments=4), _states, published, 0.04)
      for stage, published in enumerate((81.5, 40.5, 19.9, 9.7))),
    Anchor("arXiv 2603.07685", "V3 on 256 GPUs: weights and gradients", _MCORE, 256, MEGATRON,
           _weights_and_gradients, 36.4, 0.01),
    Anchor("arXiv 2603.07685", "V3 on 256 GPUs: master weights and moments", _MCORE, 256, MEGATRON, _optimizer, 32.1,
           0.01),
    Anchor("arXiv 2603.07685", "V3 on 256 GPUs: activations (of rank 2: 15 chunks of 4 layers, which is inferred)",
           _MCORE, 256, MEGATRON, _activations, 131.0, 0.03),
    Anchor("MooreThreads/SimuMax", "V3 cut to 4 layers, 8 B200, EP8: peak, measured",
           _CUT + "--expert-model-parallel-size 8 --global-batch-size 32", 8, MEGATRON, _peak, 104.30, 0.03),
    Anchor("MooreThreads/SimuMax", "the same, EP4 PP2: peak of the fuller stage, measured",
           _CUT + "--expert-model-parallel-size 4 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout "
           "Ett|ttL --global-batch-size 16", 8, MEGATRON, _peak, 114.00, 0.03))

# ScienceOne's fine-tuning of the 671B model at 32K under ZeRO-3, H100 of 80 GB: GPUs, ranks that share a sequence,
# sequences of a micro-batch, whether states, parameters and checkpoints were offloaded, GB that were seen (None: OOM).
SCIENCE_ONE = ((256, 1, 1, False, None), (256, 4, 1, False, None), (256, 4, 1, True, 25), (256, 4, 2, True, 74),
               (256, 1, 1, True, 30), (256, 8, 1, True, 32), (256, 1, 2, True, None), (128, 8, 2, True, 30))


def science_job(parse: Parse, gpus: int, shared: int, batch: int, offload: bool) -> Job:
    """Return the job of a row of SCIENCE_ONE."""
    host = " --optimizer-cpu-offload --cpu-offloading-num-layers 61" if offload else ""
    return Job(parse(f"{_V3}--seq-length 32768 --context-parallel-size {shared} --micro-batch-size {batch} "
                     f"--recompute-granularity full{host}", gpus), ZERO3)


def rows(parse: Parse) -> Iterator[str]:
    """Yield a row for each anchor."""
    for anchor in ANCHORS:
        ours = anchor.calculated(parse)
        yield (f"| {anchor.source} | {anchor.what} | {anchor.published:.1f} | {ours:.1f} | "
               f"{ours / anchor.published - 1:+.1%} |")


def science_rows(parse: Parse) -> Iterator[str]:
    """Yield a row for each of ScienceOne's runs."""
    gpu = find_gpu("h100")
    for gpus, shared, batch, offload, seen in SCIENCE_ONE:
        ranks = all_ranks(science_job(parse, gpus, shared, batch, offload))
        said, most = verdict(ranks, gpu), worst(ranks)
        yield (f"| {gpus} | {shared} | {batch} | {'yes' if offload else 'no'} | {f'{seen} GB' if seen else 'OOM'} | "
               f"{'OOM' if said == OOM else said} | {most.low / 1e9:.0f} to {most.high / 1e9:.0f} |")
