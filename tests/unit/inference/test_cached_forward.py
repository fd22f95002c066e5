"""The forward over the cache against the training model's forward over whole sequences, at every position.

In float32 both are the same sums in another order: a few roundings, 1e-5 of the largest number. In float64 they agree
to 1e-9, which shows that nothing but rounding differs.
"""

from dataclasses import replace

import pytest
import torch
from small_engines import QWEN, V2_LITE, V3_MTP, WINDOWED, engine, loaded, uncached_logits, uncached_states
from small_models import LLAMA_SMALL, V2_SMALL, relative_error

from megatron_deepseek.inference.batch import Piece
from megatron_deepseek.inference.mla import CachedMLA

LENGTH, BLOCK = 37, 4
BOUND = {torch.float32: 1e-5, torch.float64: 1e-9}
MODELS = {"v3": V3_MTP, "v2": V2_SMALL, "v2_lite": V2_LITE, "v3_bias": replace(V3_MTP, attention_bias=True),
          "llama": LLAMA_SMALL, "qwen3": QWEN, "window": WINDOWED}


def prompt(config, length: int = LENGTH, seed: int = 0) -> list[int]:
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_chunks(model, sequences: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """The logits after all tokens of sequences that are computed side by side, `chunk` tokens of each at a time."""
    blocks = [model.pool.allocate(-(-len(tokens) // BLOCK)) for tokens in sequences]
    logits = [[] for _ in sequences]
    for begin in range(0, max(map(len, sequences)), chunk):
        active = [i for i, tokens in enumerate(sequences) if begin < len(tokens)]
        pieces = [Piece(sequences[i][begin:begin + chunk], blocks[i], begin) for i in active]
        batch = model.model.batch(pieces)
        states = model.model.states(batch)
        for i, piece, row in zip(active, pieces, batch.rows):
            logits[i].append(model.model.logits(states, list(range(row, row + len(piece.tokens)))))
    return [torch.cat(each) for each in logits]


@pytest.mark.parametrize("way", ["cheaper", "absorbed", "expanded"])
@pytest.mark.parametrize("chunk", [1, 7, BLOCK, BLOCK + 1, LENGTH])
def test_cached_logits_are_the_uncached_ones(meshes, monkeypatch, chunk, way):
    if way != "cheaper":
        monkeypatch.setattr(CachedMLA, "takes_few", lambda *_: way == "absorbed")
    model = loaded(V3_MTP, meshes)
    sequences = [prompt(V3_MTP), prompt(V3_MTP, 11, 1), prompt(V3_MTP, 12, 2)]
    for tokens, logits in zip(sequences, by_chunks(engine(model), sequences, chunk)):
        assert relative_error(logits, uncached_logits(model.stage, tokens)) < 1e-5


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(meshes, name, dtype):
    config = MODELS[name]
    model = loaded(config, meshes, dtype)
    for chunk in (7, 1):
        (logits,) = by_chunks(engine(model), [prompt(config)], chunk)
        assert relative_error(logits, uncached_logits(model.stage, prompt(config))) < BOUND[dtype]


@pytest.mark.parametrize("few", [1, 16])
@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
@pytest.mark.parametrize("config", [QWEN, WINDOWED], ids=["full", "window"])
def test_cached_keys_and_values_give_the_uncached_logits(meshes, monkeypatch, config, chunk, few):
    monkeypatch.setattr("megatron_deepseek.inference.gqa.FEW", few)
    model = loaded(config, meshes)
    sequences = [prompt(config), prompt(config, 11, 1), prompt(config, 12, 2)]
    for tokens, logits in zip(sequences, by_chunks(engine(model), sequences, chunk)):
        assert relative_error(logits, uncached_logits(model.stage, tokens)) < 1e-5


def test_a_long_past_is_expanded_chunk_by_chunk(meshes, monkeypatch):
    monkeypatch.setattr("megatron_deepseek.inference.mla.PAST_CHUNK", 3)
    monkeypatch.setattr(CachedMLA, "takes_few", lambda *_: False)
    model = loaded(V3_MTP, meshes)
    (logits,) = by_chunks(engine(model), [prompt(V3_MTP)], 7)
    assert relative_error(logits, uncached_logits(model.stage, prompt(V3_MTP))) < 1e-5


def test_the_cheaper_way_is_that_of_fewer_multiplications(meshes):
    attention = next(iter(engine(loaded(V3_MTP, meshes)).model.attention.values()))
    latent, rope, nope, value = 8, 4, 6, 8
    for queries, keys in ((1, 1), (1, 5), (3, 40), (9, 9), (40, 400)):
        up = latent * (nope + value)  # of a head, for each token: queries and outputs, or keys and values
        absorbed = queries * up + queries * keys * (latent + rope + latent)
        expanded = keys * up + queries * keys * (nope + rope + value)
        assert attention.takes_few(queries, keys) == (absorbed < expanded)


@pytest.mark.parametrize("depths, chunk", [(1, 1), (1, 7), (1, LENGTH), (3, 1), (3, 5), (3, LENGTH)])
def test_the_states_of_mtp_modules_are_those_of_training(meshes, depths, chunk):
    """Computed as a prompt is, chunk by chunk, each module one place further than the main model."""
    config = replace(V3_MTP, num_nextn_predict_layers=depths)
    model, tokens = loaded(config, meshes, torch.float64), prompt(config)
    cached = engine(model, draft_tokens=depths)
    blocks, found = cached.pool.allocate(-(-LENGTH // BLOCK)), [[] for _ in range(depths)]
    filled = 0
    for begin in range(0, LENGTH, chunk):
        end = min(begin + chunk, LENGTH)
        cached.model.states(cached.model.batch([Piece(tokens[begin:end], blocks, begin)]))
        known = min(end + 1, LENGTH)
        for depth in range(1, depths + 1):
            first = max(filled, depth)
            if first >= known:
                continue
            batch = cached.model.batch([Piece(tokens[first:known], blocks, first, first=depth, lag=depth)])
            found[depth - 1].append(cached.model.depth_states(depth, batch)[:batch.num_tokens])
        filled = known
    expected = uncached_states(model.stage, tokens)
    for depth in range(1, depths + 1):
        states = torch.cat(found[depth - 1])
        assert len(states) == LENGTH - depth
        assert relative_error(states, expected[depth][:LENGTH - depth]) < 1e-9
