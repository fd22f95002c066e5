"""Calculated memory of weights, gradients and moments, against the shards that training makes and V3's own numbers."""

import dataclasses

import pytest
import torch
from random_base import RandomBase
from small_models import random_batch, training_batch
from torch_versions import keeps_bytes

from megatron_deepseek.arguments import parse
from megatron_deepseek.checkpoint.job.base_weights import fill_held
from megatron_deepseek.checkpoint.reshard.rank_shards import ModelDivision, find_holders
from megatron_deepseek.model.architecture.adapters import adapter_rows, is_adapter
from megatron_deepseek.model.architecture.parameters import parameters
from megatron_deepseek.model.architecture.presets import TINY, V2_LITE, V3
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.planning.binary_units import with_unit
from megatron_deepseek.planning.pipeline_balance import stages
from megatron_deepseek.planning.held_parameters import held_parameters
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory_table import memory_parts, memory_table
from megatron_deepseek.planning.state_bytes import describe_states, fullest_states
from megatron_deepseek.runtime.job import training_spec
from megatron_deepseek.training.trainer import Trainer

SMALL_LITE = dataclasses.replace(
    V2_LITE, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, kv_lora_rank=32,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, moe_intermediate_size=64, n_routed_experts=16,
    vocab_size=8192)


@pytest.mark.parametrize("model, layout, schedule, stages_on_rank", [
    (TINY, Layout(), "1F1B", 1),
    (TINY, Layout(tp=2), "1F1B", 1),
    (TINY, Layout(pp=2, ep=2, dp=2), "DualPipeV", 2),
    (SMALL_LITE, Layout(tp=2, pp=2, ep=2, etp=2, dp=2), "1F1B", 1),
    (dataclasses.replace(TINY, tie_word_embeddings=True, num_nextn_predict_layers=2), Layout(pp=2), "1F1B", 1),
    (SMALL_LITE, Layout(dp=6, tp=2, ep=4), "1F1B", 1),
    (SMALL_LITE, Layout(dp=32), "1F1B", 1)])
def test_parameters_are_those_of_the_shards(model, layout, schedule, stages_on_rank):
    """Of rank 0 of each pipeline rank: as many as any data rank has, which with the padding is what is calculated.
    Biases of routers, which no rank divides, are counted apart.
    """
    cut = stages(model, layout.pp * stages_on_rank, 64)
    held = find_holders(ModelDivision(model, layout, cut, schedule))
    ranks = layout.world_size // layout.pp
    for pp_rank in range(layout.pp):
        own = [cut[index] for index in stages_of_rank(pp_rank, len(cut), layout.pp, schedule)]
        calculated = held_parameters(model, layout, own).padded
        found = {"dense": 0, "experts": 0}
        for name, boxes in held.items():
            if name.startswith("model.") and not name.endswith("e_score_correction_bias"):
                kind = "experts" if ".mlp.experts." in name else "dense"
                found[kind] += sum(box.numel for box, holders in boxes.items() if pp_rank * ranks in holders)
        dense, experts = found["dense"] * layout.dp * layout.cp, found["experts"] * layout.edp
        assert (calculated.dense, calculated.experts) == (dense, experts)


def settings(arguments: str, ranks: int):
    return parse(f"--data-path x --train-iters 1 --bf16 {arguments}".split(), ranks)


def test_one_process_by_hand():
    """4 + 4 + 8 + 2 bytes a parameter; of several micro-batches the sums of gradients are where the reduced ones will
    be. With the optimizer on the host they are beside each other.
    """
    parameters = TINY.num_parameters()
    for batch in ("", "--global-batch-size 4"):
        assert fullest_states(settings(f"--model tiny {batch}", 1)).device == pytest.approx(18 * parameters, rel=1e-2)
    offloaded = fullest_states(settings("--model tiny --optimizer-cpu-offload --exp-avg-dtype bf16", 1))
    assert (offloaded.device, offloaded.host) == pytest.approx((2 * parameters, 14 * parameters), rel=1e-2)
    summed = fullest_states(settings("--model tiny --optimizer-cpu-offload --global-batch-size 4", 1))
    assert (summed.device, summed.host) == pytest.approx((6 * parameters, 16 * parameters), rel=1e-2)


def test_adapters_alone_have_gradients_and_moments():
    """4 + 2 bytes of weights, 4 of sums of gradients and 8 of moments are left to them; the base is bfloat16 twice, as
    it is kept and gathered, and routers are float32.
    """
    lora = settings("--model tiny --global-batch-size 4 --load base --lora-rank 4 --lora-target all router mtp", 1)
    adapters = sum(row.size for row in adapter_rows(lora.model, lora.lora))
    base = sum((4 if row.name.endswith("mlp.gate.weight") else 2) * row.size for row in parameters(lora.model)
               if row.trained)
    assert fullest_states(lora).device == 2 * base + (4 + 2 + 4 + 8) * adapters


@pytest.mark.parametrize("options, base", [
    ("", "base weights, bf16"),
    pytest.param("--quantization-bit 4", "base weights, nf4, scales quantised", marks=keeps_bytes),
    pytest.param("--quantization-bit 4 --no-double-quantization --exp-avg-dtype bf16", "base weights, nf4",
                 marks=keeps_bytes),
    pytest.param("--quantization-bit 8", "base weights, fp8", marks=keeps_bytes)])
def test_the_table_has_what_is_allocated(meshes, options, base):
    """Base, adapters, sums of gradients, which are as large as the reduced ones, and moments, byte for byte, of a step
    of three micro-batches on one rank.
    """
    config = dataclasses.replace(SMALL_LITE, n_group=1, topk_group=1)
    asked = settings(f"--model tiny --load base --lora-rank 4 --lora-target all router --seq-length 8 "
                     f"--global-batch-size 3 {options}", 1)
    asked = dataclasses.replace(asked, model=config)
    said = {part.name: part.bytes for part in memory_parts(Job(asked, cuda=False), 0)}
    trainer = Trainer(training_spec(asked), meshes)
    fill_held(trainer.stages, RandomBase(config), torch.device("cpu"))
    trainer.train_step(training_batch(*random_batch(config, 3, 8)), learning_rate=1e-3)
    named = dict(trainer.stages[0].named_parameters())
    trained = [parameter for name, parameter in named.items() if is_adapter(name)]
    assert said[base] == sum(size(parameter) for name, parameter in named.items() if not is_adapter(name))
    assert said["adapters"] == sum(map(size, trained)) > 0
    assert said["sums of gradients"] == sum(size(parameter.grad) for parameter in trained)
    assert said["moments"] == sum(size(state[moment]) for state in trainer.optimizer.state.values()
                                  for moment in ("exp_avg", "exp_avg_sq"))
    assert said["activations"] > 0


def size(tensor: torch.Tensor) -> int:
    """Bytes on this rank."""
    return tensor.to_local().nbytes


def test_frozen_parameters_have_no_gradient_and_no_moments():
    """Of 4 + 8 + 2 + 4 bytes a frozen one keeps its master and the gathered weight."""
    experts = sum(row.size for row in parameters(TINY) if row.mesh == "expert")
    whole, frozen = (fullest_states(settings(f"--model tiny --global-batch-size 4 {more}", 1)).device for more in (
        "", "--freeze-parameters model.layers.*.mlp.experts.*"))
    assert whole - frozen == (4 + 8) * experts


def test_v3_as_its_report_has_it():
    """1,024 ranks, PP16, EP64: all pipeline ranks together hold the model, and the embedding once more for MTP."""
    text = ("--model deepseek-v3 --pipeline-model-parallel-size 16 --pipeline-schedule DualPipeV "
            "--expert-model-parallel-size 64 --global-batch-size 15360")
    report, cut = settings(text, 1024), stages(V3, 32)
    held = [held_parameters(V3, report.layout, [cut[rank], cut[31 - rank]]) for rank in range(16)]
    total = V3.num_parameters() + V3.vocab_size * V3.hidden_size
    assert sum(each.dense + 64 * each.experts for each in held) == total
    expected = max(6 * (each.dense + each.experts) + 12 * each.dense // 64 + 12 * each.experts for each in held)
    routers = 2 * 256 * 7168  # float32 when gathered; the fullest rank has up to four of them
    most = fullest_states(report).device
    assert 0 <= most - expected <= 4 * routers
    assert f"at most {most / 2**30:.1f} GiB on a GPU, of pipeline rank" in describe_states(report)


@pytest.mark.parametrize("size, text", [(0, "0.0 KiB"), (2**20 - 1, "1024.0 KiB"), (2**20, "1.0 MiB"),
                                        (1.5 * 2**30, "1.5 GiB"), (2**42, "4096.0 GiB")])
def test_sizes_are_shown_in_the_unit_in_which_they_have_digits(size, text):
    assert with_unit(size) == text


def test_the_table_of_a_small_model_has_digits():
    """All lines in one unit, so that the last is their sum."""
    tiny = settings("--model tiny --global-batch-size 4", 1)
    *parts, together = [line.split()[-2:] for line in memory_table(tiny, cuda=False)][1:]
    assert {unit for _, unit in (*parts, together)} == {"MiB"} and len(parts) > 3
    assert sum(float(number) for number, _ in parts) == pytest.approx(float(together[0]), abs=0.01 * len(parts))
    assert float(together[0]) > 10 and "MiB on a GPU" in describe_states(tiny)
