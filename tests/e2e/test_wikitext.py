"""MindFormers' single-node exercise on WikiText, a hundredth of its size: a file in WikiText's form, a tokenizer, rows
of ids, and examples/pretrain_v3_1b.sh on its DP2 x TP2 x PP2 with EP2.
"""

import json
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from workshop import REPOSITORY, run_entry

from megatron_deepseek.cli import preprocess_data, train_tokenizer
from megatron_deepseek.data.indexed import open_indexed


def wikitext(folder: Path) -> str:
    """Write this project's documents as WikiText has articles: words apart, headings alone between blank lines."""
    lines = [""]
    for path in sorted((folder / "docs").glob("*.md")):
        for paragraph in path.read_text().split("\n\n"):
            level, _, rest = paragraph.partition(" ") if paragraph.startswith("#") else ("", "", paragraph)
            words = " ".join(re.findall(r"\w+|[^\w\s]", rest))
            marks = " ".join("=" * len(level))
            lines += [f"{marks} {words} {marks}".strip() if level else words, ""]
    return "".join(f" {line} \n" for line in lines)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wikitext")
    (folder / "wiki.train.tokens").write_text(wikitext(REPOSITORY))
    tokenizer, prefix = str(folder / "tokenizer.json"), str(folder / "wiki_64")
    (folder / "corpus.txt").write_text((folder / "wiki.train.tokens").read_text())
    made = train_tokenizer.main(["--input", str(folder / "corpus.txt"), "--output", tokenizer, "--vocab-size", "1024"])
    assert made == 0
    made = preprocess_data.main([
        "--input", str(folder / "wiki.train.tokens"), "--split-wikitext", "section", "--seq-length", "64",
        "--append-bos", "--output-prefix", prefix, "--tokenizer-model", tokenizer])
    assert made == 0
    return folder


def test_the_exercise(rows):
    """Its learning rate is warmed up over 20 steps of 8 samples; the loss begins with that of chance, ln 8192."""
    prefix = rows / "wiki_64_text_document"
    assert set(open_indexed(str(prefix), "").lengths.tolist()) == {65}
    environment = {**os.environ, "PYTHON": "echo", "SMALL": "1", "STEPS": "2", "DATA_PATH": str(prefix),
                   "TOKENIZER": str(rows / "tokenizer.json"), "SAVE": str(rows / "run")}
    printed = subprocess.run(["bash", str(REPOSITORY / "examples" / "pretrain_v3_1b.sh"), "--seq-length", "64",
                              "--no-save-optim"],
                             check=True, capture_output=True, text=True, env=environment).stdout
    words = shlex.split(printed.splitlines()[-1])
    place = words.index(str(REPOSITORY / "pretrain_deepseek.py"))
    job = run_entry("pretrain_deepseek.py", 8, words[place + 1:])
    assert job.status == 0, job.output
    steps = [json.loads(line) for line in (rows / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["learning_rate"] for step in steps] == pytest.approx([0, 2.2e-4 / 20])
    assert [step["tokens"] for step in steps] == [8 * 64] * 2
    assert steps[0]["lm_loss"] == pytest.approx(math.log(8192), abs=0.1)
    assert steps[0]["mtp_loss"] == pytest.approx([math.log(8192)], abs=0.1)
