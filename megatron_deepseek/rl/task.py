"""Reinforcement learning as a task: prompts for data, group-relative advantages for an objective."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.evaluation.while_training import TrainingTasks
from megatron_deepseek.finetuning.data import with_tokenizer
from megatron_deepseek.rl.collecting import Collector, PromptSource
from megatron_deepseek.rl.held_out import HeldOut
from megatron_deepseek.rl.judging import Judge
from megatron_deepseek.rl.maker import RolloutMaker
from megatron_deepseek.rl.objective import GroupRelative
from megatron_deepseek.rl.prompts import Prompts, read_prompts
from megatron_deepseek.rl.records import Records
from megatron_deepseek.rl.reference import Reference
from megatron_deepseek.rl.rollout.engine import RolloutEngine
from megatron_deepseek.rl.rows import RowShape
from megatron_deepseek.runtime.first_rank import await_check, tell_checked
from megatron_deepseek.runtime.job import run_job
from megatron_deepseek.runtime.task import Prepared, RunData, Task
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer


def reinforce(settings: Settings) -> None:
    """Run the job of `settings` on this rank. A user's mistake in data or checkpoint ends it with status 2."""
    run_job(Reinforcement(), settings)


class Reinforcement(Task):
    """The task of reinforcement learning. Rank 0 reads the prompts, and keeps them."""

    def __init__(self):
        self._prompts: Prompts | None = None
        self._held_out: Prompts | None = None
        self._tasks = TrainingTasks()

    def check(self, settings: Settings) -> Settings:
        settings = with_tokenizer(settings)
        self._tasks.load(settings)
        self._prompts = _read("--prompts", settings.reinforcement.prompts, settings)
        if settings.reinforcement.eval_prompts:
            self._held_out = _read("--eval-prompts", settings.reinforcement.eval_prompts, settings)
        tell_checked()
        return settings

    def wait(self) -> None:
        await_check()

    def prepare(self, settings: Settings) -> Prepared:
        settings = with_tokenizer(settings)
        prepared = Prepared(settings, _not_open, GroupRelative(settings.policy_loss, entropy=True))
        return replace(prepared, before_loading=partial(self._with_trainer, prepared))

    def _with_trainer(self, prepared: Prepared, trainer: Trainer, origin: str | None) -> Prepared:
        """Return the task with what makes its batches, which needs the trainer."""
        return replace(prepared, open_data=partial(self._open, trainer, origin), before_loading=None)

    def _open(self, trainer: Trainer, origin: str | None, settings: Settings, state: TrainState,
              say: Callable[[str], None]) -> RunData:
        reinforcement, rollout, loss = settings.reinforcement, settings.rollout, settings.policy_loss
        tokenizer = build_tokenizer(settings.data.tokenizer_type, settings.data.tokenizer_model)
        engine = RolloutEngine(trainer, rollout, tokenizer, (tokenizer.eod,), settings.data.seq_length)
        judge = Judge(reinforcement, rollout.max_tokens, say)
        source = PromptSource(self._prompts, settings.run.seed)
        rounds = reinforcement.max_sampling_rounds if reinforcement.dynamic_sampling else None
        collector = Collector(source, engine, judge, rollout, loss, rounds, settings.run.seed)
        reference = Reference(settings, trainer, origin, say) if loss.kl != "none" and loss.kl_beta else None
        records = Records(settings.run.save, state.iteration, say) \
            if settings.run.save is not None and dist.get_rank() == 0 else None
        maker = RolloutMaker(settings, row_shape(settings, trainer, tokenizer.eod), engine, collector, judge, reference,
                             records)
        validate = self._evaluation(settings, engine, judge) if settings.run.eval_interval else None
        return RunData(None, validate, periodic=self._tasks.periodic(settings), maker=maker)

    def _evaluation(self, settings: Settings, engine: RolloutEngine, judge: Judge) -> HeldOut:
        told = [self._held_out.prompts if self._held_out is not None else None]
        dist.broadcast_object_list(told)
        name = Path(settings.reinforcement.eval_prompts[0]).name
        return HeldOut(name, told[0], engine, judge, settings.rollout)


def _read(option: str, patterns: Sequence[str], settings: Settings) -> Prompts:
    return read_prompts(option, patterns, settings.reinforcement, settings.data, settings.rollout.max_tokens,
                        partial(print, flush=True))


def row_shape(settings: Settings, trainer: Trainer, pad: int) -> RowShape:
    """Return the shape of the rows that this job trains on; `pad` is the id behind a row's samples."""
    layout = settings.layout
    return RowShape(settings.data.seq_length, settings.batch.micro_batch_size, pad, trainer.meshes.rank("dp"),
                    layout.dp, settings.pipeline.schedule, layout.pp)


def _not_open(*_) -> RunData:
    raise AssertionError("the data is opened with the trainer")
