"""Rollouts with an engine that only counts: which prompts are asked, which groups are kept, what is reported."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.finetuning.conversation import BadRow
from megatron_deepseek.rl.collecting import Collector, PromptSource
from megatron_deepseek.rl.judging import Verdict, overlong_penalty
from megatron_deepseek.rl.maker import divide
from megatron_deepseek.rl.measures import rollout_reports
from megatron_deepseek.rl.prompts import Prompt, PromptOrder, PromptReader, Prompts, read_prompts
from megatron_deepseek.rl.records import Records
from megatron_deepseek.rl.rollouts import Rollout, read_rollout, write_rollout
from megatron_deepseek.rl.samples import Sample
from megatron_deepseek.rl_settings import PolicyLossSettings, ReinforcementSettings, RolloutSettings
from megatron_deepseek.settings import DataSettings

PROMPTS = Prompts(tuple(Prompt((number, number + 1), f"prompt {number}", {"number": number}) for number in range(10)))
FINISHED, CUT = "stop", "length"


@pytest.fixture(autouse=True, scope="module")
def job(tmp_path_factory):
    """One process, whose broadcasts have nobody to go to."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('job') / 'store'}", rank=0,
                            world_size=1)
    yield
    dist.destroy_process_group()


class Counting:
    """An engine whose completions say the prompt's number and their own; `asked` has what it was asked."""

    def __init__(self):
        self.asked: list[tuple[int, int]] = []

    def generate(self, prompts, seeds, rollout, temperature):
        self.asked += [(prompt[0], seed) for prompt, seed in zip(prompts, seeds)]
        return [[Sample(place, prompt, (1,) * (index + 1), f"{prompt[0]} {index}", CUT if index else FINISHED,
                        (-0.5,) * (index + 1)) for index in range(rollout.group_size)]
                for place, prompt in enumerate(prompts)]


def judge(prompts, samples) -> Verdict:
    """No reward for prompts 0 to 2, the same for all answers to 3 to 5, the number of the answer for others."""
    totals = tuple(None if prompt.row["number"] < 3 else 1.0 if prompt.row["number"] < 6
                   else float(sample.text.split()[1]) for prompt, sample in zip(prompts, samples))
    return Verdict(totals, {"numbers": totals}, {"numbers": {"raised": totals.count(None)}})


def collector(rounds: int | None = None, prompts: int = 4) -> tuple[Collector, Counting]:
    engine = Counting()
    source = PromptSource(PROMPTS, seed=3)
    return Collector(source, engine, judge, RolloutSettings(prompts=prompts, group_size=3), PolicyLossSettings(),
                     rounds, seed=3), engine


def numbers(samples) -> list[int]:
    return [int(sample.text.split()[0]) for sample in samples]


def test_groups_without_any_reward_are_left_out_and_counted():
    made, engine = collector(prompts=10)
    found = made.collect(0, 0)
    assert sorted(set(numbers(found.samples))) == [3, 4, 5, 6, 7, 8, 9] and found.num_groups == 7
    assert (found.used, found.rounds, found.unrewarded_groups, found.even_groups) == (10, 1, 3, 3)
    assert found.verdict.failures == {"numbers": {"raised": 9}} and found.tokens == 10 * 6
    assert [prompt.row["number"] for prompt in found.prompts] == numbers(found.samples)
    assert len(found.verdict.total) == len(found.samples) == 21


def test_dynamic_sampling_asks_until_there_are_enough():
    """Of the prompts 6 to 9 alone the rewards differ; the sequence goes on into the next epoch."""
    made, engine = collector(rounds=9)
    found = made.collect(0, 0)
    assert found.num_groups == 4 and set(numbers(found.samples)) <= {6, 7, 8, 9}
    order = PromptOrder(10, 3).places(0, found.used)
    assert [number for number, _ in engine.asked] == order and len(engine.asked) == found.used > 4
    assert len({seed for _, seed in engine.asked}) == found.used
    assert found.even_groups + found.unrewarded_groups + 4 == found.used
    assert all(collector(rounds=9)[0].collect(0, begin).num_groups == 4 for begin in range(10)), "no more than needed"


def test_dynamic_sampling_ends_after_its_rounds():
    made, engine = collector(rounds=1)
    found = made.collect(0, 0)
    assert (found.rounds, found.used) == (1, 4) and found.num_groups < 4


def test_a_rollout_depends_on_its_number_and_on_the_prompts_before_it():
    one, other = (collector()[0] for _ in range(2))
    ours, theirs = one.collect(2, 7), other.collect(2, 7)
    assert [sample.text for sample in ours.samples] == [sample.text for sample in theirs.samples]
    first, second = collector(), collector()
    first[0].collect(0, 0), second[0].collect(1, 0)
    assert [number for number, _ in first[1].asked] == [number for number, _ in second[1].asked]
    assert not {seed for _, seed in first[1].asked} & {seed for _, seed in second[1].asked}


def test_the_order_has_each_prompt_once_an_epoch():
    order = PromptOrder(7, 1)
    places = order.places(0, 21)
    assert all(sorted(places[epoch:epoch + 7]) == list(range(7)) for epoch in (0, 7, 14))
    assert places[:7] != places[7:14] and order.places(5, 6) == places[5:11]


def test_reports():
    made, _ = collector(prompts=10)
    found = made.collect(0, 0)
    reports = rollout_reports(found, [1.0, -1.0] * 10 + [0.0])
    assert reports["reward"] == pytest.approx((9 * 1.0 + 4 * 3) / 21) and reports["reward_numbers"] == reports["reward"]
    assert reports["reward_spread"] == pytest.approx(4 / 7 * (2 / 3) ** 0.5)
    assert (reports["mean_completion"], reports["longest_completion"]) == (2.0, 3)
    assert reports["cut_completions"] == pytest.approx(2 / 3) and reports["reward_failures_numbers_raised"] == 9
    assert (reports["zero_variance_groups"], reports["unrewarded_groups"], reports["samples"]) == (3, 3, 21)


@pytest.mark.parametrize("length, expected", [(1, 0.0), (80, 0.0), (90, -0.5), (100, -1.0)])
def test_overlong_penalty_is_daps(length, expected):
    assert overlong_penalty(length, longest=100, buffer=20) == expected


class Divided:
    """The settings that `divide` reads."""

    def __init__(self, iterations: int, seed: int = 1):
        self.rollout = RolloutSettings(prompts=4, group_size=4, iterations=iterations)
        self.run = type("Run", (), {"seed": seed})


def test_each_pass_has_every_sample_once():
    updates = divide(16, Divided(2), 4, number=5)
    assert [len(update) for update in updates] == [4] * 8
    assert sorted(sum(updates[:4], ())) == sorted(sum(updates[4:], ())) == list(range(16))
    assert updates[:4] != updates[4:] and updates == divide(16, Divided(2), 4, number=5)
    assert [len(update) for update in divide(6, Divided(1), 4, number=5)] == [2, 2, 1, 1]
    assert divide(0, Divided(1), 16, number=0) == ((),)


def test_a_rollout_comes_back_from_its_file(tmp_path):
    sample = Sample(0, (1, 2), (3, 4), "ab", FINISHED, (-1.0, -2.0), {"model.layers.1.mlp": torch.tensor([[1, 2]] * 3)},
                    (torch.tensor([3, 5]), torch.tensor([4])))
    rollout = Rollout(3, 6, 12, ((0,), (0,)), (sample,), (0.5,), (torch.tensor([-1.0, -2.0]),), None)
    write_rollout(rollout, 7, tmp_path)
    found = read_rollout(tmp_path)
    assert (found.number, found.iteration, found.used, found.updates) == (3, 6, 12, ((0,), (0,)))
    (back,) = found.samples
    assert (back.tokens, back.text, back.log_probabilities) == (sample.tokens, "ab", (-1.0, -2.0))
    assert torch.equal(back.experts["model.layers.1.mlp"], sample.experts["model.layers.1.mlp"])
    assert torch.equal(back.kept_ids[0], sample.kept_ids[0]) and torch.equal(found.old[0], rollout.old[0])
    write_rollout(rollout, 8, tmp_path)
    over = read_rollout(tmp_path)
    assert over.samples == () and (over.number, over.used) == (3, 12) and over.is_over(8) and not over.is_over(7)
    (tmp_path / "rollout.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="rollout.pt is damaged"):
        read_rollout(tmp_path)


def test_records_of_later_steps_are_removed(tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for step in (1, 3, 5):
        (folder / f"step_{step}.jsonl").touch()
    Records(tmp_path, 3, print)
    assert sorted(path.name for path in folder.iterdir()) == ["step_1.jsonl", "step_3.jsonl"]


def reader(**changes) -> PromptReader:
    settings = ReinforcementSettings(**({"prompts": ("p",), "template": "deepseek-v3"} | changes))
    return PromptReader(settings, build_tokenizer("ByteTokenizer"), None)


def test_rows_become_prompts():
    asked = "<｜begin▁of▁sentence｜>be brief<｜User｜>hi<｜Assistant｜>"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    answered = [*messages, {"role": "assistant", "content": "hello"}]
    for row in ({"messages": messages}, {"messages": answered}, {"prompt": "hi", "system": "be brief"},
                {"prompt": messages}):
        prompt = reader().read(row)
        assert prompt.text == asked and prompt.row == row
    assert reader(prompt_column="question", answer_column="gold").read({"question": "hi", "gold": 4}).row["answer"] == 4
    assert reader(template="none").read({"prompt": "1+1="}).text.endswith("1+1=")


@pytest.mark.parametrize("row, message", [
    ({"question": "hi"}, "the row has no prompt or messages; it has 'question'"), ("hi", "must be an object"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "do not end in a user's")])
def test_rows_without_a_question_are_told(row, message):
    with pytest.raises(BadRow, match=message):
        reader().read(row)


def test_long_prompts_and_bad_rows_are_counted(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "hi"}, {"prompt": "x" * 40}, {"answer": 3})))
    data, said = DataSettings((), 40, tokenizer_type="ByteTokenizer"), []
    settings = ReinforcementSettings((str(path),), template="deepseek-v3", max_bad_rows=1)
    found = read_prompts("--prompts", settings.prompts, settings, data, 16, said.append)
    assert (len(found.prompts), found.too_long, found.bad) == (1, 1, 1)
    assert said == ["--prompts: 1; 1 of more than 24 tokens are left out; 1 rows cannot be read"]
    strict = ReinforcementSettings((str(path),), template="deepseek-v3")
    with pytest.raises(ValueError, match=r"--prompts .*p.jsonl line 3: the row has no prompt .*--max-bad-rows 0"):
        read_prompts("--prompts", strict.prompts, strict, data, 16, said.append)
    with pytest.raises(ValueError, match="there is no prompt of at most 4 tokens"):
        read_prompts("--prompts", settings.prompts, settings, data, 36, said.append)
    with pytest.raises(ValueError, match="--prompts .*missing.jsonl: no such file"):
        read_prompts("--prompts", (str(Path(tmp_path) / "missing.jsonl"),), settings, data, 16, said.append)
