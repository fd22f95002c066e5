"""Pre-training from settings to a trained checkpoint."""

import os
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_deepseek.arguments import Settings
from megatron_deepseek.checkpoint import distributed as checkpoint
from megatron_deepseek.checkpoint.distributed import TrainState
from megatron_deepseek.checkpoint.export import export_hf, keep_assets
from megatron_deepseek.checkpoint.marker import is_huggingface, last_iteration
from megatron_deepseek.data.batches import GlobalBatch, Sampler, read_ahead
from megatron_deepseek.data.pretraining import build_datasets, check_data
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job
from megatron_deepseek.planning.flops import model_flops_per_token, peak_flops
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.training.failure import guarded
from megatron_deepseek.training.metrics import StepMetrics
from megatron_deepseek.training.profile import profiler
from megatron_deepseek.training.report import Report, open_report
from megatron_deepseek.training.schedules import global_batch_size, learning_rate
from megatron_deepseek.training.trainer import Plan, StepResult, Trainer


def pretrain(settings: Settings) -> None:
    """Run the job of `settings` on this rank. A user's mistake in data or checkpoint ends it with status 2."""
    guarded(_pretrain)(settings)


def _pretrain(settings: Settings) -> None:
    refuse_bad_input(settings)
    device = choose_device()
    join_job(device, settings.run.distributed_timeout_minutes)
    meshes = build_meshes(settings.layout, device)
    trainer = Trainer(make_plan(settings), meshes)
    state = resume(settings, trainer)
    first = dist.get_rank() == 0
    with open_report(settings.run, state.iteration) if first else Report() as report:
        describe(report, settings, trainer, state)
        keep_assets(settings.run)
        run = Run(settings, trainer, report, state)
        run.train()
        run.export()
    dist.barrier()
    dist.destroy_process_group()


def refuse_bad_input(settings: Settings) -> None:
    """Rank 0 looks at files before anything is built, and says in one line what is wrong with them."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        choose_device()
        check_data(settings.data, settings.model.vocab_size, num_samples(settings))
        if settings.run.load is not None:
            checkpoint.check_checkpoint(settings.run.load, settings.model)
    except (ValueError, OSError) as error:
        print(f"pretrain_deepseek.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def num_samples(settings: Settings) -> tuple[int, int, int]:
    """Samples of the train, valid and test split that the run reads."""
    consumed = 0
    for _ in range(settings.run.train_iters):
        consumed += global_batch_size(settings.batch, consumed)
    return consumed, settings.run.eval_iters * settings.batch.global_batch_size, 0


def make_plan(settings: Settings) -> Plan:
    """What this job builds. BF16 keeps float32 master weights and gradients."""
    stages = resolve(settings.model, settings.pipeline, settings.layout.pp, settings.data.seq_length)
    return Plan(
        model=settings.model, stages=stages, schedule=settings.pipeline.schedule,
        seq_length=settings.data.seq_length, micro_batch_size=settings.batch.micro_batch_size,
        precision=Precision(torch.float32, torch.bfloat16 if settings.run.bf16 else None),
        optimizer=settings.optimizer, loss=settings.loss, recompute=settings.recompute,
        communication=settings.communication, offload=settings.offload,
        reshard_after_forward=settings.run.sharding == "optim_grads_params", seed=settings.run.seed)


def resume(settings: Settings, trainer: Trainer) -> TrainState:
    """Load `--load`, or start anew. `--finetune` takes the weights alone and starts counting at zero."""
    run = settings.run
    if run.load is None:
        return TrainState()
    directory = checkpoint.check_checkpoint(run.load, settings.model)
    weights_only = run.finetune or run.no_load_optim
    if not weights_only and not checkpoint.has_optimizer(directory):
        weights_only = is_huggingface(directory) or last_iteration(run.load) == 0  # released weights, converted or not
    state = checkpoint.load(directory, trainer.stages, None if weights_only else trainer.optimizer)
    if run.finetune:
        return TrainState()
    return TrainState(state.iteration, state.consumed_samples, 0 if weights_only else state.optimizer_steps)


def describe(report: Report, settings: Settings, trainer: Trainer, state: TrainState) -> None:
    layout = settings.layout
    sizes = " ".join(f"{name}={getattr(layout, name)}" for name in ("dp", "pp", "tp", "cp", "ep", "etp"))
    schedule = f", {settings.pipeline.schedule}" if layout.pp > 1 else ""
    report.message(f"{settings.model.num_parameters():,} parameters on {layout.world_size} ranks ({sizes}{schedule}), "
                   f"{trainer.meshes.device.type}, {'bf16' if settings.run.bf16 else 'fp32'}")
    if settings.run.load is not None:
        report.message(f"loaded {settings.run.load}, continuing at iteration {state.iteration}")
    if state.optimizer_steps:
        directory = checkpoint.check_checkpoint(settings.run.load, settings.model)
        for conversion in checkpoint.converted_moments(directory, trainer.optimizer):
            report.message(conversion)


class Run:
    """The loop of one job: steps, validation, checkpoints, until train_iters or exit_interval."""

    def __init__(self, settings: Settings, trainer: Trainer, report: Report, state: TrainState):
        self.settings, self.trainer, self.report, self.state = settings, trainer, report, state
        train, valid, _ = build_datasets(settings.data, num_samples(settings))
        name = " ".join(settings.data.data_path)
        eod = None
        if settings.data.reset_attention_mask:
            eod = build_tokenizer(settings.data.tokenizer_type, settings.data.tokenizer_model).eod
        self.train_data = Sampler(train, settings.model.vocab_size, name, eod)
        self.valid_data = Sampler(valid, settings.model.vocab_size, name, eod) if valid is not None else None
        self.saved_iteration = state.iteration
        self.flops_per_token = model_flops_per_token(settings.model, settings.data.seq_length)

    def train(self) -> None:
        run = self.settings.run
        if self.state.iteration == 0:
            self._validate()
        with profiler(run, dist.get_rank()) as profile:
            for batch in read_ahead(self.train_data.batch, self._requests()):
                self._step(batch)
                profile.step()
                done = self.state.iteration
                last = done == run.train_iters or (run.exit_interval is not None and done % run.exit_interval == 0)
                if run.eval_interval and (done % run.eval_interval == 0 or done == run.train_iters):
                    self._validate()
                if run.save is not None and (last or (run.save_interval and done % run.save_interval == 0)):
                    self._save()
                if last:
                    break

    def _requests(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Arguments of `Sampler.batch` for each remaining step."""
        consumed, batch = self.state.consumed_samples, self.settings.batch
        for _ in range(self.state.iteration, self.settings.run.train_iters):
            size = global_batch_size(batch, consumed)
            yield consumed, size, batch.micro_batch_size, *self._data_rank()
            consumed += size

    def _data_rank(self) -> tuple[int, int]:
        return self.trainer.meshes.rank("dp"), self.settings.layout.dp

    def _step(self, batch: GlobalBatch) -> None:
        begin, settings, state = time.perf_counter(), self.settings, self.state
        rate = learning_rate(settings.learning_rate, state.consumed_samples / settings.batch.global_batch_size)
        until = settings.loss.moe_router_bias_update_until
        bias_rate = settings.loss.moe_router_bias_update_rate if until is None or state.iteration < until else 0.0
        result = self.trainer.train_step(**_on_device(batch, self.trainer.meshes), learning_rate=rate,
                                         bias_rate=bias_rate)
        size = batch.tokens_BS.shape[0] * settings.layout.dp
        self.state = TrainState(state.iteration + 1, state.consumed_samples + size, state.optimizer_steps + 1)
        self.report.step(self._metrics(result, rate, size * settings.data.seq_length, time.perf_counter() - begin))

    def _metrics(self, result: StepResult, rate: float, tokens: int, seconds: float) -> StepMetrics:
        losses, mfu, peak_memory = result.losses, None, None
        device = self.trainer.meshes.device
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device))
            mfu = tokens / seconds * self.flops_per_token / (peak * dist.get_world_size()) if peak else None
            memory = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
            dist.all_reduce(memory, dist.ReduceOp.MAX)
            peak_memory = memory.item()
        balance = losses.balance_loss if self.settings.loss.balance_type != "none" else None
        spread = self.settings.layout.ep > 1
        return StepMetrics(self.state.iteration, losses.lm_loss, losses.mtp_loss, balance, result.grad_norm, rate,
                           tokens, seconds, mfu, peak_memory, result.traffic.within_node if spread else None,
                           result.traffic.across_nodes if spread else None)

    def _validate(self) -> None:
        """Mean losses of the same eval_iters batches every time."""
        run, batch = self.settings.run, self.settings.batch
        if self.valid_data is None or not run.eval_iters:
            return
        batches = self.valid_data.evaluation(run.eval_iters, batch.global_batch_size, batch.micro_batch_size,
                                             *self._data_rank())
        losses = [self.trainer.evaluate(**_on_device(each, self.trainer.meshes)) for each in batches]
        self.report.validation(self.state.iteration, _mean([each.lm_loss for each in losses]),
                               tuple(map(_mean, zip(*[each.mtp_loss for each in losses]))))

    def _save(self) -> None:
        if self.saved_iteration == self.state.iteration:
            return
        directory = checkpoint.save(self.settings.run.save, self.state, self.settings.model, self.trainer.stages,
                                    self.trainer.optimizer)
        self.saved_iteration = self.state.iteration
        self.report.message(f"saved {directory}")

    def export(self) -> None:
        """--save-hf: the last checkpoint as released models are, each rank writing its part of the files."""
        run = self.settings.run
        if run.save_hf is None:
            return
        if last_iteration(run.save) != self.state.iteration:
            self.saved_iteration = None
            self._save()
        export_hf(run, dist.get_rank(), dist.get_world_size())
        self.report.message(f"exported {run.save_hf}")


def _on_device(batch: GlobalBatch, meshes: Meshes) -> dict[str, torch.Tensor | None]:
    """What `Trainer` takes of a batch, by its names."""
    tensors = dict(tokens_BS=batch.tokens_BS, labels_BS=batch.labels_BS, mask_BS=batch.loss_mask_BS,
                   documents_BS=batch.documents_BS)
    return {name: None if tensor is None else tensor.to(meshes.device, non_blocking=True)
            for name, tensor in tensors.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
