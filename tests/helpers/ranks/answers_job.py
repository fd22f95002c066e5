"""Answers of a small model on ranks of a layout, to be compared with those of one process."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from native_checkpoints import random_state, write_native
from safetensors.torch import save_file
from small_models import V3_SMALL

from megatron_deepseek.checkpoint.adapter.peft_config import peft_config
from megatron_deepseek.checkpoint.adapter.peft_files import CONFIG as ADAPTER_CONFIG
from megatron_deepseek.checkpoint.adapter.peft_files import MTP_WEIGHTS, PREFIX, WEIGHTS
from megatron_deepseek.inference.loaded_model import LoadedModel
from megatron_deepseek.inference.loading import LoadSettings, join_ranks, load_model
from megatron_deepseek.inference.model_files import open_model
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.model.architecture.adapters import LoraSettings, adapter_rows
from megatron_deepseek.parallel.layout import Layout

# Rows of kv_b_proj that two ranks share within a block of 128; columns that they share between blocks.
CONFIG = replace(V3_SMALL, num_nextn_predict_layers=1, max_position_embeddings=64, hidden_size=32,
                 num_attention_heads=4, v_head_dim=64, intermediate_size=256, moe_intermediate_size=128,
                 n_shared_experts=2)


def write_model(directory: Path) -> Path:
    """A checkpoint whose weights make lively text: nothing is near a tie."""
    weights = {name: 1 + 0.2 * tensor if name.endswith("norm.weight") else 0.15 * tensor
               for name, tensor in random_state(CONFIG).items() if name.startswith("model.")}
    weights["model.lm_head.weight"] *= 4
    return write_native(directory, weights, CONFIG)


def write_adapter(directory: Path) -> Path:
    """An adapter of every layer that can have one: MLA, MLPs, each expert, routers, the MTP module."""
    lora, generator = LoraSettings(2, 3.0, ("all", "router", "mtp")), torch.Generator().manual_seed(0)
    found = {f"{PREFIX}{tensor.name}": 0.2 * torch.randn(tensor.shape, generator=generator)
             for row in adapter_rows(CONFIG, lora) for expert in range(row.shape[0] if row.stacked else 1)
             for tensor in row.hf_tensors(expert)}
    of_mtp = {name for name in found if f".layers.{CONFIG.num_hidden_layers}." in name}
    directory.mkdir()
    save_file({name: tensor for name, tensor in found.items() if name not in of_mtp}, directory / WEIGHTS)
    save_file({name: found[name] for name in of_mtp}, directory / MTP_WEIGHTS)
    (directory / ADAPTER_CONFIG).write_text(json.dumps(peft_config(CONFIG, lora, "base")))
    return directory


def build(directory: Path, layout: Layout, mtp: bool = True, form: str = "plain", adapter: Path | None = None
          ) -> LoadedModel:
    files = open_model(directory, mtp=mtp, tokenizer=None)
    loaded = load_model(files, join_ranks(layout), LoadSettings(dtype=torch.float64, form=form, adapter=adapter,
                                                                double_quantization=form == "nf4"))
    return replace(loaded, eos_ids=(7,))


def answers(directory: Path, layout: Layout, jobs: list[tuple[list[list[int]], list[SamplingParameters]]],
            draft_tokens: int = 0, form: str = "plain", adapter: Path | None = None) -> list[list[list[Output]]]:
    """Of each of `jobs`, prompts and parameters, the answers on rank 0; other ranks have none."""
    settings = EngineSettings(max_length=64, block_size=4, token_budget=7, max_running=3, draft_tokens=draft_tokens)
    replicas = Replicas(build(directory, layout, draft_tokens > 0, form, adapter), settings)
    if not replicas.leads:
        replicas.follow()
        return []
    with replicas:
        return [replicas.generate(*job) for job in jobs]


def aborted(directory: Path, layout: Layout) -> tuple[list[str], int]:
    """Which requests finish when one of three is aborted after two steps, and how many blocks are used at the end."""
    replicas = Replicas(build(directory, layout), EngineSettings(max_length=64, block_size=4, prefix_sharing=False),
                        stream=True)
    if not replicas.leads:
        replicas.follow()
        return [], replicas.engine.statistics.blocks_used
    with replicas:
        for name in ("first", "second", "third"):
            replicas.add([1, 2, 3], SamplingParameters(max_tokens=6, temperature=0, ignore_eos=True), name)
        finished = []
        for step in range(20):
            if step == 2:
                replicas.abort("second")
            finished += [output.request_id for output in replicas.step() if output.finished]
        assert not replicas.has_work and dist.get_rank() == 0
        return sorted(finished), replicas.engine.statistics.blocks_used


def unseeded(directory: Path, layout: Layout) -> tuple[list[float], list[float]]:
    """The log-probabilities of an answer without a seed, and those of the same tokens as a prompt, on rank 0."""
    settings = EngineSettings(max_length=64, block_size=4, prefix_sharing=False)
    replicas = Replicas(build(directory, layout), settings)
    if not replicas.leads:
        replicas.follow()
        return [], []
    with replicas:
        parameters = SamplingParameters(max_tokens=12, temperature=1.5, logprobs=0, ignore_eos=True)
        ((answer,),) = replicas.generate([[5, 6, 7]], parameters)
        ((read,),) = replicas.generate([[5, 6, 7, *answer.tokens]], SamplingParameters(max_tokens=1, prompt_logprobs=0))
        return answer.log_probabilities, read.prompt_log_probabilities[3:]
