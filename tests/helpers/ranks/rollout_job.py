"""Rollouts on the ranks of a training job, between two of its steps."""

import os
import sys
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from cases import Case
from job import FLOAT64, batch, make_batch, named, open_adapters, own_rows, spec_of, whole
from kept_memory import Watch

from megatron_deepseek.model.build import Precision, shape_whole
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.rl.rollout.engine import RolloutEngine, seed_of
from megatron_deepseek.rl.rollout.weights import parts_of
from megatron_deepseek.rl.samples import Sample
from megatron_deepseek.rl_settings import RolloutSettings
from megatron_deepseek.training.reading_rows import score_rows
from megatron_deepseek.training.trainer import Trainer

LENGTH, ENDS = 16, (1,)
PROMPTS = [(3, 14, 15), (9, 2, 6, 5, 3, 5, 8), (9, 7), (31,), (4, 6, 2, 6)]


@dataclass
class Seen:
    """What a rank saw: the samples of each rollout, what training says of their tokens, and the engine's layout.

    `weights`: this rank's parts of the engine's weights by name, with their places; `trained`: training's whole ones.
    `kept`: bytes that the engine holds after a rollout, and after it has let go of its memory. `written`: files that
    were opened to be written meanwhile.
    """

    rollouts: list[list[list[Sample]]]
    scores: list[list[list[list[float]]]]
    layout: Layout
    weights: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]
    trained: dict[str, torch.Tensor]
    kept: tuple[int, int]
    written: list[str]


def note_writes() -> list[str]:
    """The names of files that this process opens to write, from now on as long as it lives."""
    written: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if event == "open" and (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            written.append(str(args[0]))

    sys.addaudithook(hook)
    return written


def trainer_of(case: Case, precision: Precision = FLOAT64) -> Trainer:
    trainer = Trainer(spec_of(case, precision, LENGTH), build_meshes(case.layout, torch.device("cpu")))
    open_adapters(trainer)
    return trainer


def step(trainer: Trainer, case: Case, number: int) -> None:
    tokens, labels, mask = batch(case.model, case.global_batch_size, number, LENGTH)
    trainer.train_step(own_rows(make_batch(tokens, labels, mask), trainer.meshes), learning_rate=0.05, bias_rate=0.01)


def rollouts(case: Case, settings: RolloutSettings, precision: Precision = FLOAT64) -> Seen:
    """Two rollouts with the same weights and seeds, the second after others, and one after another step."""
    trainer = trainer_of(case, precision)
    step(trainer, case, 0)
    engine = RolloutEngine(trainer, settings, None, ENDS, LENGTH)
    seeds = [seed_of(1, 0, number) for number in range(len(PROMPTS))]
    written = note_writes()
    with Watch() as watch:
        _ = [each.local.detach() for parts in parts_of(trainer.stages).values() for each in parts]
        trained = watch.kept_bytes()  # what is there anyway, and of which the engine makes views too
        engine.refresh()
        made = [engine.generate(PROMPTS, seeds, settings, 1.0)]
        engine.generate([prompt[::-1] for prompt in PROMPTS[:3]], seeds[2:], replace(settings, group_size=1), 0.5)
        made.append(engine.generate(PROMPTS, seeds, settings, 1.0))
        before = watch.kept_bytes() - trained
        engine.release()
        kept = before, watch.kept_bytes() - trained
    scores = [score(trainer, groups) for groups in made]
    step(trainer, case, 2)
    engine.refresh()
    made.append(engine.generate(PROMPTS, seeds, settings, 1.0))
    trained = {name: whole(tensor) for how in ("named_parameters", "named_buffers")
               for (_, name), tensor in named(trainer, how)}
    return Seen(made, [*scores, score(trainer, made[-1])], engine.layout, moved(engine), trained, kept, written)


def score(trainer: Trainer, groups: list[list[Sample]]) -> list[list[list[float]]]:
    """log p of each token of each sample, by the training model."""
    rows = [(*sample.prompt, *sample.tokens) for group in groups for sample in group]
    found = iter(score_rows(trainer, rows))
    return [[next(found)[0][len(sample.prompt) - 1:] for sample in group] for group in groups]


def moved(engine: RolloutEngine) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """The engine's weights as they arrive, before they become what it computes with."""
    weights, build = engine.weights, engine.weights.trainer.spec.build
    stage = shape_whole(weights.config, weights.meshes, LENGTH, weights.dtype, build.lora)
    stage.to_empty(device="cpu")
    parts = parts_of([stage])
    weights.resharding.move(parts_of(weights.trainer.stages), parts)
    return {name: [(each.region.place, each.local.clone()) for each in of_name] for name, of_name in parts.items()}


def largest_difference(seen: Seen) -> float:
    """Between what the engine and training say of any token."""
    return max(abs(ours - theirs) for groups, scores in zip(seen.rollouts, seen.scores, strict=True)
               for group, expected in zip(groups, scores, strict=True)
               for sample, values in zip(group, expected, strict=True)
               for ours, theirs in zip(sample.log_probabilities, values, strict=True))


if __name__ == "__main__":  # of two ranks that torchrun starts
    dist.init_process_group("gloo")
    found = largest_difference(rollouts(Case(pp=2, schedule="1F1B", microbatches=2),
                                        RolloutSettings(group_size=2, max_tokens=4, tp=2)))
    assert found < 1e-9, found
    print(f"log-probabilities differ by at most {found:.1e}", flush=True)
