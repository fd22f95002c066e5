"""The loop of steps, validations and saves of a run, whatever its task."""

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_deepseek.checkpoint.adapter.base import Base
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import read_ahead
from megatron_deepseek.device import is_accelerator, max_memory, product_name
from megatron_deepseek.planning.flops import model_flops_per_token, peak_flops
from megatron_deepseek.runtime.decision import Start
from megatron_deepseek.runtime.expert_counter import ExpertCounter, is_shown
from megatron_deepseek.runtime.export import keep_beside
from megatron_deepseek.runtime.garbage import GarbageCollection
from megatron_deepseek.runtime.graphs import GraphWatch
from megatron_deepseek.runtime.health import LabelWatch, NotFinite, SpikeWatch, find_origin
from megatron_deepseek.runtime.interruptions import Interruptions
from megatron_deepseek.runtime.megatron_curves import StepCurves
from megatron_deepseek.runtime.metrics import StepMetrics
from megatron_deepseek.runtime.profile import profiler
from megatron_deepseek.runtime.recorded import Job, record
from megatron_deepseek.runtime.replicas import ReplicasDiffer, check_replicas
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.resume import describe_changes
from megatron_deepseek.runtime.saving import Saver, nothing_more, what_stays
from megatron_deepseek.runtime.task import MadeBatch, Periodic, Prepared
from megatron_deepseek.runtime.user_errors import end_on_user_error
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.next_token import by_source
from megatron_deepseek.training.optimizer import count_zeros, parameter_norm
from megatron_deepseek.training.schedules import bias_rate, learning_rate, schedule_of
from megatron_deepseek.training.timeline import global_batch_size
from megatron_deepseek.training.token_keys import KeyedRows
from megatron_deepseek.training.trainer import StepResult, StopFlags, Trainer


class Run:
    """The loop of one job: steps, validation, checkpoints, until train_iters or something that ends it before."""

    def __init__(self, task: Prepared, settings: Settings, trainer: Trainer, report: Report, start: Start,
                 state: TrainState, begun: float, job: Job, base: Base | None = None):
        self.settings, self.trainer, self.report, self.state = settings, trainer, report, state
        with end_on_user_error():
            data = task.open_data(settings, state, report.message)
            if data.maker is not None and state.iteration > 0:
                data.maker.resume(start.load, state)
        self.train_data, self.validate, self.periodic = data.train, data.validate, data.periodic
        self.complete, self.maker = data.complete, data.maker
        if settings.lora is not None and settings.lora.lora_dropout:
            self.train_data = KeyedRows(data.train, settings.run.seed)
        recorded = self.recorded = record(settings, start.origin, job, task.files) if dist.get_rank() == 0 else None
        if recorded is not None and state.iteration < settings.run.train_iters:
            describe_changes(report, start, recorded)
        self.saver = Saver(settings.run, settings.model, trainer, report, state.iteration if start.is_saved else None,
                           recorded, lambda: keep_beside(settings, start), start.lock, base,
                           data.maker.keep if data.maker is not None else nothing_more)
        self.saver.keep_assets()
        self.interruptions = Interruptions(settings.run, dist.get_rank() == 0, begun)
        self.not_finite = NotFinite(settings.run.nan_policy, settings.run.max_skipped_steps)
        self.garbage = GarbageCollection(settings.run)
        counted = settings.model.n_routed_experts and is_shown(settings.run)
        self.experts = ExpertCounter(trainer.meshes, settings.run.log_interval) if counted else None
        self.spikes, self.labels, self.graphs = SpikeWatch(), LabelWatch(), GraphWatch()
        self.schedule = schedule_of(settings.learning_rate, settings.run, settings.batch, state)
        self.curves = StepCurves(settings.run, settings.loss.balance_type, settings.layout.world_size,
                                 trainer.meshes.device)
        self.flops_per_token = model_flops_per_token(settings.model, settings.data.seq_length)

    def train(self) -> None:
        if self.state.iteration == 0:
            self._validate()
            self._act(self.periodic)
        with self.interruptions.handling(), self.garbage:
            try:
                self._steps()
            except (FloatingPointError, ReplicasDiffer):
                self.saver.finish()  # a save on its way is that of a healthy step
                raise
            finally:
                if self.maker is not None:
                    self.maker.close()
            self.saver.save(self.state)
            save = self.settings.run.save
            with end_on_user_error(f"; it was the last of this run: {what_stays(save)}" if save is not None else ""):
                self.saver.close()

    def _steps(self) -> None:
        with profiler(self.settings.run, dist.get_rank()) as profile:
            for size, made in self._batches():
                stop_flags = self._step(size, made)
                profile.step()
                self.garbage.after_step(self.state.iteration)
                self._compare_replicas()
                if self._between_steps(stop_flags):
                    break

    def _batches(self) -> Iterator[tuple[int, MadeBatch]]:
        """Yield the number of samples of each remaining step, and this data rank's rows of them."""
        if self.maker is not None:
            for _, size, *_ in self._requests():
                yield size, self.maker.make(self.trainer, self.state, size)
            return
        for batch in read_ahead(self._read, self._requests(), self.settings.data.num_workers):
            yield batch.num_rows * self.settings.layout.dp, MadeBatch(batch)

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
        self._act([each for each in self.periodic if done % each.every == 0 or done == run.train_iters])
        if stop_flags.leave:
            self.report.message(f"leaving after iteration {done} {self.interruptions.reason()}")
        if leave or stop_flags.save or (run.save_interval and done % run.save_interval == 0):
            self.saver.save(self.state)
            self.interruptions.saved()
        self.saver.poll()
        return leave

    def _compare_replicas(self) -> None:
        """Raise ReplicasDiffer on all ranks where some have other weights than others that should have the same."""
        interval = self.settings.run.check_weight_hash_across_dp_replicas_interval
        if interval is not None and self.state.iteration % interval == 0:
            check_replicas(self.trainer.stages, self.state.iteration)
            self.report.message(f"iteration {self.state.iteration}: all ranks have the same weights")

    def _requests(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield the arguments of `Sampler.batch` for each remaining step."""
        consumed, batch = self.state.consumed_samples, self.settings.batch
        for _ in range(self.state.iteration, self.settings.run.train_iters):
            size = global_batch_size(batch, consumed)
            yield consumed, size, batch.micro_batch_size, *self._data_rank()
            consumed += size

    def _data_rank(self) -> tuple[int, int]:
        return self.trainer.meshes.rank("dp"), self.settings.layout.dp

    def _step(self, size: int, made: MadeBatch) -> StopFlags:
        begin, settings, state = time.perf_counter(), self.settings, self.state
        rate, batch = learning_rate(self.schedule, state.consumed_samples), made.batch.to(self.trainer.meshes.device)
        if self.complete is not None:
            batch = self.complete(self.trainer, batch)
        result = self.trainer.train_step(batch, rate, bias_rate(settings.loss, state, size),
                                         self.interruptions.stop_flags)
        seconds = time.perf_counter() - begin
        self._check_health(result, batch)
        self._report_graphs()
        self.state = state.after(size, result.updated)
        tokens = batch.num_rows * settings.layout.dp * settings.data.seq_length
        metrics = self._metrics(result, rate, tokens, seconds, made.reports)
        self.report.step(metrics)
        self.report.curves(metrics.iteration, self.curves.of(metrics, size, self.state.consumed_samples))
        load = self.experts.after_step(self.state.iteration, result.expert_counts) if self.experts else None
        if load is not None:
            self.report.expert_load(load)
        return result.stop_flags

    def _check_health(self, result: StepResult, batch: Batch) -> None:
        """Report what is wrong with a step. Raise FloatingPointError where a step that is not finite ends the run."""
        iteration = self.state.iteration + 1
        skipped = self.not_finite.check(iteration, result, lambda: find_origin(self.trainer, batch))
        unlabelled = self.labels.see(iteration, result.losses.num_labels)
        watched = result.losses.num_labels and self.maker is None  # rewards decide the size of other losses
        spike = self.spikes.see(iteration, result.losses.trained[1]) if watched else None
        for line in (skipped, unlabelled, spike):
            if line is not None:
                self.report.message(line)

    def _report_graphs(self) -> None:
        compiled = self.graphs.see() if self.settings.run.compile else None
        if compiled is not None:
            self.report.message(compiled)

    def _metrics(self, result: StepResult, rate: float, tokens: int, seconds: float, reports: Mapping[str, float]
                 ) -> StepMetrics:
        run, losses, mfu, peak_memory = self.settings.run, result.losses, None, None
        device, speed = self.trainer.meshes.device, tokens / seconds * self.flops_per_token
        if is_accelerator(device):
            peak = peak_flops(product_name(device))
            mfu = speed / (peak * dist.get_world_size()) if peak else None
            memory = torch.tensor(max_memory(device), device=device)
            dist.all_reduce(memory, dist.ReduceOp.MAX)
            peak_memory = memory.item()
        balance = losses.balance_loss if self.settings.loss.balance_type != "none" else None
        spread = self.settings.layout.ep * self.settings.layout.etp > 1
        limited = self.settings.loss.moe_expert_capacity_factor is not None
        names = self.train_data.source_names if self.train_data is not None else ()
        source_loss, source_tokens = by_source(names, losses.sources)
        return StepMetrics(
            iteration=self.state.iteration,
            lm_loss=losses.lm_loss,
            mtp_loss=losses.mtp_loss,
            objective={**losses.objective, **reports},
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
            moe_crossings_per_token=result.cross_node_sends or None,
            tflops_per_rank=speed / dist.get_world_size() / 1e12 if run.log_throughput else None,
            num_zeros=count_zeros(self.trainer.parameters, device) if run.log_num_zeros_in_grad else None,
            params_norm=parameter_norm(self.trainer.parameters, device) if run.log_params_norm else None)

    def _validate(self) -> None:
        """Report the losses of what is held out."""
        if self.validate is not None:
            self.garbage.around_evaluation()
            self.validate(self.trainer, self.report, self.state.iteration)
            self.garbage.around_evaluation()

    def _act(self, due: Sequence[Periodic]) -> None:
        for each in due:
            each.act(self.trainer, self.report, self.state.iteration)
