"""What training engines do differently with the same model: the bytes of a parameter, and who divides them.

    ours       FSDP2 (parallel/data.py): float32 shards, weights gathered in the compute dtype for a whole step,
               gradients of micro-batches summed in float32 before they are reduced once
    megatron   Megatron-LM's distributed optimizer: bf16 weights and float32 gradients whole on each rank, master
               weights and moments divided
    zero3      DeepSpeed ZeRO-3 and its like: all of it divided, weights gathered for one unit of the model at a time

All divide dense parameters among dp x cp ranks and routed experts among edp: two values of d in one rank.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Engine:
    """Bytes of a parameter on a rank, and what of them the data ranks divide.

    `weight` is what layers compute with, `gradient` what micro-batches are summed in, `reduced` a sum over data ranks
    beside it, `master` the optimizer's own weights, `moments` both of AdamW's. `divides_*`: whether data ranks divide
    it; reduced gradients, masters and moments that are not divided belong to plain data parallelism (ZeRO-0).
    `gathers`: weights exist whole only for this many units (layers) at once, None for all through a step. `host`:
    masters, reduced gradients and moments lie in the host's memory.

    `weighs_before`: a token's routing weight is applied before the experts' second product, whose output is then not
    kept. `keeps_output`: a stage keeps what it passed on until its backward, as torch's pipeline stages do;
    `receives_early`: receives are started before a stage needs them, as there (arrivals.py). `logit_bytes`: of a logit
    and what is made of it, which all wait for the backward; None for this project's head, which makes them by chunks.
    `gradient_apart`: a layer's weight gradients exist in the layers' dtype before they are added to the sums.
    """

    name: str
    weight: float = 2
    gradient: float = 4
    reduced: float = 0
    master: float = 4
    moments: float = 8
    divides_weights: bool = False
    divides_gradients: bool = False
    divides_optimizer: bool = True
    gathers: int | None = None
    host: bool = False
    weighs_before: bool = False
    keeps_output: bool = False
    receives_early: bool = False
    logit_bytes: float | None = None
    gradient_apart: bool = False


MEGATRON = Engine("megatron", logit_bytes=2 + 4)  # fused cross-entropy: bf16 logits, float32 exponentials
# Transformers' heads: bf16 and float32 logits, log-probabilities, and a gradient. With parameters in the host's memory
# one unit is gathered at a time: of the runs in docs/planning.md one takes 25 GB, where a unit has 23.
ZERO3 = Engine("zero3", divides_weights=True, divides_gradients=True, gathers=2, logit_bytes=2 + 4 + 4 + 2)
OURS = Engine("ours", reduced=4, keeps_output=True, receives_early=True, gradient_apart=True)
ENGINES = {"ours": OURS, "megatron": MEGATRON, "zero3": ZERO3}


def zero_stage(stage: int, moments: float = 8) -> Engine:
    """Return an engine of 2 + 4 + (4 + `moments`) bytes that divides the optimizer's (stage 1), also gradients (2),
    also weights (3), as in arXiv 1910.02054; stage 0 divides nothing.
    """
    return replace(MEGATRON, name=f"zero{stage}", moments=moments, divides_optimizer=stage > 0,
                   divides_gradients=stage > 1, divides_weights=stage > 2)
