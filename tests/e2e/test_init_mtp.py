"""A checkpoint whose config.json announces an MTP module that it lacks: what is said, and a new module's beginning."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_deepseek.checkpoint.convert.mtp import module_prefixes
from megatron_deepseek.checkpoint.convert.names import hf_shapes, mtp_copies
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.init import normal

LAYOUTS = {1: [], 2: "--pipeline-model-parallel-size 2".split(),
           4: ("--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2 --pipeline-model-parallel-size 2 "
               "--pipeline-schedule Interleaved1F1B --sequence-parallel").split()}
STILL = ["--train-iters", "1", "--lr", "1e-30", "--weight-decay", "0", "--moe-router-bias-update-rate", "0",
         "--eval-iters", "0"]
SEED = 77


@pytest.fixture(scope="module")
def announced(workshop) -> Path:
    """The workshop's architecture without its MTP module's weights, as BF16 conversions of V3 are."""
    config = ModelConfig.from_file(workshop.config)
    modules, generator = tuple(module_prefixes(config)), torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)
               for name, shape in hf_shapes(config).items() if not name.startswith(modules)}
    directory = workshop.directory / "announced"
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(workshop.config.read_text())
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def expected(config: ModelConfig, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A new module's weights as the hash of seed, name and place gives them to a whole model on one process.

    Experts are hashed by their place in the stack that training keeps them in.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    prefix, found, rest = name.partition(".mlp.experts.")
    if not found:
        index, whole = torch.arange(torch.Size(shape).numel()).view(shape), name
    else:
        expert, projection, _ = rest.split(".")
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        stack = (experts, hidden, width) if projection == "down_proj" else (experts, 2 * width, hidden)
        index = torch.arange(torch.Size(stack).numel()).view(stack)[int(expert)]
        index = index if projection == "down_proj" else index.chunk(2)[projection == "up_proj"]
        whole = f"{prefix}.mlp.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
    return (normal(index, SEED, whole) * config.initializer_range).float()


def begin(workshop, announced, ranks: int) -> Path:
    out = workshop.directory / f"begun{ranks}_hf"
    workshop.train(ranks, f"begun{ranks}", *STILL, *LAYOUTS[ranks], "--load", str(announced), "--init-mtp",
                   "--seed", str(SEED), "--save-hf", str(out))
    return out


def check_begun(workshop, announced, out: Path) -> None:
    """The loaded weights as they were, the new ones as hashed; copies of embedding and head as released files have."""
    config, found = ModelConfig.from_file(workshop.config), tensors(out)
    for name, tensor in tensors(announced).items():
        assert torch.equal(found.pop(name), tensor), name
    assert len(found) > 30
    for name in mtp_copies(config):
        del found[name]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected(config, name, tuple(tensor.shape)), rtol=0, atol=0, msg=name)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_a_new_module_begins_and_goes_on(workshop, announced):
    out = begin(workshop, announced, 1)
    check_begun(workshop, announced, out)
    save = workshop.directory / "begun1"
    again = workshop.arguments("begun1", "--load", str(save), "--init-mtp", "--seed", str(SEED), "--train-iters", "3")
    job = workshop.run(1, again)
    assert job.status == 0 and "--init-mtp: no new Multi-Token Prediction module" in job.output, job.output
    state = json.loads((save / "iter_0000003" / "state.json").read_text())
    assert (state["iteration"], state["optimizer_steps"]) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_in_any_layout_it_is_that_of_one_process(workshop, announced, ranks):
    check_begun(workshop, announced, begin(workshop, announced, ranks))


@pytest.mark.slow
def test_what_is_said_names_both_ways(workshop, announced):
    """One directory as --model and --load; then each of the ways, of which one was just seen."""
    both = workshop.arguments("said", "--model", str(announced), "--load", str(announced), *STILL)
    job = workshop.run(1, both)
    assert job.status == 2 and job.output.count("\n") == 1, job.output
    assert "--mtp-num-layers 0 goes on with what there is, --init-mtp adds 1 new" in job.output
    job = workshop.run(1, [*both, "--mtp-num-layers", "0"])
    assert job.status == 0, job.output
    assert ModelConfig.from_file(workshop.directory / "said" / "iter_0000001").num_nextn_predict_layers == 0
