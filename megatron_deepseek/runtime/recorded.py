"""arguments.json of a checkpoint: the settings of the run that wrote it. The next run lists what has changed since."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_deepseek.checkpoint.native import ARGUMENTS
from megatron_deepseek.foreign_json import LARGEST_LIST, read_object
from megatron_deepseek.settings import Settings

# Settings that do not decide what is computed, or are for one start alone: a change of these is never reported.
_SILENT = {"run": {"save", "load", "ckpt_step", "finetune", "no_load_optim", "init_mtp", "drop_mtp", "overwrite",
                   "save_hf", "load_adapter", "save_adapter", "adapter_for", "save_hf_dtype", "fp8_scale_format",
                   "exit_interval", "exit_duration_in_mins", "log_interval", "tensorboard_dir", "metrics_file",
                   "tensorboard_log_interval", "tensorboard_queue_size", "log_num_zeros_in_grad", "log_params_norm",
                   "log_timers_to_tensorboard",
                   "log_memory_to_tensorboard", "log_validation_ppl_to_tensorboard", "log_world_size_to_tensorboard",
                   "profile", "check_weight_hash_across_dp_replicas_interval", "profile_step_start", "profile_step_end",
                   "distributed_timeout_minutes"},
           "data": {"data_cache_path", "seed", "full_validation", "multiple_validation_sets", "validation_set_names",
                    "num_workers"}, "model": {"released_as"},
           "fine_tuning": {"eval_dataset", "num_workers", "recipe", "dry_run", "generate_every",
                           "generate_prompts", "generate_tokens"},
           "reinforcement": {"reward_workers", "eval_prompts"}}
# Fields and whole sections (None) whose change makes it another run (_EXACT), or changes it by rounding (_ROUNDING).
_EXACT = {"model": None, "optimizer": None, "learning_rate": None, "batch": {"global_batch_size", "rampup_batch_size"},
          "loss": None, "data": None, "files": None, "fine_tuning": None, "reinforcement": None, "rollout": None,
          "policy_loss": None, "lora": None, "base": None,
          "run": {"seed", "bf16", "fp8_format", "freeze_parameters"}}
_ROUNDING = {"layout": None, "pipeline": None, "communication": None, "batch": {"micro_batch_size"},
             "run": {"sharding", "fp8_param_gather"}}
_LENGTHS = ("train_iters", "train_samples", "epochs")
_OPTIONS = {"layout": {"tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size",
                       "cp": "--context-parallel-size", "ep": "--expert-model-parallel-size",
                       "etp": "--expert-tensor-parallel-size", "dp": "data-parallel ranks"},
            "pipeline": {"schedule": "--pipeline-schedule", "layout": "--pipeline-model-parallel-layout",
                         "num_virtual_stages": "--num-virtual-stages-per-pipeline-rank"},
            "loss": {"balance_type": "--moe-router-load-balancing-type"},
            "recompute": {"granularity": "--recompute-granularity", "modules": "--recompute-modules"},
            "run": {"sharding": "--data-parallel-sharding-strategy"}}
_LONGEST = 200  # characters of a value


@dataclass(frozen=True)
class Job:
    """A start by a user, with all its restarts. `name` is the same in all restarts under one torchrun.

    Slurm gives a job that it requeues its old number (`slurm_id`), and counts the requeues (`slurm_restarts`).
    """

    name: str
    slurm_id: str = ""
    slurm_restarts: int = 0

    @classmethod
    def here(cls, name: str, environ: Mapping[str, str] = os.environ) -> "Job":
        restarts = environ.get("SLURM_RESTART_COUNT", "0")
        return cls(name, environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdecimal() else 0)

    def is_earlier_start_of(self, other: "Job") -> bool:
        requeued = self.slurm_id == other.slurm_id != "" and self.slurm_restarts < other.slurm_restarts
        return self.name == other.name or requeued


@dataclass(frozen=True)
class RecordedArguments:
    """The content of arguments.json.

    `settings`: those of each concern (settings.py), as JSON has them. `origin`: the --load of the run's first start,
    None if it began from nothing. `files`: the files of data and tokenizer by path, with sizes in bytes or digests.
    """

    settings: Mapping[str, Mapping[str, Any]]
    origin: str | None
    job: Job
    files: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"settings": self.settings, "origin": self.origin, "job": asdict(self.job), "files": self.files}


def record(settings: Settings, origin: str | None, job: Job, files: Mapping[str, Any] | None = None
           ) -> RecordedArguments:
    """Return what this run records of itself; looks at the sizes of its data files and reads its tokenizer.

    `files`: what its task records of other files.
    """
    concerns = {name: _json(value) for name, value in asdict(settings).items() if isinstance(value, dict)}
    return RecordedArguments(concerns, origin, job, _files(settings) | _json(files or {}))


def read_recorded(directory: Path) -> RecordedArguments | None:
    """Return what a checkpoint records; None if it records nothing, as an older version's or released weights.

    Raise ValueError if the record is damaged.
    """
    path = directory / ARGUMENTS
    if not path.exists():
        return None
    fields = read_object(path, LARGEST_LIST)
    settings = {name: fields.object("settings").object(name).fields for name in fields.object("settings").fields}
    job = fields.object("job")
    return RecordedArguments(settings, fields.text("origin", default=None),
                             Job(job.text("name"), job.text("slurm_id"), job.integer("slurm_restarts")),
                             fields.object("files").fields)


def differences(there: RecordedArguments, here: RecordedArguments) -> list[str]:
    """Return a line for each setting that has changed.

    "*" marks a change that makes the run another one than it would have been, "~" one that changes it by rounding
    alone. Settings that only one of the two records are left out: versions differ.
    """
    ours = {**here.settings, "files": here.files}
    theirs = {**there.settings, "files": there.files}
    return list(_differences(theirs, ours))


def explain_marks(lines: list[str]) -> list[str]:
    """Return a line that explains each mark in `lines`."""
    meanings = {"*": "from here on this is not the run that it would have been",
                "~": "the same run but for rounding"}
    return [f"  ({mark}: {meaning})" for mark, meaning in meanings.items()
            if any(line.startswith(f"  {mark} ") for line in lines)]


def _differences(theirs: Mapping, ours: Mapping) -> Iterator[str]:
    for section in ours:
        for name in ours[section]:
            there, here = theirs.get(section, {}).get(name, _UNKNOWN), ours[section][name]
            if there is _UNKNOWN or there == here or name in _SILENT.get(section, ()):
                continue
            if name == "lr_final" and ours[section]["lr_decay_style"] != "deepseek-v3":  # follows --lr, and is not used
                continue
            if name == "train_iters" and ours[section]["train_samples"] is not None:  # follows from it and the batches
                continue
            exact = _in(_EXACT, section, name) or (name in _LENGTHS and _rate_follows_length(ours["learning_rate"]))
            mark = "*" if exact else "~" if _in(_ROUNDING, section, name) else " "
            yield f"  {mark} {_option(section, name)}: {_shown(there, here)} before, {_shown(here, there)} now"


_UNKNOWN = object()


def _rate_follows_length(rate: Mapping[str, Any]) -> bool:
    """Return whether the learning rate decays over the run, whatever its length."""
    return rate["lr_decay_style"] != "constant" and rate["lr_decay_iters"] is None and rate["lr_decay_samples"] is None


def _in(table: dict, section: str, name: str) -> bool:
    return section in table and (table[section] is None or name in table[section])


def _option(section: str, name: str) -> str:
    if section in ("model", "files"):
        return name
    return _OPTIONS.get(section, {}).get(name) or "--" + name.replace("_", "-")


def _shown(value: Any, beside: Any) -> str:
    """Return `value` as text; a long list without the beginning that it shares with `beside`."""
    if not isinstance(value, list):
        return "none" if value is None else _short(str(value))
    same = len(os.path.commonprefix([value, beside])) if isinstance(beside, list) else 0
    whole = " ".join(map(str, value))
    if len(whole) <= _LONGEST or not same:
        return _short(whole)
    return f"... {_short(' '.join(map(str, value[same:])))}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _json(value: Any) -> Any:
    """Return `value` as it comes back from a JSON file: lists for tuples, text for paths."""
    if isinstance(value, Mapping):
        return {str(name): _json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def _files(settings: Settings) -> dict[str, Any]:
    data = settings.data
    paths = [data.data_path, *(path for path in data.split_data_paths or () if path is not None)]
    prefixes = dict.fromkeys(entry for path in paths for entry in path)
    files: dict[str, Any] = {}
    for path in (Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx")):
        if path.is_file():
            files[str(path)] = path.stat().st_size
    tokenizer = Path(data.tokenizer_model or "")
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if tokenizer.is_file():
        files[str(tokenizer)] = xxhash.xxh3_128_hexdigest(tokenizer.read_bytes())
    return files
