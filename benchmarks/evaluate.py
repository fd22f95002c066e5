#!/usr/bin/env python3
"""Log-likelihoods of choices: this project's engine beside lm-eval's `hf` model, on the same weights and questions.

    python benchmarks/evaluate.py --folder DIR          with a Python that has lm-eval[hf] too (make test-clients has)

The model is that of benchmarks/generate.py (330 million parameters, V3's head sizes, random weights, float32). Each of
--questions has a context of its own, of --context random tokens, the first --shared of which all have (as examples
before a question), and --choices texts of --choice-tokens. Each engine is a process of its own with one thread, and the
time is that of the processor, which a busy machine changes little; loading is not counted. The numbers must agree.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "generate_pieces")]

Pair = tuple[list[int], list[int]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--choice-tokens", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8, help="of hf")
    parser.add_argument("--block-size", type=int, default=4, help="of ours")
    parser.add_argument("--engine", choices=("ours", "hf"), help=argparse.SUPPRESS)
    return parser.parse_args()


def pairs(args: argparse.Namespace, vocab_size: int) -> list[Pair]:
    """Return a context and a text for each choice of each question."""
    draw = random.Random(0)

    def tokens(number: int) -> list[int]:
        return [draw.randrange(300, vocab_size) for _ in range(number)]

    common, found = tokens(args.shared), []
    for _ in range(args.questions):
        context = common + tokens(args.context - args.shared)
        found += [(context, tokens(args.choice_tokens)) for _ in range(args.choices)]
    return found


def ours(directory: Path, asked: list[Pair], args: argparse.Namespace) -> tuple[float, list[float]]:
    from megatron_deepseek.evaluation.engine_model import EngineModel
    from megatron_deepseek.evaluation.questions import Continuation
    from megatron_deepseek.inference.loading import join_ranks, load_model
    from megatron_deepseek.inference.model_files import open_model
    from megatron_deepseek.inference.replicas import Replicas
    from megatron_deepseek.inference.settings import EngineSettings
    loaded = load_model(open_model(directory, tokenizer=None), join_ranks())
    model = EngineModel(Replicas(loaded, EngineSettings(1024, block_size=args.block_size)))
    questions = [Continuation(tuple(context), tuple(text)) for context, text in asked]
    dict(model.answers(questions[:1]))
    begin = time.process_time()
    found = dict(model.answers(questions))
    return time.process_time() - begin, [found[number].log_probability for number in range(len(questions))]


def hf(directory: Path, asked: list[Pair], args: argparse.Namespace) -> tuple[float, list[float]]:
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=args.batch_size)
    requests = [(("", str(number)), context, text) for number, (context, text) in enumerate(asked)]
    model._loglikelihood_tokens(requests[:1], disable_tqdm=True)
    begin = time.process_time()
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return time.process_time() - begin, [value for value, _ in found]


def measure(engine: str) -> tuple[float, list[float]]:
    """Return the seconds and the numbers of one engine, in a process of its own."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    words = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
    done = subprocess.run(words, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{engine} failed: {done.stderr}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    args = arguments()
    import torch
    from model import CONFIG, write
    directory = write(args.folder / "float32", torch.float32)
    if args.engine:
        torch.set_num_threads(1)
        print(json.dumps({"ours": ours, "hf": hf}[args.engine](directory, pairs(args, CONFIG.vocab_size), args)))
        return
    found = {engine: measure(engine) for engine in ("ours", "hf")}
    apart = max(abs(one - other) for one, other in zip(found["ours"][1], found["hf"][1], strict=True))
    requests = args.questions * args.choices
    for engine, (seconds, _) in found.items():
        print(f"{engine:>5}  {seconds:8.2f} s of the processor, {requests / seconds:8.2f} requests a second")
    print(f"ours is {found['hf'][0] / found['ours'][0]:.2f} times as fast; the sums differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
