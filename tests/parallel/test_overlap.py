"""The order in which work is issued, from a profiler's trace of gloo ranks: what lies behind what on CUDA.

On a CPU nothing runs side by side, so that no time is saved here; what a device may overlap is what the host issues
before it waits.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from cases import Case
from job import batch, make_batch, spec_of

from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.runtime.profile import all_threads
from megatron_deepseek.training.trainer import Trainer

pytestmark = pytest.mark.slow

REDUCED, ENTERED = "FSDP::post_backward_reduce", "FSDP::pre_backward"
ATTENTION = ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math_for_cpu")
ATTENTION_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
WAITED = "exchange is waited for"


@dataclass(frozen=True)
class Deep(Case):
    """Two layers on each stage."""

    @property
    def num_layers(self) -> int:
        return 2 * self.num_stages


@dataclass(frozen=True)
class Span:
    """Of a trace: what was done, in which thread, from when to when."""

    name: str
    thread: int
    begin: float
    end: float

    def holds(self, other: "Span") -> bool:
        return self.begin <= other.begin and other.end <= self.end


def trace(case: Case) -> list[Span]:
    """A training step, by its beginnings."""
    with_mark = MicroBatchOverlap.wait

    def wait(self, work):
        with torch.profiler.record_function(WAITED):
            with_mark(self, work)

    MicroBatchOverlap.wait = wait
    trainer = Trainer(spec_of(case), build_meshes(case.layout, torch.device("cpu")))
    own = make_batch(*batch(case.model, case.microbatches, 0))
    with torch.profiler.profile(experimental_config=all_threads()) as profile:
        trainer.train_step(own, learning_rate=0.0)
    spans = [Span(e.name, e.thread, e.time_range.start, e.time_range.end) for e in profile.events()]
    return sorted(spans, key=lambda span: span.begin)


@pytest.mark.parametrize("case", [
    Deep(dp=2, pp=2, schedule="1F1B", microbatches=2),
    Deep(dp=2, pp=2, schedule="LoopedBFS", virtual=2, microbatches=2)], ids=str)
def test_gradients_are_reduced_behind_the_last_backward(ranks, case):
    """A layer's reduction is issued before the backward of the layer before it begins, and once a step."""
    for spans in ranks.run(case.layout.world_size, trace, case):
        events = [span.name.split(" (") for span in spans if span.name.startswith((REDUCED, ENTERED))]
        order = [(kind, where[0].rstrip(")")) for kind, *where in events if where]
        layers = {where for _, where in order if where.rsplit(".", 1)[-1].isdigit()}
        assert len(layers) == case.num_layers // case.pp
        for layer in layers:
            before = ".".join([*layer.split(".")[:-1], str(int(layer.split(".")[-1]) - 1)])
            assert order.count((REDUCED, layer)) == 1
            if before in layers:
                last_entered = max(at for at, each in enumerate(order) if each == (ENTERED, before))
                assert order.index((REDUCED, layer)) < last_entered, order


def hidden_behind(spans: list[Span]) -> set[str]:
    """What other threads computed while a thread waited for an exchange of tokens."""
    waits = [span for span in spans if span.name == WAITED]
    computed = [span for span in spans if span.name.startswith("aten::")]
    return {span.name for span in computed for wait in waits if span.thread != wait.thread and wait.holds(span)}


def test_tokens_travel_behind_the_other_chunk_of_a_pair(ranks):
    """Attention of a forward while a backward's tokens travel, and the other way round; without turns, of neither. A
    forward goes first, so that it is the attention of its second layer which a backward waits behind.
    """
    case = Case(pp=2, dp=2, ep=2, schedule="DualPipeV", virtual=2, microbatches=4)
    for spans in ranks.run(4, trace, Deep(**vars(case) | {"turns": True})):
        hidden = hidden_behind(spans)
        assert hidden & {*ATTENTION} and ATTENTION_BACKWARD in hidden
    for spans in ranks.run(4, trace, case):
        assert any(span.name == WAITED for span in spans) and not hidden_behind(spans)
        reduced = Counter(span.name for span in spans if span.name.startswith(f"{REDUCED} ("))
        assert reduced and set(reduced.values()) == {1}, "deferred weight gradients are reduced with the others"
