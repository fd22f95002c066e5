"""megatron-core's torch_dist checkpoints: its own GPTModel says the same with what is written here, and the other way
round; what was written comes back.
"""

import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from live_megatron import exchange
from reference_model import ReferenceModel
from small_checkpoints import V3_WIDE, all_tensors, assert_identical, convert, random_weights, v3_directory
from small_models import V3_SMALL

from megatron_deepseek.checkpoint.convert.megatron import megatron_places
from megatron_deepseek.checkpoint.convert.names import native_places
from megatron_deepseek.checkpoint.loadable import check_checkpoint
from megatron_deepseek.cli.generate import main as generate
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling
from megatron_deepseek.model.rotary import rope_table, softmax_scale

# As many experts for each of a token's groups as V3 has, 2: megatron-core rates a group by so many (moe_utils.py).
LIVE = replace(V3_SMALL, num_hidden_layers=3, num_experts_per_tok=4, num_nextn_predict_layers=1,
               max_position_embeddings=64, rope_scaling=RopeScaling("yarn", 40.0, 32, mscale_all_dim=1.0))
LENGTH = 40  # beyond the 32 positions from which YaRN stretches


def test_round_trip(tmp_path):
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "megatron", hf, tmp_path / "mcore") == 0
    assert convert("megatron", "native", tmp_path / "mcore", tmp_path / "native") == 0
    assert convert("native", "hf", tmp_path / "native", tmp_path / "back") == 0
    assert_identical(all_tensors(tmp_path / "back"), all_tensors(hf))


def test_the_way_back_needs_no_assets(tmp_path):
    """Of a model that was never in Hugging Face's form, the checkpoint of training alone says the architecture."""
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "native", hf, tmp_path / "native") == 0
    shutil.rmtree(tmp_path / "native" / "huggingface")
    assert convert("native", "megatron", tmp_path / "native", tmp_path / "mcore") == 0
    assert convert("megatron", "hf", tmp_path / "mcore", tmp_path / "back") == 0
    assert_identical(all_tensors(tmp_path / "back"), all_tensors(hf))
    assert ModelConfig.from_file(tmp_path / "back") == V3_WIDE


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


@pytest.mark.parametrize("of", ["mcore", "mcore/iter_0000100", "mcore/release"])
def test_a_legacy_directory_is_known_by_its_folders(tmp_path, capsys, of):
    """As `--ckpt-format torch` lays it out: what is missing is named, in the order in which it is needed."""
    for iteration in ("iter_0000100", "release"):
        (tmp_path / "mcore" / iteration / "mp_rank_00_000").mkdir(parents=True)
        (tmp_path / "mcore" / iteration / "mp_rank_00_000" / "model_optim_rng.pt").write_bytes(b"PK")
    (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").write_text("100")
    assert convert("megatron", "hf", tmp_path / of, tmp_path / "out") == 2
    assert "--assets" in capsys.readouterr().err
    hf = v3_directory(tmp_path / "hf", torch.float32)
    assert convert("megatron", "hf", tmp_path / of, tmp_path / "out", "--assets", str(hf)) == 2
    said = capsys.readouterr().err
    assert "mp_rank_00_000/model_optim_rng.pt is no whole file of torch.save" in said and said.count("\n") == 1


def test_where_checkpoints_of_training_are_wanted_megatrons_are_told_the_way(tmp_path, capsys):
    """By training, generation and conversion alike: --load is what a user of Megatron-LM tries first."""
    hf = v3_directory(tmp_path / "hf", torch.float32)
    assert convert("hf", "megatron", hf, tmp_path / "dist") == 0
    (tmp_path / "legacy" / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "legacy" / "latest_checkpointed_iteration.txt").write_text("100")
    capsys.readouterr()
    for name, way in (("dist", "convert_checkpoint.py --from megatron --to native"),
                      ("legacy", "legacy format.*convert_checkpoint.py --from megatron --to native")):
        with pytest.raises(ValueError, match=way):
            check_checkpoint(tmp_path / name, V3_WIDE)
        assert convert("native", "hf", tmp_path / name, tmp_path / "none") == 2
        assert generate(["--load", str(tmp_path / name), "--prompt", "x"]) == 2
        said = capsys.readouterr().err
        assert len(re.findall(way, said)) == said.count("\n") == 2, said


def reference_logits(config: ModelConfig, weights: dict[str, torch.Tensor], tokens_BS: torch.Tensor):
    """[B, S, V] of the main model and of each MTP depth, in float64."""
    state: dict[str, torch.Tensor] = {}
    for place in native_places(config):
        whole = state.setdefault(place.whole, torch.zeros(place.whole_shape, dtype=torch.float64))
        offset, size = place.rows(0, place.shape[0])
        whole[tuple(slice(a, a + n) for a, n in zip(offset, size))] = weights[place.name].double().view(size)
    model = ReferenceModel(config, state, rope_table(config, LENGTH, torch.device("cpu")), softmax_scale(config))
    with torch.no_grad():
        return model.logits(tokens_BS, LENGTH)


def test_a_live_model_says_the_same(tmp_path):
    """Latent attention with YaRN, routing by groups with a bias, shared expert, MTP: in both directions."""
    pytest.importorskip("megatron.core", minversion="0.16")
    live = exchange(tmp_path, LIVE, LENGTH)
    for which, directory in live.directories.items():
        expected = reference_logits(LIVE, all_tensors(directory), live.tokens)
        assert len(live.said[which]) == len(expected) == 2
        for theirs, ours in zip(live.said[which], expected):
            torch.testing.assert_close(theirs[:, :-1].double(), ours[:, :-1], rtol=1e-4, atol=1e-4)
