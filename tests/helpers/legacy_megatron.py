"""Directories of Megatron-LM's `--ckpt-format torch`, written rank by rank from a model's whole weights.

What a rank holds follows megatron-core 0.16's modules: VocabParallelEmbedding and ColumnParallelLinear divide rows,
RowParallelLinear columns; of SwiGLU's first layer each rank has gate's rows, then up's (MLP.sharded_state_dict);
experts are SequentialMLP's, TEGroupedMLP's or GroupedMLP's (transformer/moe/experts.py).
"""

import argparse
import enum
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_deepseek.checkpoint.convert.megatron import megatron_places
from megatron_deepseek.model.architecture.config import ModelConfig

COLUMN = ("linear_q_proj.weight", "linear_q_up_proj.weight", "linear_kv_up_proj.weight", "linear_qkv.weight",
          "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight", "eh_proj.weight")
ROW = ("linear_proj.weight", "linear_fc2.weight")
SEQUENTIAL, TE_GROUPED, GROUPED = "local_experts", "TEGroupedMLP", "GroupedMLP"


class ModelType(enum.Enum):
    """As megatron.core.enums has one, of which the arguments hold a member."""

    encoder_or_decoder = 1


@dataclass(frozen=True)
class Job:
    """How a job divides the model: sizes, and for each stage in order the layers (None: the MTP module)."""

    stages: tuple[tuple[int | None, ...], ...]
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    experts: str = TE_GROUPED

    def pairs(self) -> list[tuple[int, int]]:
        """The (tensor, expert) ranks that there are: those of ranks 0, 1 ... of a stage until all come again."""
        etp = self.etp or self.tp
        return sorted({(rank % self.tp, rank // etp % self.ep) for rank in range(self.tp * self.ep * etp)})


def wholes_of(config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under megatron-core's names, layers by layer, experts stacked."""
    state: dict[str, torch.Tensor] = {}
    for place in megatron_places(config, frozenset({"decoder.layers.0."})):
        whole = state.setdefault(place.whole, torch.zeros(place.whole_shape, dtype=weights[place.name].dtype))
        done = 0
        for region in place.regions():
            part = whole[tuple(slice(a, a + n) for a, n in zip(region.place, region.shape))]
            rows = part.shape[place.axis] if place.shape else 1
            part.copy_(weights[place.name][done:done + rows].view(part.shape))
            done += rows
    return state


def write_legacy(root: Path, config: ModelConfig, weights: dict[str, torch.Tensor], job: Job, padded: int = 0) -> Path:
    """Write iteration 100 under `root`, `padded` rows below the vocabulary's."""
    wholes = wholes_of(config, weights)
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & wholes.keys():
        wholes[name] = torch.nn.functional.pad(wholes[name], (0, 0, 0, padded))
    arguments = argparse.Namespace(
        tensor_model_parallel_size=job.tp, pipeline_model_parallel_size=job.pp, expert_model_parallel_size=job.ep,
        expert_tensor_parallel_size=job.etp or job.tp, model_type=ModelType.encoder_or_decoder,
        params_dtype=torch.bfloat16, activation_func=torch.nn.functional.silu, consumed_train_samples=1 << 70)
    for p in range(job.pp):
        for t, e in job.pairs():
            chunks = [rank_state(wholes, config, job, stage, t, e) for stage in range(p, len(job.stages), job.pp)]
            models = {"model": chunks[0]} if len(chunks) == 1 else {f"model{n}": each for n, each in enumerate(chunks)}
            name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (job.pp > 1) + f"_{e:03d}" * (job.ep > 1)
            folder = root / "iter_0000100" / name
            folder.mkdir(parents=True)
            torch.save({"args": arguments, "checkpoint_version": 3.0, "iteration": 100, **models,
                        "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
                        "rng_state": [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}]},
                       folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("100")
    return root


def rank_state(wholes: dict[str, torch.Tensor], config: ModelConfig, job: Job, stage: int, t: int, e: int) -> dict:
    """What the module of a stage says in its state_dict on the tensor rank `t` and expert rank `e`."""
    state = torch.nn.Module().state_dict()  # an OrderedDict with _metadata
    first, last = stage == 0, stage == len(job.stages) - 1
    layers = [layer for layer in job.stages[stage] if layer is not None]
    for name, whole in wholes.items():
        head, _, rest = name.partition(".layers.")
        if head == "decoder":
            layer, _, rest = rest.partition(".")
            if int(layer) not in layers:
                continue
            name = f"decoder.layers.{layers.index(int(layer))}.{rest}"
        elif not {"embedding.": first or (last and None in job.stages[stage]), "mtp.": None in job.stages[stage]}.get(
                name.split(".")[0] + ".", last):
            continue
        if ".experts." in name:
            state |= expert_state(name, whole, config, job, t, e)
        else:
            state[name] = shard(name, whole, job.tp, t)
    state["output_layer._extra_state" if last else "decoder._extra_state"] = None
    if last and len(job.stages) > 1 and config.tie_word_embeddings:
        embedding = wholes["embedding.word_embeddings.weight"]
        state["output_layer.weight"] = shard("output_layer.weight", embedding, job.tp, t)
    return state


def shard(name: str, whole: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    dim = 0 if name.endswith(COLUMN) else 1 if name.endswith(ROW) else None
    return whole.clone() if dim is None else whole.chunk(ranks, dim)[rank].clone()


def expert_state(name: str, stack: torch.Tensor, config: ModelConfig, job: Job, t: int, e: int) -> dict:
    """The experts of a rank, from the stack [E, ...] of linear_fc1 or linear_fc2."""
    ranks = job.etp or job.tp
    mine = [shard(name, each, ranks, t % ranks) for each in stack.chunk(job.ep)[e]]
    before, _, layer = name.partition("experts.experts.")
    if job.experts == SEQUENTIAL:
        return {f"{before}experts.local_experts.{n}.{layer}": each for n, each in enumerate(mine)}
    if job.experts == TE_GROUPED:
        return {f"{before}experts.{layer}{n}": each for n, each in enumerate(mine)} | {
            f"{before}experts.{layer.removesuffix('weight')}_extra_state": torch.ones(1)}
    turned = torch.stack([each.T for each in mine])  # [E, H, 2 I], [E, I, H]
    return {f"{before}experts.weight1": turned.reshape(config.hidden_size, -1)} if "fc1" in layer else {
        f"{before}experts.weight2": turned.reshape(-1, config.hidden_size)}
