"""Checkpoints that other engines are to serve: a few steps of the real trainer, in several layouts, on spread weights."""

from dataclasses import dataclass
from pathlib import Path

from workshop import Workshop

LAYOUTS = {
    "tp2 ep2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2".split()),
    "pp2 dp2 ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2".split()),
}
_STEPS = "--train-iters 2 --eval-iters 0 --lr 1e-3 --seq-length 64".split()


@dataclass(frozen=True)
class Trained:
    """A run: its checkpoints, and what --save-hf made of the last."""

    native: Path
    exported: Path


def train_from(workshop: Workshop, model: Path, layout: str, *more: str) -> Trained:
    """Train a few steps in `layout`, from a Hugging Face directory with a tokenizer."""
    num_ranks, words = LAYOUTS[layout]
    name = f"{model.name} {layout}".replace(" ", "_")
    exported = workshop.directory / f"{name}-hf"
    workshop.train(num_ranks, name, "--model", str(model), "--load", str(model), "--tokenizer-type",
                   "HuggingFaceTokenizer", "--tokenizer-model", str(model / "tokenizer.json"), *_STEPS, *words,
                   "--save-hf", str(exported), *more)
    return Trained(workshop.directory / name, exported)
