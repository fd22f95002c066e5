"""tools/view_rollouts.py: numbers by hand, the terminal, and a page in which no text of a model is HTML."""

import json
import re
from pathlib import Path

import pytest

from megatron_deepseek.cli.rollout_records import find_steps, read_step
from megatron_deepseek.cli.view_rollouts import main

PROMPT = "<｜User｜>2 + 2?<｜Assistant｜><think>\n"


def sample(group: int, completion: str, reward: float | None, advantage: float, tokens: int = 10, **more) -> dict:
    return {"group": group, "prompt": PROMPT.replace("2 +", f"{group} +"), "completion": completion, "tokens": tokens,
            "finish_reason": "stop", "rewards": {"math": reward, "format": 1.0}, "reward": reward,
            "advantage": advantage, "rollout_log_probability": -5.0, "log_probability": -4.0,
            "reference_log_probability": None} | more


SAMPLES = [
    sample(7, "two and two</think>\n\n4", 1.0, 1.0), sample(7, "hm</think>5", 0.0, -1.0, 20),
    sample(9, "easy</think>11", 1.0, 0.0), sample(9, "</script><b>x</b>", None, 0.0, 40, finish_reason="length",
                                                  log_probability=None)]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of which two steps are kept."""
    for step, samples in ((2, SAMPLES[:2]), (10, SAMPLES)):
        file = tmp_path / "rollouts" / f"step_{step}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(each) + "\n" for each in samples))
    return tmp_path


def test_a_step_by_hand(run):
    """A group with one known reward is even, as one with equal rewards is."""
    assert list(find_steps(run)) == list(find_steps(run / "rollouts")) == [2, 10]
    step = read_step(10, find_steps(run)[10])
    assert step.summary() == {
        "samples": 4, "groups": 2, "even_groups": 1, "reward": pytest.approx(2 / 3), "tokens": 20.0,
        "rewards": {"math": pytest.approx(2 / 3), "format": 1.0}, "finish_reasons": {"stop": 3, "length": 1},
        "drift": pytest.approx((0.1 + 0.05 + 0.1) / 3)}
    assert step.samples[0].parts == ("two and two", "4") and step.samples[3].drift is None


def test_in_the_terminal(run, capsys):
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step 10: 4 samples of 2 prompts, 1 of these with equal rewards; reward 0.67, math 0.67, ")
    assert "[1] advantage -1.00, reward 0.00 (math 0.00, format 1.00), 20 tokens, stop, drift +5.0e-02" in text
    assert "      two and two\n    > 4\n" in text and "reward - (math -, format 1.00), 40 tokens, length" in text
    assert main([str(run), "--step", "2", "--steps", "5"]) == 0
    assert re.findall(r"^step (\d+)", capsys.readouterr().out, re.M) == ["2"]


@pytest.mark.parametrize("more, first", [((), 7), (("--order", "best"), 9), (("--order", "worst"), 7),
                                         (("--order", "spread"), 7), (("--order", "length"), 9),
                                         (("--contains", "easy"), 9)])
def test_which_prompts_are_shown(run, more, first, capsys):
    assert main([str(run), "--limit", "1", *more]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"── prompt (\d+)", text) == [str(first)] and "1 more prompts" in text


def test_long_texts_are_cut_and_control_characters_shown(run, capsys):
    file = run / "rollouts" / "step_11.jsonl"
    file.write_text(json.dumps(sample(1, "\x1b[2J</think>" + "line\n" * 30, 1.0, 0.5)) + "\n")
    assert main([str(run), "--lines", "3"]) == 0
    text = capsys.readouterr().out
    assert "... 27 more lines" in text and "\x1b" not in text and r"\x1b[2J" in text
    assert main([str(run), "--full"]) == 0 and capsys.readouterr().out.count("> line") == 30


def test_the_page_holds_the_samples_and_nothing_else(run, capsys):
    assert main([str(run), "--steps", "2", "--html", str(run / "page.html")]) == 0
    page = (run / "page.html").read_text()
    (data,) = re.findall(r"^const steps = (.*);$", page, re.M)
    steps = json.loads(data)
    assert [each["step"] for each in steps] == [2, 10] and len(steps[1]["groups"]) == 2
    assert steps[1]["groups"][1]["samples"][1]["reasoning"] == "</script><b>x</b>"
    assert page.count("</script>") == 1 and "<b>x" not in page and "innerHTML" not in page
    assert "default-src 'none'" in page and not re.search(r"(src|href)=", page.partition("<body>")[2])


@pytest.mark.parametrize("line, message", [
    ("[]", "line 1 holds a list of 0, not an object"), ('{"prompt": "q"}', 'line 1 has no "completion"'),
    ('{"prompt": "q", "completion": "a", "reward": "1"}', '"reward" is "1", not a number'), ("{", "malformed JSON")])
def test_a_file_of_something_else_is_told_in_a_line(run, line, message, capsys):
    (run / "rollouts" / "step_12.jsonl").write_text(line + "\n")
    assert main([str(run)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("view_rollouts.py: error: ") and "step_12.jsonl" in told and message in told


@pytest.mark.parametrize("more, message", [
    (("--step", "3"), "--step 3: "), (("--html", "."), "--html . is a directory")])
def test_refused_in_a_line(run, more, message, capsys):
    assert main([str(run), *more]) == 2 and message in capsys.readouterr().err
    assert main([str(run / "nothing")]) == 2 and "holds no step_N.jsonl" in capsys.readouterr().err
