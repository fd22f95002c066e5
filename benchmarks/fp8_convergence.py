"""FP8 against BF16 against float32: one small DeepSeek-V3 trained three times on the same real text.

    python benchmarks/fp8_convergence.py --corpus prose.jsonl.gz [--steps 600] [--run-dir runs/fp8] [--only fp8]

The three runs start from the same weights and read the same batches; they differ only in the precision of their GEMMs.
On CPU FP8 is emulated (ops/fp8/encoding.py), which costs time but changes nothing. An interrupted run continues from
its last checkpoint, and a complete one is not repeated, so the command may be given again until all are complete.

RUN_DIR/comparison.json and comparison.png, with the losses over each other and their relative difference, are written
also before all runs are complete.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_deepseek.cli.plot import COLORS, Curves, read_curves, smooth

REPOSITORY = Path(__file__).resolve().parents[1]
PRECISIONS = {"fp32": (), "bf16": ("--bf16",), "fp8": ("--bf16", "--fp8-format", "e4m3")}
LABELS = {"fp32": "float32", "bf16": "BF16", "fp8": "FP8 over BF16"}
VOCABULARY = 4096
MODEL = ("--model tiny --num-layers 3 --mtp-num-layers 0 --vocab-size 4096 --hidden-size 256 --ffn-hidden-size 768 "
         "--q-lora-rank 128 --kv-lora-rank 128 --qk-head-dim 64 --qk-pos-emb-head-dim 32 --v-head-dim 64 "
         "--moe-ffn-hidden-size 256 --num-experts 8 --moe-router-topk 2").split()
TRAINING = ("--seq-length 256 --micro-batch-size 8 --global-batch-size 8 --lr 2e-3 --min-lr 2e-4 "
            "--lr-decay-style cosine --lr-warmup-fraction 0.05 --split 95,5,0 --eval-interval 100 --eval-iters 8 "
            "--save-interval 10").split()
WINDOW = 25  # steps whose losses are averaged before they are compared


def main() -> None:
    args = parse_arguments()
    prefix, tokenizer = prepare(args.corpus, args.run_dir / "data")
    for name in args.only or PRECISIONS:
        train(name, args.run_dir / name, args.steps, prefix, tokenizer)
    report(args.run_dir)


def report(run_dir: Path) -> None:
    """Compare the runs up to the step that all three have reached."""
    files = {name: run_dir / name / "metrics.jsonl" for name in PRECISIONS}
    missing = [name for name, path in files.items() if not path.exists()]
    if missing:
        return print(f"no comparison yet: {', '.join(missing)} did not begin")
    runs = {name: read_curves(path, LABELS[name]) for name, path in files.items()}
    steps = min(len(run.iteration) for run in runs.values())
    runs = {name: cut(run, steps) for name, run in runs.items()}
    figures = compare(runs)
    (run_dir / "comparison.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(runs, run_dir / "comparison.png")
    print(json.dumps(figures, indent=2))


def cut(run: Curves, steps: int) -> Curves:
    """Return the first steps of a run and its validations among them."""
    seen = run.validation_iteration <= steps
    return replace(run, iteration=run.iteration[:steps], lm_loss=run.lm_loss[:steps],
                   validation_iteration=run.validation_iteration[seen], validation_lm_loss=run.validation_lm_loss[seen])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL (or .gz) with a field text")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/fp8"), help="where everything goes (runs/fp8)")
    parser.add_argument("--steps", type=int, default=600, help="iterations of each run (600)")
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, help="go on with these runs alone (all)")
    return parser.parse_args()


def prepare(corpus: Path, directory: Path) -> tuple[Path, Path]:
    """Return the prefix of the dataset and its tokenizer, which are made once."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix, tokenizer = directory / "corpus", directory / "tokenizer.json"
    if not tokenizer.exists():
        call("tools/train_tokenizer.py", "--input", corpus, "--output", tokenizer, "--vocab-size", VOCABULARY)
    if not (directory / "corpus_text_document.idx").exists():
        call("tools/preprocess_data.py", "--input", corpus, "--output-prefix", prefix, "--tokenizer-type",
             "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod", "--workers", 1)
    return directory / "corpus_text_document", tokenizer


def train(name: str, directory: Path, steps: int, prefix: Path, tokenizer: Path) -> None:
    metrics = directory / "metrics.jsonl"
    if metrics.exists() and f'"iteration": {steps},' in metrics.read_text() and \
            (directory / f"iter_{steps:07d}").exists():
        return
    call("pretrain_deepseek.py", *MODEL, *TRAINING, *PRECISIONS[name], "--train-iters", steps, "--data-path", prefix,
         "--data-cache-path", prefix.parent / "cache", "--tokenizer-model", tokenizer, "--save", directory, "--load",
         directory)


def call(script: str, *arguments) -> None:
    """Run a command as a single process. torchrun would start another one, and wait for it."""
    environ = {"PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"} | os.environ
    result = subprocess.run([sys.executable, str(REPOSITORY / script), *map(str, arguments)], env=environ)
    if result.returncode:
        sys.exit(f"fp8_convergence.py: error: {script} ended with status {result.returncode}")


def difference(run: Curves, reference: Curves) -> np.ndarray:
    """Return the relative difference of the losses, means over WINDOW steps, in percent."""
    return 100 * (smooth(run.lm_loss, WINDOW) / smooth(reference.lm_loss, WINDOW) - 1)


def compare(runs: dict[str, Curves]) -> dict:
    tail = slice(-WINDOW, None)
    pairs = (("fp8", "bf16"), ("fp8", "fp32"), ("bf16", "fp32"))
    return {
        "steps": len(runs["fp8"].iteration), "model": " ".join(MODEL), "training": " ".join(TRAINING), "window": WINDOW,
        "last_training_loss": {name: run.lm_loss[tail].mean() for name, run in runs.items()},
        "last_validation_loss": {name: run.validation_lm_loss[-1] for name, run in runs.items()},
        "training_difference_percent": {f"{a} to {b}": 100 * (
            runs[a].lm_loss[tail].mean() / runs[b].lm_loss[tail].mean() - 1) for a, b in pairs},
        "validation_difference_percent": {f"{a} to {b}": 100 * (
            runs[a].validation_lm_loss[-1] / runs[b].validation_lm_loss[-1] - 1) for a, b in pairs},
        "largest_difference_percent": {f"{a} to {b}": np.abs(difference(runs[a], runs[b])).max() for a, b in pairs},
    }


def draw(runs: dict[str, Curves], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, differences) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 6.5), height_ratios=(3, 2), layout="constrained")
    for (name, run), color in zip(runs.items(), COLORS):
        losses.plot(run.iteration, smooth(run.lm_loss, WINDOW), color=color, linewidth=1.6, label=run.label)
        losses.plot(run.validation_iteration, run.validation_lm_loss, "o", color=color, markersize=5,
                    markeredgecolor="white", label=f"{run.label}, validation")
    for (a, b), color in zip((("fp8", "bf16"), ("bf16", "fp32")), (COLORS[3], COLORS[4])):
        differences.plot(runs[a].iteration, difference(runs[a], runs[b]), color=color, linewidth=1.6,
                         label=f"{LABELS[a]} to {LABELS[b]}")
    differences.axhline(0, color="black", linewidth=0.8)
    for bound in (-0.25, 0.25):
        differences.axhline(bound, color="gray", linewidth=0.8, linestyle="--")
    losses.set_ylabel("loss (nats per token)")
    losses.set_title(f"The same model and batches in three precisions, means of {WINDOW} steps")
    differences.set_ylabel("relative difference\nof the loss (%)")
    differences.set_xlabel("iteration; dashed: the 0.25 % that DeepSeek reports")
    for axes in (losses, differences):
        axes.legend(frameon=False, fontsize="small")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
