"""Arguments in files: @FILE, and --yaml-cfg in the form of NVIDIA's Megatron-MoE ModelZoo."""

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.argument_files import expand

YAML = """
ENV_VARS:
  NCCL_DEBUG: VERSION
MODEL_ARGS:
  # a comment
  --tensor-model-parallel-size: ${TP}
  --use-distributed-optimizer: true
  --finetune: false
  --tokenizer-model: null
  --lr: 3.9e-6   # as it is written
  --moe-layer-freq: ([0]*3+[1]*58)
  --data-path: 0.5 ${DATA}/a 0.5 "$DATA/b"
  recompute_modules: [moe_act, layernorm]
"""
WORDS = ["--tensor-model-parallel-size", "4", "--use-distributed-optimizer", "--lr", "3.9e-6", "--moe-layer-freq",
         "([0]*3+[1]*58)", "--data-path", "0.5", "/d/a", "0.5", "/d/b", "--recompute-modules", "moe_act", "layernorm"]
ENVIRON = {"TP": "4", "DATA": "/d"}


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "model.yaml").write_text(text)
        return str(tmp_path / "model.yaml")
    return write


def test_the_form_of_model_zoo(yaml_file):
    path = yaml_file(YAML)
    assert expand(["--yaml-cfg", path], ENVIRON) == expand([f"--yaml-cfg={path}"], ENVIRON) == WORDS


def test_the_command_line_wins(yaml_file):
    words = expand(["--lr=1", "--yaml-cfg", yaml_file(YAML), "--data-path", "c"], ENVIRON)
    assert words == [*WORDS[:3], *WORDS[5:7], *WORDS[12:], "--lr=1", "--data-path", "c"]


def test_a_file_of_words_with_comments(tmp_path):
    (tmp_path / "inner").write_text("--bf16")
    (tmp_path / "args").write_text(f"--lr 1e-4  # peak\n# nothing\n--data-path 'a b'\n@{tmp_path}/inner --seed 1\n")
    assert expand([f"@{tmp_path}/args", "--seed", "2"], {}) == ["--bf16", "--lr", "1e-4", "--data-path", "a b",
                                                               "--seed", "2"]


def test_a_run_reads_them(tmp_path):
    (tmp_path / "args").write_text("--model tiny --data-path a --lr 1e-4 # peak")
    settings = parse([f"@{tmp_path}/args", "--train-iters", "1", "--seq-length", "64"], 1)
    assert settings.learning_rate.lr == 1e-4 and settings.run.train_iters == 1


@pytest.mark.parametrize("text, words", [
    ("MODEL_ARGS: [1]", "has no MODEL_ARGS with arguments"), ("a: b: c", "is no YAML: mapping values"), ("", "has no"),
    ("MODEL_ARGS: {--lr: {a: 1}}", "--lr is a mapping"), ("MODEL_ARGS: {--lr: $LR}", r"--lr names \$LR, which")])
def test_wrong_yaml_is_refused(yaml_file, text, words):
    with pytest.raises(ValueError, match=words):
        expand(["--yaml-cfg", yaml_file(text)], {})


def test_files_that_are_not_there_or_name_themselves_are_refused(tmp_path):
    for words, message in ((["@/none/such"], "@/none/such cannot be read: No such file"),
                           (["--yaml-cfg", "/none/such"], "--yaml-cfg /none/such cannot be read: No such file"),
                           (["--yaml-cfg"], "--yaml-cfg needs a file")):
        with pytest.raises(ValueError, match=message):
            expand(words, {})
    (tmp_path / "args").write_text(f"@{tmp_path}/args")
    with pytest.raises(ValueError, match="name each other more than 8 deep"):
        expand([f"@{tmp_path}/args"], {})
    (tmp_path / "args").write_text("--data-path 'a")
    with pytest.raises(ValueError, match="args: No closing quotation"):
        expand([f"@{tmp_path}/args"], {})
