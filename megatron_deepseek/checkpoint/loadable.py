"""What a run may continue from: looked at on one process, before anything is built."""

from dataclasses import replace
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
from megatron_deepseek.model.architecture.fields import FORWARD, WEIGHTS
from megatron_deepseek.model.architecture.matching import differences
from megatron_deepseek.model.architecture.parameters import SCORE

_NAMED_FILES = 3


def checkpoint_directory(root: Path, step: int | None = None) -> Path:
    """Return the last finished checkpoint's directory, or that of iteration `step`; `root` if it is a released model.

    Raise ValueError if there is none.
    """
    wrong = problem(root, step)
    if wrong is not None:
        raise ValueError(f"--load {root}: {wrong}")
    iteration = last_iteration(root) if step is None else step
    return root if iteration is None else find_iteration(root, iteration)


def check_checkpoint(root: Path, config: ModelConfig, step: int | None = None, init_mtp: bool = False) -> Path:
    """Return what `checkpoint_directory` does; raise ValueError also where `check_directory` does."""
    directory = checkpoint_directory(root, step)
    check_directory(directory, config, init_mtp)
    return directory


def check_directory(directory: Path, config: ModelConfig, init_mtp: bool = False, weights_alone: bool = False,
                    drop_mtp: bool = False) -> list[str]:
    """Raise ValueError if a checkpoint is of another architecture, or if its files are not whole.

    Of files only sizes are looked at. A directory without checksums.json passes; with `init_mtp` so does one that lacks
    MTP modules. Where `weights_alone` are taken over, the forward may be another one (a longer context, another
    epsilon), with `drop_mtp` MTP modules that the model lacks are left behind, and a reward model may begin from a
    language model: the lines that are returned say so.
    """
    if not is_huggingface(directory):
        refuse_damage(directory, check_sizes(directory, read_checksums(directory) or {}))
    found = stored_architecture(directory)
    there, here = found.num_nextn_predict_layers, config.num_nextn_predict_layers
    alike = replace(found, num_nextn_predict_layers=here)
    new_score = config.reward_head and not found.reward_head and weights_alone
    if new_score:
        alike = replace(alike, reward_head=True, tie_word_embeddings=False)
    elif found.reward_head and not config.reward_head:
        raise ValueError(f"--load {directory}: it is a reward model, with a score in place of an output head; "
                         "--objective reward goes on with it")
    different = differences(alike, config, WEIGHTS)
    if different:
        raise ValueError(f"--load {directory}: it is of another architecture: {'; '.join(different)}")
    dropped = there - here if drop_mtp and weights_alone and there > here else 0
    if there > here + dropped or (there < here and not init_mtp):
        raise ValueError(f"--load {directory}: {mtp.difference(there, here)}")
    lines = [mtp.left_behind(directory, dropped)] if dropped else []
    if new_score:
        lines.append(f"the output head of {directory} stays behind: {SCORE} begins with random weights")
    changed = "; ".join(differences(alike, config, FORWARD))
    if changed and not weights_alone:
        raise ValueError(f"--load {directory}: a run goes on as it began, but {changed}; --finetune or --no-load-optim "
                         "with another --save takes over the weights alone")
    return lines + [f"the weights of {directory} are taken over into another forward: {changed}"] * bool(changed)


def stored_architecture(directory: Path) -> ModelConfig:
    """Return the architecture of a Hugging Face directory's files, which may lack MTP modules, or of a checkpoint."""
    if is_huggingface(directory):
        return open_huggingface(directory).config
    return native_architecture(directory)


def native_architecture(directory: Path) -> ModelConfig:
    """Return the architecture of one iteration's checkpoint; raise ValueError that says the way for Megatron-LM's."""
    refuse_megatron(directory)
    return ModelConfig.from_file(directory / "config.json")


def refuse_damage(directory: Path, damage: list[Damage]) -> None:
    """Raise ValueError that names the damaged files and another checkpoint, if there is any damage."""
    if not damage:
        return
    named = "; ".join(map(str, damage[:_NAMED_FILES]))
    more = f"; and {len(damage) - _NAMED_FILES} more files" if len(damage) > _NAMED_FILES else ""
    others = [iteration for iteration in iterations(directory.parent)
              if find_iteration(directory.parent, iteration) != directory]
    advice = f"--ckpt-step {others[-1]} loads another one" if others else "there is no other one beside it"
    raise ValueError(f"--load {directory} is damaged: {named}{more}; {advice}")
