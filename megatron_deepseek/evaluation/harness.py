"""Runs tasks of lm-eval on a model of this project: its registry's, and files of tasks that need no network.

lm-eval is imported here and in lm.py alone, when tasks are asked for: it takes seconds, and is an extra.
"""

import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_deepseek.evaluation.chats import Chats
from megatron_deepseek.evaluation.generation_options import sampling_of
from megatron_deepseek.evaluation.generator_states import kept_generators
from megatron_deepseek.evaluation.questions import EvaluatedModel
from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.near_names import near_names
from megatron_deepseek.packages import how_to_install

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.loggers import EvaluationTracker

_FILES = (".yaml", ".yml", ".json")
_NETWORK = ("ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "MaxRetryError",
            "DatasetNotFoundError", "gaierror", "ProxyError", "ReadTimeout", "ConnectTimeout")


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated, by the names of lm-eval's options. `tasks`: names, patterns of names, groups, or files.

    `limit`: examples of each task, below 1 a part of them. `apply_chat_template`: questions are asked as chats.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    include_path: Path | None = None
    confirm_run_unsafe_code: bool = False


def check_installed(option: str) -> None:
    """Raise ValueError, with the command that installs it, where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"{option} needs lm-eval: {how_to_install('lm-eval')}")


def load_tasks(wanted: Evaluated) -> "list[Task | Group]":
    """Return the tasks with their data. Raise ValueError, of one line, for what is unknown or cannot be loaded."""
    with _quiet():
        from lm_eval.tasks import TaskManager
        manager = TaskManager(include_path=None if wanted.include_path is None else str(wanted.include_path))
        found: list[Task | Group] = []
        for spec in _specs(wanted, manager):
            loaded = _load(manager, spec)
            groups = list(loaded.get("groups", {}).values())
            found += groups[:1] or list(loaded["tasks"].values())  # the first is the group that was asked for
    return found


def _specs(wanted: Evaluated, manager) -> Iterator[str | dict[str, Any]]:
    """Yield what lm-eval loads: a name, the path of a YAML file, or what a JSON file holds."""
    for each in wanted.tasks:
        if each.endswith(_FILES):
            if not Path(each).is_file():
                raise ValueError(f"--tasks {each}: there is no such file")
            yield dict(read_object(each).fields) if each.endswith(".json") else each
            continue
        names = manager.match_tasks([each])
        if not names:
            near = near_names(each, manager.all_tasks, 0.6, 3)
            raise ValueError(f"--tasks {each} is neither a task of lm-eval, nor of --include-path, nor a file"
                             + (f"; did you mean {' or '.join(near)}?" if near else ""))
        yield from names


def _load(manager, spec: str | dict[str, Any]) -> dict:
    name = spec if isinstance(spec, str) else spec.get("task") or spec.get("group") or "a task"
    try:
        return manager.load([spec])
    except Exception as error:  # whatever a data set's loader, a network library or a task's own code raises
        raise ValueError(f"--tasks {name} cannot be loaded: {_words(error)}") from error


def _words(error: BaseException) -> str:
    """Return an error in a line, with what can be done where it is the network that is missing."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    chain, each = [], error
    while each is not None and len(chain) < 20:
        chain.append(type(each).__name__)
        each = each.__cause__ or each.__context__
    if any(name in _NETWORK for name in chain):
        return (f"its data set is not on this machine, and cannot be downloaded ({text:.200}). A task whose "
                "dataset_path is json, csv or parquet reads files of this machine")
    return f"{text:.400}"


def sampled_task(tasks: "Sequence[Task | Group]") -> str | None:
    """Return the name of a task whose answers are sampled, None where there is none."""
    for each in tasks:
        for task in each.get_all_tasks() if hasattr(each, "get_all_tasks") else (each,):
            given = task.get_config("generation_kwargs") or {}
            if task.OUTPUT_TYPE == "generate_until" and not sampling_of(given, seed=0).greedy:
                return task.task_name
    return None


def evaluate(model: EvaluatedModel, tasks: "Sequence[Task | Group]", wanted: Evaluated, described: Mapping[str, Any],
             chats: Chats = Chats(), output: Path | None = None, quiet: bool = False) -> tuple[dict, Path | None]:
    """Return lm-eval's results, and the file that they were written to where an `output` is given.

    `described`: model_args of the results. `output`: as lm-eval's --output_path, a folder or FILE.json; lm-eval adds
    the date to the names. If it is `quiet` it shows no bars. Random numbers are seeded as lm-eval does it, and put back
    afterwards.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from megatron_deepseek.evaluation.lm import EvaluatedLM
    tracker = EvaluationTracker(output_path=None if output is None else str(output))
    shown = redirect_stderr(io.StringIO()) if quiet else nullcontext()
    with kept_generators(), _quiet(), shown:
        results = simple_evaluate(
            model=EvaluatedLM(model, chats, quiet), model_args=dict(described), tasks=list(tasks),
            num_fewshot=wanted.num_fewshot, limit=wanted.limit, apply_chat_template=wanted.apply_chat_template,
            system_instruction=wanted.system_instruction,
            fewshot_as_multiturn=wanted.fewshot_as_multiturn and wanted.apply_chat_template,
            confirm_run_unsafe_code=wanted.confirm_run_unsafe_code, evaluation_tracker=tracker)
        samples = results.pop("samples")
        return results, None if output is None else _save(results, samples, tracker, output)


def _save(results: dict, samples: Mapping[str, list], tracker: "EvaluationTracker", output: Path) -> Path:
    """Write results and samples as lm-eval does, which only logs that a file could not be written."""
    tracker.save_results_aggregated(results, samples)
    for name, of_task in samples.items():
        tracker.save_results_samples(name, of_task)
    date = getattr(tracker, "date_id", "")
    folder, pattern = (output.parent, f"{output.stem}_{date}.json") if output.suffix == ".json" else \
        (output, f"*/results_{date}.json")
    found = list(folder.glob(pattern)) if date else []
    if not found:
        raise OSError(f"--output {output}: the results could not be written there")
    return found[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Let lm-eval and the libraries below it say errors alone: what they warn of is not this project's."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def scores_of(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers of each task and group by lm-eval's names of them, "none" of filters left out."""
    found: dict[str, dict[str, float]] = {}
    for name, metrics in {**results["results"], **results.get("groups", {})}.items():
        numbers = {key: value for key, value in metrics.items() if "," in key and isinstance(value, (int, float))}
        found[name] = {key.removesuffix(",none").replace(",", "/"): float(value) for key, value in numbers.items()}
    return found


def table(results: Mapping[str, Any]) -> str:
    """Return lm-eval's table of the results, and that of groups where there are any."""
    from lm_eval.utils import make_table
    return make_table(results) + ("\n" + make_table(results, "groups") if results.get("groups") else "")
