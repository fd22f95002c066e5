"""A student of R1, fine-tuned as a user does it: released files in, transformers' loss, and out as they came."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_tokenizers import write_distilled
from released_configs import QWEN_7B
from safetensors.torch import save_file
from small_checkpoints import all_tensors, random_weights
from workshop import REPOSITORY

from megatron_deepseek.data.tokenizer import ASSISTANT, BOS, EOD, USER, build_tokenizer
from megatron_deepseek.model.architecture.config import ModelConfig

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
FIELDS = QWEN_7B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "max_window_layers": 2}
PROMPT, ANSWER = f"{BOS}{USER}What is 1+2?{ASSISTANT}<think>\n", f"One and two.\n</think>\n\nIt is 3.{EOD}"


@pytest.fixture
def student(tmp_path) -> Path:
    """DeepSeek-R1-Distill-Qwen-7B's files, made small, with random weights."""
    directory = tmp_path / "student"
    write_distilled(directory, "qwen", None)
    weights = random_weights(ModelConfig.from_hf_dict(FIELDS), torch.bfloat16)
    weights = {name: torch.ones_like(each) if "norm" in name else each * 0.05 for name, each in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(FIELDS))
    row = {"messages": [{"role": "user", "content": "What is 1+2?"},
                        {"role": "assistant", "reasoning_content": "One and two.", "content": "It is 3."}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n")
    return directory


def loss_of_transformers(student: Path) -> float:
    """The mean over the answer's tokens, of R1's string."""
    transformers = pytest.importorskip("transformers")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(student))
    prompt, answer = tokenizer.encode(PROMPT), tokenizer.encode(ANSWER)
    model = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + answer]),
                     labels=torch.tensor([[-100] * len(prompt) + answer])).loss.item()


@pytest.mark.slow
def test_a_student_is_fine_tuned_and_goes_out_as_it_came(student, tmp_path):
    """With the template that its tokens tell; in FP8 with scales that are powers of two, since those are asked for."""
    given = ["--model", student, "--load", student, "--dataset", tmp_path / "chats.jsonl", "--save", tmp_path / "run",
             "--save-hf", tmp_path / "out", "--save-hf-dtype", "fp8", "--fp8-scale-format", "ue8m0", "--seq-length",
             "64", "--global-batch-size", "1", "--train-iters", "1", "--num-workers", "1"]
    done = subprocess.run([sys.executable, str(REPOSITORY / "finetune_deepseek.py"), *map(str, given)],
                          env=ENVIRONMENT, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0 and "template deepseek-r1: " in done.stdout, done.stdout + done.stderr
    (step,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # Both in float32, in another order of operations.
    assert step["lm_loss"] == pytest.approx(loss_of_transformers(student), rel=1e-5)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization_config")["scale_fmt"] == "ue8m0"
    assert written == FIELDS
    scales = [each for name, each in all_tensors(tmp_path / "out").items() if name.endswith("_scale_inv")]
    assert len(scales) == 2 * 7 and all((torch.frexp(each).mantissa == 0.5).all() for each in scales)
