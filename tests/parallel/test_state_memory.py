"""Bytes of weights, gradients and moments through a step of several micro-batches: those of the plan, at their most.

For P parameters in bfloat16 and d data ranks 6 P + 12 P / d: gathered weights and sums of gradients whole, masters and
moments divided. Reduced gradients come as sums go.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from job import own_rows
from small_models import V3_SMALL, random_batch, training_batch
from state_bytes_seen import StatesSeen

from megatron_deepseek.arguments import parse
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.schedule_rules import SCHEDULES
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.state_bytes import state_parts
from megatron_deepseek.runtime.job import training_spec
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer

LENGTH = 8
MODEL = replace(V3_SMALL, num_hidden_layers=4)
PIPELINES = {schedule: f"--pipeline-model-parallel-size 2 --pipeline-schedule {schedule} --global-batch-size 8"
             for schedule in SCHEDULES}


@dataclass(frozen=True)
class Layout:
    """Arguments of a run on some ranks; `model` has what differs from MODEL."""

    arguments: str
    ranks: int
    model: tuple[tuple[str, object], ...] = ()

    @property
    def settings(self) -> Settings:
        text = (f"--model tiny --data-path x --train-iters 1 --seq-length {LENGTH} --global-batch-size 4 --bf16 "
                f"--mtp-num-layers 0 {self.arguments}")
        return replace(parse(text.split(), self.ranks), model=replace(MODEL, **dict(self.model)))


LAYOUTS = {
    "one rank": Layout("", 1),
    "ep": Layout("--expert-model-parallel-size 2", 2),
    "DualPipeV": Layout(PIPELINES["DualPipeV"], 4),
    "dp": Layout("", 2),
    "tp sp": Layout("--tensor-model-parallel-size 2 --sequence-parallel", 4),
    "cp": Layout("--context-parallel-size 2", 2),
    "tied, MTP": Layout(f"{PIPELINES['1F1B']} --mtp-num-layers 2", 2,
                        (("tie_word_embeddings", True), ("num_nextn_predict_layers", 2))),
    "frozen": Layout("--freeze-parameters model.layers.*.mlp.experts.* model.embed_tokens.weight", 2),
    "LoRA": Layout("--load base --lora-rank 2 --lora-target all", 2),
    "moments in bfloat16": Layout("--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16", 2),
    "recomputed": Layout("--recompute-granularity full --expert-model-parallel-size 2", 2),
    **{schedule: Layout(arguments, 2) for schedule, arguments in PIPELINES.items()
       if schedule not in ("DualPipeV", "LoopedBFS")}}
QUICK = ("one rank", "ep", "DualPipeV")


def states_of_a_step(layout: Layout) -> tuple[dict[str, int], int, int]:
    """Return this rank's states at their most, all of them with what lives shortly, and its pipeline rank."""
    settings = layout.settings
    meshes = build_meshes(settings.layout, torch.device("cpu"))
    trainer = Trainer(training_spec(settings), meshes)
    step = own_rows(training_batch(*random_batch(settings.model, settings.batch.global_batch_size, LENGTH)), meshes)
    trainer.train_step(step, learning_rate=1e-3)
    with StatesSeen(trainer) as seen:
        trainer.train_step(step, learning_rate=1e-3)
    return seen.states, seen.most, meshes.rank("pp")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
                                  for name in LAYOUTS])
def test_states_at_their_most_are_those_of_the_plan(ranks, name):
    """Beside them live shortly, in bfloat16, gradients of a layer's experts, and of all that is in no layer or, where
    weight gradients wait, of the stage.
    """
    layout = LAYOUTS[name]
    job = Job(layout.settings, cuda=False, frozen_base=layout.settings.lora is not None)
    for states, most, pp_rank in ranks.run(layout.ranks, states_of_a_step, layout):
        plan = state_parts(job, pp_rank)
        assert states == {"weights": plan.weights.all, "gathered": plan.gathered.all, "sums": plan.gradients.all,
                          "moments": plan.optimizer.all}
        assert plan.reduced.all == 0 and plan.device == sum(states.values())
        assert most <= plan.device + plan.gathered.all


@pytest.mark.slow
def test_stages_that_take_turns_have_less_than_the_plan(ranks):
    """LoopedBFS goes backward through one of a rank's two stages after the other, so their sums do not meet."""
    layout = Layout(PIPELINES["LoopedBFS"], 2)
    for states, _, pp_rank in ranks.run(layout.ranks, states_of_a_step, layout):
        plan = state_parts(Job(layout.settings, cuda=False), pp_rank)
        assert (states["weights"], states["moments"]) == (plan.weights.all, plan.optimizer.all)
        assert states["gathered"] <= plan.gathered.all and states["sums"] <= plan.gradients.all
        assert plan.device / 2 < sum(states.values()) < plan.device


def test_six_and_twelve_bytes(ranks):
    """By hand: P parameters, of which r in routers, whose gathered weights are float32 too."""
    layout = Layout("", 2)
    number, routers = MODEL.num_parameters(), 3 * MODEL.n_routed_experts * MODEL.hidden_size
    for states, *_ in ranks.run(2, states_of_a_step, layout):
        assert sum(states.values()) == 6 * number + 2 * routers + 12 * number // 2


@pytest.mark.slow
def test_what_is_offloaded_or_gathered_by_layers(ranks):
    """On the host reduced gradients lie beside masters and moments. Gathered by layers it is at most the plan's."""
    for arguments in ("--optimizer-cpu-offload", "--data-parallel-sharding-strategy optim_grads_params"):
        layout = Layout(arguments, 2)
        plan = state_parts(Job(layout.settings, cuda=False), 0)
        for states, *_ in ranks.run(2, states_of_a_step, layout):
            assert states["gathered"] <= plan.gathered.all and states["sums"] == plan.gradients.all
            assert states["weights"] == plan.weights.all and states["moments"] == plan.optimizer.all
            assert (plan.reduced.all > 0) == plan.on_host and "reduced" not in states
