"""tools/evaluate.py and --eval-tasks with lm-eval, beside its own `hf` model on the same weights and tasks."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_tokenizers import write_tokenizer
from small_engines import spread_weights
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, DeepseekV3Config

from megatron_deepseek.data.tokenizer import BOS, build_tokenizer

CLIENTS = os.environ.get("CLIENTS")
if not CLIENTS:
    pytest.skip("make test-clients installs lm-eval, and says where", allow_module_level=True)

ROOT = Path(__file__).parents[2]
EVALUATE = ROOT / "tools" / "evaluate.py"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
           "CUDA_VISIBLE_DEVICES": ""}
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<｜{{ m['role'].title() }}｜>{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}")
QUESTIONS = [("what is it?", " no way", " yes"), ("first one, then", " three 北京", " two"), ("a b", "ab", " aa"),
             ("\n\nThe answer is ", "12", "13"), ("get", " Paris", " Berlin"),
             ("<｜begin▁of▁sentence｜>so", " it is", " no")]
TASKS = {
    "tiny_choice": ["output_type: multiple_choice", 'doc_to_text: "{{question}}"', 'target_delimiter: ""',
                    "doc_to_choice: choices", "doc_to_target: gold", "fewshot_split: test",
                    "metric_list: [{metric: acc}, {metric: acc_norm}]"],
    "tiny_rolling": ["output_type: loglikelihood_rolling", 'doc_to_text: ""', 'doc_to_target: "{{long}}"',
                     "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"],
    "tiny_until": ["output_type: generate_until", 'doc_to_text: "{{question}}"', 'doc_to_target: "{{choices[0]}}"',
                   'generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}',
                   "metric_list: [{metric: exact_match}]"]}


def write_model(folder: Path, adds_bos: bool) -> Path:
    """A model of transformers with weights of spread, and its tokenizer, which may begin texts with a token."""
    write_tokenizer(folder, chat_template=TEMPLATE)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    if adds_bos:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.post_processor = TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))])
        backend.save(str(folder / "tokenizer.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder))
    assert tokenizer.adds_bos == adds_bos
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=1, n_group=4, topk_group=2, max_position_embeddings=96,
        bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eod))
    spread_weights(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluate") / "plain", adds_bos=False)


@pytest.fixture(scope="module")
def model_with_bos(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluate") / "bos", adds_bos=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "tasks"
    folder.mkdir()
    rows = [{"question": question, "choices": choices, "gold": number % 2, "long": (question + choices[0]) * 12}
            for number, (question, *choices) in enumerate(QUESTIONS)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lines in TASKS.items():
        common = [f"task: {name}", "dataset_path: json", "test_split: test",
                  f"dataset_kwargs: {{data_files: {{test: {folder / 'questions.jsonl'}}}}}"]
        (folder / f"{name}.yaml").write_text("\n".join([*common, *lines, ""]))
    return folder


def command(*words, environ: dict[str, str] = {}) -> tuple[list[str], dict[str, str]]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return [f"{CLIENTS}/bin/python", *map(str, words)], kept | OFFLINE | environ


def run(*words) -> str:
    words, environ = command(*words)
    done = subprocess.run(words, env=environ, text=True, capture_output=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def samples(output: Path) -> Iterator[dict]:
    for name in TASKS:
        for path in output.rglob(f"samples_{name}_*"):
            yield from map(json.loads, path.open())


def assert_alike(own: dict, other: dict) -> None:
    """Two samples' answers: a score and whether it is of the likeliest text, a score alone, or a text."""
    for found, expected in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
        if isinstance(expected, list):
            assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-4) and found[1] == expected[1]
        elif own["metrics"][0] == "word_perplexity":
            assert float(found) == pytest.approx(float(expected), rel=1e-6)
        else:
            assert found == expected


@pytest.mark.parametrize("which, more", [
    ("model", ()), ("model", ("--apply_chat_template",)), ("model_with_bos", ("--num_fewshot", "2"))])
def test_the_same_as_lm_evals_own_model(request, tasks, tmp_path, which, more):
    """Log-likelihoods to the rounding of float32 over the whole of a text, answers to the letter, the same fields.

    `hf` decides by the first text of a batch whether all of it begin with BOS: so it has batches of one.
    """
    model = request.getfixturevalue(which)
    words = ["--tasks", ",".join(TASKS), "--include_path", tasks, *more]
    run("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu",
        "--batch_size", "1", "--output_path", tmp_path / "theirs", "--log_samples", *words)
    shown = run(EVALUATE, "--load", model, "--output", tmp_path / "ours", "--batch-size", "3", *words)
    assert "|tiny_choice |" in shown and "written to" in shown
    ours = list(samples(tmp_path / "ours"))
    for own, other in zip(ours, samples(tmp_path / "theirs"), strict=True):
        assert own["arguments"] == other["arguments"] and own.keys() == other.keys()
        assert_alike(own, other)
    assert len(ours) == 3 * len(QUESTIONS)
    mine, theirs = (json.loads(next((tmp_path / each).rglob("results_*.json")).read_text())
                    for each in ("ours", "theirs"))
    assert mine.keys() >= theirs.keys() - {"max_length", "eot_token_id"} - {
        key for key in theirs if key.startswith("tokenizer_")}
    assert mine["results"].keys() == theirs["results"].keys() and mine["configs"].keys() == theirs["configs"].keys()


def test_after_a_kill_it_goes_on(model, tasks, tmp_path):
    """Killed at the fifth answer; the second run asks what is missing, and its results are those of a whole one."""
    words = ["--load", model, "--tasks", *TASKS, "--include-path", tasks, "--max-running", "1"]
    kept = tmp_path / "killed" / "answers.jsonl"
    begun, environ = command(EVALUATE, *words, "--output", tmp_path / "killed", "--token-budget", "4")
    process = subprocess.Popen(begun, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < 5):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answered = kept.read_bytes().count(b"\n")
    run(EVALUATE, *words, "--output", tmp_path / "killed")
    run(EVALUATE, *words, "--output", tmp_path / "whole")
    killed, never = ([json.loads(line)["question"] for line in (tmp_path / each / "answers.jsonl").open()]
                     for each in ("killed", "whole"))
    assert sorted(killed) == sorted(never) and len(set(never)) == len(never)
    assert 5 <= answered < len(never)
    for own, other in zip(samples(tmp_path / "killed"), samples(tmp_path / "whole"), strict=True):
        assert_alike(own, other)  # other steps of the engine round otherwise


@pytest.mark.parametrize("task, message", [
    ("hellaswagg", "did you mean hellaswag"), ("none.json", "there is no such file"),
    ("hellaswag", "its data set is not on this machine, and cannot be downloaded")])
def test_what_cannot_be_evaluated_is_said_in_a_line(model, task, message):
    words, environ = command(EVALUATE, "--load", model, "--tasks", task)
    done = subprocess.run(words, env=environ, text=True, capture_output=True, timeout=1500)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_a_task_in_a_json_file(model, tasks, tmp_path):
    task = {"task": "of_json", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tasks / "questions.jsonl")}}, "doc_to_text": "{{question}}",
            "doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "task.json").write_text(json.dumps(task))
    shown = run(EVALUATE, "--load", model, "--tasks", tmp_path / "task.json", "--limit", "3")
    assert "|of_json|" in shown


# While training -------------------------------------------------------------------------------------------------------

TRAINING = ("--mock-data --tokenizer-type ByteTokenizer --model tiny --vocab-size 260 --seq-length 64 --train-iters 4 "
            "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --min-lr 0").split()


def train(save: Path, ranks: int, *more) -> list[dict]:
    start = ("-m", "torch.distributed.run", "--nproc_per_node", ranks) if ranks > 1 else ()
    run(*start, ROOT / "pretrain_deepseek.py", *TRAINING, "--save", save, *more)
    return [json.loads(line) for line in (save / "metrics.jsonl").open()]


def test_tasks_while_training_change_nothing_and_do_not_depend_on_the_layout(tasks, tmp_path):
    wanted = ("--eval-tasks", *TASKS, "--eval-tasks-include-path", tasks, "--eval-tasks-interval", 2)
    plain = train(tmp_path / "plain", 1)
    asked = train(tmp_path / "asked", 1, *wanted, "--tensorboard-dir", tmp_path / "curves")
    divided = train(tmp_path / "divided", 2, *wanted, "--pipeline-model-parallel-size", 2)
    numbers = [[(each["lm_loss"], each["mtp_loss"], each["grad_norm"]) for each in records if "lm_loss" in each]
               for records in (plain, asked)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 4
    ours, theirs = ([each for each in records if "eval_set" in each] for records in (asked, divided))
    assert [each["iteration"] for each in ours] == [0] * 3 + [2] * 3 + [4] * 3
    assert [each["eval_set"] for each in ours] == [*TASKS] * 3 and {"eval_acc", "eval_acc_stderr"} < ours[0].keys()
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("eval_set") == other.pop("eval_set") and one == pytest.approx(other, rel=1e-4)
    assert b"held out/tiny_choice/acc" in next((tmp_path / "curves").iterdir()).read_bytes()
