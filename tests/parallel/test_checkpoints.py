"""Checkpoints on several ranks: the same bits through any layout, in the background too, and errors that say what."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from cases import Case
from checkpoint_job import (
    export_after_a_kill,
    go_on,
    load_and_save,
    load_damaged,
    load_into,
    save_in_the_background,
    save_on_a_full_disk,
    save_without_a_shared_directory,
    space_asked_for,
    train_and_save,
    uninterrupted_and_resumed,
)

from megatron_deepseek.checkpoint.integrity import verify_directory
from megatron_deepseek.checkpoint.tracker import find_iteration, iterations, last_iteration, leftovers

# One model (two layers, MTP, experts with a bias, tied embedding) in four layouts.
A = Case(dp=2, tp=2, sp=True, ep=4, dispatcher="allgather", microbatches=3, mtp=1, shared=2, tied=True)
B = Case(pp=2, schedule="1F1B", dp=1, microbatches=6, mtp=1, shared=2, tied=True)
C = Case(dp=3, tp=1, ep=1, microbatches=2, mtp=1, shared=2, tied=True, reshard=True)
SMALL = replace(A, tp=1, ep=2, sp=False)
EMPTY = replace(B, pp=4, cut=100)  # Et||t|mL: the second rank has nothing to save


def assert_same_bits(ours: list[dict], theirs: list[dict]) -> None:
    """What ranks hold of one name is equal on all of them, and between the two jobs, moments included."""
    first: dict[str, torch.Tensor] = {}
    for of_rank in [*theirs, *ours]:
        for name, tensor in of_rank.items():
            assert torch.equal(tensor, first.setdefault(name, tensor)), name
    assert set().union(*ours) == set().union(*theirs)
    assert any(name.startswith("optimizer.exp_avg_sq.") and tensor.any() for name, tensor in first.items())
    assert any(name.endswith("e_score_correction_bias") and tensor.any() for name, tensor in first.items())


def test_from_layout_to_layout_and_back(ranks, tmp_path):
    """A -> B -> EMPTY -> C -> A; every directory passes its checksums."""
    assert A.model == B.model == C.model and A.global_batch_size == B.global_batch_size == C.global_batch_size
    start = ranks.run(4, train_and_save, A, tmp_path / "0")
    assert EMPTY.model == A.model and EMPTY.layout_string == "Et||t|mL"
    for number, case in enumerate((B, EMPTY, C, A)):
        arrived = ranks.run(case.layout.world_size, load_and_save, case, tmp_path / str(number),
                            tmp_path / str(number + 1))
        assert_same_bits(arrived, start)
        assert verify_directory(find_iteration(tmp_path / str(number + 1), 2)) == []


@pytest.mark.slow
def test_from_subset_to_subset_in_other_layouts(ranks, tmp_path):
    """Each life trains another drawn subset, on one process and in layouts, from whose checkpoints the next goes on.
    Equal are all weights, moments and numbers of steps; those of the newly trained are fewer.
    """
    one, alone, spread = replace(B, pp=1, schedule="none", microbatches=6), [], []
    for number, layout in enumerate((A, EMPTY, C, replace(B, schedule="GPipe", dp=2, microbatches=3))):
        before = [tmp_path / f"{name}{number - 1}" if number else None for name in ("one", "all")]
        frozen = number + 1 if number < 3 else 0  # at last everything is trained
        alone = ranks.run(1, go_on, replace(one, frozen=frozen), before[0], tmp_path / f"one{number}")
        spread = ranks.run(layout.layout.world_size, go_on, replace(layout, frozen=frozen), before[1],
                           tmp_path / f"all{number}")
        assert layout.model == one.model
        (wanted, steps), = alone
        for found, steps_here in spread:
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-9 * wanted[name].abs().max().item())
            assert steps_here.items() <= steps.items()
        assert set(wanted) == set().union(*(found for found, _ in spread))
        assert verify_directory(find_iteration(tmp_path / f"all{number}", 2 * number + 2)) == []
    assert set(steps.values()) == {2.0, 4.0, 6.0, 8.0}


@pytest.mark.parametrize("case", [
    SMALL, replace(B, schedule="ZBVZeroBubble", virtual=2), replace(B, frozen=1)], ids=["data", "V-shaped", "frozen"])
def test_resuming_in_the_same_layout_changes_no_bit(ranks, tmp_path, case):
    for uninterrupted, resumed in ranks.run(case.layout.world_size, uninterrupted_and_resumed, case, tmp_path):
        assert_same_bits([resumed], [uninterrupted])


@pytest.mark.parametrize("case", [SMALL, EMPTY], ids=["data", "empty stage"])
def test_a_save_in_the_background_has_the_numbers_of_its_beginning(ranks, tmp_path, case):
    before, written = zip(*ranks.run(case.layout.world_size, save_in_the_background, case, tmp_path))
    assert_same_bits(written, before)
    assert iterations(tmp_path) == [1, 2] and last_iteration(tmp_path) == 2 and not leftovers(tmp_path)


def test_a_save_asks_for_its_own_size(ranks, tmp_path):
    """Not for each rank's whole tensors, nor for the copies that tensor-parallel ranks hold."""
    (asked, written), *others = ranks.run(4, space_asked_for, A, tmp_path)
    assert [of_rank for of_rank, _ in others] == [[], [], []]
    assert written <= asked[0] < 1.25 * written and len(asked) == 1  # a small model: a fifth of it is headers


def test_files_that_another_node_keeps_to_itself_fail_the_save(ranks, tmp_path):
    """On every rank in a line; the checkpoint before stays, although --keep-last 1 would have removed it."""
    for message, _ in (results := ranks.run(3, save_without_a_shared_directory, replace(C, reshard=False), tmp_path)):
        assert message.startswith(f"{tmp_path}/0/iter_0000002.saving: __2_0.distcp, which rank 2 wrote on ")
        assert message.endswith("no shared file system?") and "\n" not in message
    assert [there for _, there in results] == 2 * [
        ["iter_0000001", "iter_0000002.saving", "latest_checkpointed_iteration.txt"]] + [["iter_0000002.saving"]]
    assert last_iteration(tmp_path / "0") == 1 and verify_directory(find_iteration(tmp_path / "0", 1)) == []


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_the_same_error_on_every_rank(ranks, tmp_path, in_background):
    """One rank meets it; both say which file and how much is free, soon, and the checkpoint before is whole."""
    errors = ranks.run(2, save_on_a_full_disk, SMALL, tmp_path, in_background)
    for error, seconds in errors:
        assert error.errno == errno.ENOSPC and "__1_0.distcp" in error.filename and "are free" in error.strerror
        assert seconds < 20
    assert last_iteration(tmp_path) == 1 and verify_directory(find_iteration(tmp_path, 1)) == []
    assert [path.name for path in leftovers(tmp_path)] == ["iter_0000002.saving"]


def test_damage_and_another_model_are_named_on_every_rank(ranks, tmp_path):
    """A flipped bit; then models with tensors that the checkpoint lacks, and one that lacks some of its."""
    ranks.run(2, train_and_save, SMALL, tmp_path)
    directory = find_iteration(tmp_path, 2)
    file = directory / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for damage in ranks.run(2, load_damaged, SMALL, tmp_path):
        assert len(damage) == 1 and damage[0].startswith("__1_0.distcp has changed")
    state = json.loads((directory / "state.json").read_text())
    assert state == {"iteration": 2, "consumed_samples": 12, "optimizer_steps": 2, "batches": [[2, 6]]}
    with_biases = replace(SMALL, attention_bias=True)
    for message in ranks.run(2, load_into, with_biases, tmp_path, True):
        assert "lacks" in message and "tensors of this model, first model." in message and "bias" in message
    for message in ranks.run(2, load_into, replace(SMALL, tied=False), tmp_path, True):
        assert "model.lm_head.weight" in message
    for message in ranks.run(2, load_into, replace(SMALL, mtp=0), tmp_path, False):
        assert "tensors that this model lacks, first model.model.layers.2" in message


def test_an_export_that_goes_on_after_a_kill_waits_for_its_own_ranks(ranks, tmp_path):
    """What the killed start's ranks left word of, that they were done, is not theirs."""
    assert ranks.run(2, export_after_a_kill, SMALL, tmp_path) == [(False, ["export", "run"])] * 2
