"""What resharding keeps of each part, of which V3 with moments has 350,000 on 2,048 ranks."""

import gc
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import torch
from native_checkpoints import MODEL

from megatron_deepseek.checkpoint.reshard.rank_shards import ModelDivision, find_holders
from megatron_deepseek.checkpoint.reshard.reshard import files_of_ranks
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.planning.pipeline_balance import stages

DEEP = replace(MODEL, num_hidden_layers=10, num_nextn_predict_layers=0)


def test_equal_layers_share_what_their_parts_are():
    found = find_holders(ModelDivision(DEEP, Layout(dp=32, ep=8), stages(DEEP, 1), "1F1B"))
    for name in ("self_attn.o_proj.weight", "mlp.experts.down_proj"):
        alike = [found[f"{kind}model.layers.{layer}.{name}"] for layer in range(4, 8)
                 for kind in ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")]
        assert all(each is alike[0] for each in alike), name
        assert len(alike[0]) >= 8


def test_bytes_of_a_planned_part():
    """Below 120 of its own, beside the regions that equal tensors share."""
    division = ModelDivision(DEEP, Layout(dp=32, ep=8), stages(DEEP, 1), "1F1B")
    found = find_holders(division)
    shapes = {name: tuple(map(max, zip(*(region.end for region in found[name])))) for name in found}
    checkpoint = SimpleNamespace(directory="here", stored=SimpleNamespace(shapes=shapes))
    gc.collect()
    tracemalloc.start()
    files = files_of_ranks(found, dict.fromkeys(found, torch.float32), checkpoint)
    of_files = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    parts = sum(len(file.items) for file in files)
    assert parts == sum(map(len, found.values())) > 9_000
    assert of_files < 120 * parts
