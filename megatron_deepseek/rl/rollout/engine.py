"""The engine of rollouts: completions of prompts by the weights that are being trained, on the ranks of the job.

    engine = RolloutEngine(trainer, rollout, tokenizer, ends=(tokenizer.eod,), max_length=4096)
    engine.refresh()                                       # after each update
    groups = engine.generate(prompts, seeds, rollout, 1.0)  # on all ranks, with the same arguments
    engine.release()                                       # its memory is training's again

Replicas of the engine (its data ranks) each answer their share of the prompts; they know it from the beginning, so that
nothing is asked for on the way. Where they share experts they step together until all are done. The completions of a
prompt are one request, and share the blocks of its cache.

A sample depends on the weights, the prompts and the seeds, and on nothing that was sampled before: a refresh makes a
new engine, and each rollout begins with an empty cache.
"""

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.inference.engine import Engine
from megatron_deepseek.inference.loaded_model import LoadedModel
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.parallel.sums import sum_numbers
from megatron_deepseek.rl.rollout.gathering import gather_samples
from megatron_deepseek.rl.rollout.layout import engine_layout
from megatron_deepseek.rl.rollout.weights import EngineWeights
from megatron_deepseek.rl.samples import Sample
from megatron_deepseek.rl_settings import RolloutSettings
from megatron_deepseek.training.trainer import Trainer

MAX_RUNNING = 256  # completions that a replica has on the way
TOKEN_BUDGET = 1024  # of one forward


class RolloutEngine:
    """Answers on all ranks of a trainer's job; every rank makes one and calls it in the same order.

    `ends`: the ids that end a completion. `max_length`: of a prompt with its completion, in tokens. Between `release`
    and `refresh` it holds neither weights nor a cache. Raise ValueError for sizes that the model or the ranks cannot
    have.
    """

    def __init__(self, trainer: Trainer, rollout: RolloutSettings, tokenizer: Tokenizer | None, ends: Sequence[int],
                 max_length: int):
        self.layout = engine_layout(trainer.spec.model, trainer.meshes.layout, rollout)
        self.weights = EngineWeights(trainer, self.layout, max_length)
        self.tokenizer, self.ends = tokenizer, tuple(ends)
        self.settings = EngineSettings(max_length=max_length, max_running=MAX_RUNNING, token_budget=TOKEN_BUDGET)
        self._engine: Engine | None = None

    def refresh(self) -> None:
        """Take the trainer's weights as they are now; the copy that there was is freed first."""
        self.release()
        weights = self.weights
        model = LoadedModel(weights.load(), weights.config, weights.meshes, weights.meshes.device, weights.dtype,
                            self.tokenizer, self.ends)
        self._engine = Engine(model, self.settings, lockstep=self.layout.shares_experts)

    def release(self) -> None:
        """Free the weights and the cache."""
        self._engine = None
        gc.collect()  # DTensors that parameters have been refer to themselves, and would be freed at some time only

    def generate(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], rollout: RolloutSettings,
                 temperature: float) -> list[list[Sample]]:
        """Return the group of each prompt, `rollout.group_size` samples, the same on every rank.

        `seeds` has one for each prompt (`seed_of`). Raise ValueError, before anything is computed, for a prompt that
        does not fit.
        """
        assert self._engine is not None, "refresh the engine before a rollout"
        engine, replica = self._engine, self.weights.meshes.rank("dp")
        parameters = sampling_of(rollout, temperature)
        for prompt in prompts:
            engine.check(prompt, parameters)
        engine.pool.forget()
        mine = range(replica, len(prompts), self.layout.dp)
        names = {engine.add(prompts[group], replace(parameters, seed=seeds[group])): group for group in mine}
        own = {(names[output.request_id], output.index): output for output in self._until_done(engine)}
        speaks = self.weights.meshes.rank("tp") == 0
        samples = {key: _sample(key[0], output) for key, output in own.items() if speaks}
        return gather_samples(samples, len(prompts))

    def _until_done(self, engine: Engine) -> list[Output]:
        """Return all answers of this replica. Ranks that step together leave together."""
        finished: list[Output] = []
        while self._work_left(engine):
            finished += engine.step_to_ends()
        return finished

    def _work_left(self, engine: Engine) -> bool:
        """Return whether this rank has to make another step."""
        if not engine.lockstep:
            return engine.has_work
        (ranks,) = sum_numbers([engine.has_work], self.weights.meshes.device)
        return ranks > 0


def sampling_of(rollout: RolloutSettings, temperature: float) -> SamplingParameters:
    """Return what the engine is asked for, without a seed. Raise ValueError for a number out of its bounds."""
    return SamplingParameters(max_tokens=rollout.max_tokens, temperature=temperature, top_p=rollout.top_p,
                              top_k=rollout.top_k, min_p=rollout.min_p, stop=rollout.stop, n=rollout.group_size,
                              drawn_logprobs=True, kept_ids=rollout.keep_sampling_mask,
                              chosen_experts=rollout.keep_routing)


def seed_of(seed: int, rollout: int, number: int) -> int:
    """Return the seed of prompt `number` of a rollout, all counted in the run whose seed is given: 63 bits."""
    digest = hashlib.blake2b(f"rollout:{seed}:{rollout}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _sample(group: int, output: Output) -> Sample:
    every = torch.empty(0, dtype=torch.int32)  # what stands for all ids
    kept_ids = None if output.kept_ids is None else tuple(every if ids is None else ids for ids in output.kept_ids)
    return Sample(group, output.prompt, tuple(output.tokens), output.text or "", output.finish_reason,
                  tuple(output.drawn_log_probabilities), output.chosen_experts, kept_ids)
