"""Mistakes planted in the source, one at a time: the tests of which one must fail, then the definition that it is in,
what stands there, and what is put in its place.

A definition is named as Python would (`Class.method`), with the end of its module's name in front where several have
its name (`context.Class.method`), so that moving or renaming a file touches no row.

tests/helpers/ranks/mutations.py has the mistakes of design.md's list, which every run of the tests makes. This table is
broader and slow: `make mutants` runs it. A mistake that no test sees, and that changes numbers, is a missing test.
agreed.py has those that a comparison of layouts cannot see.
"""

from adapters import ADAPTERS
from agreed import AGREED
from base_weights import BASE_WEIGHTS
from chats import CHATS
from compiled import COMPILED
from converted import CONVERTED
from distilled import DISTILLED
from dry_runs import DRY_RUNS
from evaluated import EVALUATED
from finetuned import FINE_TUNED
from frozen import FROZEN
from grouped_query import GROUPED_QUERY
from llama_files import GGUF
from loaded import LOADED
from megatron_options import MEGATRON
from multiplied import MULTIPLIED
from mutant import of
from on_gpus import ON_GPUS
from parameters import PARAMETERS
from policy import POLICY
from preferred import PREFERRED
from reinforced import REINFORCED
from released import RELEASED
from replayed import REPLAYED
from rewarded import REWARDED
from rollouts import ROLLOUTS
from served import SERVED

# What is run for a mistake: the first failure ends it. Quick tests first.
LAYOUTS = ("tests/parallel/test_mutations.py::test_without_a_mistake_nothing_differs", "tests/parallel/test_layouts.py")
BF16 = ("tests/parallel/test_precision.py",)
DATA = ("tests/unit/data/test_pretraining_data.py", "tests/unit/data/test_blends.py",
        "tests/unit/data/test_data_refusals.py", "tests/e2e/test_pretrain.py")
FP8 = ("tests/parallel/test_fp8_layouts.py",)
MODEL = ("tests/unit/model/test_mtp.py", "tests/unit/model/test_packing.py", "tests/unit/model/test_reference.py",
         *LAYOUTS)
ROUTER = ("tests/unit/model/test_router.py", "tests/unit/model/test_balance_loss.py",
          "tests/unit/model/test_capacity.py", "tests/unit/model/test_reference.py", *LAYOUTS)
STEP = ("tests/unit/training/test_trainer.py", "tests/unit/training/test_optimizer.py",
        "tests/unit/runtime/test_health.py", "tests/unit/model/test_packing.py", *LAYOUTS)
TRAFFIC = ("tests/parallel/test_traffic.py", "tests/unit/parallel/test_dispatch.py")

TENSOR = of(
    LAYOUTS,
    ("TensorParallel.activation_grad", "return Partial() if self.sequence_parallel and self.size > 1 else",
     "return Partial() if self.size > 1 else"),
    ("ParallelLinear.__init__", "self.bias_grad = tp.activation_grad", "self.bias_grad = Replicate()"),
    ("replicated_linear", "tp, Replicate(), tp.activation_grad, bias, gemm)",
     "tp, Replicate(), Replicate(), bias, gemm)"),
    ("RMSNorm.__init__", "self.weight_grad = weight_grad or tp.activation_grad",
     "self.weight_grad = weight_grad or Replicate()"),
    ("ParallelLinear.forward", "(x, self.local_weight())",
     "(x, local_weight(self.weight, Replicate()))"),
    ("SplitTokens.forward", "        return x.chunk(group.size(), dim)[group.rank()].contiguous()",
     "        return x.chunk(group.size(), dim)[-1 - group.rank()].contiguous()"),
    ("GatherSum.backward", "        own = reduce_scatter(grad, ctx.dim, ctx.group)",
     "        own = reduce_scatter(grad, ctx.dim, ctx.group) / ctx.group.size()"),
    ("CopyToTensorRanks.backward", "        return all_reduce(grad, ctx.group), None",
     "        return all_reduce(grad, ctx.group) / ctx.group.size(), None"),
    ("SumOverTensorRanks",
     "        return all_reduce(x, group)\n\n    @staticmethod\n    def backward(ctx, grad):\n"
     "        return grad, None",
     "        ctx.size = group.size()\n        return all_reduce(x, group)\n\n    @staticmethod\n"
     "    def backward(ctx, grad):\n        return grad * ctx.size, None"),
    ("SplitTokens.backward", "return all_gather(grad, ctx.dim, ctx.group), None, None",
     "return all_gather(grad, ctx.dim, ctx.group) / ctx.group.size(), None, None"),
)

VOCABULARY = of(
    LAYOUTS,
    ("local_ids", "local = ids - tp.rank * rows", "local = ids - (tp.size - 1 - tp.rank) * rows"),
    ("VocabParallelEmbedding.forward", "return self.tp.leave(F.embedding(local_BS, weight_vH) * mine_BS.unsqueeze(-1))",
     "return self.tp.leave(F.embedding(local_BS, weight_vH))"),
    ("VocabParallelCrossEntropy.forward", "ctx.first_id = tp.rank * logits_Tv.shape[-1]", "ctx.first_id = 0"),
    ("joint_statistics", "dist.all_reduce(sums_2T, group=tp.group)", "dist.all_reduce(sums_2T[:1], group=tp.group)"),
    ("joint_statistics", "sum_T * (own_max_T - max_T).exp()", "sum_T"),
)

DATA_PARALLEL = of(
    LAYOUTS,
    ("shard_over_data", "unit.module.set_gradient_divide_factor(1.0)", "pass"),
) + of(
    BF16,
    ("accumulate_gradients", "            parameter.to_accumulated_grad_if_needed()", "            pass"),
    ("shard_over_data", "reduce_dtype=master", "reduce_dtype=unit.compute_dtype"),
)

MESH = of(
    LAYOUTS,
    ("build_meshes", 'dense_fsdp = dense["dp", "cp"]._flatten("dp_cp")', 'dense_fsdp = dense["dp"]'),
    ("build_meshes", 'sequence = dense["cp", "tp"]._flatten("cp_tp")', 'sequence = dense["cp"]'),
    ("build_meshes", 'sequence = dense["cp", "tp"]._flatten("cp_tp")', 'sequence = dense["tp"]'),
    ("build_meshes", 'stage = dense["dp", "cp", "tp"]._flatten("dp_cp_tp")',
     'stage = dense["dp", "cp"]._flatten("stage")'),
    ("build_meshes", 'stage = dense["dp", "cp", "tp"]._flatten("dp_cp_tp")',
     'stage = dense["dp", "tp"]._flatten("stage")'),
    ("build_meshes", 'stage = dense["dp", "cp", "tp"]._flatten("dp_cp_tp")',
     'stage = dense["cp", "tp"]._flatten("stage")'),
)

EXCHANGE = of(
    LAYOUTS,
    ("Ring.return_gradients", "total = total + arriving.wait()", "total = total + 0 * arriving.wait()"),
    ("Ring.blocks", "yield (self.group.rank() - step) % size, block", "yield (self.group.rank() + step) % size, block"),
    ("own_last", "return [*others, own]", "return [own, *others]"),
    ("Gather.return_gradients", "stacked = torch.cat([by_owner[owner] for owner in range(len(by_owner))])",
     "stacked = torch.cat([by_owner[owner] for owner in self._order()])"),
    ("Gather.return_gradients",
     "return reduce_scatter(stacked.to(torch.promote_types(dtype, torch.float32)), 0, self.group).to(dtype)",
     "return reduce_scatter(stacked.to(torch.promote_types(dtype, torch.float32)), 0, self.group).to(dtype) / 2"),
)

SLICED = of(
    ("tests/parallel/test_traffic.py", *LAYOUTS),
    ("Sliced.return_gradients", "whole = torch.zeros_like(first)", "whole = torch.ones_like(first)"),
    ("Sliced.return_gradients", "reduce_scatter(gradient.to(wide), TOKENS, self.group) for",
     "self._slice(gradient.to(wide)) for"),
    ("ContextParallel.make_exchange", "return Sliced(exchange, alike)", "return exchange"),
)

CONTEXT = of(
    LAYOUTS,
    ("zigzag", "return torch.cat([chunks[rank], chunks[-1 - rank]])",
     "return torch.cat([chunks[2 * rank], chunks[2 * rank + 1]])"),
    ("visible", "return everything, slice(0, length // 2), False", "return everything, everything, False"),
    ("visible", "return slice(length // 2, length), everything, False", "return everything, everything, False"),
    ("ContextParallel.own",
     "return x if self.size == 1 else x.index_select(dim, send(self.positions(x.shape[dim]), x.device))",
     "return x if self.size == 1 else x.chunk(self.size, dim)[self.rank]"),
    ("BlockwiseAttention.backward", "total[place] += gradient", "total[place] = gradient"),
    ("gradient_of_block", "gradient[:, keys] = part.grad", "gradient[:, keys] = part.grad / 2"),
    ("BlockMask._within", "bounds += [start - begin + here, stop - begin + here]",
     "bounds += [start - begin, stop - begin]"),
    ("BlockMask._within", "start, stop = max(bounds[0], part.start), min(bounds[-1], part.stop)",
     "start, stop = bounds[0], bounds[-1]"),
    ("BlockwiseAttention.backward", "attend_backward(*read, Scores(ctx.scale, part.causal))",
     "attend_backward(*read, Scores(ctx.scale, False))"),
    ("BlockwiseAttention.backward", "else torch.zeros_like(block)", "else torch.ones_like(block)"),
)

EXPERT = of(
    LAYOUTS,
    ("AllToAllRows.backward", "return ctx.exchange.send(ctx.encode(grad), ctx.received, ctx.sent)",
     "return ctx.exchange.send(ctx.encode(grad) / 2, ctx.received, ctx.sent)"),
    ("_group_by_expert",
     "return expert_of_row.repeat_interleave(counts_re.flatten(), output_size=num_rows).argsort(stable=True)",
     "return torch.arange(num_rows, device=counts_re.device)"),
    ("agree_on_counts", "shared(incoming_re.sum(0))", "shared(incoming_re[0] * len(incoming_re))"),
    ("AllToAllDispatcher.__call__", "return sum_copies(rows_RH, weights_TK, copies), cross_node_sends",
     "return sum_copies(rows_RH, weights_TK.detach(), copies), cross_node_sends"),
)

GATHERED = of(
    ("tests/unit/parallel/test_dispatch.py", *LAYOUTS),
    ("AllGatherDispatcher.__call__", "gather_sum(weights_TK, 0", "gather_sum(weights_TK.detach(), 0"),
    ("AllGatherDispatcher.route", "self.mesh.get_local_rank() * mine",
     "(self.mesh.size() - 1 - self.mesh.get_local_rank()) * mine"),
    ("AllGatherDispatcher.__call__", "_serve(lambda: x_TH, route, weights_TK, experts,",
     "_serve(lambda: x_TH, route, weights_TK.detach(), experts,"),
    ("AllGatherDispatcher.__call__", "_serve(lambda: x_TH, route, weights_TK, experts,",
     "_serve(lambda: x_TH, route, 2 * weights_TK, experts,"),
)

GROUPED = of(
    (*TRAFFIC, *LAYOUTS),
    ("GroupedDispatcher._one_for_each_node", ".where(experts_TK != DROPPED, num_nodes)",
     ".where(experts_TK != DROPPED, 0)"),
    ("GroupedDispatcher.__call__", "parts = (weights_TK[copies.row_R],", "parts = (weights_TK.detach()[copies.row_R],"),
    ("GroupedDispatcher._within_node", "experts_QK - self.levels.across.get_local_rank() * number", "experts_QK"),
    ("GroupedDispatcher._one_for_each_node", "nodes_N.where(needed_TN[:, :num_nodes], DROPPED)",
     "nodes_N.where(needed_TN[:, :num_nodes], 0)"),
) + of(
    ("tests/parallel/test_collective_bytes.py",),
    ("GroupedDispatcher._one_for_each_node", "needed_TN.scatter_(1, node_TK, True)", "needed_TN.fill_(True)"),
)

SLICES = of(
    LAYOUTS,
    ("_expert_of_row", "right=True).flatten()", "right=False).flatten()"),
    ("ExpertTensorParallel.__call__", "gather_sum(F.pad(", "gather_sum(0.5 * F.pad("),
)

SHARED = of(
    LAYOUTS,
    ("SharedParameter.sum_gradients", "            if copy.grad is not None:\n                total +=",
     "            if copy is self.copies[0] and copy.grad is not None:\n                total +="),
    ("SharedParameter.sum_gradients",
     "        if self.group is not None:\n            dist.all_reduce(total, group=self.group)",
     "        pass"),
    ("find_shared", "counted = rank_of_stage[holding[0]] == meshes.rank(\"pp\")", "counted = True"),
    ("SharedParameter.sum_gradients", "            _local(copy.grad).copy_(total)",
     "            _local(copy.grad).copy_(total / len(self.copies))"),
    ("find_shared", "ranks = sorted({rank_of_stage[s] for s in holding})",
     "ranks = sorted({rank_of_stage[s] for s in holding[:2]})"),
)

PIPELINE = of(
    STEP,
    ("Pipeline.train", "synchronize_gradients(module, i == last)", "synchronize_gradients(module, i == 0)"),
    ("Pipeline.train", "            module.train()", "            pass"),
    ("Pipeline.evaluate", "        for module in self.modules:\n            reshard(module)", "        pass"),
    ("Pipeline._build_schedule", "scale_grads=False)\n        if self.overlap",
     "scale_grads=True)\n        if self.overlap"),
    ("Pipeline.evaluate", "            module.eval()", "            pass"),
    ("_with_tokens", "return zip(tokens_BS.tensor_split(len(micro_batches.items)),",
     "return zip(reversed(tokens_BS.tensor_split(len(micro_batches.items))),"),
    ("Travel.passed_on", "states = min(self.states_after[index], num_predictions)",
     "states = self.states_after[index]"),
)

ZERO_BUBBLE = of(
    ("tests/unit/parallel/test_waiting_gradients.py",),
    ("DeferringLinear.backward", "ctx.saved_tensors[0].detach()", "ctx.saved_tensors[0]"),
    ("zero_bubble._GroupedGemm.backward", "ctx.saved_tensors[0].detach()", "ctx.saved_tensors[0]"),
    ("_LogProbabilities.backward", "x_TH.detach()", "x_TH"),
) + of(
    LAYOUTS,
    ("DeferredGradients.take", "        pending, self._pending = self._pending, []",
     "        pending = list(self._pending)"),
    ("zero_bubble._GroupedGemm.backward",
     "        ctx.deferred.defer(weight_EOI, lambda: grouped_wgrad(grad_RO, x_RI, counts_E))",
     "        pass"),
) + of(
    BF16,
    ("DeferredGradients.take", "            self._finish()", "            pass"),
)

SCHEDULE_RULES = of(
    LAYOUTS,
    ("rank_of_stage", "        return min(stage, num_stages - 1 - stage)", "        return stage % pp"),
    ("rank_of_stage", "    if schedule in V_SHAPED and num_stages == 2 * pp:", "    if num_stages == 2 * pp:"),
)

PIECES = of(
    LAYOUTS,
    ("regions", "offset[dim] + number * rows", "offset[dim] + number * part[dim]"),
)

STAGE = of(
    ("tests/parallel/test_overlap.py", *LAYOUTS),
    ("ReducingStage.backward_maybe_with_nosync", "        self.submod.set_requires_gradient_sync(last_backward)\n",
     ""),
    ("ReducingStage.backward_maybe_with_nosync", "if self.dw_builder or not (",
     "if not ("),
    ("ReducingStage.backward_maybe_with_nosync", "if self.dw_builder or not (",
     "if True or not ("),
    ("ReducingStage.perform_reduce_grad", "        if self.dw_builder:\n            super().perform_reduce_grad",
     "        if False:\n            super().perform_reduce_grad"),
)

EXTREMES = of(
    ("tests/parallel/test_vocabulary.py",),
    ("joint_statistics", "op=dist.ReduceOp.MAX", "op=dist.ReduceOp.MIN"),
)

COUNTED = of(
    TRAFFIC,
    ("Trainer._result", "tokens = copies / (self.spec.model.num_experts_per_tok or 1)", "tokens = copies"),
) + of(
    TRAFFIC,
    ("StepStatistics.add_stats", "self.cross_node_sends = self.cross_node_sends + stats.cross_node_sends",
     "self.cross_node_sends = stats.cross_node_sends"),
)

SENT = of(
    TRAFFIC,
    ("Exchange.send", "        self.counter.rows(self.group, sent, x)\n", ""),
) + of(
    TRAFFIC,
    ("GatherSum.backward",
     "        ctx.sent(ctx.group, own)\n"
     "",
     ""),
    ("ScatterSum.backward", "        ctx.sent(ctx.group, grad)\n", ""),
) + of(
    TRAFFIC,
    ("Trainer.train_step", "        self.counter.take()  # what an evaluation sent\n", ""),
)

TRAFFIC_BYTES = of(
    TRAFFIC,
    ("CommunicationCounter.divide", "if rank != here]", "]"),
    ("CommunicationCounter.divide",
     "within = sum(number for rank, number in sent if rank // self.ranks_per_node == node)",
     "within = sum(number for rank, number in sent if rank % self.ranks_per_node == node)"),
)

MEMORY_MUTANTS = of(
    ("tests/parallel/test_state_memory.py",),
    ("Trainer.train_step", "self.optimizer.zero_grad()", "self.optimizer.zero_grad(set_to_none=False)"),
)

STEP_MUTANTS = of(
    STEP,
    ("Trainer.global_counts", 'self.meshes.group("dp"))', 'self.meshes.group("etp"))'),
    ("Trainer.global_counts", 'self.meshes.group("dp"))', "None)"),
    ("Trainer.global_counts", 'self.meshes.group("dp"))', "self.meshes.dense_fsdp.get_group())"),
    ("Trainer.global_counts", "(*own.values(), divided.num_sequences)",
     "(*own.values(), divided.num_sequences // self.spec.micro_batch_size)"),
    ("Trainer._reduce", "statistics.reports.get(name, 0.0) if first_tp else 0.0 for name in names]",
     "statistics.reports.get(name, 0.0) for name in names]"),
    ("Trainer._reduce", "values += [statistics.balance_loss, *own",
     "values += [statistics.balance_loss if first_tp else 0.0, *own"),
    ("Trainer._reduce", "sum_numbers(values, self.meshes.device)",
     "sum_numbers(values, self.meshes.device, self.meshes.stage.get_group())"),
    ("sum_numbers", "send(there, device)", "send(there[::-1], device)"),
    ("Trainer.__init__", "for layer in stage.mtp_layers(self.objective.num_depths)):",
     "for layer in stage.mtp_layers(9)):"),
    ("Trainer.read", "self.holders[-1], self.meshes)", "0, self.meshes)"),
    ("Trainer.train_step",
     "        for shared in self.shared:\n            shared.sum_gradients()\n"
     "        own = self._own_sums(step.statistics, stop_flags())",
     "        own = self._own_sums(step.statistics, stop_flags())\n"
     "        for shared in self.shared:\n            shared.sum_gradients()"),
    ("Trainer.named_parameters",
     "counted = {shared.name: shared.copies[0] if shared.counted_here and shared.copies else None",
     "counted = {shared.name: None"),
    ("Trainer.train_step", "self.optimizer.zero_grad()", "pass"),
    ("Trainer.train_step", "self.meshes.stage.get_group())\n        return",
     "self.meshes.dense_fsdp.get_group())\n        return"),
    ("Trainer.train_step", "bias_rate if healthy else 0.0", "0.0"),
    ("Trainer._update", "clip_gradients(self.parameters, norm, self.spec.optimizer.clip_grad)", "pass"),
    ("_embedding_holders", "stage.embedding or stage.mtp or (stage.loss and tied)]",
     "stage.embedding or (stage.loss and tied)]"),
    ("Trainer.train_step", "healthy = losses.finite() and math.isfinite(norm)", "healthy = True"),
    ("Trainer.train_step", "self._own_sums(step.statistics, stop_flags())",
     "self._own_sums(step.statistics, StopFlags())"),
) + of(
    LAYOUTS,
    ("division.divide", "objective.num_depths, batch.documents_BS)\n    own = ", "objective.num_depths)\n    own = "),
    ("own_part", "weights_BMS=cp.own(rows.weights_BMS),", "weights_BMS=rows.weights_BMS.chunk(cp.size, -1)[0],"),
    ("own_part", "inputs={**batch.inputs, **inputs})", "inputs=batch.inputs)"),
    ("_micro_batch", "sums=replace(rows.sums, documents=own_documents),", "sums=rows.sums,"),
    ("own_part", "group=cp.group),", "group=None),"),
) + of(
    LAYOUTS,
    ("SequenceSums.over_ranks", "sum_gradients(sum_alike(x, self.group), self.group)", "sum_alike(x, self.group)"),
    ("SequenceSums.share", "return x.sum() / (1 if self.group is None else self.group.size())", "return x.sum()"),
    ("SequenceSums._own_places", "places_BS if self.positions_S is None else places_BS[:, self.positions_S]",
     "places_BS if self.positions_S is None else places_BS[:, :len(self.positions_S)]"),
) + of(
    ("tests/unit/training/test_objectives.py", "tests/unit/model/test_mtp.py"),
    ("NextToken.contribution", "loss * self.mtp_scale / predictions.num_depths", "loss * self.mtp_scale"),
    ("NextToken.mean", '/ (counts[f"weight_{depth}"] or 1.0)', '/ (counts["weight_0"] or 1.0)'),
    ("NextToken.counts", 'counts["labels"] = (rows.weights_BS != 0).sum()', 'counts["labels"] = rows.weights_BS.sum()'),
    ("NextToken.mean", "(x_BS * rows.weights_BMS[:, depth]).sum()", "(x_BS * (rows.weights_BMS[:, depth] != 0)).sum()"),
) + of(
    LAYOUTS,
    ("whole_sequences", "return gathered.index_select(1, order_S.argsort().to(own.device))", "return gathered"),
    ("chosen_experts", 'own = own if meshes.layout.tp == 1 else all_gather(own, 1, meshes.group("tp"))',
     'own = own.repeat(1, meshes.layout.tp, 1)'),
)


OPTIMIZER = of(
    STEP,
    ("counts_in_norm", "return item.counted and gradient is not None", "return gradient is not None"),
    ("is_first_copy", "return all(tensor.device_mesh.get_local_rank(dim) == 0 for dim in replicated)",
     "return True"),
    ("Trainer.train_step", 'math.sqrt(sums.pop("squared_gradient_norm"))', 'sums.pop("squared_gradient_norm")'),
    ("clip_gradients", "scale = max_norm / (norm + 1e-6)", "scale = max_norm / (norm**2 + 1e-6)"),
    ("build_optimizer", "decays = optimizer_group(item.parameter.shape) == MATRIX", "decays = True"),
    ("clip_gradients", "for item in parameters if item.parameter.grad is not None]",
     "for item in parameters if item.parameter.grad is not None and item.counted]"),
)

BALANCE = of(
    STEP,
    ("update_expert_bias", "    dist.all_reduce(total_LE, group=group)", "    pass"),
    ("update_expert_bias", "torch.sign(total_E.mean() - total_E)", "torch.sign(total_E - total_E.mean())"),
    ("update_expert_bias", "zip(layers.values(), total_LE.double(), strict=True)",
     "zip([*layers.values()][1:], total_LE.double())"),
)

ROUTER_MUTANTS = of(
    ROUTER,
    ("Router.__init__", "self.weight_grad = Partial() if tp.size > 1 else Replicate()",
     "self.weight_grad = tp.activation_grad"),
    ("expert_weights", "return weights_TK * config.routed_scaling_factor", "return weights_TK"),
    ("expert_weights", "weights_TK = scores_TE.gather(-1, experts_TK)",
     "weights_TK = scores_TE.gather(-1, experts_TK).detach()"),
    ("limit_to_groups", 'best = 2 if config.topk_method == "noaux_tc" else 1', "best = 1"),
    ("choose_experts", "choice_TE = scores_TE if bias_E is None else scores_TE + bias_E", "choice_TE = scores_TE"),
    ("choose_experts", "choice_TE = scores_TE if bias_E is None else scores_TE + bias_E",
     "choice_TE = scores_TE if bias_E is None else scores_TE - bias_E"),
)

BALANCE_LOSS = of(
    ROUTER,
    ("balance_loss.balance_loss",
     "for counts in (counts_BE, sent_BG, tokens_B1):", "for counts in (counts_BE, sent_BG):"),
    ("balance_loss.balance_loss",
     "for counts in (counts_BE, sent_BG, tokens_B1):", "for counts in (counts_BE, tokens_B1):"),
    ("balance_loss.balance_loss",
     "for counts in (counts_BE, sent_BG, tokens_B1):", "for counts in (sent_BG, tokens_B1):"),
    ("balance_loss.balance_loss", "1 if weights.per_sequence else num_sequences", "1"),
    ("balance_loss.balance_loss", "p_BE = scores_BSE.sum(1) / tokens_B1", "p_BE = scores_BSE.mean(1)"),
    ("_choices",
     "    experts_TK = choose_experts(routing.scores_TE, None, config) if config.topk_method == \"noaux_tc\" \\\n"
     "        else routing.experts_TK",
     "    experts_TK = routing.experts_TK"),
    ("_AttachLoss.backward", "return grad, grad.new_ones((), dtype=ctx.loss_dtype)",
     "return grad, 0.5 * grad.new_ones((), dtype=ctx.loss_dtype)"),
    ("balance_loss.balance_loss", "pooled * sent_BG * num_groups", "pooled * sent_BG"),
)

CAPACITY = of(
    ROUTER,
    ("Capacity.keep", "positions_S = all_gather(positions_S, 0, sequence_group)",
     "positions_S = torch.arange(experts_BSK.shape[1])"),
    ("Capacity.keep", "return own.where(kept_BSK.chunk(size, 1)[rank], DROPPED)",
     "return own.where(kept_BSK.chunk(size, 1)[0], DROPPED)"),
    ("Capacity.keep", "tokens_B = (experts_BSK != DROPPED).any(-1).sum(1)",
     "tokens_B = (experts_BSK != DROPPED).any(-1).sum(1) * 0 + experts_BSK.shape[1]"),
    ("Capacity.keep", ".ceil()", ".floor()"),
)

MOE = of(
    ROUTER,
    ("TensorParallel.own_keys", "SEQUENCE_DIM)[self.rank]", "SEQUENCE_DIM)[0]"),
    ("MoE._balanced", "loss = loss / global_sequences", "loss = loss / num_sequences"),
    ("MoE._balanced", "self.balance, self.sequence_group, counted_BS)", "self.balance, None, counted_BS)"),
    ("MoE._balanced", "        if not (self.balance.any and self.training):", "        if not self.balance.any:"),
    ("MoE.forward", "count_choices(_routed(chosen_TK, counted_BS)", "count_choices(_routed(kept_TK, counted_BS)"),
    ("MoE._balanced", "return attach_loss(y_TH, loss), loss.detach()", "return y_TH, loss.detach()"),
    ("MoE._positions", "return send(positions_S[self.tp.rank * length:][:length]", "return send(positions_S[:length]"),
    ("MoE.forward", "self._within_capacity(own_BSH, chosen_TK, routing.weights_TK)",
     "self._within_capacity(own_BSH, routing.experts_TK, routing.weights_TK)"),
    ("MoE._positions", "length * self.tp.size * self.cp.size)", "length * self.tp.size)"),
)

DEEPSEEK = of(
    MODEL,
    ("DeepseekStage.__init__",
     "self.rope_2SD = blueprint.cp.own(rope_table(self.config, seq_length, device, wide), dim=1)",
     "self.rope_2SD = rope_table(self.config, seq_length, device, wide)[:, :seq_length // blueprint.cp.size]"),
    ("DeepseekStage.states", "embedding = self.model.embed_tokens(labels_BMS[:, depth])",
     "embedding = self.model.embed_tokens(labels_BMS[:, depth + 1])"),
    ("DeepseekStage.states", "embedding = self.model.embed_tokens(labels_BMS[:, depth])",
     "embedding = self.model.embed_tokens(labels_BMS[:, depth]).detach()"),
    ("DeepseekStage.__init__", "self.model.embed_tokens.local_weight, chunk",
     "lambda: self.model.embed_tokens.local_weight().detach(), chunk"),
    ("DeepseekStage.states", "if depth + 1 < labels_BMS.shape[1]:", "if depth < labels_BMS.shape[1]:"),
    ("Trunk.__init__", "        if config.num_hidden_layers - 1 in stage.layers:", "        if stage.loss:"),
    ("DeepseekStage.states", "            current = self.model.norm(current)", "            pass"),
    ("Trunk.__init__", "if stage.embedding or stage.mtp or (stage.loss and config.tie_word_embeddings):",
     "if stage.embedding or stage.mtp or stage.loss:"),
    ("DeepseekStage.states",
     "states.append(self._layer(index, step, positions, routed[depth + 1], states[-1], embedding))",
     "states.append(self._layer(index, step, positions, routed[depth + 1], states[0], embedding))"),
    ("DeepseekStage.states",
     "states.append(self._layer(index, step, positions, routed[depth + 1], states[-1], embedding))",
     "states.append(self._layer(index, step, positions, routed[depth], states[-1], embedding))"),
) + of(
    MODEL,
    ("StepStatistics.add_stats", "self.expert_counts[layer] = self.expert_counts.get(layer, 0) + stats.counts_E",
     "self.expert_counts[layer] = stats.counts_E"),
    ("StepStatistics.add_stats", "self.balance_loss = self.balance_loss + stats.balance_loss",
     "self.balance_loss = stats.balance_loss"),
    ("StepStatistics.add_stats", "self.dropped = self.dropped + stats.dropped", "self.dropped = stats.dropped"),
    ("StepStatistics.add_stats", "self.chosen.setdefault(layer, []).append(stats.experts_BSK)",
     "self.chosen[layer] = [stats.experts_BSK]"),
) + of(
    MODEL,
    ("shifted_labels", "labels.append(F.pad(labels[-1][:, 1:], (0, 1)))", "labels.append(labels[-1].roll(-1, 1))"),
    ("shifted_labels", "shifted_BS = F.pad(shifted_BS[:, 1:], (0, 1))\n", "shifted_BS = shifted_BS.roll(-1, 1)\n"),
    ("shifted_labels", "stays_BS = 1 if documents_BS is None else send(_stays(documents_BS, depth)",
     "stays_BS = send(torch.tensor(1)"),
    ("shifted_labels", "stays_BS = 1 if documents_BS is None else send(_stays(documents_BS, depth)",
     "stays_BS = 1 if documents_BS is None else send(_stays(documents_BS, 1)"),
    ("routed_tokens",
     "routed.append(both_BS if documents_BS is None else both_BS & send(_stays(documents_BS, depth), real_BS.device))",
     "routed.append(both_BS)"),
)

MLA = of(
    MODEL,
    ("UpProjections.block", "turned = apply_rope(k_pe_BSD.unsqueeze(2), self.rope_2SD).squeeze(2)",
     "turned = k_pe_BSD"),
    ("MLA.forward", "self.o_proj.add_bias(self.tp.leave(self.o_proj(y_BSV, positions.keys.own_BS)))",
     "self.tp.leave(self.o_proj.add_bias(self.o_proj(y_BSV, positions.keys.own_BS)))"),
    ("MLA.whole_sequence",
     "return self.tp.enter(torch.cat(latents, -1)).split([latent.shape[-1] for latent in latents], -1)",
     "return self.tp.enter(torch.cat([*latents[:2], latents[2].detach()], -1)).split("
     "[latent.shape[-1] for latent in latents], -1)"),
)

LAYER = of(
    MODEL,
    ("MTPLayer.forward", "joined = torch.cat([self.enorm(embedding_BSH), self.hnorm(state_BSH)], -1)",
     "joined = torch.cat([self.hnorm(state_BSH), self.enorm(embedding_BSH)], -1)"),
    ("MTPLayer.forward", "return self.shared_head.norm(x_BSH), stats", "return x_BSH, stats"),
)

BUILD = of(
    LAYOUTS,
    ("units", "yield Unit(layer.mlp.experts, meshes.expert_fsdp, precision.compute)",
     "yield Unit(layer.mlp.experts, meshes.dense_fsdp, precision.compute)"),
    ("make_blueprint", "sequence_group=meshes.sequence.get_group() if meshes.sequence.size() > 1 else None,",
     "sequence_group=None,"),
) + of(
    ("tests/unit/training/test_trainer.py", *BF16),
    ("units", "                yield Unit(layer.mlp.gate, meshes.dense_fsdp)", "                pass"),
)

INIT = of(
    ("tests/unit/model/test_init.py", "tests/unit/model/test_sharded_init.py", *LAYOUTS),
    ("global_index", "index += (rest % local_shape[dim] + offset[dim]) * stride",
     "index += (rest % local_shape[dim]) * stride"),
    ("normal", 'f"{seed}:{name}"', 'f"{seed}"'),
)

SAMPLES = of(
    DATA,
    ("sample_indices", "consumed_samples + dp_rank * micro_batch_size", "consumed_samples"),
    ("sample_indices", "stride = micro_batch_size * dp_size", "stride = micro_batch_size"),
    ("number_documents", "return ends_BS.cumsum(1) - ends_BS", "return ends_BS.cumsum(1)"),
) + of(
    DATA,
    ("Run._data_rank", 'return self.trainer.meshes.rank("dp"), self.settings.layout.dp',
     "return 0, self.settings.layout.dp"),
    ("Run._batches", "batch.num_rows * self.settings.layout.dp", "batch.num_rows"),
)

MUTANTS = (
    *TENSOR, *VOCABULARY, *EXTREMES, *DATA_PARALLEL, *MESH, *EXCHANGE, *SLICED, *CONTEXT, *EXPERT, *GATHERED, *GROUPED,
    *SLICES, *SHARED, *PIPELINE, *ZERO_BUBBLE, *SCHEDULE_RULES, *PIECES, *STAGE, *SENT, *TRAFFIC_BYTES, *COUNTED,
    *MEMORY_MUTANTS, *STEP_MUTANTS, *OPTIMIZER, *BALANCE, *ROUTER_MUTANTS, *BALANCE_LOSS, *CAPACITY, *MOE, *DEEPSEEK,
    *MLA, *LAYER,
    *BUILD, *INIT, *SAMPLES, *AGREED, *FROZEN, *PARAMETERS, *FINE_TUNED, *GROUPED_QUERY, *RELEASED, *LOADED, *ADAPTERS,
    *CONVERTED, *MEGATRON, *CHATS, *BASE_WEIGHTS, *SERVED, *EVALUATED, *PREFERRED, *REWARDED, *COMPILED, *GGUF,
    *ROLLOUTS, *REPLAYED, *POLICY, *DISTILLED, *REINFORCED, *DRY_RUNS, *ON_GPUS, *MULTIPLIED)
