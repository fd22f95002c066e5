"""Mistakes planted in the source, one at a time: a file, what stands there, what is put in its place, and the tests
that must fail.

tests/helpers/ranks/mutations.py has the mistakes of design.md's list, which every run of the tests makes. This table is
broader and slow: `make mutants` runs it. A mistake that no test sees, and that changes numbers, is a missing test.
agreed.py has those that a comparison of layouts cannot see.
"""

from agreed import AGREED
from frozen import FROZEN
from mutant import of
from parameters import PARAMETERS

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
    "parallel/tensor.py", LAYOUTS,
    ("return Partial() if self.sequence_parallel and self.size > 1 else", "return Partial() if self.size > 1 else"),
    ("self.bias_grad = tp.activation_grad", "self.bias_grad = Replicate()"),
    ("tp, Replicate(), tp.activation_grad, bias, gemm)", "tp, Replicate(), Replicate(), bias, gemm)"),
    ("        self.weight_grad = tp.activation_grad\n        self.eps",
     "        self.weight_grad = Replicate()\n        self.eps"),
    ("return self.gemm(x, self.local_weight())",
     "return self.gemm(x, local_weight(self.weight, Replicate()))"),
    ("        return x.chunk(group.size(), dim)[group.rank()].contiguous()",
     "        return x.chunk(group.size(), dim)[-1 - group.rank()].contiguous()"),
    ("        own = reduce_scatter(grad, ctx.dim, ctx.group)",
     "        own = reduce_scatter(grad, ctx.dim, ctx.group) / ctx.group.size()"),
    ("        return all_reduce(grad, ctx.group), None",
     "        return all_reduce(grad, ctx.group) / ctx.group.size(), None"),
    ("        return all_reduce(x, group)\n\n    @staticmethod\n    def backward(ctx, grad):\n"
     "        return grad, None",
     "        ctx.size = group.size()\n        return all_reduce(x, group)\n\n    @staticmethod\n"
     "    def backward(ctx, grad):\n        return grad * ctx.size, None"),
    ("        return all_gather(grad, ctx.dim, ctx.group), None, None\n\n\nclass _Join",
     "        return all_gather(grad, ctx.dim, ctx.group) / ctx.group.size(), None, None\n\n\nclass _Join"),
)

VOCABULARY = of(
    "parallel/vocabulary.py", LAYOUTS,
    ("local = ids - tp.rank * rows", "local = ids - (tp.size - 1 - tp.rank) * rows"),
    ("return self.tp.leave(F.embedding(local_BS, weight_vH) * mine_BS.unsqueeze(-1))",
     "return self.tp.leave(F.embedding(local_BS, weight_vH))"),
    ("ctx.first_id = tp.rank * logits_Tv.shape[-1]", "ctx.first_id = 0"),
    ("dist.all_reduce(sums_2T, group=tp.group)", "dist.all_reduce(sums_2T[:1], group=tp.group)"),
    ("sum_T * (own_max_T - max_T).exp()", "sum_T"),
)

DATA_PARALLEL = of(
    "parallel/data.py", LAYOUTS,
    ("unit.module.set_gradient_divide_factor(1.0)", "pass"),
) + of(
    "parallel/data.py", BF16,
    ("            parameter.to_accumulated_grad_if_needed()", "            pass"),
    ("reduce_dtype=master", "reduce_dtype=unit.compute_dtype"),
)

MESH = of(
    "parallel/mesh.py", LAYOUTS,
    ('dense_fsdp = dense["dp", "cp"]._flatten("dp_cp")', 'dense_fsdp = dense["dp"]'),
    ('sequence = dense["cp", "tp"]._flatten("cp_tp")', 'sequence = dense["cp"]'),
    ('sequence = dense["cp", "tp"]._flatten("cp_tp")', 'sequence = dense["tp"]'),
    ('stage = dense["dp", "cp", "tp"]._flatten("dp_cp_tp")', 'stage = dense["dp", "cp"]._flatten("stage")'),
    ('stage = dense["dp", "cp", "tp"]._flatten("dp_cp_tp")', 'stage = dense["dp", "tp"]._flatten("stage")'),
    ('stage = dense["dp", "cp", "tp"]._flatten("dp_cp_tp")', 'stage = dense["cp", "tp"]._flatten("stage")'),
)

EXCHANGE = of(
    "parallel/exchange.py", LAYOUTS,
    ("total = total + arriving.wait()", "total = total + 0 * arriving.wait()"),
    ("yield (self.group.rank() - step) % size, block", "yield (self.group.rank() + step) % size, block"),
    ("return arriving.wait().to(dtype)", "return total.to(dtype)"),
    ("stacked = torch.cat([by_owner[owner] for owner in range(len(by_owner))])",
     "stacked = torch.cat([by_owner[owner] for owner in self._order()])"),
    ("return reduce_scatter(stacked.to(torch.promote_types(dtype, torch.float32)), 0, self.group).to(dtype)",
     "return reduce_scatter(stacked.to(torch.promote_types(dtype, torch.float32)), 0, self.group).to(dtype) / 2"),
)

CONTEXT = of(
    "parallel/context.py", LAYOUTS,
    ("return torch.cat([chunks[rank], chunks[-1 - rank]])",
     "return torch.cat([chunks[2 * rank], chunks[2 * rank + 1]])"),
    ("return x if self.size == 1 else x.index_select(dim, self.positions(x.shape[dim]).to(x.device))",
     "return x if self.size == 1 else x.chunk(self.size, dim)[self.rank]"),
) + of(
    "parallel/block_mask.py", LAYOUTS,
    ("return everything, slice(0, length // 2), False", "return everything, everything, False"),
    ("return slice(length // 2, length), everything, False", "return everything, everything, False"),
    ("bounds += [start - begin + here, stop - begin + here]", "bounds += [start - begin, stop - begin]"),
    ("start, stop = max(bounds[0], part.start), min(bounds[-1], part.stop)", "start, stop = bounds[0], bounds[-1]"),
) + of(
    "parallel/blockwise_attention.py", LAYOUTS,
    ("grad_q_BNSD[queries] += grad_q", "grad_q_BNSD[queries] = grad_q"),
    ("gradient[:, keys] = part.grad", "gradient[:, keys] = part.grad / 2"),
    ("lse_BNS[queries], Scores(ctx.scale, part.causal))", "lse_BNS[queries], Scores(ctx.scale, False))"),
    ("else torch.zeros_like(block)", "else torch.ones_like(block)"),
)

EXPERT = of(
    "parallel/expert.py", LAYOUTS,
    ("return ctx.exchange.send(ctx.encode(grad), ctx.received, ctx.sent)",
     "return ctx.exchange.send(ctx.encode(grad) / 2, ctx.received, ctx.sent)"),
    ("return expert_of_row.repeat_interleave(counts_re.flatten()).argsort(stable=True)",
     "return torch.arange(int(counts_re.sum()), device=counts_re.device)"),
    ("incoming_re.sum(0).tolist())", "incoming_re[0].mul(incoming_re.shape[0]).tolist())"),
    ("return sum_copies(rows_RH, weights_TK, copies), cross_node_sends",
     "return sum_copies(rows_RH, weights_TK.detach(), copies), cross_node_sends"),
)

GATHERED = of(
    "parallel/expert_gather.py", ("tests/unit/parallel/test_dispatch.py", *LAYOUTS),
    ("for each in (x_TH, weights_TK))", "for each in (x_TH, weights_TK.detach()))"),
    ("self.mesh.get_local_rank() * mine", "(self.mesh.size() - 1 - self.mesh.get_local_rank()) * mine"),
    ("return self._serve(x_TH, experts_TK, weights_TK, experts, mine), 0",
     "return self._serve(x_TH, experts_TK, weights_TK.detach(), experts, mine), 0"),
    ("return self._serve(x_TH, experts_TK, weights_TK, experts, mine), 0",
     "return self._serve(x_TH, experts_TK, 2 * weights_TK, experts, mine), 0"),
)

GROUPED = of(
    "parallel/expert_grouped.py", (*TRAFFIC, *LAYOUTS),
    (".where(experts_TK != DROPPED, num_nodes)", ".where(experts_TK != DROPPED, 0)"),
    ("rows = [copy_rows(x_TH, copies), weights_TK[copies.row_R], experts_TK[copies.row_R]]",
     "rows = [copy_rows(x_TH, copies), weights_TK.detach()[copies.row_R], experts_TK[copies.row_R]]"),
    ("experts_QK - self.levels.across.get_local_rank() * number", "experts_QK"),
    ("nodes_N.where(needed_TN[:, :num_nodes], DROPPED)", "nodes_N.where(needed_TN[:, :num_nodes], 0)"),
)

SLICES = of(
    "parallel/expert_tensor.py", LAYOUTS,
    ("right=True).flatten()", "right=False).flatten()"),
    ("rows_GH = gather_sum(F.pad(", "rows_GH = gather_sum(0.5 * F.pad("),
)

SHARED = of(
    "parallel/shared.py", LAYOUTS,
    ("            if copy.grad is not None:\n                total +=",
     "            if copy is self.copies[0] and copy.grad is not None:\n                total +="),
    ("        if self.group is not None:\n            dist.all_reduce(total, group=self.group)", "        pass"),
    ("counted = rank_of_stage[holding[0]] == meshes.rank(\"pp\")", "counted = True"),
    ("            _local(copy.grad).copy_(total)", "            _local(copy.grad).copy_(total / len(self.copies))"),
    ("ranks = sorted({rank_of_stage[s] for s in holding})", "ranks = sorted({rank_of_stage[s] for s in holding[:2]})"),
)

PIPELINE = of(
    "parallel/pipeline.py", STEP,
    ("synchronize_gradients(module, i == last)", "synchronize_gradients(module, i == 0)"),
    ("            module.train()", "            pass"),
    ("        for module in self.modules:\n            reshard(module)", "        pass"),
    ("scale_grads=False)\n        if self.overlap", "scale_grads=True)\n        if self.overlap"),
    ("            module.eval()", "            pass"),
    ("return zip(tokens_BS.tensor_split(len(micro_batches.items)),",
     "return zip(reversed(tokens_BS.tensor_split(len(micro_batches.items))),"),
    ("states = min(self.states_after[index], num_predictions)", "states = self.states_after[index]"),
)

ZERO_BUBBLE = of(
    "parallel/zero_bubble.py", LAYOUTS,
    ("        pending, self._pending = self._pending, []", "        pending = list(self._pending)"),
    ("        ctx.deferred.defer(weight_EOI, lambda: grouped_wgrad(grad_RO, x_RI, counts_E))", "        pass"),
) + of("parallel/zero_bubble.py", BF16, ("            self._finish()", "            pass"))

SCHEDULE_RULES = of(
    "parallel/schedule_rules.py", LAYOUTS,
    ("        return min(stage, num_stages - 1 - stage)", "        return stage % pp"),
    ("    if schedule in V_SHAPED and num_stages == 2 * pp:", "    if num_stages == 2 * pp:"),
)

PIECES = of(
    "parallel/shards.py", LAYOUTS,
    ("offset[dim] + number * rows", "offset[dim] + number * part[dim]"),
)

STAGE = of(
    "parallel/stage.py", ("tests/parallel/test_overlap.py", *LAYOUTS),
    ("        self.submod.set_requires_gradient_sync(True)\n", ""),
    ("if self.dw_builder or not last_backward:", "if not last_backward:"),
    ("if self.dw_builder or not last_backward:", "if True:"),
    ("        if self.dw_builder:\n            super().perform_reduce_grad",
     "        if False:\n            super().perform_reduce_grad"),
)

EXTREMES = of(
    "parallel/vocabulary.py", ("tests/parallel/test_vocabulary.py",),
    ("op=dist.ReduceOp.MAX", "op=dist.ReduceOp.MIN"),
)

COUNTED = of(
    "training/trainer.py", TRAFFIC,
    ("tokens = copies / (self.plan.model.num_experts_per_tok or 1)", "tokens = copies"),
) + of(
    "model/step.py", TRAFFIC,
    ("self.cross_node_sends = self.cross_node_sends + stats.cross_node_sends",
     "self.cross_node_sends = stats.cross_node_sends"),
)

SENT = of("parallel/expert.py", TRAFFIC, ("        self.counter.rows(self.group, sent, x)\n", "")) + of(
    "parallel/tensor.py", TRAFFIC, ("        ctx.sent(ctx.group, own)\n"
    "", ""), ("        ctx.sent(ctx.group, grad)\n", ""),
) + of("training/trainer.py", TRAFFIC, ("        self.counter.take()  # what an evaluation sent\n", ""))

TRAFFIC_BYTES = of(
    "parallel/nodes.py", TRAFFIC,
    ("if rank != here]", "]"),
    ("within = sum(number for rank, number in sent if rank // self.ranks_per_node == node)",
     "within = sum(number for rank, number in sent if rank % self.ranks_per_node == node)"),
)

STEP_MUTANTS = of(
    "training/trainer.py", STEP,
    ('dist.all_reduce(together, group=self.meshes.group("dp"))', "pass"),
    ('dist.all_reduce(together, group=self.meshes.group("dp"))', "dist.all_reduce(together)"),
    ('dist.all_reduce(together, group=self.meshes.group("dp"))',
     'dist.all_reduce(together, group=self.meshes.dense_fsdp.get_group())'),
    ("(*own.values(), divided.num_rows)]", "(*own.values(), divided.num_rows // self.plan.micro_batch_size)]"),
    ("statistics.reports.get(name, 0.0) if first_tp else 0.0 for name in names]",
     "statistics.reports.get(name, 0.0) for name in names]"),
    ("values += [statistics.balance_loss, stop_flags.save",
     "values += [statistics.balance_loss if first_tp else 0.0, stop_flags.save"),
    ("        dist.all_reduce(together)\n        *reports",
     "        dist.all_reduce(together, group=self.meshes.stage.get_group())\n        *reports"),
    ("for layer in stage.mtp_layers(self.objective.num_depths)):", "for layer in stage.mtp_layers(9)):"),
    ("self.holders[-1], self.meshes)", "0, self.meshes)"),
    ("        for shared in self.shared:\n            shared.sum_gradients()\n"
     "        norm = gradient_norm(self.parameters, self.meshes.device)",
     "        norm = gradient_norm(self.parameters, self.meshes.device)\n"
     "        for shared in self.shared:\n            shared.sum_gradients()"),
    ("counted = {shared.name: shared.copies[0] if shared.counted_here and shared.copies else None",
     "counted = {shared.name: None"),
    ("self.optimizer.zero_grad()", "pass"),
    ("self.meshes.stage.get_group())\n        return StepResult",
     "self.meshes.dense_fsdp.get_group())\n        return StepResult"),
    ("bias_rate if healthy else 0.0", "0.0"),
    ("clip_gradients(self.parameters, norm, self.plan.optimizer.clip_grad)", "pass"),
    ("stage.embedding or stage.mtp or (stage.loss and tied)]", "stage.embedding or (stage.loss and tied)]"),
    ("healthy = losses.finite() and math.isfinite(norm.item())", "healthy = True"),
    ("self._reduce(step.statistics, divided, counts, stop_flags())",
     "self._reduce(step.statistics, divided, counts, StopFlags())"),
    ("        dist.all_reduce(sums)\n", ""),
) + of(
    "training/division.py", LAYOUTS,
    ("objective.num_depths, batch.documents_BS)\n    own = ", "objective.num_depths)\n    own = "),
    ("weights_BMS=cp.own(rows.weights_BMS),", "weights_BMS=rows.weights_BMS.chunk(cp.size, -1)[0],"),
    ("inputs={**batch.inputs, **inputs})", "inputs=batch.inputs)"),
    ("sums=replace(rows.sums, documents=own_documents),", "sums=rows.sums,"),
    ("group=cp.group),", "group=None),"),
) + of(
    "parallel/sequence_sums.py", LAYOUTS,
    ("sum_gradients(sum_alike(x, self.group), self.group)", "sum_alike(x, self.group)"),
    ("return x.sum() / (1 if self.group is None else self.group.size())", "return x.sum()"),
    ("places_BS if self.positions_S is None else places_BS[:, self.positions_S]",
     "places_BS[:, :x_BS.shape[1]]"),
) + of(
    "training/next_token.py", ("tests/unit/training/test_objectives.py", "tests/unit/model/test_mtp.py"),
    ("loss * self.mtp_scale / predictions.num_depths)", "loss * self.mtp_scale)"),
    ('/ (counts[f"weight_{depth}"] or 1.0)', '/ (counts["weight_0"] or 1.0)'),
    ('counts["labels"] = (rows.weights_BS != 0).sum()', 'counts["labels"] = rows.weights_BS.sum()'),
    ("(loss_BS * rows.weights_BMS[:, depth]).sum()", "(loss_BS * (rows.weights_BMS[:, depth] != 0)).sum()"),
) + of(
    "training/scoring.py", LAYOUTS,
    ("return gathered.index_select(1, order_S.argsort().to(own.device))", "return gathered"),
    ('own = own if meshes.layout.tp == 1 else all_gather(own, 1, meshes.group("tp"))',
     'own = own.repeat(1, meshes.layout.tp, 1)'),
)


OPTIMIZER = of(
    "training/optimizer.py", STEP,
    ("    if not item.counted or gradient is None:", "    if gradient is None:"),
    ("return all(gradient.device_mesh.get_local_rank(dim) == 0 for dim in replicated)", "return True"),
    ("    dist.all_reduce(total)\n", ""),
    ("scale = float(max_norm / (norm + 1e-6))", "scale = float(max_norm / (norm**2 + 1e-6))"),
    ("decays = optimizer_group(item.parameter.shape) == MATRIX", "decays = True"),
    ("for item in parameters if item.parameter.grad is not None]",
     "for item in parameters if item.parameter.grad is not None and item.counted]"),
)

BALANCE = of(
    "training/balance.py", STEP,
    ("            dist.all_reduce(total[name], group=group)", "            pass"),
    ("torch.sign(mean - total[name].double())", "torch.sign(total[name].double() - mean)"),
    ("            if bias is not None and rate and",
     "            if bias is not None and rate and not name.endswith('2.mlp') and"),
)

ROUTER_MUTANTS = of(
    "model/router.py", ROUTER,
    ("self.weight_grad = Partial() if tp.size > 1 else Replicate()", "self.weight_grad = tp.activation_grad"),
    ("return weights_TK * config.routed_scaling_factor", "return weights_TK"),
    ("weights_TK = scores_TE.gather(-1, experts_TK)", "weights_TK = scores_TE.gather(-1, experts_TK).detach()"),
    ('best = 2 if config.topk_method == "noaux_tc" else 1', "best = 1"),
    ("choice_TE = scores_TE if bias_E is None else scores_TE + bias_E", "choice_TE = scores_TE"),
    ("choice_TE = scores_TE if bias_E is None else scores_TE + bias_E",
     "choice_TE = scores_TE if bias_E is None else scores_TE - bias_E"),
)

BALANCE_LOSS = of(
    "model/balance_loss.py", ROUTER,
    ("for counts in (counts_BE, sent_BG, tokens_B1):", "for counts in (counts_BE, sent_BG):"),
    ("for counts in (counts_BE, sent_BG, tokens_B1):", "for counts in (counts_BE, tokens_B1):"),
    ("for counts in (counts_BE, sent_BG, tokens_B1):", "for counts in (sent_BG, tokens_B1):"),
    ("return loss if weights.per_sequence else loss * num_sequences", "return loss"),
    ("p_BE = scores_BSE.sum(1) / tokens_B1", "p_BE = scores_BSE.mean(1)"),
    ("    experts_TK = choose_experts(routing.scores_TE, None, config) if config.topk_method == \"noaux_tc\" \\\n"
     "        else routing.experts_TK",
     "    experts_TK = routing.experts_TK"),
    ("return grad, grad.new_ones((), dtype=ctx.loss_dtype)",
     "return grad, 0.5 * grad.new_ones((), dtype=ctx.loss_dtype)"),
    ("f_communication_BG = sent_BG * num_groups", "f_communication_BG = sent_BG"),
)

CAPACITY = of(
    "model/capacity.py", ROUTER,
    ("positions_S = all_gather(positions_S, 0, sequence_group)", "positions_S = torch.arange(experts_BSK.shape[1])"),
    ("return own.where(kept_BSK.chunk(size, 1)[rank], DROPPED)",
     "return own.where(kept_BSK.chunk(size, 1)[0], DROPPED)"),
    ("tokens_B = (experts_BSK != DROPPED).any(-1).sum(1)",
     "tokens_B = (experts_BSK != DROPPED).any(-1).sum(1) * 0 + experts_BSK.shape[1]"),
    (".ceil()", ".floor()"),
)

MOE = of(
    "model/moe.py", ROUTER,
    ("routed_BS.chunk(self.tp.size, 1)[self.tp.rank]", "routed_BS.chunk(self.tp.size, 1)[0]"),
    ("loss = loss / global_sequences", "loss = loss / num_sequences"),
    ("self.balance, self.sequence_group, routed_BS)", "self.balance, None, routed_BS)"),
    ("        if not (self.balance.any and self.training):", "        if not self.balance.any:"),
    ("counts_E = (chosen_TK.flatten() + 1)", "counts_E = (kept_TK.flatten() + 1)"),
    ("return attach_loss(y_TH, loss), loss.detach()", "return y_TH, loss.detach()"),
    ("return positions_S[self.tp.rank * length:][:length]", "return positions_S[:length]"),
    ("self._within_capacity(own_BSH, chosen_TK, routing.weights_TK)",
     "self._within_capacity(own_BSH, routing.experts_TK, routing.weights_TK)"),
    ("length * self.tp.size * self.cp.size)", "length * self.tp.size)"),
)

DEEPSEEK = of(
    "model/deepseek.py", MODEL,
    ("self.rope_2SD = blueprint.cp.own(rope_table(self.config, seq_length, device), dim=1)",
     "self.rope_2SD = rope_table(self.config, seq_length, device)[:, :seq_length // blueprint.cp.size]"),
    ("embedding = self.model.embed_tokens(labels_BMS[:, depth])",
     "embedding = self.model.embed_tokens(labels_BMS[:, depth + 1])"),
    ("embedding = self.model.embed_tokens(labels_BMS[:, depth])",
     "embedding = self.model.embed_tokens(labels_BMS[:, depth]).detach()"),
    ("self.model.embed_tokens.local_weight, chunk", "lambda: self.model.embed_tokens.local_weight().detach(), chunk"),
    ("if depth + 1 < labels_BMS.shape[1]:", "if depth < labels_BMS.shape[1]:"),
    ("        if config.num_hidden_layers - 1 in stage.layers:", "        if stage.loss:"),
    ("            current = self.model.norm(current)", "            pass"),
    ("if stage.embedding or stage.mtp or (stage.loss and config.tie_word_embeddings):",
     "if stage.embedding or stage.mtp or stage.loss:"),
    ("states.append(self._layer(index, step, positions, routed[depth + 1], states[-1], embedding))",
     "states.append(self._layer(index, step, positions, routed[depth + 1], states[0], embedding))"),
    ("states.append(self._layer(index, step, positions, routed[depth + 1], states[-1], embedding))",
     "states.append(self._layer(index, step, positions, routed[depth], states[-1], embedding))"),
) + of(
    "model/step.py", MODEL,
    ("self.expert_counts[layer] = self.expert_counts.get(layer, 0) + stats.counts_E",
     "self.expert_counts[layer] = stats.counts_E"),
    ("self.balance_loss = self.balance_loss + stats.balance_loss", "self.balance_loss = stats.balance_loss"),
    ("self.dropped = self.dropped + stats.dropped", "self.dropped = stats.dropped"),
    ("self.chosen.setdefault(layer, []).append(stats.experts_BSK)", "self.chosen[layer] = [stats.experts_BSK]"),
) + of(
    "model/shifts.py", MODEL,
    ("labels.append(F.pad(labels[-1][:, 1:], (0, 1)))", "labels.append(labels[-1].roll(-1, 1))"),
    ("shifted_BS = F.pad(shifted_BS[:, 1:], (0, 1))\n", "shifted_BS = shifted_BS.roll(-1, 1)\n"),
    ("stays_BS = 1 if documents_BS is None else _stays(documents_BS, depth)", "stays_BS = torch.tensor(1)"),
    ("stays_BS = 1 if documents_BS is None else _stays(documents_BS, depth)",
     "stays_BS = 1 if documents_BS is None else _stays(documents_BS, 1)"),
    ("routed.append(both_BS if documents_BS is None else both_BS & _stays(documents_BS, depth).to(real_BS.device))",
     "routed.append(both_BS)"),
)

MLA = of(
    "model/attention/mla.py", MODEL,
    ("turned = apply_rope(k_pe_BSD.unsqueeze(2), self.rope_2SD).squeeze(2)", "turned = k_pe_BSD"),
    ("self.o_proj.add_bias(self.tp.leave(self.o_proj(y_BSV)))",
     "self.tp.leave(self.o_proj.add_bias(self.o_proj(y_BSV)))"),
    ("return self.tp.enter(torch.cat(latents, -1)).split([latent.shape[-1] for latent in latents], -1)",
     "return self.tp.enter(torch.cat([*latents[:2], latents[2].detach()], -1)).split("
     "[latent.shape[-1] for latent in latents], -1)"),
)

LAYER = of(
    "model/layer.py", MODEL,
    ("joined = torch.cat([self.enorm(embedding_BSH), self.hnorm(state_BSH)], -1)",
     "joined = torch.cat([self.hnorm(state_BSH), self.enorm(embedding_BSH)], -1)"),
    ("return self.shared_head.norm(x_BSH), stats", "return x_BSH, stats"),
)

BUILD = of(
    "model/build.py", LAYOUTS,
    ("yield Unit(layer.mlp.experts, meshes.expert_fsdp, precision.compute)",
     "yield Unit(layer.mlp.experts, meshes.dense_fsdp, precision.compute)"),
    ("sequence_group=meshes.sequence.get_group() if meshes.sequence.size() > 1 else None,", "sequence_group=None,"),
) + of(
    "model/build.py", ("tests/unit/training/test_trainer.py", *BF16),
    ("                yield Unit(layer.mlp.gate, meshes.dense_fsdp)", "                pass"),
)

INIT = of(
    "model/init.py", ("tests/unit/model/test_init.py", "tests/unit/model/test_sharded_init.py", *LAYOUTS),
    ("index += (rest % local_shape[dim] + offset[dim]) * stride", "index += (rest % local_shape[dim]) * stride"),
    ('f"{seed}:{name}"', 'f"{seed}"'),
)

SAMPLES = of(
    "data/batches.py", DATA,
    ("consumed_samples + dp_rank * micro_batch_size", "consumed_samples"),
    ("stride = micro_batch_size * dp_size", "stride = micro_batch_size"),
    ("return ends_BS.cumsum(1) - ends_BS", "return ends_BS.cumsum(1)"),
) + of(
    "pretraining/loop.py", DATA,
    ('return self.trainer.meshes.rank("dp"), self.settings.layout.dp', "return 0, self.settings.layout.dp"),
    ("batch.num_rows * settings.layout.dp", "batch.num_rows"),
)

MUTANTS = (
    *TENSOR, *VOCABULARY, *EXTREMES, *DATA_PARALLEL, *MESH, *EXCHANGE, *CONTEXT, *EXPERT, *GATHERED, *GROUPED, *SLICES,
    *SHARED, *PIPELINE, *ZERO_BUBBLE, *SCHEDULE_RULES, *PIECES, *STAGE, *SENT, *TRAFFIC_BYTES, *COUNTED, *STEP_MUTANTS,
    *OPTIMIZER, *BALANCE, *ROUTER_MUTANTS, *BALANCE_LOSS, *CAPACITY, *MOE, *DEEPSEEK, *MLA, *LAYER, *BUILD, *INIT,
    *SAMPLES, *AGREED, *FROZEN, *PARAMETERS)
