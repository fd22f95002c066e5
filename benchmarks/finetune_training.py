#!/usr/bin/env python3
"""Real tokens per second of fine-tuning on conversations of mixed lengths, beside a plain loop of transformers.

    python benchmarks/finetune_training.py

Both train the same random weights of transformers' DeepseekV3ForCausalLM (--model tiny without MTP) in float32 with
AdamW on one process of the CPU, on the same token ids and loss weights. Ours packs the conversations best fit into rows
of --seq-length; the loop pads --micro-batch-size conversations to the longest of them, as a data collator does. An
update has about the same number of conversations on both sides. Padding counts for nothing: tokens are those of the
conversations. The first epoch warms up, the second is measured. Processor seconds say more where other work runs.
The losses of all conversations before the first step must be equal to 1e-5.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
LEARNING_RATE = 1e-4

OURS = """
import json, sys, time
from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.finetuning.data import training_set
from megatron_deepseek.finetuning.loop import finetune
from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.training.trainer import Trainer
asked, steps, real = json.loads(sys.argv[1]), [], Trainer.train_step
settings = parse(asked["arguments"], 1, 1, build_finetuning_parser)
rows = Rows(prepare(training_set(settings), lambda _: None))
samples = [[each.tolist() for each in rows.sample(0, number)] for number in range(rows.samples_per_epoch)]
with open(asked["samples"], "w") as file:
    json.dump(samples, file)
def timed(*args, **more):
    began = time.perf_counter(), time.process_time()
    result = real(*args, **more)
    steps.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return result
Trainer.train_step = timed
finetune(settings)
half = steps[len(steps) // 2:]
print(json.dumps({"seconds": sum(each[0] for each in half), "cpu": sum(each[1] for each in half), "steps": len(half),
                  "tokens": rows.tokens_per_epoch}))
"""
THEIRS = """
import json, random, sys, time
import torch
from transformers import AutoModelForCausalLM
asked = json.loads(sys.argv[1])
torch.set_num_threads(asked["threads"])
with open(asked["samples"]) as file:
    samples = json.load(file)
model = AutoModelForCausalLM.from_pretrained(asked["weights"], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=asked["lr"], betas=(0.9, 0.95), weight_decay=0.1)
def padded(batch):
    longest = max(len(ids) for ids, _ in batch)
    ids, labels, mask = (torch.full((len(batch), longest), fill) for fill in (0, -100, 0))
    for row, (own, weights) in enumerate(batch):
        ids[row, :len(own)], mask[row, :len(own)] = torch.tensor(own), 1
        labels[row, :len(own)] = torch.where(torch.tensor(weights) > 0, torch.tensor(own), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
def micro_batches(chosen):
    return [padded(chosen[at:at + asked["micro"]]) for at in range(0, len(chosen), asked["micro"])]
def labels_of(batch):
    return int((batch["labels"][:, 1:] >= 0).sum())
with torch.no_grad():
    batches = micro_batches(samples)
    loss = sum(model(**each).loss.item() * labels_of(each) for each in batches) / sum(map(labels_of, batches))
for epoch in range(2):
    random.Random(epoch).shuffle(samples)
    began, size = (time.perf_counter(), time.process_time()), -(-len(samples) // asked["steps"])
    for at in range(0, len(samples), size):
        batches = micro_batches(samples[at:at + size])
        total = sum(map(labels_of, batches))
        for each in batches:
            (model(**each).loss * (labels_of(each) / total)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
print(json.dumps({"seconds": time.perf_counter() - began[0], "cpu": time.process_time() - began[1], "loss": loss}))
"""


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_weights(folder / "weights")
        write_chats(folder / "chats.jsonl", args.rows, args.seq_length)
        write_chats(folder / "held_out.jsonl", 2, args.seq_length, seed=1)
        samples, environment = str(folder / "samples.json"), {"OMP_NUM_THREADS": str(args.threads)}
        ours = run(OURS, {"arguments": arguments(folder, args), "samples": samples}, environment)
        theirs = run(THEIRS, {"samples": samples, "weights": str(folder / "weights"), "lr": LEARNING_RATE,
                              "micro": args.micro_batch_size, "steps": ours["steps"], "threads": args.threads},
                     environment)
        ours["loss"] = loss_before(folder, args, environment)
    for side, found in (("packed, ours", ours), ("padded, transformers", theirs)):
        print(f"{side:22s} {ours['tokens'] / found['seconds']:8,.0f} tokens/s, {ours['tokens'] / found['cpu']:8,.0f} "
              f"per processor second; loss before training {found['loss']:.6f}")
    print(f"{theirs['seconds'] / ours['seconds']:.2f} times as fast, {theirs['cpu'] / ours['cpu']:.2f} by processor "
          "time")
    if abs(ours["loss"] - theirs["loss"]) > 1e-5:
        sys.exit("the losses differ by more than 1e-5")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400, help="conversations (400)")
    parser.add_argument("--seq-length", type=int, default=512, help="of packed rows, and of a conversation (512)")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="conversations that are padded together (8)")
    parser.add_argument("--global-batch-size", type=int, default=8, help="packed rows in an update (8)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    return parser.parse_args()


def make_weights(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    sys.path.insert(0, str(REPOSITORY))
    from megatron_deepseek.model.architecture.presets import load_config

    torch.manual_seed(0)
    fields = load_config("tiny").to_hf_dict() | {"num_nextn_predict_layers": 0, "vocab_size": 512}
    AutoModelForCausalLM.from_config(DeepseekV3Config(**fields)).save_pretrained(directory)


def write_chats(path: Path, count: int, longest: int, seed: int = 0) -> None:
    """Write conversations of log-normal length, half of whose bytes are the answer."""
    numbers = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            half = min(int(numbers.lognormvariate(4.0, 0.8)) + 1, longest // 2 - 4)
            texts = ("".join(numbers.choices("abcdefgh ", k=half - 1)) + "." for _ in range(2))
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in
                                                zip(("user", "assistant"), texts)]}) + "\n")


def arguments(folder: Path, args: argparse.Namespace) -> list[str]:
    return ["--model", str(folder / "weights"), "--load", str(folder / "weights"), "--mtp-num-layers", "0",
            "--dataset", str(folder / "chats.jsonl"), "--tokenizer-type", "ByteTokenizer", "--template", "deepseek-v3",
            "--seq-length", str(args.seq_length), "--micro-batch-size", "1", "--global-batch-size",
            str(args.global_batch_size), "--lr", str(LEARNING_RATE), "--lr-decay-style", "constant", "--epochs", "2",
            "--moe-router-load-balancing-type", "none", "--data-cache-path", str(folder / "cache")]


def loss_before(folder: Path, args: argparse.Namespace, environment: dict[str, str]) -> float:
    """Return our loss of all conversations with the weights as they are, as a held-out set of a run of no length."""
    swapped = ["--dataset", str(folder / "held_out.jsonl"), "--eval-dataset", str(folder / "chats.jsonl"), "--lr", "0",
               "--train-iters", "1", "--save", str(folder / "run")]
    kept = arguments(folder, args)
    at = kept.index("--epochs")
    subprocess.run([sys.executable, str(REPOSITORY / "finetune_deepseek.py"), *kept[:at], *kept[at + 2:], *swapped],
                   check=True, env=ENVIRONMENT | environment, stdout=subprocess.DEVNULL)
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return next(record["eval_loss"] for record in records if "eval_loss" in record)


def run(code: str, asked: dict, environment: dict[str, str]) -> dict:
    done = subprocess.run([sys.executable, "-c", code, json.dumps(asked)], env=ENVIRONMENT | environment, text=True,
                          stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
