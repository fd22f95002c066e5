"""tools/make_conversations.py: puzzles with right answers, none of which is both trained on and held out."""

import json

from megatron_deepseek.cli.make_conversations import main, puzzles


def test_questions_are_in_one_of_the_two_files(tmp_path):
    paths = tmp_path / "a" / "train.jsonl", tmp_path / "a" / "held_out.jsonl"
    given = ["--output", str(paths[0]), "--held-out", str(paths[1]), "--rows", "300", "--held-out-rows", "60"]
    assert main(given) == 0
    texts = [path.read_text() for path in paths]
    rows = [[json.loads(line)["messages"] for line in text.splitlines()] for text in texts]
    assert list(map(len, rows)) == [300, 60]
    train, held_out = ({messages[0]["content"] for messages in part} for part in rows)
    assert not train & held_out
    assert all(messages[1]["reasoning_content"] and messages[1]["content"] for part in rows for messages in part)
    assert main(given) == 0 and [path.read_text() for path in paths] == texts


def test_answers_are_right():
    for _, (question, thoughts, answer) in zip(range(200), puzzles(7, False)):
        words = question.split()
        if "plus" in words:
            assert int(words[2]) + int(words[4]) == int(answer)
        elif "follows" in words:
            assert int(words[-2]) + 1 == int(answer)
        elif "Reverse" in words:
            assert answer.split() == words[-2:0:-1]
        else:
            assert answer == (words[6] if "first" in words else words[-2])
        assert thoughts.split()[-1] != "?"
