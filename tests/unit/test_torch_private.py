"""What torch does not promise is still as it was: the first test to fail with a torch that changed it."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from megatron_deepseek import torch_private

PACKAGE = Path(__file__).parents[2] / "megatron_deepseek"
# What is overridden or called, and the parameters that it must take.
SIGNATURES = {
    (PipelineStage, "forward_one_chunk"): "self fwd_chunk_id args kwargs save_forward_output",
    (PipelineStage, "backward_maybe_with_nosync"): "self backward_type bwd_kwargs last_backward",
    (PipelineStage, "perform_reduce_grad"): "self grad_scale_factor",
    (PipelineStage, "_get_init_p2p_neighbors_ops"): "self",
    (torch_private.FSDPParam, "_init_extensions"): "self",
    (torch_private.FSDPParam, "accumulate_unsharded_grad_if_needed"): "self",
    (torch_private.FSDPParam, "to_accumulated_grad_if_needed"): "self",
    (torch_private, "stage_backward"): "stage_output output_grads input_values outputs_with_grads_idxs",
}


@pytest.mark.parametrize("name", torch_private.WHERE)
def test_the_name_is_there(name):
    assert getattr(torch_private, name) is not None


@pytest.mark.parametrize("owner, name", SIGNATURES, ids=[name for _, name in SIGNATURES])
def test_it_takes_what_it_took(owner, name):
    assert [*inspect.signature(getattr(owner, name)).parameters] == SIGNATURES[owner, name].split()


def test_no_other_name_is_known():
    with pytest.raises(AttributeError, match="_no_such_name is no private name of torch"):
        getattr(torch_private, "_no_such_name")


def private_imports(path: Path) -> list[str]:
    """Private names, or names of private modules, that a file imports from torch."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found += [f"{node.module}.{alias.name}" for alias in node.names
                      if any(part.startswith("_") for part in (*node.module.split("."), alias.name))]
    return found


def test_nobody_else_imports_private_names():
    assert private_imports(PACKAGE / "parallel" / "pipeline.py") == []
    assert {str(path.relative_to(PACKAGE)): names for path in PACKAGE.rglob("*.py")
            if (names := private_imports(path))} == {}


def test_this_torch_is_one_that_setup_allows():
    bounds = (PACKAGE.parent / "setup.py").read_text().split('"torch>=')[1].split('"')[0].split(",<")
    least, beyond = (tuple(map(int, bound.split("."))) for bound in bounds)
    assert least <= tuple(map(int, torch.__version__.split(".")[:2])) < beyond
