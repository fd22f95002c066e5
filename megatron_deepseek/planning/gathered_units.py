"""The weights of a stage as FSDP gathers them: what there is of a unit while it is gathered, and of the one before it.

What all data ranks have sent of a unit is one tensor, which is there until it is unpacked, and in forwards until the
next unit is; where a backward makes a forward again, until its experts have run. Weights of the FP8 recipe are then
made tiles, one after the other, in both orders: as many bytes as before. Where they were gathered once, their tiles
have memory of their own, to which the new ones are copied (ops/fp8/weight.py). With --fp8-param-gather routed experts
are sent as codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.byte_tape import Backward
from megatron_deepseek.planning.held_parameters import largest_products
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.state_bytes import Divided, data_ranks, gathered_weights


@dataclass(frozen=True)
class Gathered:
    """Bytes of the weights of a stage, unit by unit: those in none of its `layers`, and of each layer routed experts
    and all else. `sent`: what all data ranks send of a layer's units; `made`: of the FP8 recipe's largest weight in
    them, what it takes to make its tiles the first time. `ahead`: dense units, and those of routed experts, have other
    data ranks. `from_host`: shards come from the host's memory, as masters, or as what layers compute with (`frozen`).
    `routers`: these are units of their own, whose ends in a backward are known.
    """

    outer: float
    layers: Mapping[int, Divided]
    sent: Mapping[int, Divided]
    made: Mapping[int, Divided]
    ahead: tuple[bool, bool]
    from_host: bool = False
    frozen: bool = False
    routers: bool = False

    @property
    def outer_sent(self) -> float:
        """Return what all data ranks send of the weights outside of layers."""
        return self.outer * self.ahead[0]

    def gathering_experts(self, index: int) -> float:
        """Return what there is while routed experts are gathered again."""
        return self.outer + self.layers[index].all + self.unpacking_experts(index, again=True)

    def unpacking(self, index: int) -> float:
        """Return what there is beside a layer's units while the fuller one is gathered for the first time."""
        dense = self.sent[index].dense + self.made[index].dense
        return max(dense, self.unpacking_experts(index, again=False))

    def unpacking_experts(self, index: int, again: bool) -> float:
        """Return what there is beside gathered experts while they are gathered, the first time or `again`.

        A single data rank copies each weight in the layers' dtype, if it is a master, before that copy is copied; the
        last one's stays until all are made tiles, and that of the larger weight, two thirds of all, until the smaller
        one's is there. From the host come float32 masters, or frozen weights, which the layers' dtype already is.
        """
        own, tiles = self.layers[index].experts, (1 + again) * self.made[index].experts
        if self.ahead[1]:
            return self.sent[index].experts + tiles
        copies = self.from_host or not self.frozen
        third = own / 3 * copies
        first = third * (4 if self.from_host and not self.frozen else 2)
        return max(first, third + tiles)

    def at(self, index: int, after: int | None, experts_over: bool, moment: Backward) -> float:
        """Return what is gathered in a moment of layer `index`'s backward, before that of layer `after`. A unit that
        ends is free before its gradients are summed or reduced.
        """
        dense, experts = self.layers[index].dense, self.layers[index].experts
        coming = self.sent[after].dense if after is not None and self._comes(index, moment) else 0.0
        if moment.ends == "layer":
            return self.outer + coming
        there = 0.0 if experts_over or moment.attends or moment.ends == "experts" else experts
        return self.outer + dense + there + coming + (self.sent[index].experts if moment.reruns else 0.0)

    def _comes(self, index: int, moment: Backward) -> bool:
        """Return whether the next layer's dense unit is on its way in a moment of layer `index`'s backward: torch
        begins to gather it with the unit that was over first in the forward. That is the router's, if it is one; but
        where weight gradients are made apart moments do not say when.
        """
        if not self.layers[index].experts:
            return True
        return bool(moment.ended) if self.routers else not moment.reruns

    def beginning(self, index: int) -> float:
        """Return what is gathered when the backward of layer `index` has just gathered it."""
        own, sent = self.layers[index], self.sent[index]
        return self.outer + own.dense + sent.dense + 2 * self.made[index].dense + sent.experts

    @property
    def all(self) -> float:
        """Return all of them."""
        return self.outer + sum(each.all for each in self.layers.values())

    def entering(self, index: int, before: int | None) -> float:
        """Return what is gathered when the forward of layer `index`, behind that of `before`, has just gathered it."""
        return self.attending(index) + 2 * self.made[index].dense + self.left(before)

    def left(self, before: int | None) -> float:
        """Return what is left of what was sent of a layer behind it, or of what is in no layer (None)."""
        if before is None:
            return self.outer_sent
        return self.sent[before].experts if self.layers[before].experts else self.sent[before].dense

    def attending(self, index: int) -> float:
        """Return what is gathered in the forward of layer `index` before its routed experts are."""
        return self.outer + self.layers[index].dense + self.sent[index].dense

    def forward(self, index: int) -> float:
        """Return what is gathered while the forward of layer `index` runs, its routed experts having been gathered."""
        return self.outer + self.layers[index].all + self.left(index)


def part_of(job: Job, index: int) -> Stage:
    """Return layer `index`, or the MTP module with this id, as a stage of its own."""
    depth = index - job.model.num_hidden_layers
    return Stage(False, (), (depth,), False) if depth >= 0 else Stage(False, (index,), (), False)


def by_layer(job: Job, stage: int) -> Gathered | None:
    """Return the weights of a stage that are gathered unit by unit, None where they stay for the step."""
    return gathered_units(job, stage) if job.freed_by_forwards else None


def gathered_units(job: Job, stage: int) -> Gathered:
    """Return the weights of a stage by the units that are gathered."""
    dense, experts = data_ranks(job)
    layers = {index: gathered_weights(job, [part_of(job, index)], outside=False) for index in job.layers_of(stage)}
    whole = gathered_weights(job, [job.stages[stage]])
    size = job.numbers.element if job.numbers.fp8 and job.settings.base is None else 0
    largest = {index: largest_products(job.model, job.layout, index) for index in layers}
    sent, tiles = 1.0, 1.0  # of experts, in these parts of what they take when they are gathered
    if job.numbers.fp8 and _experts_as_codes(job):
        sent, tiles = 1 / 2, 1 / 8  # their codes stay, and one more order of them is made
    return Gathered(
        whole.dense - sum(each.dense for each in layers.values()), layers,
        {index: Divided(each.dense * (dense > 1), each.experts * (experts > 1) * sent)
         for index, each in layers.items()},
        {index: Divided(size * each.dense, size * each.experts * tiles) for index, each in largest.items()},
        (dense > 1, experts > 1), job.settings.offload.optimizer_cpu_offload, job.settings.lora is not None,
        job.numbers.element < job.numbers.wide and not job.splits_backwards)


def _experts_as_codes(job: Job) -> bool:
    """Return whether data ranks send codes of routed experts: each has as many experts."""
    ranks, layout = data_ranks(job)[1], job.layout
    return job.settings.run.fp8_param_gather and ranks > 1 and job.model.n_routed_experts // layout.ep % ranks == 0
