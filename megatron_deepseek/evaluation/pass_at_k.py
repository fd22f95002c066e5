"""pass@k: how probable it is that one of k programs of a model passes a problem's tests (arXiv 2107.03374).

A problem is a line of a file of HumanEval's form, {"task_id", "prompt", "entry_point", "test"}; `test` defines
`check(candidate)`. The program that runs is prompt + completion + test + "check(ENTRY_POINT)", in the sandbox.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path

from megatron_deepseek.evaluation.generation_options import cut_at
from megatron_deepseek.evaluation.questions import EvaluatedModel, Generation
from megatron_deepseek.foreign_json import JsonObject, parse_json
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.text import prompt_ids
from megatron_deepseek.sandbox.run import Limits, Outcome, run_all


@dataclass(frozen=True)
class Problem:
    """A function to be completed, and the program that tests it."""

    name: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        return f"{self.prompt}{completion}\n\n{self.test}\n\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Sample:
    """A completion of a problem, and what became of its program."""

    problem: Problem
    completion: str
    outcome: Outcome

    def record(self) -> dict:
        """Return it as HumanEval's own evaluation writes samples."""
        return {"task_id": self.problem.name, "completion": self.completion, "result": self.outcome.reason,
                "passed": self.outcome.passed}


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Return the problems of a file, the first `limit`. Raise ValueError that names the line which is none."""
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            found = JsonObject.of(parse_json(line, where), where)
            problems.append(Problem(str(found.fields.get("task_id", number)), found.text("prompt"),
                                    found.text("entry_point"), found.text("test")))
    if not problems:
        raise ValueError(f"{path} has no problem")
    return problems[:limit]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k by `samples` programs of which `passed` do: 1 - C(n - c, k) / C(n, k).

    It is the part of all choices of k programs in which one passes. Raise ValueError for more than `samples`.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, and there are {samples}, of which "
                         f"{passed} pass")
    return 1 - comb(samples - passed, k) / comb(samples, k)


def complete(model: EvaluatedModel, problems: Sequence[Problem], parameters: SamplingParameters,
             advance: Callable[[], None] = lambda: None) -> list[list[str]]:
    """Return the completions of each problem, up to the first of the parameters' stops.

    Each problem has a seed of its own. Raise ValueError for a prompt that leaves no room for an answer.
    """
    questions = []
    for number, problem in enumerate(problems):
        ids = prompt_ids(model.tokenizer, problem.prompt)
        if len(ids) + parameters.max_tokens > model.max_length:
            raise ValueError(f"the problem {problem.name} has {len(ids)} tokens, with {parameters.max_tokens} of an "
                             f"answer more than the {model.max_length} that the model sees")
        seed = (parameters.seed or 0) + number * parameters.n
        questions.append(Generation(tuple(ids), replace(parameters, seed=seed)))
    found: list[list[str]] = [[] for _ in problems]
    for number, answers in model.answers(questions):
        texts = (model.tokenizer.decode(ids, special_tokens=False) for ids in answers)
        found[number] = [cut_at(text, parameters.stop) for text in texts]
        advance()
    return found


def judge(problems: Sequence[Problem], completions: Sequence[Sequence[str]], limits: Limits, workers: int,
          unisolated: bool = False) -> Iterator[Sample]:
    """Yield each completion with its outcome, in order."""
    written = [(problem, each) for problem, of_problem in zip(problems, completions) for each in of_problem]
    programs = [problem.program(completion) for problem, completion in written]
    for (problem, completion), outcome in zip(written, run_all(programs, limits, workers, unisolated)):
        yield Sample(problem, completion, outcome)


def summary(samples: Sequence[Sample], ks: Sequence[int]) -> dict[str, float]:
    """Return the mean of pass@k over the problems, by name, for each of `ks`."""
    of_problem: dict[Problem, list[bool]] = {}
    for each in samples:
        of_problem.setdefault(each.problem, []).append(each.outcome.passed)
    results = {f"pass@{k}": sum(pass_at_k(len(each), sum(each), k) for each in of_problem.values()) / len(of_problem)
               for k in ks}
    return {"problems": len(of_problem), "samples": len(samples), **results}
