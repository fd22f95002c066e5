"""Which references of the past stay in --save: those that a checkpoint goes on with, also one being written."""

from types import SimpleNamespace

from cases import Case
from rollout_job import trainer_of

from megatron_deepseek.checkpoint.tracker import iteration_directory, iterations
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.rl import maker as maker_module
from megatron_deepseek.rl.maker import RolloutMaker
from megatron_deepseek.rl.reference import FOLDER, Reference
from megatron_deepseek.rl.rollouts import Rollout, read_rollout
from megatron_deepseek.rl.samples import Sample
from megatron_deepseek.rl_settings import PolicyLossSettings


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


def test_a_checkpoint_is_of_the_iteration_behind_the_update(monkeypatch, tmp_path):
    """The reference is told so, and behind the last update with a rollout its samples are kept no more."""
    told = []
    settings, reference = SimpleNamespace(policy_loss=PolicyLossSettings()), SimpleNamespace(
        checkpoint_begins=told.append)
    maker = RolloutMaker(settings, None, None, None, None, reference, None)
    monkeypatch.setattr(maker_module, "pack_samples", lambda *_: SimpleNamespace(batch=None))
    maker.rollout = Rollout(0, 4, 1, ((0,), (0,)), (Sample(0, (1,), (2,), "a", "stop", (-1.0,)),), (0.0,))
    for iteration, samples in ((4, 1), (5, 0)):
        maker.make(None, TrainState(iteration=iteration), 1)
        maker.keep()(tmp_path)
        assert told[-1] == iteration + 1 and len(read_rollout(tmp_path).samples) == samples
