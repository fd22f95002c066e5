"""Checkpoints that other engines are to serve: a few steps of the real trainer, in several layouts."""

from pathlib import Path

from workshop import Workshop

LAYOUTS = {
    "tp2-ep2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2".split()),
    "pp2-dp2-ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2".split()),
}
_STEPS = "--train-iters 2 --eval-iters 0 --seq-length 64".split()


def train_from(workshop: Workshop, model: Path, layout: str, *more: str) -> Path:
    """Train a few steps in `layout`, from a Hugging Face directory with a tokenizer; return the checkpoints."""
    num_ranks, words = LAYOUTS[layout]
    workshop.train(num_ranks, f"{model.name}-{layout}", "--model", str(model), "--load", str(model),
                   "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model / "tokenizer.json"),
                   *_STEPS, *words, *more)
    return workshop.directory / f"{model.name}-{layout}"
