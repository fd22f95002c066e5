"""What layers keep for their backward, calculated, against what saved-tensor hooks see in real forwards on CPU: equal.

Both count storages, each once, without weights and inputs. Every kind of recomputation, offloading, chunked losses, FP8
and packed documents, on architectures that have and lack each part.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from saved_bytes import saved_bytes
from small_models import LLAMA_SMALL, V2_SMALL, V3_SMALL, random_batch, training_batch, whole_model

from megatron_deepseek.arguments import parse
from megatron_deepseek.model.build import Precision
from megatron_deepseek.model.head import LOGITS_BYTES
from megatron_deepseek.model.step import StepContext
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.planning import head
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.stage_bytes import stage_bytes
from megatron_deepseek.settings import LossSettings, OffloadSettings, RecomputeSettings
from megatron_deepseek.training.division import divide
from megatron_deepseek.training.next_token import NextToken

LENGTH = 8
MTP = replace(V3_SMALL, num_nextn_predict_layers=2)
ALL = ("layernorm", "mla_up_proj", "moe_act")
MODELS = {
    "v2": V2_SMALL, "v3": V3_SMALL, "mtp": MTP,
    "values as wide as keys, tied, biases": replace(MTP, v_head_dim=10, tie_word_embeddings=True, attention_bias=True),
    "no shared expert": replace(MTP, n_shared_experts=0),
    "no query latent": replace(MTP, q_lora_rank=None),
    "one head": replace(MTP, num_attention_heads=1),
    "one expert a token": replace(MTP, num_experts_per_tok=1),
    "dense": replace(MTP, n_routed_experts=0, num_nextn_predict_layers=1)}
GROUPED = {
    "llama": LLAMA_SMALL, "qwen2, tied": replace(LLAMA_SMALL, qkv_bias=True, tie_word_embeddings=True),
    "qwen3, heads of their own size": replace(LLAMA_SMALL, qk_norm=True, head_dim=6),
    "deepseek, as many heads of keys": replace(
        LLAMA_SMALL, num_key_value_heads=4, attention_bias=True, moe_intermediate_size=12, n_routed_experts=8,
        n_shared_experts=2, num_experts_per_tok=3, first_k_dense_replace=1),
    "qwen2, a window in the second layer": replace(
        LLAMA_SMALL, qkv_bias=True, sliding_window=3, layer_types=("full_attention", "sliding_attention"))}
GROUPED_MTP = replace(GROUPED["deepseek, as many heads of keys"], num_nextn_predict_layers=1)


def settings_of(config, rows: int, arguments: str = "", **parts):
    """Return the settings of a run of `config` in one process; `parts` replace those of their name."""
    text = f"--model tiny --data-path x --train-iters 1 --micro-batch-size {rows} --seq-length {LENGTH} {arguments}"
    return replace(parse(text.split(), 1), model=config, **parts)


def counted(settings, meshes, monkeypatch, documents=None):
    """Return what hooks see of one micro-batch's forward."""
    run, config, rows = settings.run, settings.model, settings.batch.micro_batch_size
    precision = Precision(torch.float32, torch.bfloat16 if run.bf16 else None, fp8=run.fp8_format is not None)
    model = whole_model(config, meshes, LENGTH, precision=precision, loss=settings.loss,
                        recompute=settings.recompute, offload=settings.offload)
    model.train()
    objective = NextToken(config.num_nextn_predict_layers, 0.1)
    batch = training_batch(*random_batch(config, rows, LENGTH), documents_BS=documents)
    division = divide(batch, objective, ContextParallel(meshes.cp), rows, bool(config.n_routed_experts))
    (micro_batch,) = division.micro_batches.items
    counts = {name: float(count) for name, count in objective.counts(division.rows).items()}
    step = StepContext(rows, partial(objective.contribution, counts=counts))
    model(division.tokens_BS, micro_batch, step)  # FSDP gathers weights, and keeps them
    own = [getattr(each, "_local_tensor", each) for each in (*model.parameters(), *model.buffers())]
    inputs = [division.tokens_BS, micro_batch.rows.labels_BMS, micro_batch.rows.weights_BMS, model.rope_2SD]
    inputs += [] if micro_batch.routed_BMS is None else [micro_batch.routed_BMS]
    return saved_bytes(lambda: model(division.tokens_BS, micro_batch, step), own + inputs, monkeypatch)


def calculated(settings):
    job = Job(settings, cuda=False)
    return stage_bytes(job, 0, job.shapes())


def assert_equal(settings, meshes, monkeypatch, documents=None):
    saw, said = counted(settings, meshes, monkeypatch, documents), calculated(settings)
    assert (said.replayed.kept, said.host) == (saw.device, saw.host)


@pytest.mark.parametrize("precision", ["", "--bf16", "--bf16 --fp8-format e4m3"], ids=["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_recomputed(model, precision, meshes, monkeypatch):
    assert_equal(settings_of(MODELS[model], 1 if model == "mtp" else 2, precision), meshes, monkeypatch)


@pytest.mark.parametrize("precision", ["--bf16", "--bf16 --fp8-format e4m3"], ids=["bf16", "fp8"])
@pytest.mark.parametrize("model", GROUPED)
def test_grouped_query_attention(model, precision, meshes, monkeypatch):
    """Kept, and with queries, keys and values made again; what norms of heads read stays."""
    for recompute in (RecomputeSettings(), RECOMPUTED["all modules"]):
        assert_equal(settings_of(GROUPED[model], 2, precision, recompute=recompute), meshes, monkeypatch)


@pytest.mark.parametrize("precision", ["--bf16", "--bf16 --fp8-format e4m3"], ids=["bf16", "fp8"])
def test_grouped_query_attention_with_all_that_it_can_meet(precision, meshes, monkeypatch):
    """MTP's module, offloading, recomputed layers and norms, documents in a row."""
    for parts in ({}, {"recompute": RECOMPUTED["full"]}, {"recompute": RECOMPUTED["layernorm"]},
                  {"offload": OffloadSettings(2)}):
        assert_equal(settings_of(GROUPED_MTP, 2, precision, **parts), meshes, monkeypatch)
    settings = settings_of(LLAMA_SMALL, 2, precision)
    settings = replace(settings, data=replace(settings.data, reset_attention_mask=True))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    assert_equal(settings, meshes, monkeypatch, documents)


RECOMPUTED = {"full": RecomputeSettings("full"), "all modules": RecomputeSettings("selective", ALL),
              **{module: RecomputeSettings("selective", (module,)) for module in ALL}}


@pytest.mark.parametrize("precision", ["", "--bf16", "--bf16 --fp8-format e4m3"], ids=["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputed(recompute, precision, meshes, monkeypatch):
    for model in ("v2", "no query latent") if precision == "" else ("mtp", "no shared expert"):
        settings = settings_of(MODELS[model], 2, precision, recompute=RECOMPUTED[recompute])
        assert_equal(settings, meshes, monkeypatch)


@pytest.mark.parametrize("precision", ["--bf16", "--bf16 --fp8-format e4m3"], ids=["bf16", "fp8"])
@pytest.mark.parametrize("recompute", [RecomputeSettings(), RECOMPUTED["full"], RECOMPUTED["all modules"]],
                         ids=["kept", "full", "selective"])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_offloaded(layers, recompute, precision, meshes, monkeypatch):
    """Of the first layers, MTP's among them: what went to the host, and the indices that stayed."""
    settings = settings_of(MTP, 2, precision, recompute=recompute, offload=OffloadSettings(layers))
    assert_equal(settings, meshes, monkeypatch)


@pytest.mark.parametrize("chunk", [1, 5, 15, 16])
def test_losses_by_chunks(chunk, meshes, monkeypatch):
    for config in (V2_SMALL, MTP):
        settings = settings_of(config, 2, "--bf16", loss=LossSettings(loss_chunk_size=chunk))
        assert_equal(settings, meshes, monkeypatch)


@pytest.mark.parametrize("kind", ["seq_aux_loss", "aux_loss"])
def test_balance_losses(kind, meshes, monkeypatch):
    for config in (V2_SMALL, MTP):
        settings = settings_of(config, 2, "--bf16", loss=LossSettings(balance_type=kind, moe_aux_loss_coeff=0.1))
        assert_equal(settings, meshes, monkeypatch)


@pytest.mark.parametrize("precision", ["", "--bf16", "--bf16 --fp8-format e4m3"], ids=["fp32", "bf16", "fp8"])
def test_packed(precision, meshes, monkeypatch):
    """Rows of several documents; MTP's positions at their ends are not routed, so that fewer copies travel."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    for config in (V2_SMALL, V3_SMALL, replace(V3_SMALL, num_attention_heads=1)):
        settings = settings_of(config, 2, precision)
        settings = replace(settings, data=replace(settings.data, reset_attention_mask=True))
        assert_equal(settings, meshes, monkeypatch, documents)


def test_the_bound_of_chunks_is_the_heads():
    assert head.LOGITS_BYTES == LOGITS_BYTES
