"""megatron-core's torch_dist checkpoints: its own reader finds what was written, and what was written comes back.

GPTModel with latent attention cannot be built without Transformer Engine, so its names are not compared with a live
model's: they follow its sources.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_checkpoints import V3_WIDE, all_tensors, assert_identical, convert, random_weights, v3_directory

from megatron_deepseek.checkpoint.megatron import megatron_places


def test_round_trip(tmp_path):
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "megatron", hf, tmp_path / "mcore") == 0
    assert convert("megatron", "native", tmp_path / "mcore", tmp_path / "native") == 0
    assert convert("native", "hf", tmp_path / "native", tmp_path / "back") == 0
    assert_identical(all_tensors(tmp_path / "back"), all_tensors(hf))


def test_megatron_core_reads_it(tmp_path, meshes):
    dist_checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")
    assert convert("hf", "megatron", v3_directory(tmp_path / "hf"), tmp_path / "mcore") == 0
    tensors = dist_checkpointing.load_plain_tensors(str(tmp_path / "mcore" / "iter_0000000"))
    weights = random_weights(V3_WIDE, torch.bfloat16)
    fc1 = tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    prefix = "model.layers.1.mlp.experts.2."
    assert torch.equal(fc1[2], torch.cat([weights[f"{prefix}gate_proj.weight"], weights[f"{prefix}up_proj.weight"]]))
    assert torch.equal(tensors["mtp.layers.0.transformer_layer.self_attention.linear_kv_up_proj.layer_norm_weight"],
                       weights["model.layers.2.self_attn.kv_a_layernorm.weight"])
    assert tensors.keys() - {"iteration", "checkpoint_version"} == {place.whole for place in megatron_places(V3_WIDE)}


def test_padded_vocabulary_and_other_spellings(tmp_path, capsys):
    """Rows that Megatron added to the embedding are cut off; norms of a model without Transformer Engine are found."""
    weights, state = random_weights(V3_WIDE, torch.float32), {}
    own = frozenset({f"{layer}{name}" for layer in ("decoder.layers.0.", "decoder.layers.1.",
                                                    "mtp.layers.0.transformer_layer.")
                     for name in ("self_attention.q_layernorm.weight", "self_attention.kv_layernorm.weight",
                                  "pre_mlp_layernorm.weight")})
    for place in megatron_places(V3_WIDE, own):
        whole = state.setdefault(place.whole, torch.zeros(place.whole_shape))
        offset, size = place.rows(0, place.shape[0])
        whole[tuple(slice(a, a + n) for a, n in zip(offset, size))] = weights[place.name].view(size)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, 84))
    state["optimizer.state.exp_avg.x"] = torch.ones(3)
    dcp.save(state, checkpoint_id=tmp_path / "mcore" / "release", no_dist=True)
    (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").write_text("release\n")
    hf = v3_directory(tmp_path / "hf", torch.float32)
    assert convert("megatron", "hf", tmp_path / "mcore", tmp_path / "none") == 2
    assert "--assets" in capsys.readouterr().err
    assert convert("megatron", "hf", tmp_path / "mcore", tmp_path / "back", "--assets", str(hf)) == 0
    assert "state of the optimizer" in capsys.readouterr().out
    assert_identical(all_tensors(tmp_path / "back"), weights)
