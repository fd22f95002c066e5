"""What a run may continue from: looked at on one process, before anything is built."""

from dataclasses import asdict, replace
from pathlib import Path

from megatron_deepseek.checkpoint.convert import mtp
from megatron_deepseek.checkpoint.convert.huggingface import open_huggingface
from megatron_deepseek.checkpoint.dcp.files import refuse_megatron
from megatron_deepseek.checkpoint.integrity import Damage, check_sizes, read_checksums
from megatron_deepseek.checkpoint.tracker import (
    find_iteration,
    is_huggingface,
    iterations,
    last_iteration,
    problem,
)
from megatron_deepseek.model.architecture.config import ModelConfig

_NAMED_FILES = 3

# What decides the names, shapes or meaning of weights; other fields (dropout, loss weights) may change between runs.
_SHAPING = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank",
            "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
            "first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group", "topk_method", "scoring_func",
            "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers", "tie_word_embeddings",
            "attention_bias")


def checkpoint_directory(root: Path, step: int | None = None) -> Path:
    """The last finished checkpoint's directory, or that of iteration `step`, or `root` if that is a Hugging Face model.

    ValueError if there is none.
    """
    wrong = problem(root, step)
    if wrong is not None:
        raise ValueError(f"--load {root}: {wrong}")
    iteration = last_iteration(root) if step is None else step
    return root if iteration is None else find_iteration(root, iteration)


def check_checkpoint(root: Path, config: ModelConfig, step: int | None = None, init_mtp: bool = False) -> Path:
    """`checkpoint_directory`; ValueError also if it is of another architecture, or if its files are not whole."""
    return check_directory(checkpoint_directory(root, step), config, init_mtp)


def check_directory(directory: Path, config: ModelConfig, init_mtp: bool = False) -> Path:
    """ValueError if a checkpoint is of another architecture, or if its files are not whole.

    Of files only sizes are looked at. A directory without checksums.json passes; with `init_mtp` so does one that lacks
    MTP modules.
    """
    if not is_huggingface(directory):
        refuse_damage(directory, check_sizes(directory, read_checksums(directory) or {}))
    found = stored_architecture(directory)
    there, here = found.num_nextn_predict_layers, config.num_nextn_predict_layers
    different = architecture_differences(replace(found, num_nextn_predict_layers=here), config)
    if different:
        raise ValueError(f"--load {directory}: it is of another architecture: {'; '.join(different)}")
    if there > here or (there < here and not init_mtp):
        raise ValueError(f"--load {directory}: {mtp.difference(there, here)}")
    return directory


def stored_architecture(directory: Path) -> ModelConfig:
    """That of a Hugging Face directory's files, which may lack MTP modules, or of one iteration's checkpoint."""
    if is_huggingface(directory):
        return open_huggingface(directory).config
    return native_architecture(directory)


def native_architecture(directory: Path) -> ModelConfig:
    """Of one iteration's checkpoint. ValueError that says the way for those of Megatron-LM."""
    refuse_megatron(directory)
    return ModelConfig.from_file(directory / "config.json")


def architecture_differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """Fields that decide the names, shapes or meaning of weights and are not the same, with both values."""
    theirs, ours = asdict(there), asdict(here)
    return [f"{name} {theirs[name]} there, {ours[name]} here" for name in _SHAPING if theirs[name] != ours[name]]


def refuse_damage(directory: Path, damage: list[Damage]) -> None:
    """ValueError that names the damaged files and another checkpoint, if there is any damage."""
    if not damage:
        return
    named = "; ".join(map(str, damage[:_NAMED_FILES]))
    more = f"; and {len(damage) - _NAMED_FILES} more files" if len(damage) > _NAMED_FILES else ""
    others = [iteration for iteration in iterations(directory.parent)
              if find_iteration(directory.parent, iteration) != directory]
    advice = f"--ckpt-step {others[-1]} loads another one" if others else "there is no other one beside it"
    raise ValueError(f"--load {directory} is damaged: {named}{more}; {advice}")
