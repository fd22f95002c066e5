"""Mistakes that every layout would make alike, so that comparing them shows nothing: in what a run asks of its trainer,
reads of its arguments and takes from a checkpoint; in what overlaps, is kept or is freed; and in dtypes, which float64
hides. A table like table.py's.
"""

from mutant import of

ARGUMENTS = ("tests/unit/arguments/test_arguments.py",)
MEGATRON = ("tests/unit/arguments/test_megatron_arguments.py",)
LAYOUT = ("tests/unit/parallel/test_layout.py",)
LOOP = ("tests/unit/pretraining/test_loop.py",)
RESUME = ("tests/unit/runtime/test_resume.py",)
SIGHT = ("tests/unit/parallel/test_exchange.py",)
STEP = ("tests/unit/training/test_trainer.py",)

READ_MUTANTS = of(
    ("tests/parallel/test_host_reads.py",),
    ("norm_backward", ".sum(0).to(weight.dtype)", ".sum(0).to(weight.dtype).cpu()"),
    ("swiglu_backward", "F.silu(gate).mul_(grad)", "F.silu(gate.to(str(gate.device))).mul_(grad)"),
)

LOOP_MUTANTS = of(
    LOOP,
    ("Run._step", "learning_rate(self.schedule, state.consumed_samples)",
     "learning_rate(self.schedule, state.iteration)"),
    ("Run._step", "learning_rate(self.schedule, state.consumed_samples)",
     "learning_rate(self.schedule, state.consumed_samples + size)"),
    ("Run._step", "bias_rate(settings.loss, state, size),\n", "settings.loss.moe_router_bias_update_rate,\n"),
    ("Run.__init__", "settings.run, settings.batch, state)\n", "settings.run, settings.batch)\n"),
    ("Run._step", "state.after(size, result.updated)", "state.after(size, True)"),
    ("loop.open_data", "num_samples(settings, state)", "num_samples(settings)"),
    ("Run.train", "        if self.state.iteration == 0:\n            self._validate()", "        self._validate()"),
    ("Run._between_steps", "(done % run.eval_interval == 0 or done == run.train_iters)",
     "done % run.eval_interval == 0"),
    ("loop.open_data", "(Sampler(train, vocab_size, name, eod),", "(Sampler(train, vocab_size, name),"),
    ("validation_sets", "Sampler(dataset, vocab_size, prefix, eod)", "Sampler(dataset, vocab_size, prefix)"),
    ("validation._mean", " / (sum(labels for _, labels in losses) or 1.0)", ""),
    ("validation._mean", "losses = list(losses)", "losses = list(losses)[-1:]"),
    ("training_spec", "recompute=settings.recompute,", ""),
    ("training_spec", 'settings.run.sharding == "optim_grads_params"',
     'settings.run.sharding != "optim_grads_params"'),
    ("training_spec", "torch.bfloat16 if settings.run.bf16 else None,", "None,"),
    ("training_spec", "fp8_gather=settings.run.fp8_param_gather", "fp8_gather=False"),
    ("Run._step", "settings.layout.dp * settings.data.seq_length", "settings.layout.dp"),
    ("Run._metrics", "result.dropped if limited else None", "result.dropped"),
    ("validation._source_loss", "by_source(data.source_names, sums)[0]",
     "by_source(data.source_names, losses[0].sources)[0]"),
    ("training_spec", "seed=settings.run.seed)", "seed=settings.data.seq_length)"),
    ("training_spec", "        optimizer=settings.optimizer,\n", ""),
)

RESUME_MUTANTS = of(
    LOOP,
    ("num_samples", "timeline(settings.batch, state).samples(max(settings.run.train_iters, state.iteration))",
     "settings.run.train_iters * settings.batch.global_batch_size"),
    ("num_samples", "samples(max(settings.run.train_iters, state.iteration))", "samples(settings.run.train_iters)"),
    ("go_on", "train_iters=last_iteration(settings.run, settings.batch, state)",
     "train_iters=settings.run.train_iters"),
) + of(
    RESUME,
    ("resume", "None if start.weights_only else trainer.optimizer", "trainer.optimizer"),
    ("resume", "    if start.finetune:\n        return TrainState(), base\n", ""),
    ("resume", "state.without_optimizer() if start.weights_only else state", "state"),
) + of(
    ("tests/unit/runtime/test_decision.py",),
    ("decide", "start.finetune or start.weights_only or bool(new)", "start.finetune or bool(new)"),
    ("decide", "start.finetune or start.weights_only or bool(new)", "start.weights_only or bool(new)"),
    ("_decide", "if last is not None and last.job.is_earlier_start_of(job):", "if False:"),
    ("_decide", "(last is not None and last.origin != _full(run.load))", "False"),
    ("_first_start", "and run.ckpt_step is None\n", "\n"),
    ("_continued", "step in (None, last_iteration(run.save))", "True"),
    ("_sees", "if holder is not None and holder.token == token:", "if holder is not None:"),
)

SCHEDULES = of(
    ("tests/unit/training/test_schedules.py",),
    ("learning_rate", "consumed_samples <= warmup", "consumed_samples < warmup"),
    ("learning_rate", "start, style = decay - schedule.wsd_decay,", "start, style = warmup,"),
    ("learning_rate", "max(warmup, 1) / max(consumed_samples, 1)", "max(warmup, 8) / max(consumed_samples, 8)"),
    ("_wsd_decay", "return decay - line.samples(last - rates.lr_wsd_decay_iters)",
     "return line.samples(rates.lr_wsd_decay_iters)"),
    ("_warmup", "return line.samples(rates.lr_warmup_iters)", "return rates.lr_warmup_iters * line.final"),
    ("_warmup", "return (rates.lr_warmup_fraction or 0) * decay",
     "return round((rates.lr_warmup_fraction or 0) * decay)"),
    ("bias_rate", "state.consumed_samples + size > samples", "state.consumed_samples > samples"),
    ("bias_rate", "state.iteration >= until", "state.iteration > until"),
    ("schedule_of", "    line = timeline(batch, state)", "    line = timeline(batch)"),
) + of(
    ("tests/unit/training/test_timeline.py",),
    ("global_batch_size", "consumed_samples > samples:", "consumed_samples >= samples:"),
    ("training.timeline.timeline", "while consumed <= ramp_samples:", "while consumed < ramp_samples:"),
    ("Timeline.iterations", "return iterations + samples // size", "return iterations"),
    ("timeline.last_iteration", "line = timeline(batch, state)", "line = timeline(batch)"),
    ("with_past", "if past.samples(state.iteration) == state.consumed_samples:", "if False:"),
) + of(
    ("tests/unit/training/test_timeline.py",),
    ("TrainState.after", "(*before, (updates + 1, size)) if size == last else",
     "(*before, (updates + 1, size)) if True else"),
)

BATCHES = of(
    ("tests/unit/data/test_data_refusals.py",),
    ("Sampler._read", "ids_BS.max() >= self.vocab_size", "ids_BS.max() > self.vocab_size"),
    ("Sampler._read", "ids_BS.min() < 0 or ", ""),
    ("Sampler._read", "for ids_BS in (tokens_BS, labels_BS):", "for ids_BS in (tokens_BS,):"),
)

SHOWN = of(
    ("tests/unit/runtime/test_report.py",),
    ("ProgressLines._time_left", "(done - self._begun)", "done"),
    ("ProgressLines._time_left", "pace * (self._run.train_iters - done)", "pace * self._run.train_iters"),
)

NORMS = of(
    ("tests/unit/ops/test_ops.py",),
    ("norm_forward", "((x_wide * rstd).to(x.dtype) * weight).to(x.dtype)", "(x_wide * rstd * weight).to(x.dtype)"),
) + of(
    ("tests/unit/model/test_mtp.py",),
    ("MTPLayer.__init__", "        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)",
     "        self.hnorm = RMSNorm(config.hidden_size, 1e-6, tp)"),
    ("MTPLayer.__init__", "        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)",
     "        self.enorm = RMSNorm(config.hidden_size, 1e-6, tp)"),
    ("SharedHead.__init__", "        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)",
     "        self.norm = RMSNorm(config.hidden_size, 1e-6, tp)"),
)

RULES = of(
    MEGATRON,
    ("Topic.problems", "                if self.chained:", "                if True:"),
    ("config_of", "or not args.moe_router_pre_softmax", "or args.moe_router_pre_softmax"),
    ("padded", "args.make_vocab_size_divisible_by * args.tensor_model_parallel_size",
     "args.make_vocab_size_divisible_by"),
    ("shared_experts", "{number * width}", "{width}"),
    ("noop_layers", "{layers - len(numbers)}", "{layers}"),
) + of(
    ARGUMENTS,
    ("_RANKS", "r.world_size % (r.tp * r.pp) != 0", "r.world_size % r.tp != 0"),
    ("_RANKS", "r.stage_ranks % (r.tp * r.cp) != 0", "r.stage_ranks % r.cp != 0"),
    ("_SIZES", "r.args.seq_length % (r.tp * r.cp),", "r.args.seq_length % r.tp,"),
    ("_SIZES", "(r.args.sequence_parallel or r.model.n_routed_experts > 0) and", "r.model.n_routed_experts > 0 and"),
    ("_BATCH", "r.args.seq_length > r.model.max_position_embeddings",
     "r.args.seq_length >= r.model.max_position_embeddings"),
    ("_RUN", "r.args.finetune and _loads_save(r)", "False"),
    ("_BATCH", "r.args.train_samples < r.batch_sizes[0]", "r.args.train_samples <= r.batch_sizes[0]"),
) + of(
    ARGUMENTS,
    ("Request.uneven_batch", "for size in sizes if size % self._row)",
     "for size in self.batch_sizes[1:] if size % self._row)"),
    ("Request.refused_microbatches", "for size in sizes\n", "for size in self.batch_sizes[-1:]\n"),
    ("Request.validation_weight", "return float(split_data_paths[1] is not None)", "return 1.0"),
    ("Request.ranks_per_node", "self.args.moe_ranks_per_node or self.local_world_size or self.world_size",
     "self.args.moe_ranks_per_node or self.world_size"),
) + of(
    ARGUMENTS,
    ("_loss", "_usual_bias_rate(request) if rate is None else rate",
     "_usual_bias_rate(request) if not rate else rate"),
    ("_learning_rate", "args.lr / 10 if v3 else 0.0", "args.lr / 10"),
    ("settings._run", "train_iters=timeline.last_iteration(run, request.batch)", "train_iters=run.train_iters"),
    ("settings._run", "max_skipped_steps=args.max_skipped_steps or RunSettings.max_skipped_steps",
     "max_skipped_steps=RunSettings.max_skipped_steps"),
)

# The next block travels, and the next gradient is made, while one is at work; sums are wide.
BLOCKS = of(
    SIGHT,
    ("Ring.blocks",
     "            arriving = Transfer(block, self.group) if step < size - 1 else None\n"
     "            yield (self.group.rank() - step) % size, block\n",
     "            yield (self.group.rank() - step) % size, block\n"
     "            arriving = Transfer(block, self.group) if step < size - 1 else None\n"),
    ("Ring.return_gradients", "in enumerate(gradients):  # made", "in enumerate([*gradients]):  # made"),
    ("Ring.return_gradients", "total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))",
     "total = gradient"),
    ("Gather.return_gradients",
     "reduce_scatter(stacked.to(torch.promote_types(dtype, torch.float32)), 0, self.group).to(dtype)",
     "reduce_scatter(stacked, 0, self.group).to(dtype)"),
) + of(
    SIGHT,
    ("BlockwiseAttention.backward", "        wide = torch.promote_types(q_BSND.dtype, torch.float32)\n",
     "        wide = q_BSND.dtype\n"),
    ("BlockMask._block", "return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds)), parts",
     "return keys, parts"),
    ("BlockwiseAttention.backward", " if parts \\\n                    else torch.zeros_like(block)", ""),
) + of(
    SIGHT,
    ("LogSumExpMerge.empty", "        wide = torch.promote_types(q_BNSD.dtype, torch.float32)\n",
     "        wide = q_BNSD.dtype\n"),
)

REFUSED_ELSEWHERE = of(
    LAYOUT,
    ("Layout.__post_init__", "if self.dp * self.cp * self.tp % (self.ep * self.etp):",
     "if self.world_size % (self.ep * self.etp):"),
    ("nodes_divide", "return ranks_per_node % block == 0 or block % ranks_per_node == 0 and ranks_per_node % etp == 0",
     "return ranks_per_node % block == 0 or block % ranks_per_node == 0"),
) + of(
    LAYOUT,
    ("build_meshes", "    if dist.get_world_size() != layout.world_size:", "    if False:"),
) + of(
    LAYOUT,
    ("sharded_parameter", "        if local[placement.dim] % mesh.size(axis):", "        if False:"),
) + of(
    LAYOUT,
    ("choose_device", "if local_size > count_accelerators():", "if local_rank > count_accelerators():"),
)

KEPT_AND_FREED = of(
    STEP,
    ("Pipeline.evaluate", "    @torch.no_grad()\n    def evaluate", "    def evaluate"),
) + of(
    STEP,
    ("Trainer._result", "StopFlags(save > 0, leave > 0)", "StopFlags(leave > 0, save > 0)"),
) + of(
    STEP,
    ("synchronize_gradients", "module.set_reshard_after_backward(enabled or frees_after_forward(module))",
     "module.set_reshard_after_backward(True)"),
    ("synchronize_gradients", "module.set_reshard_after_backward(enabled or frees_after_forward(module))",
     "module.set_reshard_after_backward(enabled)"),
) + of(
    STEP,
    ("StepStatistics.add_reports", "self.reports.get(name, 0) + value.detach()", "self.reports.get(name, 0) + value"),
) + of(
    STEP,
    ("shard_stages", "options.reshard_after_forward,\n", "False,\n"),
) + of(
    ("tests/unit/ops/test_side_stream.py", "tests/unit/training/test_trainer.py"),
    ("MoE._balanced", "attach_loss(y_TH, loss), loss.detach()", "attach_loss(y_TH, loss), loss"),
    ("MoE.forward", "            shared.start(partial(self.shared_experts, keys_BS=keys_BS), x_BSH)\n",
     "            shared.start(partial(self.shared_experts, keys_BS=keys_BS), x_BSH)\n            shared.result()\n"),
)

AGREED = (*LOOP_MUTANTS, *RESUME_MUTANTS, *SCHEDULES, *BATCHES, *SHOWN, *NORMS, *RULES, *REFUSED_ELSEWHERE, *BLOCKS,
          *KEPT_AND_FREED, *READ_MUTANTS)
