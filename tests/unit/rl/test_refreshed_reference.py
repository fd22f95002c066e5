"""Which references of the past stay in --save: those that a checkpoint goes on with, also one that is being written."""

from types import SimpleNamespace

from cases import Case
from rollout_job import trainer_of

from megatron_deepseek.checkpoint.tracker import iteration_directory, iterations
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.rl.maker import RolloutMaker
from megatron_deepseek.rl.reference import FOLDER, Reference


def test_a_reference_stays_while_a_checkpoint_needs_it(meshes, tmp_path):
    trainer = trainer_of(Case())
    run = SimpleNamespace(save=tmp_path, distributed_timeout_minutes=1)
    settings = SimpleNamespace(reinforcement=SimpleNamespace(reference_refresh_interval=4), lora=None, run=run,
                               model=trainer.spec.model)
    reference = Reference(settings, trainer, None, print)
    for iteration in (0, 4):
        reference.before_rollout(TrainState(iteration=iteration))
    reference.checkpoint_begins(6)  # in the background: finished behind iteration 8
    reference.before_rollout(TrainState(iteration=8))
    assert iterations(tmp_path / FOLDER) == [4, 8]
    iteration_directory(tmp_path, 6).mkdir()
    reference.checkpoint_begins(10)
    reference.before_rollout(TrainState(iteration=12))
    assert iterations(tmp_path / FOLDER) == [4, 8, 12]
    iteration_directory(tmp_path, 6).rmdir()  # by --keep-last
    iteration_directory(tmp_path, 10).mkdir()
    reference.before_rollout(TrainState(iteration=16))
    assert iterations(tmp_path / FOLDER) == [8, 16]


def test_the_reference_is_told_of_each_checkpoint():
    told = []
    reference = SimpleNamespace(checkpoint_begins=told.append)
    maker = RolloutMaker(None, None, None, None, None, reference, None)
    maker.keep()
    assert told == [0]
