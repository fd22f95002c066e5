"""The parts of a step: which modules and functions of the package belong to each."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import product
from unittest.mock import patch

import torch
from anatomy_pieces.counting import StepCounter

from megatron_deepseek.model import head, layer, moe
from megatron_deepseek.model.attention import core, mla
from megatron_deepseek.model.router import Router
from megatron_deepseek.parallel import expert
from megatron_deepseek.parallel.tensor import RMSNorm
from megatron_deepseek.parallel.vocabulary import VocabParallelEmbedding
from megatron_deepseek.torch_private import fsdp_parameter_group
from megatron_deepseek.training import trainer
from megatron_deepseek.training.next_token import NextToken

NORMS, PROJECTIONS, ROPE, ATTENTION = "norms", "MLA's projections", "rope, keys and values", "attention core"
ROUTER, ROUTE, DISPATCH, EXPERTS, COMBINE = "router", "route", "dispatch", "experts", "combine"
BALANCE, MLPS, RESIDUAL, ADDED = "balance loss", "dense MLP, shared experts", "residual sums", "gradients' sums"
EMBEDDING, HEAD, LOSS, JOINING = "embedding", "head", "loss", "MTP's joining"
GATHERED, REDUCED = "weights gathered", "gradients summed, reduced"
NORM_AND_CLIP, ADAM = "gradient's norm, clip", "AdamW"

# Where a function is looked up when it is called, and its part; what it calls may be of another part.
FUNCTIONS = (
    (layer.DecoderLayer, "forward", RESIDUAL), (layer.MTPLayer, "forward", JOINING), (RMSNorm, "forward", NORMS),
    (mla.MLA, "forward", PROJECTIONS), (mla.UpProjections, "queries", PROJECTIONS),
    (mla.UpProjections, "_keys_and_values", PROJECTIONS),
    (core, "_equally_wide_on_cpu", ROPE), (core.WholeSequenceAttention, "__call__", ATTENTION),
    (moe.MLP, "forward", MLPS), (Router, "forward", ROUTER), (expert.AllToAllDispatcher, "route", ROUTE),
    (moe, "count_choices", ROUTE), (expert, "copy_rows", DISPATCH), (moe.Experts, "forward", EXPERTS),
    (expert, "sum_copies", COMBINE), (moe, "balance_loss", BALANCE), (VocabParallelEmbedding, "forward", EMBEDDING),
    (head.OutputHead, "log_probabilities", HEAD), (head, "vocab_parallel_cross_entropy", LOSS),
    (NextToken, "contribution", LOSS), (trainer, "squared_gradient_norm", NORM_AND_CLIP),
    (trainer, "clip_gradients", NORM_AND_CLIP), (trainer.Trainer, "_update", ADAM))

# What each layer of attention holds as its own.
OF_ATTENTION = (("rope_queries", ROPE), ("assemble_keys", ROPE))

# FSDP2's, wherever it runs: weights in a forward and a backward, gradients in a backward.
OF_GROUPS = (("unshard", GATHERED), ("wait_for_unshard", GATHERED), ("post_backward", REDUCED))


def _within(function: Callable, block: Callable, name: str) -> Callable:
    @wraps(function)
    def counted(*args, **kwargs):
        with block(name):
            return function(*args, **kwargs)

    return counted


@contextmanager
def parts_of_steps(counter: StepCounter, stage: torch.nn.Module) -> Iterator[None]:
    """Have `counter` told which part of a step of `stage` runs."""
    groups = type(fsdp_parameter_group(stage))
    with ExitStack() as stack:
        for owner, name, part in FUNCTIONS:
            stack.enter_context(patch.object(owner, name, _within(getattr(owner, name), counter.part, part)))
        layers = [module for module in stage.modules() if isinstance(module, mla.MLA)]
        for module, (name, part) in product(layers, OF_ATTENTION):
            stack.enter_context(patch.object(module, name, _within(getattr(module, name), counter.part, part)))
        for name, part in OF_GROUPS:
            stack.enter_context(patch.object(groups, name, _within(getattr(groups, name), counter.wherever, part)))
        backward = _within(torch.autograd.backward, counter.between_nodes, ADDED)
        stack.enter_context(patch.object(torch.autograd, "backward", backward))
        yield
