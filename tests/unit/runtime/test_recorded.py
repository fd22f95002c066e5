"""arguments.json: what a run was told comes back from the file, and what another is told otherwise is listed."""

import json

import pytest
from small_datasets import EOD, SEQ, write_dataset

from megatron_deepseek.arguments import parse
from megatron_deepseek.checkpoint.native import ARGUMENTS
from megatron_deepseek.runtime.recorded import Job, differences, explain_marks, read_recorded, record


@pytest.fixture
def told(tmp_path):
    """Settings of a command line on one rank, or on `ranks`, as they are recorded."""
    write_dataset(tmp_path / "data", num_documents=20)

    def make(more: str = "", ranks: int = 1, length: str = "--train-iters 5"):
        settings = parse(f"--model tiny --data-path {tmp_path}/data --tokenizer-type NullTokenizer --tokenizer-model "
                         f"{EOD} --seq-length {SEQ} {length} --lr 1e-3 {more}".split(), ranks)
        return record(settings, None, Job("job"))

    return make


def changed(before, after) -> list[str]:
    return [line.strip() for line in differences(before, after)]


def test_what_was_recorded_comes_back(told, tmp_path):
    """As written to a file; and the same settings differ in nothing."""
    for more in ("", "--rampup-batch-size 2 2 8 --global-batch-size 6 --save run --lr 3e-4"):
        (tmp_path / ARGUMENTS).write_text(json.dumps(told(more).to_json()))
        back = read_recorded(tmp_path)
        assert back == told(more) and not differences(back, told(more)) and not differences(told(more), back)
    assert read_recorded(tmp_path / "nowhere") is None


@pytest.mark.parametrize("more, line", [
    ("--lr 2e-3", "* --lr: 0.001 before, 0.002 now"),
    ("--seed 7", "* --seed: 1234 before, 7 now"),
    ("--global-batch-size 4", "* --global-batch-size: 1 before, 4 now"),
    ("--micro-batch-size 2 --global-batch-size 2", "~ --micro-batch-size: 1 before, 2 now"),
    ("--weight-decay 0.2", "* --weight-decay: 0.1 before, 0.2 now"),
    ("--split 9,1,0", "* --split: 969,30,1 before, 9,1,0 now"),
    ("--bf16", "* --bf16: False before, True now"),
    ("--eod-mask-loss", "* --eod-mask-loss: False before, True now"),
    ("--rotary-base 5000", "* rope_theta: "),
    ("--mtp-loss-scaling-factor 0.1", "* --mtp-loss-scaling-factor: 0.3 before, 0.1 now"),
    ("--recompute-granularity full", "--recompute-granularity: none before, full now"),
    ("--train-iters 9", "* --train-iters: 5 before, 9 now"),
    ("--save-interval 7 --save run", "--save-interval: none before, 7 now"),
])
def test_a_change_is_listed_with_what_it_means(told, more, line):
    lines = changed(told(), told(more))
    assert any(each.startswith(line) for each in lines), lines


def test_another_sequence_length_blend_and_tokenizer(told, tmp_path):
    data = f"{tmp_path}/data"
    lines = changed(told(), told(f"--seq-length {2 * SEQ} --data-path 0.5 {data} 0.5 {data}"))
    assert f"* --seq-length: {SEQ} before, {2 * SEQ} now" in lines
    assert f"* --data-path: {data} before, 0.5 {data} 0.5 {data} now" in lines
    lines = changed(told("--tokenizer-model 99"), told("--tokenizer-model 98"))
    assert "* --tokenizer-model: 99 before, 98 now" in lines


def test_of_a_long_blend_the_end_that_differs_is_shown(told, tmp_path):
    many = [f"{tmp_path}/{number}" for number in range(50)]
    one, other = (told(f"--data-path {' '.join([*many, last])}") for last in ("a", "b"))
    assert changed(one, other) == ["* --data-path: ... a before, ... b now"]


def test_files_that_are_not_what_they_were(told, tmp_path):
    """Under the same name, other data or another tokenizer."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    before = told(f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}")
    size = (tmp_path / "data.bin").stat().st_size
    (tmp_path / "data.bin").write_bytes((tmp_path / "data.bin").read_bytes() + b"abcd")
    tokenizer.write_text('{"a": 1}')
    lines = changed(before, told(f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"))
    assert f"* {tmp_path}/data.bin: {size} before, {size + 4} now" in lines
    assert [line for line in lines if line.startswith(f"* {tokenizer}: ")]


@pytest.mark.parametrize("fixed", ["--lr-decay-iters 5", "--lr-decay-samples 5", "--lr-decay-style constant"])
def test_a_longer_run_is_the_same_where_the_learning_rate_does_not_follow_its_length(told, fixed):
    assert changed(told(fixed), told(f"{fixed} --train-iters 9")) == ["--train-iters: 5 before, 9 now"]


def test_iterations_that_follow_from_samples_are_no_change(told):
    """Nobody gave them: --train-samples and the batches say it."""
    lines = changed(told(length="--train-samples 48"), told("--global-batch-size 4", length="--train-samples 48"))
    assert lines == ["* --global-batch-size: 1 before, 4 now"]
    assert not any("--train-iters" in line for line in changed(told(), told(length="--train-samples 48")))


def test_another_layout_is_the_same_but_for_rounding(told):
    lines = changed(told("--global-batch-size 4"), told("--global-batch-size 4 --expert-model-parallel-size 2", 2))
    assert {"~ --expert-model-parallel-size: 1 before, 2 now", "~ data-parallel ranks: 1 before, 2 now"} <= set(lines)
    assert not any(line.startswith("*") for line in lines)


def test_a_rate_that_the_style_does_not_use_is_left_out(told):
    v3 = "--lr-decay-style deepseek-v3"
    assert changed(told(), told("--lr 2e-3")) == ["* --lr: 0.001 before, 0.002 now"]
    assert len([line for line in changed(told(v3), told(f"{v3} --lr 2e-3")) if "--lr-final" in line]) == 1


def test_where_it_reads_and_writes_is_no_change(told):
    start = "--save run --load run --save-hf out --log-interval 7 --data-cache-path elsewhere --exit-interval 5"
    assert changed(told(), told(start)) == []


def test_what_one_version_alone_knows_is_left_out(told):
    before = told()
    del before.settings["run"]["seed"], before.settings["offload"]
    before.settings["run"]["of_old"] = 5
    assert changed(before, told("--seed 7")) == []


def test_only_marks_that_are_there_are_explained():
    assert explain_marks(["  * a", "    b"]) == ["  (*: from here on this is not the run that it would have been)"]
    assert explain_marks(["    b"]) == [] and len(explain_marks(["  ~ a", "  * a"])) == 2


@pytest.mark.parametrize("text, named", [("[]", "a list"), ('{"settings": {}}', "job"), ("{", "malformed")])
def test_a_damaged_file_is_named(tmp_path, text, named):
    (tmp_path / ARGUMENTS).write_text(text)
    with pytest.raises(ValueError, match=f"{ARGUMENTS}.*{named}"):
        read_recorded(tmp_path)
