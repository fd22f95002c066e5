"""What a rank does in a test of GRPO: steps on random samples, whose old log-probabilities it scores itself."""

from dataclasses import dataclass, replace

import torch
from cases import Case
from job import FLOAT64, LEARNING_RATE, Record, Step, named, open_adapters, spec_of, whole
from rollout_samples import distances, random_samples

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.planning.pipeline_balance import stages
from megatron_deepseek.rl.advantages import group_advantages
from megatron_deepseek.rl.objective import GroupRelative
from megatron_deepseek.rl.rows import RowShape, pack_samples
from megatron_deepseek.rl.samples import OLD, REFERENCE, ROLLOUT
from megatron_deepseek.rl_settings import PolicyLossSettings
from megatron_deepseek.training.scoring import Scores
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LENGTH, SAMPLES, GROUP = 16, 22, 3
SETTINGS = {
    "defaults": PolicyLossSettings(),
    "dapo": PolicyLossSettings(loss_aggregation="token-mean", clip_high=0.28, kl="k3", dual_clip=1.3, overlong="mask"),
    "v3.2": PolicyLossSettings(advantage="none", loss_aggregation="constant", loss_constant=7, kl="unbiased",
                               kl_beta=0.3, off_policy_mask_delta=0.02, temperature=0.7),
    "gspo": PolicyLossSettings(ratio="sequence", clip_low=0.05, clip_high=0.1, kl="unbiased", temperature=1.4,
                               rollout_correction="sequence-truncate", rollout_correction_threshold=1.1),
    "cispo": PolicyLossSettings(ratio="cispo", advantage="population-std", off_policy_mask_delta=0.05,
                                rollout_correction="token-mask", rollout_correction_threshold=1.2),
}


@dataclass(frozen=True)
class PolicyCase(Case):
    """A layout with settings by name; `kept`: whether samples were drawn among some ids alone."""

    policy: str = "defaults"
    kept: bool = False

    def shape(self, dp_rank: int) -> RowShape:
        return RowShape(LENGTH, self.micro_batch_size, 0, dp_rank, self.dp, self.schedule, self.pp)


def run_policy(case: PolicyCase, num_steps: int = 3) -> Record:
    return _train(case, spec_of(case, FLOAT64, LENGTH), case.layout, num_steps)


def run_alone(case: PolicyCase, num_steps: int = 3) -> Record:
    """What one process computes, which takes the batch as a whole, without blank rows, and recomputes nothing."""
    build = replace(spec_of(case, FLOAT64, LENGTH).build, loss=case.reference.loss, reshard_after_forward=False)
    rows = sum(int(pack_all(case, rank).batch.real_BS.any(1).sum()) for rank in range(case.dp))
    spec = replace(spec_of(case, FLOAT64, LENGTH), stages=stages(case.model, 1, LENGTH), schedule="none", build=build,
                   micro_batch_size=rows)
    alone = replace(case, dp=1, pp=1, schedule="none", micro_batch_size=rows)
    return _train(alone, spec, Layout(), num_steps)


def pack_all(case: PolicyCase, dp_rank: int):
    settings = SETTINGS[case.policy]
    samples, rewards = random_samples(SAMPLES, GROUP, LENGTH, case.model.vocab_size, case.kept)
    advantages = group_advantages(rewards, [sample.group for sample in samples], settings)
    distant = {name: distances(samples, seed, scale) for seed, (name, scale) in enumerate(
        [(OLD, 0.2), (REFERENCE, 0.4), (ROLLOUT, 0.3)])}
    return pack_samples(samples, advantages.values_N, case.shape(dp_rank), distant, settings.overlong == "mask")


def _train(case: PolicyCase, spec: TrainingSpec, layout: Layout, num_steps: int) -> Record:
    """The first step has no old log-probabilities, as right after a rollout; others have the first one's, and noise."""
    meshes = build_meshes(layout, torch.device("cpu"))
    objective = GroupRelative(SETTINGS[case.policy], entropy=case.chunk > 0)
    trainer, record = Trainer(spec, meshes, objective), Record()
    open_adapters(trainer)
    batch = near(trainer, objective, pack_all(case, meshes.rank("dp")).batch)
    first = replace(batch, per_token={name: each for name, each in batch.per_token.items() if name != OLD})
    for step in range(num_steps):
        if step == num_steps - 1:  # an evaluation before it must not show in a step
            record.evaluation = trainer.evaluate(batch)
        result = trainer.train_step(batch if step else first, learning_rate=LEARNING_RATE)
        gradients = {key: whole(parameter.grad) for key, parameter in named(trainer, "named_parameters")}
        record.steps.append(Step(result.losses, result.grad_norm, result.expert_counts, result.dropped, gradients))
    record.weights = {key: whole(value) for how in ("named_parameters", "named_buffers")
                      for key, value in named(trainer, how)}
    record.scores = Scores(torch.zeros(1))  # those of the samples are in the losses
    return record


def near(trainer: Trainer, objective: GroupRelative, batch: Batch) -> Batch:
    """The batch with log-probabilities of other models that lie as far from the trainer's as its inputs say."""
    scores_BS = trainer.score(batch, distribution=objective.distribution(batch)).log_probabilities_BS
    others = {name: batch.per_token[name] + scores_BS for name in (OLD, REFERENCE, ROLLOUT)}
    return replace(batch, per_token={**batch.per_token, **others})
