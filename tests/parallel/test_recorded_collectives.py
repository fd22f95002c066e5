"""What the record says of each kind of collective, by hand, on 4 gloo ranks of a mesh of 2 x 2."""

import threading

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from megatron_deepseek.parallel.recorded_collectives import Collective, RecordedCollectives


def some_collectives() -> list[Collective]:
    """One of each kind over this rank's group of the mesh's first axis, {0, 2} or {1, 3}."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "within"))
    group = mesh.get_group("across")
    other = dist.get_global_rank(group, 1 - group.rank())
    six, twelve = torch.zeros(6), torch.zeros(12)
    partial = DTensor.from_local(six, mesh["across"], [Partial()], run_check=False)
    with RecordedCollectives(place=lambda: "here") as record:
        dist.all_reduce(torch.zeros(6, dtype=torch.float64), group=group)
        dist.all_gather_single(twelve, six, group=group)
        dist.all_gather([torch.zeros(6), torch.zeros(6)], six, group=group)
        dist.reduce_scatter_single(six, twelve, group=group)
        from_each = [1, 1] if group.rank() == 0 else [3, 3]
        dist.all_to_all_single(torch.zeros(sum(from_each), 6), torch.zeros(4, 6), from_each, [1, 3], group=group)
        dist.all_to_all_single(twelve, twelve.clone(), group=group)
        dist.broadcast(six, group=group, group_src=1)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, six, other, group),
                                            dist.P2POp(dist.irecv, six.clone(), other, group)]):
            work.wait()
        partial.redistribute(placements=[Replicate()]).to_local().sum()
        partial.redistribute(placements=[Shard(0)]).to_local().sum()
        dist.barrier(group)
    dist.all_reduce(six, group=group)  # not recorded any more
    return record.calls


def test_each_kind(ranks):
    """6 float32 are 24 bytes. Of an all-reduce half goes to the other rank and the sum of the other half comes back."""
    seen = ranks.run(4, some_collectives)
    for rank, calls in enumerate(seen):
        first, other = rank < 2, (rank + 2) % 4
        rows_for_the_other = 3 if first else 1
        expected = [("all_reduce", 48), ("all_gather", 24), ("all_gather", 24), ("reduce_scatter", 24),
                    ("all_to_all", rows_for_the_other * 24), ("all_to_all", 24), ("broadcast", 0 if first else 24),
                    ("send", 24), ("recv", 0), ("all_reduce", 24), ("reduce_scatter", 12), ("barrier", 0)]
        assert [(call.kind, call.sent) for call in calls] == expected
        assert {call.ranks for call in calls} == {(0, 2) if rank % 2 == 0 else (1, 3)}
        assert {call.group for call in calls} == {"mesh_across"} and {call.place for call in calls} == {"here"}
        assert calls[0].dtype == torch.float64 and calls[1].dtype == torch.float32
        assert [(call.kind, call.peer, call.received) for call in calls if call.peer is not None] == [
            ("send", other, 0), ("recv", other, 24)]


def recorded_in_a_backward_and_a_thread() -> list[tuple[str, str]]:
    from megatron_deepseek.parallel.collectives import sum_gradients

    x, record = torch.ones(2, requires_grad=True), RecordedCollectives()
    y = sum_gradients(x, dist.group.WORLD).sum()

    def in_thread():
        with record:
            dist.all_reduce(torch.ones(3))

    with record:
        y.backward()
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
    return [(call.kind, call.place.split(":")[0]) for call in record.calls]


def test_places_are_lines_of_the_package(ranks):
    """The backward's collective began in the package; the thread's in no line of it, but in this file."""
    (first, second), _ = ranks.run(2, recorded_in_a_backward_and_a_thread)
    assert first == ("all_reduce", "parallel/collectives.py")
    assert second[0] == "all_reduce" and second[1].endswith("test_recorded_collectives.py")
