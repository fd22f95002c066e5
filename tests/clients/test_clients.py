"""Programs that others wrote, as their users start them: lm-eval and llm (make test-clients installs them).

lm-eval's log-likelihoods are held against the training model's own forward of the whole texts.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from served import Served, serving
from served_models import write_served
from small_engines import V3_MTP, uncached_logits

from megatron_deepseek.data.tokenizer import Tokenizer, build_tokenizer
from megatron_deepseek.inference.loading import join_ranks, load_model
from megatron_deepseek.inference.model_files import open_model

CLIENTS = os.environ.get("CLIENTS")
if not CLIENTS:
    pytest.skip("make test-clients installs lm-eval and llm, and says where", allow_module_level=True)

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
QUESTIONS = [("what is it?", " no way"), ("first one, then", " three 北京"), ("Assistant:", "User: no"), ("a b", "ab"),
             ("\n\nThe answer is", " 12"), ("get", " Paris")]
TASKS = {
    "tiny_choice": ["output_type: multiple_choice", 'doc_to_text: "{{question}}"', 'target_delimiter: ""',
                    "doc_to_choice: choices", "doc_to_target: gold", "metric_list: [{metric: acc}]"],
    "tiny_rolling": ["output_type: loglikelihood_rolling", 'doc_to_text: ""',
                     'doc_to_target: "{{question}}{{choices[0]}}"', "metric_list: [{metric: word_perplexity}]"],
    "tiny_until": ["output_type: generate_until", 'doc_to_text: "{{question}}"', 'doc_to_target: "{{choices[0]}}"',
                   'generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false, temperature: 0}',
                   "metric_list: [{metric: exact_match}]"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_served(tmp_path_factory.mktemp("clients") / "tiny", replace(V3_MTP, max_position_embeddings=256))


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory) -> Iterator[Served]:
    """Prompts are computed 7 tokens at a time: what is read of them comes from several steps."""
    with serving(tmp_path_factory.mktemp("server"), checkpoint, "--template", "deepseek-v3.1", "--token-budget",
                 "7") as one:
        yield one


@pytest.fixture(scope="module")
def stage(checkpoint) -> Iterator[torch.nn.Module]:
    yield load_model(open_model(checkpoint), join_ranks()).stage
    dist.destroy_process_group()


def run(program: str, *arguments: str, **environment: str) -> str:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run([f"{CLIENTS}/bin/{program}", *arguments], env=environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# lm-eval --------------------------------------------------------------------------------------------------------------

def greedy_choice(stage, tokenizer: Tokenizer, question: str) -> str | None:
    """The likeliest next token's text, if the text of both is cut into the same tokens."""
    ids = tokenizer.encode(question)
    token = int(uncached_logits(stage, ids)[-1].argmax())
    text = tokenizer.decode([token])
    return text if tokenizer.encode(question + text) == [*ids, token] else None


def write_tasks(folder: Path, checkpoint: Path, stage, tokenizer: Tokenizer) -> list[dict]:
    """Write the tasks, their questions and the tokenizer as lm-eval reads them; return the questions."""
    kept = checkpoint / "huggingface"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_bytes((kept / "tokenizer.json").read_bytes())
    config = json.loads((kept / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    questions = [{"question": question, "choices": [other, greedy_choice(stage, tokenizer, question) or " yes"],
                  "gold": 0} for question, other in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    (folder / "tasks").mkdir()
    for name, lines in TASKS.items():
        common = [f"task: {name}", "dataset_path: json", "test_split: test",
                  f"dataset_kwargs: {{data_files: {{test: {folder / 'questions.jsonl'}}}}}"]
        (folder / "tasks" / f"{name}.yaml").write_text("\n".join([*common, *lines, ""]))
    return questions


def log_likelihood(stage, context: list[int], text: list[int]) -> tuple[float, bool]:
    """Of `text` after `context`, and whether each of its tokens is the likeliest."""
    found = uncached_logits(stage, [*context, *text])[len(context) - 1:-1].log_softmax(-1)
    return float(found.gather(1, torch.tensor(text)[:, None]).sum()), found.argmax(-1).tolist() == text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lm_eval(served, checkpoint, stage, tmp_path, batch_size):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(checkpoint / "huggingface"))
    questions = write_tasks(tmp_path / "eval", checkpoint, stage, tokenizer)
    model = (f"base_url={served.url}/v1/completions,model=tiny,tokenizer={tmp_path / 'eval' / 'tokenizer'},"
             "tokenized_requests=True,max_length=128,num_concurrent=2")
    run("lm_eval", "--model", "local-completions", "--model_args", model, "--tasks", ",".join(TASKS), "--include_path",
        str(tmp_path / "eval" / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size",
        str(batch_size), HF_HOME=str(tmp_path / "home"), **OFFLINE)
    samples = {name: [json.loads(line) for line in next((tmp_path / "out").rglob(f"samples_{name}_*")).open()]
               for name in TASKS}
    kinds = set()
    for sample, question in zip(samples["tiny_choice"], questions, strict=True):
        context = tokenizer.encode(question["question"])
        for (found,), choice in zip(sample["resps"], question["choices"], strict=True):
            text = tokenizer.encode(question["question"] + choice)[len(context):]
            expected, greedy = log_likelihood(stage, context, text)
            assert float(found[0]) == pytest.approx(expected, abs=1e-4) and found[1] == str(greedy)
            kinds.add(greedy)
    assert kinds == {True, False}
    for sample, question in zip(samples["tiny_rolling"], questions, strict=True):
        text = tokenizer.encode(question["question"] + question["choices"][0])
        expected, _ = log_likelihood(stage, [tokenizer.bos], text)  # which lm-eval puts before each text
        assert float(sample["resps"][0][0]) == pytest.approx(expected, abs=1e-4)
    for sample, question in zip(samples["tiny_until"], questions, strict=True):
        asked = {"prompt": question["question"], "temperature": 0, "max_tokens": 8, "stop": ["\n\n"]}
        assert sample["resps"][0][0] == served.post("/v1/completions", asked).json["choices"][0]["text"]


# llm ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [(), ("--no-stream",)])
def test_llm(served, tmp_path, options):
    models = [f"- {{model_id: {name}, model_name: tiny, api_base: '{served.url}/v1'{more}}}"
              for name, more in (("chat", ""), ("base", ", completion: true"))]
    (tmp_path / "extra-openai-models.yaml").write_text("\n".join([*models, ""]))
    asked = {"temperature": 0, "max_tokens": 12}
    chat = served.post("/v1/chat/completions", asked | {"messages": [{"role": "user", "content": "what is it?"}]}).json
    base = served.post("/v1/completions", asked | {"prompt": "what is it?"}).json
    for name, expected in (("chat", chat["choices"][0]["message"]["content"]), ("base", base["choices"][0]["text"])):
        said = run("llm", "-m", name, *options, "-o", "temperature", "0", "-o", "max_tokens", "12", "--key", "none",
                   "what is it?", LLM_USER_PATH=str(tmp_path))
        assert said.rstrip("\n") == expected.rstrip("\n")
