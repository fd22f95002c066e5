"""The private names of torch that this project uses, in one place, each with its purpose.

They were checked with torch 2.11, 2.13 and 2.14, and setup.py allows no later version. When that bound is raised,
tests/unit/test_torch_private.py is the first to fail, for names that have gone or take other arguments. A name is
looked up when it is imported from here, so that a tool loads no more of torch than it uses.
"""

import importlib

WHERE = {
    # FSDP's own record of a parameter: to convert what is gathered and to accumulate gradients (parallel/data.py).
    "FSDPParam": "torch.distributed.fsdp._fully_shard._fsdp_param",
    # Actions of a schedule: for a forward-only schedule and to overlap pairs (parallel/forward_only.py,
    # parallel/paired_chunks.py).
    "_Action": "torch.distributed.pipelining.schedules",
    "_ComputationType": "torch.distributed.pipelining.schedules",
    "_PipelineContext": "torch.distributed.pipelining.schedules",
    "_PipelineScheduleRuntime": "torch.distributed.pipelining.schedules",
    "_add_send_recv": "torch.distributed.pipelining.schedules",
    "_add_unshard_reshard": "torch.distributed.pipelining.schedules",
    # Sends of a stage, begun and waited for (parallel/stage.py, parallel/paired_chunks.py).
    "_batch_p2p": "torch.distributed.pipelining.schedules",
    "_wait_batch_p2p": "torch.distributed.pipelining.schedules",
    # The backward of a stage alone, without what torch's PipelineStage does around it (parallel/stage.py).
    "stage_backward": "torch.distributed.pipelining._backward",
    # Shards that are several regions of a tensor: stacked experts, each matrix divided (parallel/shards.py).
    "DTensorSpec": "torch.distributed.tensor._dtensor_spec",
    "TensorMeta": "torch.distributed.tensor._dtensor_spec",
    "LocalShardsWrapper": "torch.distributed.tensor._shards_wrapper",
    "_compute_local_shape_and_global_offset": "torch.distributed.tensor._utils",
    "_StridedShard": "torch.distributed.tensor.placement_types",
    # What DTensor remembers of meshes, to be forgotten with the job that had them (parallel/fake_job.py).
    "_clear_sharding_prop_cache": "torch.distributed.tensor.debug",
    # The copy of the state that a background save writes (checkpoint/job/distributed.py).
    "StateDictStager": "torch.distributed.checkpoint._state_dict_stager",
    # Operators as they are called, collectives among them, and groups by their names
    # (parallel/recorded_collectives.py).
    "TorchDispatchMode": "torch.utils._python_dispatch",
    # The modes of a thread, which another one that takes turns with it needs too (parallel/micro_batch_overlap.py).
    "_get_current_dispatch_mode_stack": "torch.utils._python_dispatch",
    "_get_current_function_mode_stack": "torch.overrides",
    "_resolve_process_group": "torch.distributed.distributed_c10d",
    # Sizes that differ from call to call, of which one graph must take all (ops/fusible.py).
    "mark_dynamic": "torch._dynamo.decorators",
    # A store for ranks that do not exist, to shard a model as they would (checkpoint/reshard/rank_shards.py).
    "FakeStore": "torch.testing._internal.distributed.fake_pg",
    # Tensors that have a shape and no numbers (dry_run/).
    "FakeTensor": "torch._subclasses.fake_tensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "in_kernel_invocation_manager": "torch._subclasses.fake_tensor",
    "unset_fake_temporarily": "torch._subclasses.fake_tensor",
    # Traces of all threads (runtime/profile.py).
    "_ExperimentalConfig": "torch._C._profiler",
    # The active hooks for saved tensors, of which torch applies only the innermost (ops/recompute.py).
    "_top_saved_tensors_default_hooks": "torch._C._autograd",
    # The store by which the ranks met, and time-outs of groups that were made without one (runtime/failure.py,
    # parallel/start.py).
    "_get_default_store": "torch.distributed.distributed_c10d",
    "_set_pg_timeout": "torch.distributed.distributed_c10d",
    "_world": "torch.distributed.distributed_c10d",
}


def __getattr__(name: str):
    if name not in WHERE:
        raise AttributeError(f"{name} is no private name of torch that this project uses")
    module, _, last = WHERE[name].rpartition(".")
    try:
        return getattr(importlib.import_module(WHERE[name]), name)
    except ModuleNotFoundError:  # torch._C's submodules are attributes
        return getattr(getattr(importlib.import_module(module), last), name)


def fsdp_parameter_group(module):
    """Return FSDP's own record of the parameters of one unit; None for a unit without any, and for other modules."""
    return module._get_fsdp_state()._fsdp_param_group if hasattr(module, "_get_fsdp_state") else None


def set_timeout(timeout, group) -> None:
    """Limit how long the collectives of a group wait. Until torch 2.14 it has no public name."""
    import torch.distributed as dist
    (getattr(dist, "set_timeout", None) or __getattr__("_set_pg_timeout"))(timeout, group)


def pack_weight(weight, rows: int):
    """Return a weight [out, in] in the order that oneDNN likes best for products of so many rows."""
    return torch_ops()._reorder_linear_weight(weight, rows)


def multiply_packed(x, packed):
    """Return x [..., in] times a packed weight, [..., out]."""
    return torch_ops()._linear_pointwise(x, packed, None, "none", [], "")


def multiplies_bfloat16() -> bool:
    """Return whether oneDNN multiplies bfloat16 on this processor, packed weights among it."""
    import torch
    return torch.backends.mkldnn.is_available() and torch_ops()._is_mkldnn_bf16_supported()


def torch_ops():
    """Return the operators that torch's compiler uses for oneDNN."""
    import torch
    return torch.ops.mkldnn


def declaration_of(operator) -> str:
    """Return `namespace::name(arguments) -> results` of an operator of torch.ops that has no overloads."""
    return str(operator.default._schema)


def compile_one_graph(function, backend: str):
    """Return `function` compiled as one graph for each kind of arguments, of which there may be many.

    torch.compile raises an error for a function that is not one graph, and for more than 8 kinds of arguments unless
    that bound is raised: those of layers differ in widths, and in whether gradients are wanted. Before torch 2.13 it is
    one for all functions of the process.
    """
    import inspect

    import torch
    limit = {"recompile_limit": 64}
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        import torch._dynamo
        torch._dynamo.config.recompile_limit, limit = limit.popitem()[1], {}
    return torch.compile(function, backend=backend, fullgraph=True, **limit)


def compiled_so_far() -> tuple[int, float]:
    """Return how many graphs torch.compile has made in this process, and the seconds that it took, backwards included.
    """
    import sys
    utils = sys.modules.get("torch._dynamo.utils")  # not imported before something is compiled
    return (0, 0.0) if utils is None else (utils.counters["stats"]["unique_graphs"],
                                           utils.calculate_time_spent()["total_wall_time"])
