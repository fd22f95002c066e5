"""tools/sample_answers.py on a small model of random weights, whose answers end at a letter: rows and resumed runs.

The same words as tools/generate.py, rows that fine-tuning reads, and the bytes of a run that was never interrupted.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from served_models import write_served
from small_engines import V3_MTP

from megatron_deepseek.cli.generate import main as generate
from megatron_deepseek.cli.sample_answers import main
from megatron_deepseek.cli.sample_answers_run import beside
from megatron_deepseek.cli.sample_judge import judged_digest
from megatron_deepseek.finetuning.formats import to_conversation
from megatron_deepseek.rewards.spec import parse_rewards

QUESTIONS = [{"messages": [{"role": "user", "content": f"Say {word}"}], "answer": word} for word in
             ("one", "two", "three", "four", "five", "six")]
PATTERN = "[a-m]"
SAMPLING = ("--template", "deepseek-r1", "--n", "4", "--max-new-tokens", "6", "--temperature", "1", "--top-p", "1",
            "--stop", "o", "e", "s", " ")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    write_served(folder / "tiny", replace(V3_MTP, max_position_embeddings=64))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return folder


def words(bench: Path, output: Path, *more: str) -> list[str]:
    """Answers end at one of four characters, or after six tokens."""
    return ["--load", str(bench / "tiny"), "--input", str(bench / "prompts.jsonl"), "--output", str(output), *SAMPLING,
            "--no-thinking", "--language", "any", "--reward", f"regex(pattern={PATTERN})", "--reward",
            "length(longest=6,soft=6):0", *more]


def content_of(folder: Path) -> dict[str, bytes]:
    """The files of a run, of answers and rewards the lines in any order."""
    found = {name: beside(folder / "rows.jsonl", name) for name in ("answers.jsonl", "rewards.jsonl")}
    kept = {name: b"\n".join(sorted(path.read_bytes().splitlines())) for name, path in found.items()}
    return kept | {name: beside(folder / "rows.jsonl", name).read_bytes() for name in ("jsonl", "statistics.json")}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(bench) -> Path:
    """A run from beginning to end."""
    folder = bench / "whole"
    assert main(words(bench, folder / "rows.jsonl")) == 0
    return folder


def test_answers_are_those_of_generate(bench, whole, tmp_path):
    """Which gives a prompt the seed of its line, where each of four answers here has one of its own."""
    asked = [{"messages": row["messages"], "thinking": False, "seed": 1234 + 4 * number}
             for number, row in enumerate(QUESTIONS, start=1)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    assert generate(["--load", str(bench / "tiny"), "--prompts", str(tmp_path / "prompts.jsonl"), *SAMPLING,
                     "--output", str(tmp_path / "answers.jsonl")]) == 0
    theirs = {line["line"]: [each["text"] for each in line["outputs"]]
              for line in lines_of(tmp_path / "answers.jsonl")}
    ours = {line["number"]: [each["text"] for each in line["answers"]]
            for line in lines_of(whole / "rows.answers.jsonl")}
    assert ours == theirs and len({text for texts in ours.values() for text in texts}) > 12


def test_what_is_kept_passes_and_what_is_not_has_a_reason(whole):
    rows, answers = lines_of(whole / "rows.jsonl"), lines_of(whole / "rows.answers.jsonl")
    statistics = json.loads((whole / "rows.statistics.json").read_text())
    all_answers = [each for line in answers for each in line["answers"]]
    passing = {(line["number"], place) for line in answers for place, each in enumerate(line["answers"])
               if each["finished"] and each["content"].strip() and re.search(PATTERN, each["text"])
               and each["text"] not in [other["text"] for other in line["answers"][:place]]}
    assert 0 < len(rows) < 24 and {(row["row"], row["sample"]) for row in rows} == passing
    assert statistics["answers"] == 24 == statistics["kept"] + sum(statistics["rejected"].values())
    assert statistics["kept"] == len(rows) and statistics["tokens"] == sum(each["tokens"] for each in all_answers)
    assert statistics["rejected"]["unfinished"] == sum(not each["finished"] for each in all_answers) > 0
    mean = sum(bool(re.search(PATTERN, each["text"])) for each in all_answers) / 24
    assert statistics["rewards"]["regex"] == {"mean": pytest.approx(mean), "without_value": 0, "failures": {}}
    lengths = sum(-each["tokens"] / 6 for each in all_answers) / 24
    assert statistics["rewards"]["length"]["mean"] == pytest.approx(lengths)


def test_rows_are_read_by_fine_tuning(whole):
    answers = {line["number"]: line["answers"] for line in lines_of(whole / "rows.answers.jsonl")}
    for row in lines_of(whole / "rows.jsonl"):
        turns = to_conversation(row).turns
        assert turns[1].content == answers[row["row"]][row["sample"]]["content"]
        assert [turn.role for turn in turns] == ["user", "assistant"]
        assert turns[0].content == QUESTIONS[row["row"] - 1]["messages"][0]["content"] and turns[1].content
        assert row["reward"] == row["rewards"]["regex"] == 1


@pytest.mark.parametrize("answers, rewards", [(0, 0), (2, 1), (3, 0), (6, 4)])
def test_a_run_that_was_killed_goes_on(bench, whole, tmp_path, answers, rewards):
    """It leaves the first of its answers and rewards, the last of them torn, and no rows."""
    for name, count in (("answers.jsonl", answers), ("rewards.jsonl", rewards)):
        lines = beside(whole / "rows.jsonl", name).read_bytes().splitlines(keepends=True)
        torn = b"".join(lines[:count]) + (lines[count][:-9] if count < len(lines) else b"")
        beside(tmp_path / "rows.jsonl", name).write_bytes(torn)
    assert main(words(bench, tmp_path / "rows.jsonl")) == 0
    assert content_of(tmp_path) == content_of(whole)


def test_other_rewards_ask_nothing_again_and_other_sampling_does(bench, whole, tmp_path, monkeypatch, capsys):
    for name in ("answers.jsonl", "rewards.jsonl"):
        beside(tmp_path / "rows.jsonl", name).write_bytes(beside(whole / "rows.jsonl", name).read_bytes())
    monkeypatch.setattr("megatron_deepseek.cli.sample_answers_run.load_model", None)
    assert main(words(bench, tmp_path / "rows.jsonl", "--reward", "exact", "--accept-at", "2", "--keep", "best")) == 0
    statistics = json.loads((tmp_path / "rows.statistics.json").read_text())
    assert statistics["kept"] == 0 and set(statistics["rewards"]) == {"regex", "length", "exact"}
    assert (tmp_path / "rows.jsonl").read_bytes() == b"" and "reward too low" in capsys.readouterr().out
    with pytest.raises(TypeError):
        main(words(bench, tmp_path / "rows.jsonl", "--min-p", "0.1"))


def test_rewards_are_told_apart_by_options_and_files_but_not_by_weights(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(): ...\n")
    texts = ["regex(pattern=a)", "regex(pattern=b)", f"{file}:f"]
    digests = [judged_digest(parse_rewards([text])) for text in texts]
    assert len(set(digests)) == 3 and judged_digest(parse_rewards([f"{texts[0]}:2"])) == digests[0]
    file.write_text("def f(): return []\n")
    assert judged_digest(parse_rewards([texts[2]])) not in digests


def test_reasoning_has_a_field_of_its_own(bench, tmp_path):
    """Random weights do not end it: what they write is reasoning, and there is no answer."""
    assert main(words(bench, tmp_path / "rows.jsonl", "--thinking")) == 0
    answers = [each for line in lines_of(tmp_path / "rows.answers.jsonl") for each in line["answers"]]
    assert all(not each["content"] for each in answers) and any(each["reasoning"] for each in answers)
    statistics = json.loads((tmp_path / "rows.statistics.json").read_text())
    assert statistics["rejected"]["no answer"] > 0 and statistics["kept"] == 0


@pytest.mark.parametrize("more, message", [
    (("--reward", "mth"), "mth is none of math, "), (("--raw", "--thinking"), "--raw asks without a template"),
    (("--temperature", "0"), "--n 4 with --temperature 0 are all the same"),
    (("--input", "none.jsonl"), "--input none.jsonl: no such file"),
    (("--tensor-model-parallel-size", "2"), "does not divide the 1 rank of this job"),
    (("--keep", "most"), "--keep: 'most' is neither all nor best nor a whole number from 1 up")])
def test_refused_in_a_line(bench, tmp_path, more, message, capsys):
    assert main(words(bench, tmp_path / "rows.jsonl", *more)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("sample_answers.py: error: ") and message in line


def test_accept_at_needs_a_reward(bench, tmp_path, capsys):
    words_ = ["--load", str(bench / "tiny"), "--input", str(bench / "prompts.jsonl"), "--output",
              str(tmp_path / "rows.jsonl"), "--accept-at", "2"]
    assert main(words_) == 2 and "--accept-at 2 needs --reward" in capsys.readouterr().err
