"""Mistakes that every layout would make alike, so that comparing them shows nothing: in what a run asks of its trainer,
reads of its arguments and takes from a checkpoint; in what overlaps, is kept or is freed; and in dtypes, which float64
hides. A table like table.py's.
"""

from mutant import of

ARGUMENTS = ("tests/unit/arguments/test_arguments.py",)
LAYOUT = ("tests/unit/parallel/test_layout.py",)
LOOP = ("tests/unit/pretraining/test_loop.py",)
RESUME = ("tests/unit/runtime/test_resume.py",)
SIGHT = ("tests/unit/parallel/test_exchange.py",)
STEP = ("tests/unit/training/test_trainer.py",)

LOOP_MUTANTS = of(
    "pretraining/loop.py", LOOP,
    ("learning_rate(self.schedule, state.consumed_samples)", "learning_rate(self.schedule, state.iteration)"),
    ("learning_rate(self.schedule, state.consumed_samples)",
     "learning_rate(self.schedule, state.consumed_samples + size)"),
    ("bias_rate(settings.loss, state, size),\n", "settings.loss.moe_router_bias_update_rate,\n"),
    ("settings.run, settings.batch, state)\n", "settings.run, settings.batch)\n"),
    ("state.after(size, result.updated)", "state.after(size, True)"),
    ("num_samples(settings, state)", "num_samples(settings)"),
    ("        if self.state.iteration == 0:\n            self._validate()", "        self._validate()"),
    ("(done % run.eval_interval == 0 or done == run.train_iters)", "done % run.eval_interval == 0"),
    ("self.train_data = Sampler(train, settings.model.vocab_size, name, eod)",
     "self.train_data = Sampler(train, settings.model.vocab_size, name)"),
    ("Sampler(valid, settings.model.vocab_size, name, eod) if", "Sampler(valid, settings.model.vocab_size, name) if"),
    ("return sum(values) / len(values)", "return sum(values)"),
    ("return sum(values) / len(values)", "return values[-1]"),
    ("recompute=settings.recompute,", ""),
    ('settings.run.sharding == "optim_grads_params"', 'settings.run.sharding != "optim_grads_params"'),
    ("torch.bfloat16 if settings.run.bf16 else None,", "None,"),
    ("fp8_gather=settings.run.fp8_param_gather", "fp8_gather=False"),
    ("size * settings.data.seq_length, seconds)", "size, seconds)"),
    ("result.dropped if limited else None", "result.dropped"),
    ("by_source(self.valid_data.source_names, sums)[0]",
     "by_source(self.valid_data.source_names, losses[0].sources)[0]"),
    ("seed=settings.run.seed)", "seed=settings.data.seq_length)"),
    ("        optimizer=settings.optimizer,\n", ""),
)

RESUME_MUTANTS = of(
    "runtime/resume.py", LOOP,
    ("timeline(settings.batch, state).samples(max(settings.run.train_iters, state.iteration))",
     "settings.run.train_iters * settings.batch.global_batch_size"),
    ("samples(max(settings.run.train_iters, state.iteration))", "samples(settings.run.train_iters)"),
    ("train_iters=last_iteration(settings.run, settings.batch, state)", "train_iters=settings.run.train_iters"),
) + of(
    "runtime/resume.py", RESUME,
    ("None if start.weights_only else trainer.optimizer", "trainer.optimizer"),
    ("    if start.finetune:\n        return TrainState()\n", ""),
    ("state.without_optimizer() if start.weights_only else state", "state"),
) + of(
    "runtime/decision.py", ("tests/unit/runtime/test_decision.py",),
    ("start.finetune or start.weights_only or bool(new)", "start.finetune or bool(new)"),
    ("start.finetune or start.weights_only or bool(new)", "start.weights_only or bool(new)"),
    ("if last is not None and last.job.is_earlier_life_of(job):", "if False:"),
    ("(last is not None and last.origin != _full(run.load))", "False"),
    ("and run.ckpt_step is None\n", "\n"),
    ("step in (None, last_iteration(run.save))", "True"),
    ("if holder is not None and holder.token == token:", "if holder is not None:"),
)

SCHEDULES = of(
    "training/schedules.py", ("tests/unit/training/test_schedules.py",),
    ("consumed_samples <= warmup", "consumed_samples < warmup"),
    ("start, style = decay - schedule.wsd_decay,", "start, style = warmup,"),
    ("max(warmup, 1) / max(consumed_samples, 1)", "max(warmup, 8) / max(consumed_samples, 8)"),
    ("return decay - line.samples(last - rates.lr_wsd_decay_iters)", "return line.samples(rates.lr_wsd_decay_iters)"),
    ("return line.samples(rates.lr_warmup_iters)", "return rates.lr_warmup_iters * line.final"),
    ("return (rates.lr_warmup_fraction or 0) * decay", "return round((rates.lr_warmup_fraction or 0) * decay)"),
    ("state.consumed_samples + size > samples", "state.consumed_samples > samples"),
    ("state.iteration >= until", "state.iteration > until"),
    ("    line = timeline(batch, state)", "    line = timeline(batch)"),
) + of(
    "training/timeline.py", ("tests/unit/training/test_timeline.py",),
    ("consumed_samples > samples:", "consumed_samples >= samples:"),
    ("while consumed <= ramp_samples:", "while consumed < ramp_samples:"),
    ("return iterations + samples // size", "return iterations"),
    ("timeline(batch, state).iterations(run.train_samples)", "timeline(batch).iterations(run.train_samples)"),
    ("if past.samples(state.iteration) == state.consumed_samples:", "if False:"),
) + of(
    "checkpoint/train_state.py", ("tests/unit/training/test_timeline.py",),
    ("(*before, (updates + 1, size)) if size == last else", "(*before, (updates + 1, size)) if True else"),
)

BATCHES = of(
    "data/batches.py", ("tests/unit/data/test_data_refusals.py",),
    ("ids_BS.max() >= self.vocab_size", "ids_BS.max() > self.vocab_size"),
    ("ids_BS.min() < 0 or ", ""),
    ("for ids_BS in (tokens_BS, labels_BS):", "for ids_BS in (tokens_BS,):"),
)

SHOWN = of(
    "runtime/report.py", ("tests/unit/runtime/test_report.py",),
    ("(done - self._begun)", "done"),
    ("pace * (self._run.train_iters - done)", "pace * self._run.train_iters"),
)

NORMS = of(
    "ops/norm.py", ("tests/unit/ops/test_ops.py",),
    ("((x_wide * rstd).to(x.dtype) * weight).to(x.dtype)", "(x_wide * rstd * weight).to(x.dtype)"),
) + of(
    "model/layer.py", ("tests/unit/model/test_mtp.py",),
    ("        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)",
     "        self.hnorm = RMSNorm(config.hidden_size, 1e-6, tp)"),
    ("        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)",
     "        self.enorm = RMSNorm(config.hidden_size, 1e-6, tp)"),
    ("        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)",
     "        self.norm = RMSNorm(config.hidden_size, 1e-6, tp)"),
)

RULES = of(
    "arguments/validation.py", ARGUMENTS,
    ("r.world_size % (r.tp * r.pp) != 0", "r.world_size % r.tp != 0"),
    ("r.stage_ranks % (r.tp * r.cp) != 0", "r.stage_ranks % r.cp != 0"),
    ("r.args.seq_length % (r.tp * r.cp),", "r.args.seq_length % r.tp,"),
    ("(r.args.sequence_parallel or r.model.n_routed_experts > 0) and", "r.model.n_routed_experts > 0 and"),
    ("r.args.seq_length > r.model.max_position_embeddings", "r.args.seq_length >= r.model.max_position_embeddings"),
    ("r.args.finetune and _loads_save(r)", "False"),
    ("r.args.train_samples < r.batch_sizes[0]", "r.args.train_samples <= r.batch_sizes[0]"),
) + of(
    "arguments/request.py", ARGUMENTS,
    ("for size in self.batch_sizes if size % self._row)", "for size in self.batch_sizes[1:] if size % self._row)"),
    ("for size in self.batch_sizes\n", "for size in self.batch_sizes[-1:]\n"),
    ("return float(split_data_paths[1] is not None)", "return 1.0"),
    ("self.args.moe_ranks_per_node or self.local_world_size or self.world_size",
     "self.args.moe_ranks_per_node or self.world_size"),
) + of(
    "arguments/settings.py", ARGUMENTS,
    ("(1e-3 if has_bias else 0.0) if rate is None else rate", "(1e-3 if has_bias else 0.0) if not rate else rate"),
    ("args.lr / 10 if v3 else 0.0", "args.lr / 10"),
    ("train_iters=timeline.last_iteration(run, request.batch)", "train_iters=run.train_iters"),
    ("max_skipped_steps=args.max_skipped_steps or RunSettings.max_skipped_steps",
     "max_skipped_steps=RunSettings.max_skipped_steps"),
)

# The next block travels, and the next gradient is made, while one is at work; sums are wide.
BLOCKS = of(
    "parallel/exchange.py", SIGHT,
    ("            arriving = _Transfer(block, self.group) if step < size - 1 else None\n"
     "            yield (self.group.rank() - step) % size, block\n",
     "            yield (self.group.rank() - step) % size, block\n"
     "            arriving = _Transfer(block, self.group) if step < size - 1 else None\n"),
    ("        for gradient in gradients:  # made", "        for gradient in [*gradients]:  # made"),
    ("total = gradient.to(torch.promote_types(dtype, torch.float32))", "total = gradient"),
    ("reduce_scatter(stacked.to(torch.promote_types(dtype, torch.float32)), 0, self.group).to(dtype)",
     "reduce_scatter(stacked, 0, self.group).to(dtype)"),
) + of(
    "parallel/block_mask.py", SIGHT,
    ("return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds)), parts", "return keys, parts"),
) + of(
    "parallel/blockwise_attention.py", SIGHT,
    ("        wide = torch.promote_types(q_BSND.dtype, torch.float32)\n", "        wide = q_BSND.dtype\n"),
    (" if parts \\\n                    else torch.zeros_like(block)", ""),
) + of(
    "ops/attention.py", SIGHT,
    ("        wide = torch.promote_types(q_BNSD.dtype, torch.float32)\n", "        wide = q_BNSD.dtype\n"),
)

REFUSED_ELSEWHERE = of(
    "parallel/layout.py", LAYOUT,
    ("if self.dp * self.cp * self.tp % (self.ep * self.etp):", "if self.world_size % (self.ep * self.etp):"),
    ("return ranks_per_node % block == 0 or block % ranks_per_node == 0 and ranks_per_node % etp == 0",
     "return ranks_per_node % block == 0 or block % ranks_per_node == 0"),
) + of(
    "parallel/mesh.py", LAYOUT, ("    if dist.get_world_size() != layout.world_size:", "    if False:"),
) + of(
    "parallel/tensor.py", LAYOUT, ("        if local[placement.dim] % mesh.size(axis):", "        if False:"),
) + of(
    "parallel/start.py", LAYOUT,
    ("if local_size > count_accelerators():", "if local_rank > count_accelerators():"),
)

KEPT_AND_FREED = of(
    "parallel/pipeline.py", STEP, ("    @torch.no_grad()\n    def evaluate", "    def evaluate"),
) + of(
    "training/trainer.py", STEP,
    ("StopFlags(save > 0, leave > 0)", "StopFlags(leave > 0, save > 0)"),
) + of(
    "parallel/data.py", STEP,
    ("module.set_reshard_after_backward(enabled or freed)", "module.set_reshard_after_backward(True)"),
    ("module.set_reshard_after_backward(enabled or freed)", "module.set_reshard_after_backward(enabled)"),
) + of(
    "model/step.py", STEP,
    ("self.reports.get(name, 0) + value.detach()", "self.reports.get(name, 0) + value"),
) + of(
    "model/build.py", STEP,
    ("options.reshard_after_forward,\n", "False,\n"),
) + of(
    "model/moe.py", ("tests/unit/ops/test_side_stream.py", "tests/unit/training/test_trainer.py"),
    ("attach_loss(y_TH, loss), loss.detach()", "attach_loss(y_TH, loss), loss"),
    ("            shared.start(self.shared_experts, x_BSH)\n",
     "            shared.start(self.shared_experts, x_BSH)\n            shared.result()\n"),
)

AGREED = (*LOOP_MUTANTS, *RESUME_MUTANTS, *SCHEDULES, *BATCHES, *SHOWN, *NORMS, *RULES, *REFUSED_ELSEWHERE, *BLOCKS,
          *KEPT_AND_FREED)
