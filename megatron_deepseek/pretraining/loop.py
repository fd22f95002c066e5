"""Pre-training: the loop of steps, validations and saves, from settings to a trained checkpoint."""

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import Sampler, read_ahead
from megatron_deepseek.data.blend import SPLITS
from megatron_deepseek.data.pretraining import open_datasets, shared_plan
from megatron_deepseek.data.table import describe_split
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.device import is_accelerator, max_memory, product_name
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job, limit_waiting
from megatron_deepseek.planning.flops import model_flops_per_token, peak_flops
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.pretraining.export import export, keep_beside
from megatron_deepseek.runtime.decision import Start, overwrite, share
from megatron_deepseek.runtime.failure import guarded
from megatron_deepseek.runtime.health import LabelWatch, NotFinite, SpikeWatch, find_origin
from megatron_deepseek.runtime.interruptions import Interruptions
from megatron_deepseek.runtime.metrics import StepMetrics
from megatron_deepseek.runtime.profile import profiler
from megatron_deepseek.runtime.recorded import Job, record
from megatron_deepseek.runtime.report import Report, open_report
from megatron_deepseek.runtime.resume import (
    describe,
    describe_changes,
    go_on,
    num_samples,
    check_and_decide,
    resume,
    save_lock,
    this_job,
)
from megatron_deepseek.runtime.saving import Saver, what_stays
from megatron_deepseek.runtime.user_errors import end_on_user_error
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.next_token import SourceSum, by_source
from megatron_deepseek.training.schedules import bias_rate, learning_rate, schedule_of
from megatron_deepseek.training.timeline import global_batch_size
from megatron_deepseek.training.trainer import StepResult, StopFlags, Trainer, TrainingSpec


def pretrain(settings: Settings) -> None:
    """Run the job of `settings` on this rank. A user's mistake in data or checkpoint ends it with status 2."""
    guarded(_pretrain, 60 * settings.run.distributed_timeout_minutes)(settings, time.monotonic())


def _pretrain(settings: Settings, begun: float) -> None:
    job = this_job()
    lock = save_lock(settings, job)
    start = check_and_decide(settings, job, lock)
    device = choose_device()
    join_job(device, settings.run.distributed_timeout_minutes)
    with end_on_user_error(lock=lock):
        start = share(start, settings.run.save)
    meshes = build_meshes(settings.layout, device)
    trainer = Trainer(training_spec(settings), meshes)
    limit_waiting(settings.run.distributed_timeout_minutes)
    settings, state = go_on(settings, resume(start, trainer))
    with _open_report(settings, start, state) as report:
        if dist.get_rank() == 0:
            with end_on_user_error():
                describe(report, settings, trainer, start, state)
        run = Run(settings, trainer, report, start, state, begun, job)
        run.train()
        export(settings.run, run.state.iteration, report)
        with end_on_user_error():
            report.close()
    dist.barrier()
    if lock is not None:
        lock.release()
    dist.destroy_process_group()


def _open_report(settings: Settings, start: Start, state: TrainState) -> Report:
    """Open the report on rank 0; the others' says nothing.

    What --overwrite removes is removed now, after all checks of the user's input.
    """
    if dist.get_rank() != 0:
        return Report()
    with end_on_user_error():
        removed = overwrite(settings.run.save) if start.overwrite else None
        report = open_report(settings.run, state.iteration)
    if removed is not None:
        report.message(removed)
    return report


def training_spec(settings: Settings) -> TrainingSpec:
    """Return what this job builds. With --bf16 master weights and gradients stay float32."""
    stages = resolve(settings.model, settings.pipeline, settings.layout.pp, settings.data.seq_length)
    return TrainingSpec(
        model=settings.model, stages=stages, schedule=settings.pipeline.schedule,
        seq_length=settings.data.seq_length, micro_batch_size=settings.batch.micro_batch_size,
        optimizer=settings.optimizer,
        build=BuildOptions(
            precision=Precision(torch.float32, torch.bfloat16 if settings.run.bf16 else None,
                                fp8=settings.run.fp8_format is not None, fp8_gather=settings.run.fp8_param_gather),
            loss=settings.loss, recompute=settings.recompute, communication=settings.communication,
            offload=settings.offload, reshard_after_forward=settings.run.sharding == "optim_grads_params",
            frozen=settings.run.freeze_parameters,
            seed=settings.run.seed))


class Run:
    """The loop of one job: steps, validation, checkpoints, until train_iters or something that ends it before."""

    def __init__(self, settings: Settings, trainer: Trainer, report: Report, start: Start, state: TrainState,
                 begun: float, job: Job):
        self.settings, self.trainer, self.report, self.state = settings, trainer, report, state
        with end_on_user_error():
            plan = shared_plan(settings.data, num_samples(settings, state), report.message)
        train, valid, _ = open_datasets(settings.data, plan)
        for split, each in zip(SPLITS, plan.splits):
            for line in describe_split(split, each) if each is not None else ():
                report.message(line)
        eod = None
        if settings.data.reset_attention_mask:
            eod = build_tokenizer(settings.data.tokenizer_type, settings.data.tokenizer_model).eod
        name = plan.splits[0].sources[0].prefix
        self.train_data = Sampler(train, settings.model.vocab_size, name, eod)
        self.valid_data = Sampler(valid, settings.model.vocab_size, name, eod) if valid is not None else None
        recorded = record(settings, start.origin, job) if dist.get_rank() == 0 else None
        if recorded is not None and state.iteration < settings.run.train_iters:
            describe_changes(report, start, recorded)
        self.saver = Saver(settings.run, settings.model, trainer, report, state.iteration if start.is_saved else None,
                           recorded, lambda: keep_beside(settings, start), start.lock)
        self.saver.keep_assets()
        self.interruptions = Interruptions(settings.run, dist.get_rank() == 0, begun)
        self.not_finite = NotFinite(settings.run.nan_policy, settings.run.max_skipped_steps)
        self.spikes, self.labels = SpikeWatch(), LabelWatch()
        self.schedule = schedule_of(settings.learning_rate, settings.run, settings.batch, state)
        self.flops_per_token = model_flops_per_token(settings.model, settings.data.seq_length)

    def train(self) -> None:
        if self.state.iteration == 0:
            self._validate()
        with self.interruptions.handling():
            try:
                self._steps()
            except FloatingPointError:
                self.saver.finish()  # a save on its way is that of a healthy step
                raise
            self.saver.save(self.state)
            save = self.settings.run.save
            with end_on_user_error(f"; it was the last of this run: {what_stays(save)}" if save is not None else ""):
                self.saver.close()

    def _steps(self) -> None:
        with profiler(self.settings.run, dist.get_rank()) as profile:
            for batch in read_ahead(self._read, self._requests()):
                stop_flags = self._step(batch)
                profile.step()
                if self._between_steps(stop_flags):
                    break

    def _read(self, *request) -> Batch:
        """Read a batch, ready to be copied to the device. A thread calls it while the step before is made."""
        batch = self.train_data.batch(*request)
        return batch.pinned() if is_accelerator(self.trainer.meshes.device) else batch

    def _between_steps(self, stop_flags: StopFlags) -> bool:
        """Make the validation and the checkpoint that are due. Return whether the run leaves here."""
        run, done = self.settings.run, self.state.iteration
        leave = stop_flags.leave or (run.exit_interval is not None and done % run.exit_interval == 0)
        if run.eval_interval and (done % run.eval_interval == 0 or done == run.train_iters):
            self._validate()
        if stop_flags.leave:
            self.report.message(f"leaving after iteration {done} {self.interruptions.reason()}")
        if leave or stop_flags.save or (run.save_interval and done % run.save_interval == 0):
            self.saver.save(self.state)
            self.interruptions.saved()
        self.saver.poll()
        return leave

    def _requests(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield the arguments of `Sampler.batch` for each remaining step."""
        consumed, batch = self.state.consumed_samples, self.settings.batch
        for _ in range(self.state.iteration, self.settings.run.train_iters):
            size = global_batch_size(batch, consumed)
            yield consumed, size, batch.micro_batch_size, *self._data_rank()
            consumed += size

    def _data_rank(self) -> tuple[int, int]:
        return self.trainer.meshes.rank("dp"), self.settings.layout.dp

    def _step(self, batch: Batch) -> StopFlags:
        begin, settings, state = time.perf_counter(), self.settings, self.state
        rate, size = learning_rate(self.schedule, state.consumed_samples), batch.num_rows * settings.layout.dp
        batch = batch.to(self.trainer.meshes.device)
        result = self.trainer.train_step(batch, rate, bias_rate(settings.loss, state, size),
                                         self.interruptions.stop_flags)
        seconds = time.perf_counter() - begin
        self._check_health(result, batch)
        self.state = state.after(size, result.updated)
        self.report.step(self._metrics(result, rate, size * settings.data.seq_length, seconds))
        return result.stop_flags

    def _check_health(self, result: StepResult, batch: Batch) -> None:
        """Report what is wrong with a step. Raise FloatingPointError where a step that is not finite ends the run."""
        iteration = self.state.iteration + 1
        skipped = self.not_finite.check(iteration, result, lambda: find_origin(self.trainer, batch))
        unlabelled = self.labels.see(iteration, result.losses.num_labels)
        spike = self.spikes.see(iteration, result.losses.lm_loss) if result.losses.num_labels else None
        for line in (skipped, unlabelled, spike):
            if line is not None:
                self.report.message(line)

    def _metrics(self, result: StepResult, rate: float, tokens: int, seconds: float) -> StepMetrics:
        losses, mfu, peak_memory = result.losses, None, None
        device = self.trainer.meshes.device
        if is_accelerator(device):
            peak = peak_flops(product_name(device))
            mfu = tokens / seconds * self.flops_per_token / (peak * dist.get_world_size()) if peak else None
            memory = torch.tensor(max_memory(device), device=device)
            dist.all_reduce(memory, dist.ReduceOp.MAX)
            peak_memory = memory.item()
        balance = losses.balance_loss if self.settings.loss.balance_type != "none" else None
        spread = self.settings.layout.ep * self.settings.layout.etp > 1
        limited = self.settings.loss.moe_expert_capacity_factor is not None
        source_loss, source_tokens = by_source(self.train_data.source_names, losses.sources)
        return StepMetrics(
            iteration=self.state.iteration,
            lm_loss=losses.lm_loss,
            mtp_loss=losses.mtp_loss,
            balance_loss=balance,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=tokens,
            step_seconds=seconds,
            mfu=mfu,
            peak_memory_bytes=peak_memory,
            moe_bytes_within_node=result.traffic.within_node if spread else None,
            moe_bytes_across_nodes=result.traffic.across_nodes if spread else None,
            checkpoint_stall_seconds=self.saver.take_stall(),
            skipped=None if result.updated else True,
            source_loss=source_loss,
            source_tokens=source_tokens,
            moe_dropped_fraction=result.dropped if limited else None,
            moe_crossings_per_token=result.cross_node_sends or None)

    def _validate(self) -> None:
        """Report the mean losses of eval_iters batches, the same ones every time."""
        run, batch = self.settings.run, self.settings.batch
        if self.valid_data is None or not run.eval_iters:
            return
        batches = self.valid_data.evaluation(run.eval_iters, batch.global_batch_size, batch.micro_batch_size,
                                             *self._data_rank())
        losses = [self.trainer.evaluate(each.to(self.trainer.meshes.device)) for each in batches]
        if not any(each.num_labels for each in losses):
            self.report.message("validation: all labels are masked; its loss of 0 says nothing")
        sums = [SourceSum(*map(sum, zip(*batches))) for batches in zip(*[each.sources for each in losses])]
        self.report.validation(self.state.iteration, _mean([each.lm_loss for each in losses]),
                               tuple(map(_mean, zip(*[each.mtp_loss for each in losses]))),
                               by_source(self.valid_data.source_names, sums)[0])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
