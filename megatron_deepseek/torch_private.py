"""The names that torch does not promise to keep, in one place, each with what it is needed for.

They were checked with torch 2.11 and 2.13, and setup.py allows none later than these. When it is raised,
tests/unit/test_torch_private.py says first what has gone or takes other arguments. A name is looked up when it is
imported from here, so that a tool loads no more of torch than it uses.
"""

import importlib

WHERE = {
    # FSDP's own record of a parameter, whose gradients accumulate: what is gathered in its place (parallel/data.py).
    "FSDPParam": "torch.distributed.fsdp._fully_shard._fsdp_param",
    # Actions of a schedule, to write one that runs forwards alone and to run pairs another way (parallel/pipeline.py,
    # parallel/paired_chunks.py).
    "_Action": "torch.distributed.pipelining.schedules",
    "_ComputationType": "torch.distributed.pipelining.schedules",
    "_PipelineContext": "torch.distributed.pipelining.schedules",
    "_PipelineScheduleRuntime": "torch.distributed.pipelining.schedules",
    "_add_send_recv": "torch.distributed.pipelining.schedules",
    "_add_unshard_reshard": "torch.distributed.pipelining.schedules",
    "_wait_batch_p2p": "torch.distributed.pipelining.schedules",
    # The backward of a stage without what torch's stage does around it (parallel/stage.py).
    "stage_backward": "torch.distributed.pipelining._backward",
    # Shards that are several pieces of a tensor: stacked experts cut in each matrix (parallel/shards.py).
    "DTensorSpec": "torch.distributed.tensor._dtensor_spec",
    "TensorMeta": "torch.distributed.tensor._dtensor_spec",
    "LocalShardsWrapper": "torch.distributed.tensor._shards_wrapper",
    "_compute_local_shape_and_global_offset": "torch.distributed.tensor._utils",
    "_StridedShard": "torch.distributed.tensor.placement_types",
    # The copy that a save in the background is made of (checkpoint/job/distributed.py).
    "StateDictStager": "torch.distributed.checkpoint._state_dict_stager",
    # Ranks that do not exist, to shard a model as they would (checkpoint/reshard/rank_shards.py).
    "FakeStore": "torch.testing._internal.distributed.fake_pg",
    # Traces of all threads (runtime/profile.py).
    "_ExperimentalConfig": "torch._C._profiler",
    # Hooks for saved tensors that are in force, of which torch applies only the innermost (ops/recompute.py).
    "_top_saved_tensors_default_hooks": "torch._C._autograd",
    # The store that the job was joined by, and time-outs of groups that were made without one (runtime/failure.py,
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
    """Return FSDP's own record of the parameters of one unit; None for one that has none, and for what is no unit."""
    return module._get_fsdp_state()._fsdp_param_group if hasattr(module, "_get_fsdp_state") else None
