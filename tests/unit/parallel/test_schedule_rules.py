"""The rules for schedules against torch's own constructors, which also prove that their order of actions ends."""

from types import SimpleNamespace

import pytest

from megatron_deepseek.parallel import schedule_rules

torch_pipelining = pytest.importorskip("torch.distributed.pipelining")
torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")


def fake_stage(index: int, stages: int, pp: int) -> SimpleNamespace:
    return SimpleNamespace(stage_index=index, num_stages=stages, group_size=pp, group_rank=0, group=None, device="cpu",
                           has_backward=True, is_first=index == 0, is_last=index == stages - 1, submod=None,
                           stage_index_to_group_rank=None)


def torch_accepts(name: str, pp: int, virtual: int, microbatches: int) -> bool:
    total = pp * virtual
    indices = [0, total - 1] if name in schedule_rules.V_SHAPED else [k * pp for k in range(virtual)]
    mine = [fake_stage(index, total, pp) for index in indices[:virtual]]
    kind = torch_schedules.get_schedule_class(name)
    single = issubclass(kind, torch_schedules.PipelineScheduleSingle)
    try:
        kind(mine[0] if single else mine, microbatches, loss_fn=lambda output, target: 0)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", schedule_rules.SCHEDULES)
def test_microbatches(name):
    virtual = schedule_rules.VIRTUAL_STAGES[name]
    for pp in (2, 3, 4):
        for microbatches in range(1, 13):
            assert schedule_rules.takes_microbatches(name, pp, microbatches) == torch_accepts(
                name, pp, virtual, microbatches), (pp, microbatches)


@pytest.mark.parametrize("name", schedule_rules.V_SHAPED)
def test_v_shaped_schedules_take_two_stages_on_a_rank(name):
    assert [v for v in (1, 2, 3) if schedule_rules.takes_virtual_stages(name, v)] == [2]
    assert torch_accepts(name, 2, 2, 8) and not torch_accepts(name, 2, 1, 8)


def test_schedules_are_all_that_torch_has():
    """Of torch.distributed.pipelining's public names; the forward-only one, for evaluation, has its own place here."""
    names = {name.removeprefix("Schedule") for name in dir(torch_pipelining) if name.startswith("Schedule")}
    assert names == set(schedule_rules.SCHEDULES)


def test_loops_over_several_stages_take_any_number_from_two():
    for name in ("LoopedBFS", *schedule_rules.INTERLEAVED):
        assert [v for v in (1, 2, 3) if schedule_rules.takes_virtual_stages(name, v)] == [2, 3]
        assert torch_accepts(name, 2, 3, 8)
