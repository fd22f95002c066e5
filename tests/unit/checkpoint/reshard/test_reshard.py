"""tools/reshard_checkpoint.py in this process: what comes out is what went in, as DCP itself reads it."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from native_checkpoints import MODEL, random_state, read_native, tool, write_native
from small_checkpoints import assert_identical

from megatron_deepseek.checkpoint.dcp.item_file import frame
from megatron_deepseek.checkpoint.native import open_checkpoint

LAYOUT = {"tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size",
          "cp": "--context-parallel-size", "ep": "--expert-model-parallel-size", "dp": "--data-parallel-size",
          "v": "--num-virtual-stages-per-pipeline-rank"}


def options(**sizes: int) -> list[str]:
    return [text for name, size in sizes.items() for text in (LAYOUT[name], str(size))]


def random_layout(rng: random.Random) -> list[str]:
    """Uneven shards too: 3 and 5 data ranks divide none of the model's widths."""
    while True:
        sizes = {"tp": rng.choice((1, 2, 4)), "pp": rng.choice((1, 2)), "cp": rng.choice((1, 2)),
                 "ep": rng.choice((1, 2, 4, 8)), "dp": rng.choice((1, 2, 3, 5))}
        if sizes["tp"] * sizes["cp"] * sizes["dp"] % sizes["ep"] == 0:
            return options(**sizes, **({"v": 2} if sizes["pp"] == 2 and rng.random() < 0.5 else {}))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def original(tmp_path_factory, state):
    return write_native(tmp_path_factory.mktemp("original") / "a", state)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_there_and_back(tmp_path, original, state, seed):
    """A -> B -> C -> A through random layouts: every bit of weights and moments, and where the run is."""
    rng, here = random.Random(seed), original
    for number in range(3):
        there = tmp_path / str(number)
        last = ["merge"] if number == 2 else ["reshard", *random_layout(rng)]
        assert tool(*last, "--load", here, "--save", there, "--workers", 1 + number % 2) == 0
        assert tool("verify", there) == 0
        here = there
    assert_identical(read_native(here, state), state)
    assert len(list((here / "iter_0000100").glob("*.distcp"))) == 1
    for name in ("state.json", "config.json", "arguments.json"):
        found, expected = (json.loads((root / "iter_0000100" / name).read_text()) for root in (here, original))
        assert found == expected
    assert tool("diff", original, here) == 0


def test_moments_of_a_part_of_the_parameters(tmp_path, state, capsys):
    """Of a run that froze some, and one more at first: through a layout and back, and without the optimizer."""
    frozen = "model.embed_tokens.weight", "layers.1.mlp.experts.down_proj", "layers.2.self_attn.o_proj.weight"
    part = {name: tensor for name, tensor in state.items()
            if not (name.startswith("optimizer.") and name.endswith(frozen))}
    assert len(part) == len(state) - 2 * len(frozen)
    late = [["model.norm.weight", 40]]
    begin = write_native(tmp_path / "a", part, late=late)
    assert tool("reshard", "--load", begin, "--save", tmp_path / "b", *options(tp=2, pp=2, dp=3, ep=2)) == 0
    assert tool("merge", "--load", tmp_path / "b", "--save", tmp_path / "c") == 0
    assert_identical(read_native(tmp_path / "c", part), part)
    assert open_checkpoint(tmp_path / "c").stored.shapes.keys() == part.keys()
    assert tool("verify", tmp_path / "c") == 0 == tool("diff", begin, tmp_path / "c")
    capsys.readouterr()
    assert tool("inspect", tmp_path / "c") == 0
    assert "1 parameters were frozen at first, model.norm.weight" in capsys.readouterr().out
    assert tool("merge", "--load", begin, "--save", tmp_path / "d", "--drop-optimizer") == 0
    kept = [json.loads((tmp_path / name / "iter_0000100" / "state.json").read_text()) for name in "cd"]
    assert kept[0]["late"] == late and kept[0]["optimizer_steps"] == 100
    assert "late" not in kept[1] and kept[1]["optimizer_steps"] == 0


def test_to_a_pipeline_with_a_rank_that_holds_nothing(tmp_path, original, state):
    assert tool("reshard", "--load", original, "--save", tmp_path / "b", *options(pp=4),
                "--pipeline-model-parallel-layout", "Et||tt|tmL") == 0
    assert_identical(read_native(tmp_path / "b", state), state)


def test_each_step_is_a_checkpoint_of_its_own(tmp_path, original, state):
    """Not only after the last step back: rows and columns divided, experts, stages, copies."""
    assert tool("reshard", "--load", original, "--save", tmp_path / "b",
                *options(tp=2, pp=2, ep=4, dp=2)) == 0
    assert_identical(read_native(tmp_path / "b", state), state)
    note = json.loads((tmp_path / "b" / "iter_0000100" / "layout.json").read_text())
    assert note["world_size"] == 8 and note["pipeline_model_parallel_layout"].count("|") == 1


def test_a_dry_run_tells_what_resharding_would_save(tmp_path, original, capsys):
    """Of one file each rank opens one, but DCP reads all of every tensor; afterwards items are shards."""
    sizes = options(dp=4)
    assert tool("reshard", "--load", original, "--dry-run", *sizes) == 0
    before = capsys.readouterr().out
    assert "files that a rank opens now: 1 at most" in before
    assert tool("reshard", "--load", original, "--save", tmp_path / "b", *sizes) == 0
    capsys.readouterr()
    assert tool("reshard", "--load", tmp_path / "b", "--dry-run", *sizes) == 0
    after = capsys.readouterr().out
    own, whole = (int(number.replace(",", "")) for number in re.findall(r"(?:shards|whole): ([\d,]+)", after))
    assert own < whole < 1.2 * own, after
    assert "4 ranks" in after and int(re.findall(r"whole: ([\d,]+)", before)[0].replace(",", "")) > 3 * own
    assert tool("reshard", "--load", original, *sizes) == 2


def test_items_too_large_are_cut(tmp_path, original, state, monkeypatch):
    """Along the first dimension, and the experts' second one."""
    monkeypatch.setattr("megatron_deepseek.checkpoint.dcp.item_file.ITEM_BYTES", 40_000)
    assert tool("reshard", "--load", original, "--save", tmp_path / "b", *options(tp=2)) == 0
    found = [item for items in open_checkpoint(tmp_path / "b").stored.items.values() for item in items]
    assert max(item.length for item in found) < 43_000
    assert_identical(read_native(tmp_path / "b", state), state)


def test_without_optimizer_and_in_another_type(tmp_path, original, state):
    """Router biases stay as they are: they decide between near-equal scores."""
    assert tool("reshard", "--load", original, "--save", tmp_path / "b", "--drop-optimizer", "--dtype", "bf16",
                *options(dp=2)) == 0
    weights = {name: tensor if name.endswith("bias") else tensor.bfloat16() for name, tensor in state.items()
               if name.startswith("model.")}
    assert_identical(read_native(tmp_path / "b", weights), weights)
    assert json.loads((tmp_path / "b" / "iter_0000100" / "state.json").read_text())["optimizer_steps"] == 0
    assert tool("inspect", tmp_path / "b") == 0


def test_what_the_type_cannot_hold_is_refused(tmp_path, state, capsys):
    name = "model.model.norm.weight"
    write_native(tmp_path / "a", state | {name: state[name] * 1e6})
    assert tool("merge", "--load", tmp_path / "a", "--save", tmp_path / "b", "--dtype", "fp16") == 2
    assert name in capsys.readouterr().err and not (tmp_path / "b" / "iter_0000100").exists()


def test_average(tmp_path, state):
    """Against float64; the mean of equal checkpoints is that checkpoint."""
    states = [state, random_state(seed=1), random_state(seed=2)]
    roots = [write_native(tmp_path / str(number), each) for number, each in enumerate(states)]
    assert tool("average", *roots, "--save", tmp_path / "mean", "--weights", 1, 2, 5) == 0
    expected = {name: sum(each[name].double() * weight for each, weight in zip(states, (1, 2, 5))).div(8).float()
                for name in state if name.startswith("model.")}
    assert_identical(read_native(tmp_path / "mean", expected, 0), expected)
    assert tool("average", roots[0], roots[0], roots[0], "--save", tmp_path / "same") == 0
    assert tool("diff", roots[0], tmp_path / "same", "--weights-only") == 0


def test_average_refuses_another_architecture(tmp_path, original, state, capsys):
    """Both numbers are told; a tensor of another shape is found, too, where config.json says nothing of it."""
    wider = replace(MODEL, n_routed_experts=16)
    write_native(tmp_path / "wider", random_state(wider), wider)
    name = "model.model.norm.weight"
    write_native(tmp_path / "odd", state | {name: torch.ones(7)})
    for other, said in (("wider", "n_routed_experts 16 there, 8 here"), ("odd", name)):
        assert tool("average", original, tmp_path / other, "--save", tmp_path / "mean") == 2
        assert said in capsys.readouterr().err


def test_diff_says_how_much(tmp_path, original, state, capsys):
    """Hand-made: one number, one that is no number any more, a missing tensor, one too many."""
    def name(which):
        return f"model.model.layers.0.{which}.weight"

    changed = {key: tensor.clone() for key, tensor in state.items()}
    changed[name("input_layernorm")][5] += 2.0
    changed[name("post_attention_layernorm")][:] = state[name("post_attention_layernorm")]
    changed[name("post_attention_layernorm")][3] = float("nan")
    changed["extra"] = changed.pop(name("mlp.up_proj"))
    write_native(tmp_path / "b", changed)
    assert tool("diff", original, tmp_path / "b", "--json") == 1
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["tensors"]}
    old, new = (float(each[name("input_layernorm")][5]) for each in (state, changed))
    assert found[name("input_layernorm")] | {"largest": 0, "relative": 0} == {
        "name": name("input_layernorm"), "reason": "numbers", "detail": "", "different": 1, "largest": 0, "relative": 0}
    assert found[name("input_layernorm")]["largest"] == pytest.approx(abs(new - old))
    assert found[name("input_layernorm")]["relative"] == pytest.approx(abs(new - old) / max(abs(old), abs(new)))
    assert found[name("post_attention_layernorm")]["largest"] == float("inf")
    assert found[name("mlp.up_proj")]["reason"] == "missing in B" and found["extra"]["reason"] == "missing in A"
    assert sum(each["reason"] is not None for each in found.values()) == 4
    assert tool("diff", original, tmp_path / "b") == 1
    assert "4 are not" in capsys.readouterr().out


def test_diff_compares_bits(tmp_path, capsys):
    """Zeros of either sign differ, by nothing; equal not-a-numbers are the same; another type is another tensor."""
    nan = float("nan")
    write_native(tmp_path / "a", {"zero": torch.tensor([0.0, 1.0]), "nan": torch.tensor([nan]), "type": torch.ones(2)})
    write_native(tmp_path / "b", {"zero": torch.tensor([-0.0, 1.0]), "nan": torch.tensor([nan]),
                                  "type": torch.ones(2, dtype=torch.bfloat16)})
    assert tool("diff", tmp_path / "a", tmp_path / "b", "--json") == 1
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["tensors"]}
    assert (found["zero"]["reason"], found["zero"]["different"], found["zero"]["largest"]) == ("numbers", 1, 0.0)
    assert found["nan"]["reason"] is None
    assert found["type"]["reason"] == "dtype" and found["type"]["largest"] == 0.0


def test_inspect_tells_architecture_step_and_tensors(original, state, capsys):
    assert tool("inspect", original, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iteration"] == 100 and found["optimizer"] and found["checksums"]
    assert found["architecture"]["n_routed_experts"] == MODEL.n_routed_experts
    assert {each["name"]: tuple(each["shape"]) for each in found["tensors"]} == {
        name: tuple(tensor.shape) for name, tensor in state.items()}
    assert all(each["bytes"] == state[each["name"]].nbytes for each in found["tensors"])
    assert tool("inspect", original / "iter_0000100") == 0
    text = capsys.readouterr().out
    assert found["parameters"] == MODEL.num_parameters()
    assert f"{MODEL.num_parameters():,} parameters, {MODEL.num_active_parameters():,} active for a token: " in text
    assert "8x280x136" in text and "iteration 100" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (2, 3, 4), ()])
def test_a_frame_is_torch_saves(tmp_path, dtype, shape):
    """torch.load finds the numbers between head and tail."""
    numbers = torch.randn(shape).to(dtype)
    around = frame(shape, dtype)
    file = tmp_path / "item"
    file.write_bytes(around.head + numbers.reshape(-1).view(torch.uint8).numpy().tobytes() + around.tail)
    found = torch.load(file, weights_only=True)
    assert found.dtype == dtype and torch.equal(found, numbers)
