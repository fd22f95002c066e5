"""Mistakes of LoRA: adapters' products, their shards and gradients, their files and their base."""

from mutant import of

STEP = ("tests/unit/training/test_lora.py",)
ROWS = ("tests/unit/model/architecture/test_adapters.py",)
FILES = ("tests/unit/checkpoint/test_adapter_files.py",)
MERGING = ("tests/unit/checkpoint/test_adapter_merging.py",)
LAYOUTS = ("tests/parallel/test_layouts.py",)
BASE = ("tests/parallel/test_adapter_base.py",)

ADAPTERS = of(
    STEP,
    ("LowRank._up", "hidden, b = hidden * self.scale, self.b()", "hidden, b = hidden, self.b()"),
    ("LowRank._up", "hidden.chunk(self.matrices, -1), b.chunk", "hidden.chunk(self.matrices, -1)[::-1], b.chunk"),
    ("AdaptedGemm.after_swiglu", " + self.base.gradient_seen(delta)", ""),
    ("freeze_base", "isinstance(module, Factor) or is_adapter(name)", 'name.endswith("lora_B")'),
    ("set_learning_rate", 'learning_rate * group["lr_ratio"]', "learning_rate"),
    ("initialize", "parameter.shape[-1]**-0.5", "parameter.shape[0]**-0.5"),
    ("update_expert_bias", " and any(each.requires_grad for each in module.gate.parameters()):", ":"),
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
    BASE,
    ("counts_here", "== 0 for dim in replicated", ">= 0 for dim in replicated"),
    ("base_hash._counted", "name == EMBEDDING and not stage.stage.embedding", "False"),
)
