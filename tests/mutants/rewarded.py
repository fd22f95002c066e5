"""Mistakes in rewards, and in what becomes of functions that fail."""

from mutant import of

SPECS = ("tests/unit/rewards/test_reward_specs.py",)
READY = ("tests/unit/rewards/test_ready_rewards.py",)
MATH = ("tests/unit/rewards/test_math_reward.py",)
WORKERS = ("tests/unit/rewards/test_reward_workers.py",)
SELECTED = ("tests/unit/rewards/test_selection.py",)
KEPT = ("tests/unit/runtime/test_kept_records.py",)
PROMPTS = ("tests/unit/cli/test_sample_prompts.py",)
SAMPLED = ("tests/unit/cli/test_sample_answers.py",)
VIEWED = ("tests/unit/cli/test_view_rollouts.py",)

REWARDED = of(
    READY,
    ("split_answer", "text = opened(prompt) + completion", "text = completion"),
    ("split_answer", "text.rfind(END_THINK)", "text.find(END_THINK)"),
    ("opened", "and not prompt[place + len(THINK):].strip()", ""),
    ("_has_form", "text.count(END_THINK) != 1", "END_THINK not in text"),
    ("_has_form", "return bool(thoughts.strip() and answer.strip())", "return bool(thoughts.strip())"),
    ("format_reward", "opened(prompt) + completion", "completion"),
    ("_overlong", "length <= longest - soft", "length <= longest"),
    ("_overlong", "(longest - soft - length) / soft", "(longest - length) / soft"),
    ("language_share", "sum(found[each] for each in SCRIPTS[language])", "found[SCRIPTS[language][0]]"),
    ("scripts", '_NO_LANGUAGE.sub(" ", text)', "text"),
    ("repetition", "1 - len(set(runs)) / len(runs)", "1 - len(set(found)) / len(found)"),
    ("regex_reward", "pattern or row.get(column)", "row.get(column) or pattern or None"),
    ("code_of", "blocks[-1] if blocks", "blocks[0] if blocks"),
    ("_tests", 'check({row[\'entry_point\']})', ""),
) + of(
    MATH,
    ("mathematics._score", "if gold else None", "if gold else 1.0"),
    ("mathematics._score", "verify(gold, _parse(answer)", "verify(_parse(answer), gold"),
    ("mathematics._score", "timeout_seconds=None", "timeout_seconds=5"),
    ("parse_right", "if _DELIMITED.search(text) else (formula, text)", "if True else (formula, text)"),
    ("parse_right", "or second and _parse(second)", ""),
    ("parse_right", 'expected.rpartition("####")[2]', "expected"),
) + of(
    SPECS,
    ("parse_rewards", 'f"{spec.name}_{alike + 1}"', "spec.name"),
    ("spec._weight", "not math.isfinite(found)", "False"),
    ("_of_ready", "separator and not weight.endswith(\")\")", "separator"),
    ("_of_model", "if path and not Path(text.removeprefix(MODEL + \":\")).is_dir():", "if path:"),
) + of(
    WORKERS,
    ("_Deadline._end", "self.passed = True", "pass"),
    ("_environment", "if name not in _OF_JOB", ""),
    ("rewards.worker.main", "ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)", "pass"),
    ("RewardWorkers._alone", "if failure.kind not in (RAISED, TIMED_OUT, DIED) or count == 1:", "if True:"),
    ("RewardWorkers._alone", "if failure.kind not in (RAISED, TIMED_OUT, DIED) or count == 1:", "if count == 1:"),
    ("RewardWorkers._alone", "return first + [first[-1]] * (count - len(first))", "pass"),
    ("result._sum", "weight * value for", "value for"),
    ("rewards.result._checked", "if not math.isfinite(value):", "if False:"),
    ("rewards.worker.call", "except BaseException as error", "except Exception as error"),
) + of(
    SELECTED,
    ("verdicts", "language_of(question) if filters.language == QUESTION", "None if filters.language == QUESTION"),
    ("verdicts", "seen.add((candidate.reasoning, candidate.content))", "seen.add((None, candidate.content))"),
    ("selection._fault", "language_share(candidate.words, language)", "language_share(candidate.content, language)"),
    ("selection._fault", "candidate.tokens > filters.longest", "candidate.tokens >= filters.longest"),
    ("_fault_of_reward", "total < filters.accept_at", "total <= filters.accept_at"),
    ("selection._kept", "reverse=True", "reverse=False"),
    ("Tally.add", "each in (None, NOT_KEPT)", "each is None"),
    ("Tally.add_rewards", '"valued": len(numbers)', '"valued": len(there)'),
) + of(
    KEPT,
    ("KeptRecords._find", "os.truncate(self.path, begin)", "pass"),
    ("KeptRecords._find", 'self._digests.get(record["number"]) == record["digest"]',
     'record["number"] in self._digests'),
    ("KeptRecords.keep", "self._end, self._end + len(line)", "self._end, self._end"),
) + of(
    PROMPTS,
    ("PromptRows._turns", "all(row.get(each) is None for each in COLUMNS)", "True"),
    ("PromptRows._turns", "turns[-1].content + wording.append", "turns[-1].content"),
    ("sample_prompts._message", '"loss": False', '"loss": True'),
    ("PromptRows.prompt", "len(ids) > self.most", "False"),
) + of(
    SAMPLED,
    ("sample_answers_run._asked", "seed + prompt.number * parameters.n", "seed + prompt.number"),
    ("sample_answers_run._asked", "(seed + prompt.number * parameters.n) % 2**63", "None"),
    ("answer_record", 'output.finish_reason == "stop"', "True"),
    ("Judge._score", 'TOKENS_COLUMN: each["tokens"]', "TOKENS_COLUMN: 0"),
    ("judged_digest", "str(spec)", "spec.weight"),
    ("sample_answers_run._rows", "row_of(prompt, candidate, place)", "row_of(prompt, candidates[0], place)"),
) + of(
    VIEWED,
    ("Step.summary", "len({each.reward for each in group} - {None}) < 2", "len({each.reward for each in group}) < 2"),
    ("Kept.drift", "self.log_probability - self.rollout_log_probability",
     "self.rollout_log_probability - self.log_probability"),
    ("rollout_records.mean", "if each is not None", "if each"),
    ("_in_script", '.replace("<", "\\\\u003c")', ""),
    ("_visible", 'each == "\\n" or each.isprintable()', "True"),
    ("chosen_steps", "if number <= last", "if True"),
)
