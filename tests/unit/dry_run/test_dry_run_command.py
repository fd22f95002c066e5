"""The command line of dry runs: errors in one line before torch is needed, and a whole dry run of a tiny job."""

import json

import pytest

from megatron_deepseek.arguments.dry_run import asked
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.dry_run.command import dry_run

TINY = "--model tiny --bf16 --seq-length 64"


def lines_of(capsys, arguments: str, parser=build_parser, status: int = 0) -> str:
    with pytest.raises(SystemExit) as left:
        dry_run(arguments.split(), parser, "--dataset" if parser is build_finetuning_parser else "--data-path")
    assert left.value.code == status
    said = capsys.readouterr()
    return said.err if status else said.out


@pytest.mark.parametrize("arguments, message", [
    ("--dry-run-memory", "--dry-run-memory needs --world-size"),
    ("--dry-run-communication --world-size 8 --ranks 0,8", "--ranks 8 is none of the ranks 0 to 7 of --world-size 8"),
    ("--dry-run-memory --world-size 8 --ranks fullest", "'fullest' is neither worst nor all nor numbers"),
    ("--dry-run-memory --world-size 6 --tensor-model-parallel-size 4", "6 "),
    ("--dry-run-memory --world-size many", "'many'"),
    ("--data-path any --world-size 8", "--world-size is for --dry-run-memory"),
    ("--dry-run-memory --world-size 8 --pipeline-model-parallel-size 4 --global-batch-size 16 "
     "--dry-run-micro-batches 2", "--dry-run-micro-batches 2: 1F1B over 4 pipeline ranks takes at least one for each")])
def test_a_mistake_is_one_line(capsys, arguments, message):
    said = lines_of(capsys, f"{arguments} {TINY}", status=2)
    assert message in said and said.count("\n") == 1 and said.startswith("pretrain_deepseek.py: error: ")


@pytest.mark.parametrize("option", ["--dry-run-json", "--dry-run-trace"])
def test_a_file_is_refused_before_the_work(capsys, tmp_path, option, monkeypatch):
    monkeypatch.setattr("megatron_deepseek.dry_run.rank.dry_rank", lambda *_: pytest.fail("it has begun"))
    for path, why in ((tmp_path / "none" / "x.json", "No such file or directory"), (tmp_path, "is a directory")):
        said = lines_of(capsys, f"--dry-run-memory --world-size 2 {TINY} {option} {path}", status=2)
        assert f"{option} {path}" in said and why in said and said.count("\n") == 1


def test_preferences_have_no_dry_run(capsys):
    said = lines_of(capsys, f"--dry-run-memory --world-size 2 {TINY} --objective reward --load base",
                    build_finetuning_parser, status=2)
    assert "--objective reward has no dry run" in said and "A step of --objective sft" in said
    assert said.count("\n") == 1


def test_other_command_lines_are_left_alone():
    assert asked(["--model", "tiny", "--dry-run"]) is None  # fine-tuning's, which shows data
    assert dry_run(["--model", "tiny"], build_parser) is None


def test_a_rank_of_a_pipeline(capsys, tmp_path):
    files = tmp_path / "found.json", tmp_path / "trace.json"
    said = lines_of(capsys, f"--dry-run-memory --dry-run-communication --world-size 8 --ranks 0 {TINY} "
                            f"--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 8 "
                            f"--dry-run-json {files[0]} --dry-run-trace {files[1]}")
    assert said.startswith("rank 0 of 8: pipeline rank 0, ") and "the largest tensors" in said
    (rank,) = json.loads(files[0].read_text())["ranks"]
    assert rank["peak_bytes"] == max(level["bytes"] for level in rank["levels"]) == rank["peak"]["bytes"]
    assert sum(rank["peak"]["categories"].values()) == rank["peak_bytes"]
    gradients = [each["of"] for each in rank["largest"] if each["category"] == "gradients"]
    assert gradients and all(name.startswith("gradient of model.layers.") for name in gradients)
    acts = [level["act"] for level in rank["levels"] if level["act"].startswith(("F", "B"))]
    assert sorted(acts) == sorted(f"{kind}{number} of stage 0" for kind in "FB" for number in range(2))
    to_experts = [each for each in rank["collectives"] if each["kind"] == "all_to_all"]
    assert to_experts and all(each["ranks"] == [0, 1] for each in to_experts)
    events = json.loads(files[1].read_text())["traceEvents"]
    assert {"acts", "collectives"} == {each["args"]["name"] for each in events if each["name"] == "thread_name"}
    assert max(each["args"]["bytes"] for each in events if "bytes" in each["args"]) == rank["peak_bytes"]


def test_fine_tuning_needs_no_data(capsys):
    said = lines_of(capsys, f"--dry-run-memory --world-size 2 {TINY} --loss-average sample", build_finetuning_parser)
    assert "peak" in said and "not in it" not in said


def test_adapters_need_no_weights(capsys):
    """A quantised base too, whose bytes are those of no file."""
    said = lines_of(capsys, f"--dry-run-memory --world-size 1 {TINY} --num-layers 2 --mtp-num-layers 0 --lora-rank 4 "
                            "--quantization-bit 4 --global-batch-size 1 --dry-run-device gpu", build_finetuning_parser)
    assert "model.layers.1.mlp.experts.gate_up_proj" in said and "uint8[16, 128, 64]" in said


def test_a_teacher_is_said_to_be_missing(capsys):
    said = lines_of(capsys, f"--dry-run-communication --world-size 2 {TINY} --num-layers 1 --teacher r1",
                    build_finetuning_parser)
    assert said.endswith("not in it: --teacher r1 (docs/distillation.md says what it takes)\n")
