"""The search: what it proposes is accepted and fits, an annealer does not beat it, and it says what is closest."""

import random
import shlex
from dataclasses import replace
from math import exp

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.auto_layout import accept_for, chosen, defaults
from megatron_deepseek.arguments.settings import build_settings
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.planning.candidates import Choice, Lane, lanes, options, pipelines, recomputes, words
from megatron_deepseek.parallel.layout_string import to_short_string
from megatron_deepseek.planning.gpus import find_gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import FITS, all_ranks, rank_memory, verdict
from megatron_deepseek.planning.rank_costs import RankCosts
from megatron_deepseek.planning.search import Search, bounds_of
from megatron_deepseek.planning.stage_time import machine_of
from megatron_deepseek.planning.step_time import step_time

LITE = "--model tiny --data-path any --train-iters 10 --seq-length 512 --global-batch-size 64"
GPU = find_gpu("h100")
RANKS = 4


def search_of(arguments, ranks=RANKS, limit=GPU.memory_bytes, gpu=GPU, fixed=None):
    args = build_parser().parse_args(arguments.split())
    alone = accept_for(build_settings, args, 1, 1)({})
    accept = accept_for(build_settings, args, ranks, min(ranks, gpu.scale_up_gpus))
    return Search(Job(alone), gpu, limit, ranks, accept, fixed)


@pytest.fixture(scope="module")
def search():
    return search_of(LITE)


@pytest.fixture(scope="module")
def found(search):
    return search.run()


def test_everything_that_is_proposed_parses_fits_and_is_as_fast_as_said(found):
    assert len(found.plans) == 10
    seconds = [plan.step.step_seconds for plan in found.plans]
    assert seconds == sorted(seconds)
    for plan in found.plans:
        said = words(plan.values, defaults())
        settings = parse(LITE.split() + shlex.split(shlex.join(said)), RANKS, RANKS)
        job = Job(settings)
        assert step_time(job, GPU).step_seconds == pytest.approx(plan.step.step_seconds)
        assert verdict(all_ranks(job), GPU) == FITS


def test_two_searches_find_the_same(search, found):
    again = search_of(LITE).run()
    assert [plan.values for plan in again.plans] == [plan.values for plan in found.plans]


def test_an_annealer_does_not_beat_it(search, found):
    """Annealing over lanes, pipelines, recomputation, offloading and edges of stages, with the whole simulation."""
    chance, best = random.Random(0), found.plans[0].step.step_seconds
    here = (found.plans[-1].choice, None)
    now = found.plans[-1].step.step_seconds
    seen, heat = now, 0.1
    for _ in range(150):
        there = _neighbour(search, here, chance)
        seconds = _seconds(search, there)
        if seconds is not None and (seconds < now or chance.random() < exp((1 - seconds / now) / heat)):
            here, now, seen = there, seconds, min(seen, seconds)
        heat *= 0.985
    assert seen >= best * (1 - 1e-3), (seen, best)


def _neighbour(search, place, chance):
    choice, bounds = place
    kind = chance.choice(["lane", "pipeline", "memory", "edge"])
    if kind == "lane":
        near = [lane for lane in lanes(search.model, RANKS, 4096) if _distance(lane, choice.lane) == 1]
        return replace(choice, lane=chance.choice(near)), None
    if kind == "pipeline":
        pp, virtual, schedule = chance.choice(list(pipelines(search.model, choice.lane, RANKS, search.batch)) or [
            (choice.pp, choice.virtual, choice.schedule)])
        return replace(choice, pp=pp, virtual=virtual, schedule=schedule), None
    if kind == "memory":
        granularity, modules = chance.choice(recomputes(search.model))
        return replace(choice, granularity=granularity, modules=modules, offloaded=chance.choice([0, 0, 1])), bounds
    return choice, ("edge", bounds, chance.random(), chance.choice([-1, 1]))


def _distance(one, other):
    return sum(getattr(one, name) != getattr(other, name) for name in Lane.__dataclass_fields__)


def _seconds(search, place):
    """Return the whole simulation's seconds, None for what is refused or does not fit."""
    choice, edge = place
    try:
        settings = search.accept(options(choice, search.model, search.per_node))
    except ValueError:
        return None
    job = Job(settings)
    if isinstance(edge, tuple) and choice.pp > 1:
        bounds = list(bounds_of(job, search.model.num_hidden_layers + search.model.num_nextn_predict_layers + 1))
        at = 1 + int(edge[2] * (len(bounds) - 1))
        moved = bounds[at][0] + edge[3]
        if not bounds[at - 1][0] < moved < bounds[at][1]:
            return None
        bounds[at - 1:at + 1] = [(bounds[at - 1][0], moved), (moved, bounds[at][1])]
        from megatron_deepseek.planning.pipeline_balance import stage_of

        job = replace(job, cut=tuple(stage_of(search.model, *each) for each in bounds))
    if verdict(all_ranks(job), GPU) != FITS:
        return None
    return step_time(job, GPU).step_seconds


@pytest.mark.parametrize("pp, virtual, schedule", [(1, 1, "1F1B"), (4, 1, "1F1B"), (4, 2, "DualPipeV"),
                                                   (4, 2, "ZBVZeroBubble"), (2, 3, "Interleaved1F1B")])
def test_costs_of_ranks_are_those_of_the_plan(pp, virtual, schedule):
    """What the search asks thousands of times is what memory.py says of the whole job."""
    search = search_of("--model deepseek-v2-lite --bf16 --data-path any --train-iters 10 --global-batch-size 64", 8)
    for way in (dict(), dict(granularity="full"), dict(granularity="selective", modules=("layernorm",), offloaded=1)):
        choice = Choice(Lane(ep=2), pp, virtual, schedule, **way)
        job = Job(search.accept(options(choice, search.model, 8)))
        costs = RankCosts(job, machine_of(job, GPU), GPU.memory_bytes, virtual)
        bounds = bounds_of(job, costs.parts)
        for rank in range(pp):
            held = tuple(bounds[stage] for stage in job.held(rank))
            expected = rank_memory(job, rank)
            assert costs.peak(rank, held) == pytest.approx(expected.peak_bytes, rel=1e-9)
            assert costs.needed(expected.peak_bytes) == pytest.approx(expected.high, rel=1e-9)


def test_less_memory_is_made_by_recomputing_offloading_and_sharding():
    roomy = search_of(LITE).run().plans
    limit = 0.97 * max(rank.high for rank in roomy[0].memory)
    tight = search_of(LITE, limit=limit).run().plans
    assert tight and tight[0].step.step_seconds >= roomy[0].step.step_seconds
    assert all(max(rank.high for rank in plan.memory) <= limit for plan in tight)


def test_given_arguments_stay():
    found = search_of(LITE, fixed={"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}).run()
    assert found.plans and all(plan.choice.pp == 2 and plan.choice.lane.ep == 2 for plan in found.plans)


def test_where_nothing_fits_the_closest_is_told():
    found = search_of(LITE, ranks=1, limit=0.4e9).run()
    assert not found.plans
    choice, _, needs = found.closest
    assert choice.granularity == "full" and needs.high > 0.4e9


def test_auto_layout_is_the_first_of_the_search(found):
    args = build_parser().parse_args([*LITE.split(), "--auto-layout", "h100"])
    assert chosen(build_settings, args, RANKS, RANKS) == found.plans[0].values
    settings = parse([*LITE.split(), "--auto-layout", "h100"], RANKS, RANKS)
    assert Job(settings).stages == found.plans[0].step.job.stages
    assert "--auto-layout h100 is --tensor-model-parallel-size" in settings.notes[-1]


@pytest.mark.parametrize("more, message", [
    ("--tensor-model-parallel-size 2", "--auto-layout h100 chooses --tensor-model-parallel-size itself"),
    ("--recompute-granularity full", "--auto-layout h100 chooses --recompute-granularity itself")])
def test_auto_layout_refuses_what_it_chooses(more, message):
    with pytest.raises(ValueError, match=message):
        parse([*LITE.split(), *more.split(), "--auto-layout", "h100"], RANKS, RANKS)


def test_auto_layout_of_an_unknown_gpu_or_too_few_is_one_line():
    for gpu, message in (("h1000", "--auto-layout 'h1000' is not known"), ("h100", "nothing fits on 1 x h100")):
        with pytest.raises(ValueError, match=message) as raised:
            parse(["--auto-layout", gpu, *LITE.replace("tiny", "deepseek-v3").split()], 1, 1)
        assert "\n" not in str(raised.value)


def test_layout_strings_in_short():
    settings = parse((LITE + " --pipeline-model-parallel-size 4").split(), RANKS, RANKS)
    stages = Job(settings).stages
    given = f" --pipeline-model-parallel-size 4 --pipeline-model-parallel-layout {to_short_string(stages)}"
    again = parse((LITE + given).split(), RANKS, RANKS)
    assert Job(again).stages == stages
