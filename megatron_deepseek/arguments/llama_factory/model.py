"""What LLaMA-Factory says of the model: its weights, adapters, numbers and memory."""

from pathlib import Path

from megatron_deepseek.arguments.llama_factory.recipe import Recipe
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.presets import load_config

_LORA, _FULL = "lora", "full"
_NOT_TRANSLATED = {
    "freeze": "finetuning_type freeze is not translated: give finetuning_type full, and --freeze-parameters with the "
              "names of what is not to be trained",
    "oft": "finetuning_type oft is not there: LoRA is (finetuning_type lora)"}


def weights(r: Recipe) -> None:
    """Translate the model's name or directory."""
    name = r.text("model_name_or_path")
    if name is None:
        raise ValueError("model_name_or_path is missing")
    r.put("--model", name)
    revision = r.text("model_revision", "main")
    if not r.flag("train_from_scratch"):
        r.put("--load", name)
        if not Path(name).is_dir():
            more = "" if revision == "main" else f" --revision {revision}"
            r.first.append(f"hf download {name}{more} --local-dir {name}   # --load is a directory; nothing is "
                           "downloaded here")
    config = known_config(name)
    if config is None:
        r.differs.append(f"{name} is none of the models whose architecture is known by name (--help-models): its "
                         "config.json decides whether it can be trained here")
    elif config.num_nextn_predict_layers:
        r.put("--mtp-num-layers", 0)
        r.differs.append("--mtp-num-layers 0: transformers leaves MTP modules out; without this option they are "
                         "trained too")


def known_config(name: str) -> ModelConfig | None:
    """Return the architecture of a model, None where neither the name nor a directory says which it is."""
    try:
        return load_config(name)
    except ValueError:
        return None


def method(r: Recipe) -> None:
    """Translate what is trained: all weights, or adapters."""
    kind = r.text("finetuning_type", _LORA)
    if kind not in (_LORA, _FULL):
        raise ValueError(_NOT_TRANSLATED.get(kind, f"finetuning_type {kind} is none of lora, full, freeze, oft"))
    adapters = r.names("adapter_name_or_path")
    if kind == _FULL:
        r.leave("adapter_name_or_path", ",".join(adapters), "all weights are trained: tools/merge_lora.py merges it")
        for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "loraplus_lr_ratio", "use_rslora"):
            r.take(key)  # they mean nothing beside full, there either
        return
    _adapter(r)
    if adapters:
        _begin_from(r, adapters)


def _adapter(r: Recipe) -> None:
    rank = r.integer("lora_rank", 8)
    r.put("--lora-rank", rank)
    r.put("--lora-alpha", r.number("lora_alpha", 2 * rank))
    if r.flag("use_rslora"):
        r.put("--lora-rs")
    dropout = r.number("lora_dropout", 0.0)
    if dropout:
        r.put("--lora-dropout", dropout)
        r.differs.append("--lora-dropout: the masks are hashes of the token's place, not torch's random numbers")
    targets = r.names("lora_target") or ["all"]
    r.put("--lora-target", *targets)
    if "all" in targets:
        r.differs.append("--lora-target all: attention, dense and shared MLPs, and each routed expert by itself; PEFT "
                         "with transformers 5 moves what is named gate_proj, up_proj and down_proj to the routed "
                         "experts (docs/lora.md)")
    ratio = r.number("loraplus_lr_ratio")
    if ratio is not None:
        r.put("--lora-plus-ratio", ratio)


def _begin_from(r: Recipe, adapters: list[str]) -> None:
    new = r.flag("create_new_adapter")
    last = None if new else adapters.pop()
    if adapters:
        r.first.append(f"python tools/merge_lora.py --base {r.given['model_name_or_path']} --adapter "
                       f"{' '.join(adapters)} --save MERGED   # and give --load MERGED: LLaMA-Factory merges them too")
    if last is not None:
        r.put("--load-adapter", last)


def quantisation(r: Recipe) -> None:
    """Translate a base in fewer bits."""
    bits = r.integer("quantization_bit")
    kind, how = r.text("quantization_type", "nf4"), r.text("quantization_method", "bnb")
    double = r.flag("double_quantization", True)
    if bits is None:
        return
    option = "--quantization-bit"
    if option not in r.options:
        r.leave("quantization_bit", bits, "bases in 4 bits are for answering only (tools/generate.py --weights nf4)")
    elif (bits, kind, how) == (4, "nf4", "bnb"):
        r.put(option, bits)
        if not double:
            r.leave("double_quantization", "false", "scales are quantised too")
    else:
        r.leave("quantization_bit", f"{bits} ({kind} of {how})", "a base is in NF4 (4 bits of bnb), FP8 or 16 bits")


def numbers(r: Recipe) -> None:
    """Translate the dtype that is computed in, and whether layers are compiled."""
    pure, half = r.flag("pure_bf16"), r.flag("fp16")
    if r.flag("bf16") or pure or half:
        r.put("--bf16")
    if pure:
        r.differs.append("pure_bf16: --bf16 computes in bfloat16; weights and gradients stay in float32")
    if half:
        r.differs.append("fp16: --bf16 stands for it; float16 is not computed in")
    if r.flag("torch_compile"):
        r.put("--compile")
    if r.flag("fp8"):
        r.put("--fp8-format", "e4m3")
        r.put("--fp8-recipe", "blockwise")
        r.differs.append("fp8: scales of blocks, as DeepSeek-V3 was trained, not of whole tensors (docs/fp8.md)")


def memory(r: Recipe) -> None:
    """Translate what is recomputed, sharded and offloaded."""
    checkpointing = r.take("gradient_checkpointing")
    if r.text("recompute_granularity") is None and not r.flag("disable_gradient_checkpointing") \
            and checkpointing is not False:
        r.put("--recompute-granularity", "full")
    elif r.given.get("recompute_granularity") is not None:
        r.put("--recompute-granularity", r.given["recompute_granularity"])
    sharded = " ".join(str(r.take(key, "")) for key in ("deepspeed", "fsdp", "fsdp_config")).lower()
    if any(name in sharded for name in ("z3", "zero3", "full_shard", "true")):
        r.put("--data-parallel-sharding-strategy", "optim_grads_params")
    if "offload" in sharded:
        r.put("--optimizer-cpu-offload")


def losses(r: Recipe) -> None:
    """Translate the balance loss, which transformers' DeepSeek models do not have."""
    config, coefficient = known_config(r.given["model_name_or_path"]), r.number("moe_aux_loss_coef")
    if coefficient is not None:
        r.put("--moe-aux-loss-coeff", coefficient)
    elif config is None or config.n_routed_experts:
        r.put("--moe-router-load-balancing-type", "none")
    if coefficient is None and config is not None and config.n_routed_experts:
        r.differs.append("--moe-router-load-balancing-type none: transformers' DeepSeek models have no balance loss; "
                         "without this option the config's is trained on")
