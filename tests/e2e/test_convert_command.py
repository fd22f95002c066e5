"""tools/convert_checkpoint.py as a user runs it: the export speaks in transformers, a kill costs one file, memory does
not grow with the model, and torchrun shares the work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from forked import run_script
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    PreTrainedTokenizerFast,
)

from megatron_deepseek.checkpoint.convert.names import hf_shapes
from megatron_deepseek.model.architecture.config import ModelConfig

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
         "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16,
         "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1,
         "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "initializer_range": 0.3,
         "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
# transformers 5's own dialect, and its default num_nextn_predict_layers of 1 without the weights.
MODELS = {"v3": DeepseekV3Config(**SMALL, q_lora_rank=24), "tied v3": DeepseekV3Config(
    **SMALL, q_lora_rank=None, tie_word_embeddings=True), "v2": DeepseekV2Config(**SMALL, q_lora_rank=24)}


def command(origin: str, to: str, load: Path, save: Path, *more: str) -> list[str]:
    return [str(REPOSITORY / "tools" / "convert_checkpoint.py"), "--from", origin, "--to", to, "--load", str(load),
            "--save", str(save), *more]


def launch(*arguments, launcher=(sys.executable,)) -> subprocess.CompletedProcess:
    return subprocess.run([*launcher, *command(*arguments)], env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=120)


def convert(*arguments, num_ranks: int = 1) -> subprocess.CompletedProcess:
    """Convert in processes that begin with everything imported."""
    with TemporaryDirectory(prefix="convert-") as directory:
        streams = [Path(directory) / name for name in ("out", "errors")]
        status = run_script(command(*arguments), *streams, num_ranks)
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in streams))


def write_tokenizer(directory: Path) -> None:
    words = {"<s>": 0, "</s>": 1, **{f"w{index}": index for index in range(2, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def says(directory: Path) -> tuple[str, torch.Tensor]:
    """Generated text, and the logits of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("w5 w9 w20", return_tensors="pt")
    with torch.no_grad():
        logits = model(prompt.input_ids).logits
        text = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return tokenizer.decode(text[0]), logits


@pytest.mark.parametrize("name", MODELS)
def test_the_export_speaks_in_transformers(tmp_path, name):
    """Through a native checkpoint and back: the same text and the same logits, in transformers' own classes."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    for arguments in (("hf", "native", tmp_path / "hf", tmp_path / "native"),
                      ("native", "hf", tmp_path / "native", tmp_path / "back")):
        done = convert(*arguments)
        assert done.returncode == 0, done.stderr
    (text, logits), (expected_text, expected) = says(tmp_path / "back"), says(tmp_path / "hf")
    assert text == expected_text and len(text.split()) == 15
    assert torch.equal(logits, expected)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """About 270 MB in two files, mostly experts: enough that holding it shows, and that a kill comes in time."""
    directory = tmp_path_factory.mktemp("large") / "hf"
    directory.mkdir()
    fields = SMALL | {"model_type": "deepseek_v3", "hidden_size": 1024, "moe_intermediate_size": 1024,
                      "n_routed_experts": 20, "num_hidden_layers": 3, "q_lora_rank": 24, "num_nextn_predict_layers": 0,
                      "routed_scaling_factor": 2.5, "norm_topk_prob": True, "torch_dtype": "bfloat16"}
    shapes = hf_shapes(ModelConfig.from_hf_dict(fields))
    (directory / "config.json").write_text(json.dumps(fields))
    for part in (0, 1):
        weights = {name: torch.full(shape, 0.5 + number / 512, dtype=torch.bfloat16)
                   for number, (name, shape) in enumerate(shapes.items()) if number % 2 == part}
        save_file(weights, directory / f"part-{part}.safetensors")
    return directory


def assert_equal_files(ours: Path, theirs: Path) -> None:
    """Every tensor of `theirs`, one file of it in memory at a time."""
    found = {name: tensor for path in ours.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in theirs.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(found.pop(name), tensor), name
    assert not found


@pytest.mark.parametrize("to", ["native", pytest.param("hf", marks=pytest.mark.slow)])
def test_kill_and_resume(tmp_path, large, to):
    """SIGKILL in the middle; the same command keeps the finished files and ends with the same weights."""
    work = tmp_path / ("out/iter_0000000.incomplete" if to == "native" else "out.incomplete")
    arguments = ("hf", to, large, tmp_path / "out", "--max-shard-size", "20MB")
    slow = "import os, time; pwrite = os.pwrite; os.pwrite = lambda *a: (time.sleep(0.02), pwrite(*a))[1]; "
    run = (f"import sys, runpy; {slow}sys.argv = {command(*arguments)!r}; "
           "runpy.run_path(sys.argv[0], run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-c", run], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    started = "output/*.tmp" if to == "native" else "finished/*.safetensors.json"
    while not list(work.glob(started)) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()
    kept = {path: path.stat().st_ino for path in (work / "output").glob("*.safetensors")
            if (work / "finished" / f"{path.name}.json").exists()}  # a kill may fall between the two renames
    done = convert(*arguments)
    assert done.returncode == 0 and "continuing the conversion" in done.stderr, done.stderr
    assert not work.exists()
    for path, inode in kept.items():
        assert (tmp_path / "out" / path.name).stat().st_ino == inode
    if to == "native":
        assert convert("native", "hf", tmp_path / "out", tmp_path / "back").returncode == 0
    assert_equal_files(tmp_path / ("back" if to == "native" else "out"), large)


def test_memory_does_not_hold_the_model(tmp_path, large):
    """Both ways under a limit of address space that torch's import and the model together exceed. Of it glibc would set
    64 MiB aside for each thread that has to wait for another's allocation: by chance.
    """
    measure = "import torch; print([l for l in open('/proc/self/status') if l.startswith('VmPeak')][0].split()[1])"
    imports = "import megatron_deepseek.cli.convert_checkpoint_run; " + measure
    base = int(subprocess.run([sys.executable, "-c", imports], env=ENVIRONMENT, capture_output=True, text=True).stdout)
    size = sum(path.stat().st_size for path in large.glob("*.safetensors")) // 1024
    limit = f"export MALLOC_ARENA_MAX=1; ulimit -v {base + int(size * 0.6)}"
    limited = ("bash", "-c", f"{limit}; exec {sys.executable} \"$@\"", "limited")
    done = launch("hf", "native", large, tmp_path / "native", launcher=limited)
    assert done.returncode == 0, done.stderr
    done = launch("native", "hf", tmp_path / "native", tmp_path / "back", launcher=limited)
    assert done.returncode == 0, done.stderr
    assert_equal_files(tmp_path / "back", large)


def test_ranks_share_the_work(tmp_path):
    """Two ranks write what one would, and rank 0 alone reports."""
    AutoModelForCausalLM.from_config(MODELS["v3"]).save_pretrained(tmp_path / "hf")
    done = convert("hf", "hf", tmp_path / "hf", tmp_path / "out", "--max-shard-size", "40KB", num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensors") == 1 and len(list((tmp_path / "out").glob("*.safetensors"))) > 4
    assert_equal_files(tmp_path / "out", tmp_path / "hf")


def test_refused_in_one_line(tmp_path):
    done = launch("hf", "native", tmp_path, tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("convert_checkpoint.py: error: ")
    assert done.stderr.count("\n") == 1
