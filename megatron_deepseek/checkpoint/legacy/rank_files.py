"""The files of a directory of `--ckpt-format torch`, and which ranks of Megatron-LM's job wrote them.

    iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

TT is the rank of tensor parallelism, PPP that of the pipeline, where there is one, EEE that of expert parallelism,
where there is any. Two numbers alone may mean either: the arguments of the job, which are in each file, say which. With
the distributed optimizer its state lies beside, in distrib_optim.pt.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepseek.checkpoint.dcp.pickle_values import KnownInstance
from megatron_deepseek.checkpoint.legacy.torch_file import read_torch_file

FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_JOB_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_EXPERT_TENSOR = "expert_tensor_parallel_size"
_RANK_KINDS = ("tensor", "pipeline", "expert")  # attributes of RankFile, in the order of _JOB_SIZES
# MindSpeed's and Megatron-LM's own settings under which the files mean something else than is read here.
_OTHER_MEANING = {"schedules_method": "stages in the order of a V", "noop_layers": "layers without weights",
                  "moe_mlp_glu_interleave_size": "rows of gate and up in turns"}


class Arguments(KnownInstance):
    """The arguments of the job that wrote a file, of which only these are read."""

    __slots__ = (*_JOB_SIZES, _EXPERT_TENSOR, *_OTHER_MEANING)


@dataclass(frozen=True, eq=False)
class RankFile:
    """What one file holds: for each virtual stage of the pipeline rank its tensors by their names in the module.

    `tensor`, `pipeline` and `expert` are ranks. `sizes` are the job's, by the names of Megatron-LM's arguments, as far
    as the file says them. `optimizer` says whether state of the optimizer is there or beside.
    """

    path: Path
    tensor: int
    pipeline: int
    expert: int
    sizes: dict[str, int]
    chunks: tuple[dict[str, Any], ...]
    optimizer: bool


@dataclass(frozen=True, eq=False)
class LegacyIteration:
    """All files of one iteration, and by how many ranks each kind of parallelism divided the model.

    `expert_tensor_ranks` divide an expert; they divide `tensor_ranks`, so that rank t has part t % expert_tensor_ranks.
    """

    directory: Path
    files: tuple[RankFile, ...]
    tensor_ranks: int
    pipeline_ranks: int
    expert_ranks: int
    expert_tensor_ranks: int

    @property
    def optimizer(self) -> bool:
        return any(file.optimizer for file in self.files)


def is_legacy(directory: Path) -> bool:
    """Return whether `directory` is an iteration in the legacy format."""
    return any(directory.glob("mp_rank_*"))


def read_legacy(directory: Path) -> LegacyIteration:
    """Read the contents, not the numbers, of all files of an iteration.

    Raise ValueError, naming a file, for one that is damaged, is missing, or means something that is not read here.
    """
    folders = {path: match for path in sorted(directory.glob("mp_rank_*"))
               if (match := _FOLDER.fullmatch(path.name)) is not None}
    if not folders:
        raise ValueError(f"{directory} has no folder mp_rank_TT, mp_rank_TT_PPP, mp_rank_TT_EEE or mp_rank_TT_PPP_EEE")
    files = tuple(_read(path, [int(number) for number in match.groups() if number is not None])
                  for path, match in folders.items())
    told = _told(directory, files)
    tensor, pipeline, expert = (max(getattr(file, rank) for file in files) + 1 for rank in _RANK_KINDS)
    divided = told.get(_EXPERT_TENSOR, tensor)
    if tensor % divided:
        raise ValueError(f"{directory} was written with --expert-tensor-parallel-size {divided} and "
                         f"--tensor-model-parallel-size {tensor}: it does not say which part of an expert is whose")
    iteration = LegacyIteration(directory, files, tensor, pipeline, expert, divided)
    _check_complete(iteration, told)
    return iteration


def _read(folder: Path, numbers: list[int]) -> RankFile:
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    found = read_torch_file(path, {("argparse", "Namespace"): Arguments})
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no dictionary of a checkpoint")
    sizes = _sizes(path, found.get("args"))
    alone = len(numbers) == 2 and sizes.get(_JOB_SIZES[1], 2) == 1 and sizes.get(_JOB_SIZES[2], 1) > 1
    tensor, pipeline, expert = (numbers[0], 0, numbers[1]) if alone else (*numbers, 0, 0)[:3]
    optimizer = found.get("optimizer") is not None or (folder / "distrib_optim.pt").exists()
    return RankFile(path, tensor, pipeline, expert, sizes, _chunks(path, found), optimizer)


def _sizes(path: Path, arguments: Any) -> dict[str, int]:
    """Return the job's sizes; raise ValueError for settings under which the files mean something else."""
    if not isinstance(arguments, Arguments):
        return {}
    for name, meaning in _OTHER_MEANING.items():
        value = getattr(arguments, name)
        if value and value != "1f1b":
            raise ValueError(f"{path} was written with --{name.replace('_', '-')} {value!s:.40}: {meaning}, which is "
                             f"not read here")
    return {name: value for name in (*_JOB_SIZES, _EXPERT_TENSOR)
            if type(value := getattr(arguments, name)) is int and value > 0}


def _chunks(path: Path, found: dict) -> tuple[dict[str, Any], ...]:
    """Return the virtual stages' dictionaries: "model", or "model0", "model1" ..."""
    names = ["model"] if "model" in found else [f"model{number}" for number in range(len(found))
                                                 if f"model{number}" in found]
    chunks = tuple(found[name] for name in names)
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise ValueError(f"{path} holds no weights: neither model nor model0 is a dictionary in it")
    if any(isinstance(chunk.get("language_model"), dict) for chunk in chunks):
        raise ValueError(f"{path} was written by Megatron-LM's models from before megatron-core (--use-legacy-models), "
                         f"which are not read")
    return chunks


def _told(directory: Path, files: tuple[RankFile, ...]) -> dict[str, int]:
    """Return the job's sizes; raise ValueError if the files disagree."""
    told: dict[str, int] = {}
    for file in files:
        for name, size in file.sizes.items():
            if told.setdefault(name, size) != size:
                raise ValueError(f"{directory}: its files are of different jobs, --{name.replace('_', '-')} "
                                 f"{told[name]} and {size}")
    return told


def _check_complete(iteration: LegacyIteration, told: dict[str, int]) -> None:
    """Raise ValueError unless each stage has a file of each tensor rank, and one of each expert rank.

    Not every pair of them: where expert parallelism extends over tensor ranks, a pair may have no rank.
    """
    directory, sizes = iteration.directory, (iteration.tensor_ranks, iteration.pipeline_ranks, iteration.expert_ranks)
    for name, size in zip(_JOB_SIZES, sizes):
        if told.get(name, size) != size:
            raise ValueError(f"{directory} was written with --{name.replace('_', '-')} {told[name]}, but has folders "
                             f"of {size}")
    for stage in range(iteration.pipeline_ranks):
        for rank, size in (("tensor", sizes[0]), ("expert", sizes[2])):
            present = {getattr(file, rank) for file in iteration.files if file.pipeline == stage}
            if missing := set(range(size)) - present:
                raise ValueError(f"{directory} has no file of {rank} rank {min(missing)} in pipeline rank {stage}")
    if len({len(file.chunks) for file in iteration.files}) > 1:
        raise ValueError(f"{directory}: its files hold different numbers of virtual stages")
