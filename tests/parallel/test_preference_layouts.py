"""Preference tuning under layouts against one process: losses, rewards, KTO's z, every gradient, updated weights.

In float64, to 1e-9. The data are packed rows of a file; some rows have one pair or answer, some several, and the last
ones are blank.
"""

from functools import cache

import pytest
from compare import differences
from preference_data import labelled, pairs, rows_of, write_rows
from preference_job import PreferenceCase, run_alone, run_preference

CASES = (
    PreferenceCase(preference="dpo", pp=2, tp=2, sp=True, ep=2, schedule="1F1B", microbatches=3, mtp=1),
    PreferenceCase(preference="kto", dp=2, cp=2, ep=4, dispatcher="allgather", microbatches=2, cp_type="allgather"),
)
MORE = (
    PreferenceCase(preference="dpo", pp=2, tp=2, cp=2, sp=True, ep=2, schedule="1F1B", microbatches=4, mtp=1,
                   recompute="full"),
    PreferenceCase(preference="dpo", dp=2, tp=2, microbatches=2, lora="all+router+mtp", mtp=1),
    PreferenceCase(preference="reward", pp=2, tp=2, dp=2, sp=True, schedule="ZBVZeroBubble", virtual=2,
                   microbatches=4),
    PreferenceCase(preference="orpo", tp=2, cp=2, chunk=3, microbatches=4),
    PreferenceCase(preference="simpo", dp=2, pp=2, schedule="1F1B", microbatches=2, reshard=True),
    PreferenceCase(preference="ipo", cp=2, dp=2, microbatches=2, tied=True),
    PreferenceCase(preference="hinge", pp=4, schedule="DualPipeV", virtual=2, microbatches=8, recompute="moe_act"),
    PreferenceCase(preference="reward", cp=2, dp=2, tp=2, microbatches=1, micro_batch_size=2),
    PreferenceCase(preference="kto", pp=2, dp=2, schedule="Interleaved1F1B", virtual=2, microbatches=2,
                   lora="attention+mlp"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The file of each objective, tokenised: ranks only read."""
    folder = tmp_path_factory.mktemp("preference")
    written = {"pairs": write_rows(folder / "pairs.jsonl", pairs(20)),
               "answers": write_rows(folder / "answers.jsonl", labelled(23))}

    @cache
    def file_of(objective: str):
        file = written["answers" if objective == "kto" else "pairs"]
        rows_of(file, objective)
        return file

    return file_of


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_layout_trains_as_one_process(ranks, files, case):
    file = files(case.preference)
    (alone,) = ranks.run(1, run_alone, case, file)
    found = differences(ranks.run(case.layout.world_size, run_preference, case, file), alone)
    assert not found, "\n".join(found[:10])
    assert alone.steps[0].grad_norm > 0
