"""--save-hf of a run that is started again after its end: an export of that very checkpoint is what is asked for."""

import pytest
from native_checkpoints import MODEL, random_state, write_native

from megatron_deepseek.checkpoint.job.export import check_export, export_hf, is_exported
from megatron_deepseek.settings import RunSettings


@pytest.fixture
def exported(tmp_path) -> RunSettings:
    """A run with its export."""
    write_native(tmp_path / "run", random_state())
    run = RunSettings(100, save=tmp_path / "run", save_hf=tmp_path / "hf")
    export_hf(run, 0, 1)
    return run


def test_the_same_checkpoint_in_the_same_numbers(exported, tmp_path):
    """Not another iteration, dtype or content of the same name."""
    checkpoint = exported.save / "iter_0000100"
    assert is_exported(exported.save_hf, checkpoint, bf16=False)
    assert not is_exported(exported.save_hf, checkpoint, bf16=True)
    write_native(tmp_path / "other", random_state(seed=1))
    assert not is_exported(exported.save_hf, tmp_path / "other" / "iter_0000100", bf16=False)
    write_native(exported.save, random_state(), iteration=200)
    assert not is_exported(exported.save_hf, exported.save / "iter_0000200", bf16=False)


def test_it_is_no_obstacle_once_the_run_is_finished(exported, tmp_path):
    checkpoint = exported.save / "iter_0000100"
    check_export(exported.save_hf, MODEL, False, finished=checkpoint)
    for finished, bf16 in ((None, False), (checkpoint, True)):
        with pytest.raises(ValueError, match=f"--save-hf {exported.save_hf} exists already"):
            check_export(exported.save_hf, MODEL, bf16, finished=finished)
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "model.safetensors.index.json").write_text("[")
    with pytest.raises(ValueError, match="exists already"):
        check_export(tmp_path / "another", MODEL, False, finished=checkpoint)
    check_export(tmp_path / "nothing", MODEL, False, finished=checkpoint)


def test_without_checksums_nobody_knows(exported):
    (exported.save / "iter_0000100" / "checksums.json").unlink()
    assert not is_exported(exported.save_hf, exported.save / "iter_0000100", bf16=False)
