"""Mistakes of LoRA: adapters' products, their shards and gradients, their files and their base."""

from mutant import of

STEP = ("tests/unit/training/test_lora.py",)
ROWS = ("tests/unit/model/architecture/test_adapters.py",)
FILES = ("tests/unit/checkpoint/test_adapter_files.py",)
FOR_VLLM = ("tests/unit/checkpoint/test_adapter_for_vllm.py",)
AT_SCALE = ("tests/unit/checkpoint/test_merging_at_scale.py",)
BESIDE = ("tests/unit/inference/test_adapted_experts.py",)
ANSWERS = ("tests/parallel/test_answers.py",)
MERGING = ("tests/unit/checkpoint/test_adapter_merging.py",)
MASKS = ("tests/unit/ops/test_dropout.py",)
LAYOUTS = ("tests/parallel/test_layouts.py",)
BASE = ("tests/parallel/test_adapter_base.py",)

ADAPTERS = of(
    STEP,
    ("LowRank._up", "hidden, b = hidden * self.scale, self.b()", "hidden, b = hidden, self.b()"),
    ("LowRank._up", "hidden.chunk(self.matrices, -1), b.chunk", "hidden.chunk(self.matrices, -1)[::-1], b.chunk"),
    ("AdaptedGemm.after_swiglu", "return self(hidden, weight, *counts)", "return self.base(hidden, weight, *counts)"),
    ("freeze_base", "isinstance(module, Factor) or is_adapter(name)", 'name.endswith("lora_B")'),
    ("set_learning_rate", 'learning_rate * group["lr_ratio"]', "learning_rate"),
    ("initialize", "parameter.shape[-1]**-0.5", "parameter.shape[0]**-0.5"),
    ("update_expert_bias", " and any(each.requires_grad for each in module.gate.parameters()):", ":"),
) + of(
    MASKS,
    ("Dropout.mask", "skipped:skipped + width", ":width"),
    ("Dropout.threshold", "min(round(self.rate * 2**_BITS), 2**_BITS - 1)", "round(self.rate * 2**_BITS)"),
    ("_Drop.backward", "_dropped(grad, keys_R, ctx.dropout)", "grad"),
) + of(
    STEP,
    ("LowRank.__call__", "self.down(dropped, self.a(), *counts)", "self.down(x, self.a(), *counts)"),
    ("Experts._mlp", "keys_R = split_mix(expert_of_rows(counts, self.first, keys_R.device), keys_R)", "pass"),
    ("Router.forward", "self.gemm.keyed(keys_T)(", "self.gemm("),
    ("KeyedRows.batch", "keys_of(self.seed, torch.tensor(sample_indices(*where))",
     "keys_of(self.seed, torch.arange(batch.num_rows)"),
) + of(
    ROWS,
    ("LoraSettings.scale", "self.lora_rs)", "False)"),
    ("factor_rows", "division.dim != without)", "division.dim == without)"),
    ("adapters._matches", "group in _IN_ALL", "group != ROUTER"),
) + of(
    LAYOUTS,
    ("_adapt", "(Partial(), Shard(0)) if placement == Shard(0)", "(Replicate(), Shard(0)) if placement == Shard(0)"),
    ("_adapt", "else (Shard(1), Partial()))", "else (Shard(1), Replicate()))"),
    ("_adapt_experts", "Partial() if of_etp == Replicate() else of_etp)", "of_etp)"),
    ("_adapt", "first = tp.rank * (inputs // tp.size) if placement == Shard(1) else 0", "first = 0"),
    ("_adapt_experts", 'mesh.get_local_rank("etp") * (inputs // mesh.size(1))', "0"),
    ("Experts.first", 'mesh.get_local_rank("ep") * (self.num // mesh.size(0))', "0"),
    ("TokenKeys.of", "self._parts[rank]", "self.own_BS"),
    ("TensorParallel.stream_keys", "self.own_keys(keys_BS) if self.sequence_parallel else keys_BS",
     "keys_BS if keys_BS is None or not self.sequence_parallel else keys_BS.chunk(self.size, SEQUENCE_DIM)[0]"),
    ("run_experts", "exchange(keys_R, sent, received)[order_Q]", "exchange(keys_R, sent, received)"),
    ("expert_gather.AllGatherDispatcher.__call__", "all_gather(keys_T, 0, group)", "keys_T.repeat(self.mesh.size())"),
    ("GroupedDispatcher.__call__", "copy_keys(keys_T, copies))\n",
     "keys_T if keys_T is None else keys_T[torch.arange(len(copies.row_R)) % len(keys_T)])\n"),
    ("ExpertTensorParallel.__call__", "all_gather(padded_M, 0, group)", "padded_M.repeat(group.size())"),
    ("UpProjections.weights", "tuple(self.w_kvb.parameters())", "(self.w_kvb.weight,)"),
) + of(
    FILES,
    ("base_hash.hash_of", "split_mix(bits.to(torch.int64), split_mix(index, key))", "split_mix(index, key)"),
    ("peft_config", "2**0.5 if lora.lora_rs else 2", "2"),
    ("export.write_adapter", "        _write(directory / MTP_WEIGHTS", "        _write(directory / WEIGHTS"),
    ("model_state", "stage.lora is None or is_adapter(name)", "True"),
) + of(
    MERGING,
    ("MergedSource.read", "rows + factor *", "rows +"),
    ("MergedSource.read_fp8", "block_fp8.quantize(self.read(name, start, stop))",
     "self.base.read_fp8(name, start, stop)"),
) + of(
    AT_SCALE,
    ("MergedSource.stream", "in row_ranges(self.shapes[name], start, stop):", "in [(start, stop)]:"),
    ("_write_unless_finished", "workspace.finished(file.name) is not None", "False"),
) + of(
    ("tests/parallel/test_fp8_layouts.py",),
    ("AdaptedGemm.after_swiglu", " + self.base.gradient_seen(delta)", ""),
) + of(
    ("tests/unit/ops/test_recompute.py",),
    ("recomputed", "index_of_storage.get(tensor.untyped_storage()._cdata)", "None"),
) + of(
    BESIDE,
    ("adapter._stacked", "pair.b.read() * pair.scale", "pair.b.read()"),
    ("_beside_router", "lambda: b, pair.scale)", "lambda: b, 1.0)"),
    ("AdaptedExperts.multiply_grouped", "1.0, Grouped(), Grouped(), self.matrices)", "1.0, Grouped(), Grouped())"),
) + of(
    ANSWERS,
    ("_beside_experts", "projections, experts.first, path", "projections, 0, path"),
) + of(
    FOR_VLLM,
    ("unapplied", "if not is_applied(layer)} | of_mtp", "if not is_applied(layer)}"),
    ("merge_lora_run.unapplied_part", "pairs=left)", "pairs=adapter.pairs)"),
    ("for_vllm.write_for_vllm", "if is_applied(layer_of(name))}", "}"),
) + of(
    BASE,
    ("is_first_copy", "== 0 for dim in replicated", ">= 0 for dim in replicated"),
    ("base_hash._counted", "name == EMBEDDING and not stage.stage.embedding", "False"),
)
