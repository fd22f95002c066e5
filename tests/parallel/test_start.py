"""A start on several ranks of which some see other files than rank 0: a line on every rank, and no rank waits."""

import shutil

import pytest
from start_job import refused, share_a_directory, verify_elsewhere

from megatron_deepseek.checkpoint.integrity import CHECKSUMS, checksum_directory


def test_a_directory_that_nodes_do_not_share_is_refused(ranks, tmp_path):
    for error, _ in ranks.run(2, share_a_directory, tmp_path, False):
        assert error.startswith(f"--save {tmp_path}/") and "rank 1 on" in error and "does not see" in error
        assert "one directory of a file system that all nodes share" in error
    shutil.rmtree(tmp_path)
    answers = ranks.run(2, share_a_directory, tmp_path, True)
    assert answers[0] == answers[1] and answers[0][0] == "" and answers[0][1]


@pytest.mark.parametrize("failing, speaks", [((1,), 1), ((0,), 0), ((0, 1), 0)])
def test_one_rank_speaks_whoever_meets_the_error(ranks, failing, speaks):
    """Rank 0 where all of them do. Every one that met it ends."""
    for rank, (printed, status) in enumerate(ranks.run(2, refused, failing)):
        assert status == (2 if rank in failing else 0)
        line = "pretrain_deepseek.py: error: [Errno 5] Input/output error: '/file of rank"
        assert printed.startswith(line) if rank == speaks else printed == ""


def test_verification_goes_by_what_the_first_rank_sees(ranks, tmp_path):
    """Where another rank sees nothing, it is missing files; a damaged listing is an error for all."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    checksum_directory(tmp_path)
    for damage in ranks.run(2, verify_elsewhere, tmp_path):
        assert damage and all("is missing" in each for each in damage)
    (tmp_path / CHECKSUMS).write_text("{")
    for damage in ranks.run(2, verify_elsewhere, tmp_path):
        assert len(damage) == 1 and CHECKSUMS in damage[0]
