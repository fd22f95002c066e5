"""What sample_answers.py does once its arguments are right: rank 0 asks and judges, the other ranks follow.

Answers and rewards are kept as they are ready; the rows are written at the end, in the order of the prompts. So a run
that was killed and one that was not write the same bytes.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.cli.sample_judge import Judge, judged_digest
from megatron_deepseek.cli.sample_prompts import PromptRows, SampledPrompt, Wording
from megatron_deepseek.data.preprocess.files import write_json, written_aside
from megatron_deepseek.evaluation.kept_answers import checkpoint_digest
from megatron_deepseek.inference.asking import AHEAD, Asked, answer_all
from megatron_deepseek.inference.loading import checked_length, join_ranks, load_model
from megatron_deepseek.inference.model_files import ModelFiles
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.rewards.answer import split_answer
from megatron_deepseek.rewards.result import totals
from megatron_deepseek.rewards.selection import Candidate, Filters, Tally, verdicts
from megatron_deepseek.rewards.workers import RewardWorkers
from megatron_deepseek.runtime.kept_records import KeptRecords, digest_of

_IDLE_MINUTES = 24 * 60  # for which other ranks wait for rank 0, which reads and judges
_tell = partial(print, file=sys.stderr)


@dataclass(frozen=True)
class _Kept:
    """What a run has found: answers and rewards by the prompts' numbers."""

    answers: KeptRecords
    rewards: KeptRecords


def sample(args: argparse.Namespace) -> None:
    """Sample answers, judge them, and write the rows. Raise ValueError or OSError, of one line, for what cannot be."""
    files = options.open_files(args)
    limit = checked_length(files.config, args.seq_length)
    parameters = replace(files.defaults, **options.sampling_options(args))
    reader = PromptRows(_wording(args), files.tokenizer, partial(options.chat_format, args, files, args.thinking),
                        limit - 1)
    prompts = reader.read(args.input)
    asked = [_asked(each, parameters, args.seed) for each in prompts]
    max_length = max(min(limit, max(len(each.prompt) for each in asked) + parameters.max_tokens), 2)
    if not options.leads():
        _follow(args, files, max_length)
        return
    for reason, first in reader.first_bad.items():
        _tell(f"{reader.unusable[reason]:,} rows are not asked ({reason}), first {first}")
    with _opened(args, files, asked) as kept, RewardWorkers(
            args.rewards, args.reward_seconds, args.reward_processes) as workers:
        _answer_and_judge(args, files, max_length, asked, kept, Judge(workers, kept.rewards, args.reward_processes))
    _write(args, prompts, kept, reader)


def _wording(args: argparse.Namespace) -> Wording:
    return Wording(args.prompt_column, args.answer_column, args.system, args.append, args.raw)


def _asked(prompt: SampledPrompt, parameters: SamplingParameters, seed: int) -> Asked:
    """Return the request of a prompt; each of its answers has a seed of its own, whatever is answered beside it."""
    own = replace(parameters, seed=(seed + prompt.number * parameters.n) % 2**63)
    return Asked(prompt, prompt.ids, own if prompt.question is None else prompt.question.sampling(own))


def beside(output: Path, name: str) -> Path:
    """Return the file of a run that lies beside its output: rows.jsonl -> rows.NAME."""
    return output.with_name(f"{output.stem if output.suffix == '.jsonl' else output.name}.{name}")


@contextmanager
def _opened(args: argparse.Namespace, files: ModelFiles, asked: Sequence[Asked]) -> Iterator[_Kept]:
    """Open what earlier runs kept of the same model, prompts, sampling and rewards."""
    model = checkpoint_digest(files.directory, args.adapter, args.dtype, args.weights, args.double_quantization,
                              args.seq_length)
    answers = {each.key.number: digest_of(model, each.prompt, repr(each.parameters), args.raw, args.template,
                                          args.thinking) for each in asked}
    judged = judged_digest(args.rewards)
    rewards = {each.key.number: digest_of(answers[each.key.number], judged, each.key.row) for each in asked}
    kept = _Kept(KeptRecords(beside(args.output, "answers.jsonl"), answers, _tell),
                 KeptRecords(beside(args.output, "rewards.jsonl"), rewards, _tell))
    try:
        yield kept
    finally:
        kept.answers.close()
        kept.rewards.close()


# Answers --------------------------------------------------------------------------------------------------------------

def _engine(args: argparse.Namespace, files: ModelFiles, max_length: int) -> Replicas:
    model = load_model(files, join_ranks(options.layout_of(args), _IDLE_MINUTES),
                       options.load_settings(args, max_length))
    replicas = Replicas(model, options.engine_settings(args, max_length))
    options.warm_up(args, replicas)
    return replicas


def _follow(args: argparse.Namespace, files: ModelFiles, max_length: int) -> None:
    _engine(args, files, max_length).follow()


def _answer_and_judge(args: argparse.Namespace, files: ModelFiles, max_length: int, asked: Sequence[Asked],
                      kept: _Kept, judge: Judge) -> None:
    missing = [each for each in asked if each.key.number not in kept.answers]
    for each in asked:
        if each.key.number in kept.answers:
            judge.submit(each.key, kept.answers[each.key.number]["answers"])
    if missing or int(os.environ.get("WORLD_SIZE", 1)) > 1:  # other ranks wait for an engine
        with _engine(args, files, max_length) as replicas, tqdm(
                total=len(asked), initial=len(asked) - len(missing), desc="sampling", unit="prompt", disable=None,
                dynamic_ncols=True) as bar:
            tokens = 0
            for prompt, outputs in answer_all(replicas, missing, AHEAD * args.max_running):
                found = [answer_record(prompt, each) for each in outputs]
                kept.answers.keep(prompt.number, {"answers": found})
                judge.submit(prompt, found)
                tokens += sum(len(each.tokens) for each in outputs)
                bar.update()
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
    judge.finish()


def answer_record(prompt: SampledPrompt, output: Output) -> dict:
    """Return an answer as it is kept: its text, and what the template reads in it."""
    if prompt.question is None:
        reasoning, content = split_answer(prompt.text, output.text)
        calls = False
    else:
        parser = prompt.question.parser()
        parser.update(output)
        message = parser.message()
        reasoning, content = message.get("reasoning_content"), message["content"] or ""
        calls = "tool_calls" in message
    candidate = Candidate(reasoning, content, len(output.tokens), output.finish_reason == "stop", calls)
    return {"text": output.text, **asdict(candidate)}


# Rows -----------------------------------------------------------------------------------------------------------------

def _write(args: argparse.Namespace, prompts: Sequence[SampledPrompt], kept: _Kept, reader: PromptRows) -> None:
    """Write the rows of the answers that pass, and print and write what became of all."""
    filters = Filters(args.max_repetition, args.language, args.min_language_share, args.max_answer_tokens,
                      args.accept_at, args.keep)
    tally = Tally(unusable=reader.unusable)
    with written_aside(args.output) as file:
        for prompt in prompts:
            for row in _rows(prompt, args, kept, filters, tally):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_json(str(beside(args.output, "statistics.json")), tally.record())
    print("\n".join([*tally.lines(), f"written to {args.output}"]))


def _rows(prompt: SampledPrompt, args: argparse.Namespace, kept: _Kept, filters: Filters, tally: Tally
          ) -> Iterator[dict]:
    """Yield the rows of a prompt's answers that are kept, and count all."""
    found = kept.answers[prompt.number]["answers"]
    candidates = [Candidate(**{name: value for name, value in each.items() if name != "text"}) for each in found]
    judged = kept.rewards[prompt.number] if args.rewards else {"values": {}, "failures": {}}
    values, total = judged["values"], totals(args.rewards, judged["values"], len(found))
    reasons = verdicts(prompt.asked, candidates, total, filters)
    tally.add(candidates, reasons)
    for name, own in values.items():
        tally.add_rewards(name, own, judged["failures"].get(name, {}))
    for place, (candidate, reason) in enumerate(zip(candidates, reasons)):
        if reason is None:
            rewards = {name: own[place] for name, own in values.items()}
            yield row_of(prompt, candidate, place) | ({"reward": total[place], "rewards": rewards} if values else {})


def row_of(prompt: SampledPrompt, candidate: Candidate, place: int) -> dict:
    """Return the row for fine-tuning: the prompt's messages and the answer, its reasoning in a field of its own."""
    reasoning = {"reasoning_content": candidate.reasoning} if candidate.reasoning else {}
    answer = {"role": "assistant", **reasoning, "content": candidate.content}
    tools = {"tools": prompt.row["tools"]} if prompt.row.get("tools") else {}
    return {"messages": [*prompt.messages, answer], **tools, "row": prompt.number, "sample": place}
