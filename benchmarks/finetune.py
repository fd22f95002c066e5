#!/usr/bin/env python3
"""Samples per second of fine-tuning's data, from files to packed rows, beside TRL's preparation of the same rows.

    python benchmarks/finetune.py --tokenizer-model DIRECTORY --trl-python VENV/bin/python

The rows are made up: conversations of 1 to 3 exchanges with reasoning within the content, words of log-normal number,
about 350 tokens each. Both sides render with the template of DeepSeek-V3, tokenise with the same tokenizer.json in
--workers processes, and pack best fit into rows of --seq-length. Time begins after imports, with the file on disk and
no cache, and ends when the first row could be read; ours writes the dataset and the loss weights, TRL makes no mask
(assistant_only_loss False), which is the faster way for it. Seconds of processor time, of all processes together, say
more where other work runs. TRL is not installed here: --trl-python is the interpreter of a virtual environment that has
it; without that its half is left out. The numbers of tokens must be equal.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_deepseek.checkpoint.convert.chat_templates import read_template  # noqa: E402

CLOCK = """
import json, os, resource, sys, time
def cpu():
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
asked = json.loads(sys.argv[1])
"""
OURS = CLOCK + """
from megatron_deepseek.finetuning.plan import plan_epoch
from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.finetuning.settings import DataSettings
settings = DataSettings((asked["file"],), tokenizer_model=asked["tokenizer"], template="deepseek-v3",
                        seq_length=asked["seq_length"], num_workers=asked["workers"], data_cache_path=asked["folder"])
start, began = time.perf_counter(), cpu()
prepared = prepare(settings, lambda _: None)
plan = plan_epoch(prepared)
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": cpu() - began, "tokens": prepared.total.tokens,
                  "rows": plan.num_rows, "megabytes": max(resource.getrusage(each).ru_maxrss for each in (
                      resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024}))
"""
TRL = CLOCK + """
os.environ["HF_HOME"] = asked["folder"] + "/hf"
from datasets import load_dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
tokenizer = PreTrainedTokenizerFast.from_pretrained(asked["tokenizer"])
tokenizer.chat_template = asked["template"]
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=1))
config = SFTConfig(asked["folder"] + "/out", dataset_num_proc=asked["workers"], max_length=asked["seq_length"],
                   packing=True, use_cpu=True, bf16=False, report_to=[])
start, began = time.perf_counter(), cpu()
rows = load_dataset("json", data_files=asked["file"], split="train")
trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
done = trainer.train_dataset
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": cpu() - began, "rows": len(done),
                  "tokens": sum(map(len, done["input_ids"])), "megabytes": max(resource.getrusage(each).ru_maxrss for
                      each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024}))
"""


def write_rows(path: Path, count: int):
    numbers = random.Random(0)
    words = (REPOSITORY / "README.md").read_text().split()

    def text(mean: float) -> str:
        return " ".join(numbers.choices(words, k=int(numbers.lognormvariate(mean, 0.8)) + 1))

    with open(path, "w") as file:
        for _ in range(count):
            messages = [{"role": "system", "content": "You are a helpful assistant."}]
            for _ in range(numbers.choice((1, 1, 1, 2, 3))):
                messages += [{"role": "user", "content": text(3.2)},
                             {"role": "assistant", "content": f"<think>\n{text(4)}\n</think>\n\n{text(3.5)}"}]
            file.write(json.dumps({"messages": messages}) + "\n")


def run(python: str, code: str, asked: dict) -> dict:
    done = subprocess.run([python, "-c", code, json.dumps(asked)], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer-model", required=True, help="a directory with DeepSeek's tokenizer.json")
    parser.add_argument("--trl-python", help="the interpreter of a virtual environment that has trl")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, arguments.rows)
        sides = [("ours", sys.executable, OURS)] + [("TRL", arguments.trl_python, TRL)] * bool(arguments.trl_python)
        for name, python, code in sides:
            found = [run(python, code, {
                "file": str(path), "tokenizer": str(Path(arguments.tokenizer_model).resolve()), "workers":
                arguments.workers, "seq_length": arguments.seq_length, "template": read_template("deepseek-v3"),
                "folder": f"{folder}/{name}{number}"}) for number in range(arguments.rounds)]
            best = min(found, key=lambda each: each["seconds"])
            cpu = min(each["cpu"] for each in found)
            print(f"{name:5} {arguments.rows / best['seconds']:8,.0f} samples/s, {arguments.rows / cpu:8,.0f} a second "
                  f"of processor time, {best['tokens']:,} tokens, {best['rows']:,} rows, "
                  f"largest process {best['megabytes']:,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
