"""The loop of a run, with a trainer that only takes notes: which samples and rates each step gets, what is validated,
and what is told of it.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from small_datasets import EOD, SEQ, write_dataset

from megatron_deepseek.arguments import Settings, parse
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import number_documents
from megatron_deepseek.data.pretraining import build_datasets
from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel.nodes import Traffic
from megatron_deepseek.planning.flops import model_flops_per_token
from megatron_deepseek.pretraining.loop import Pretraining
from megatron_deepseek.runtime.decision import Start
from megatron_deepseek.runtime.job import training_spec
from megatron_deepseek.runtime.loop import Run
from megatron_deepseek.runtime.recorded import Job
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.resume import go_on, num_samples, check_and_decide
from megatron_deepseek.training.acceptance import Validation, ValidationLosses
from megatron_deepseek.training.next_token import NextToken
from megatron_deepseek.training.objective import Objective
from megatron_deepseek.training.trainer import StepResult

RAMP = "--rampup-batch-size 2 2 8 --global-batch-size 6"  # batches of 2, 2, 4 and then 6
SIZES = [2, 2, 4, 6, 6]
CONSUMED = [0, 2, 4, 8, 14, 20]


@pytest.fixture
def corpus(tmp_path):
    write_dataset(tmp_path / "data", num_documents=60)
    return tmp_path / "data"


def settings_of(corpus, more: str = "") -> Settings:
    return parse(f"--model tiny --data-path {corpus} --tokenizer-type NullTokenizer --tokenizer-model {EOD} "
                 f"--seq-length {SEQ} --train-iters 5 {RAMP} --lr 1e-2 --lr-decay-style linear {more}".split(), 1)


class RecordingTrainer:
    """A stand-in for a Trainer that records every step and batch, and gives each losses that tell it from others."""

    def __init__(self, settings: Settings, meshes, skipped: tuple[int, ...] = ()):
        self.spec, self.meshes, self.skipped = training_spec(settings), meshes, skipped
        self.stages, self.optimizer, self.objective = [], None, NextToken(1)
        self.steps, self.evaluations = [], []

    def train_step(self, batch: Batch, learning_rate: float, bias_rate: float, stop_flags) -> StepResult:
        self.steps.append({"batch": batch, "learning_rate": learning_rate, "bias_rate": bias_rate})
        number = len(self.steps)
        return StepResult(losses(number, batch), number / 2, {}, Traffic(3, 5), dropped=0.25, cross_node_sends=1.5,
                          updated=number not in self.skipped, stop_flags=stop_flags())

    def evaluate(self, batch: Batch, objective: Objective) -> ValidationLosses:
        assert isinstance(objective, Validation) and objective.num_depths == 1
        self.evaluations.append(batch)
        return losses(len(self.evaluations), batch)


def losses(number: int, batch: Batch) -> ValidationLosses:
    """Of call `number`, with as many drafts; two labels of each source."""
    reports = {"lm_loss": float(number), "mtp_loss_1": 10.0 * number, "mtp_acceptance_1": 0.01 * number}
    counts = {"labels": 4.0, "labels_1": float(number)}
    for source in range(0 if batch.sources_BK is None else batch.sources_BK.shape[1]):
        reports[f"source_loss_{source}"] = 2.0 * number
        counts |= {f"source_weight_{source}": 2.0, f"source_labels_{source}": 2.0}
    return ValidationLosses(reports, number / 8, counts)


NO_LABELS = ValidationLosses({"lm_loss": 0.0, "mtp_loss_1": 0.0, "mtp_acceptance_1": 0.0}, 0.0,
                             {"labels": 0.0, "labels_1": 0.0})


class Listener:
    """All that a report is told."""

    def __init__(self):
        self.steps, self.validations, self.held, self.drawn, self.messages = [], [], [], [], []

    def step(self, metrics):
        self.steps.append(metrics)

    def validation(self, *what):
        self.validations.append(what)

    def held_out(self, *what):
        self.held.append(what)

    def curves(self, iteration, curves):
        self.drawn.append((iteration, curves))

    def message(self, text):
        self.messages.append(text)

    def close(self):
        pass


def run(settings: Settings, meshes, state: TrainState = TrainState(), skipped: tuple[int, ...] = ()
        ) -> tuple[Run, RecordingTrainer, Listener]:
    trainer, told = RecordingTrainer(settings, meshes, skipped), Listener()
    made = Run(Pretraining().prepare(settings), settings, trainer, Report(told), Start(), state, 0.0, Job("job"))
    made.train()
    return made, trainer, told


def samples(settings: Settings, split: int, numbers: range, name: str = "tokens") -> torch.Tensor:
    dataset = build_datasets(settings.data, num_samples(settings))[split]
    return torch.stack([dataset[number][name] for number in numbers])


def test_each_step_has_its_samples_and_its_rates(meshes, corpus):
    """Under a ramp the learning rate goes by samples; the bias stops moving after the updates that were asked for."""
    settings = settings_of(corpus, "--moe-router-bias-update-until 3 --lr-warmup-iters 1")
    ended, trainer, told = run(settings, meshes)
    assert ended.state == TrainState(5, 20, 5, ((2, 2), (1, 4), (2, 6)))
    for step, (given, metrics) in enumerate(zip(trainer.steps, told.steps, strict=True)):
        read = range(CONSUMED[step], CONSUMED[step + 1])
        batch = given["batch"]
        for argument, name in (("tokens_BS", "tokens"), ("labels_BS", "labels"), ("weights_BS", "loss_mask")):
            assert torch.equal(getattr(batch, argument), samples(settings, 0, read, name))
        assert batch.documents_BS is batch.sources_BK is batch.real_BS is None
        rate = 1e-2 * (CONSUMED[step] / 2 if step < 2 else 1 - (CONSUMED[step] - 2) / 18)
        assert given["learning_rate"] == metrics.learning_rate == pytest.approx(rate, rel=1e-14)
        assert given["bias_rate"] == (1e-3 if step < 3 else 0.0)
        assert (metrics.iteration, metrics.tokens) == (step + 1, SIZES[step] * SEQ)
        assert (metrics.lm_loss, metrics.mtp_loss) == (step + 1.0, (10.0 * (step + 1),))
        assert (metrics.balance_loss, metrics.grad_norm) == ((step + 1) / 8, (step + 1) / 2)
        assert metrics.skipped is None and metrics.step_seconds > 0
        assert metrics.moe_bytes_within_node is metrics.moe_bytes_across_nodes is metrics.moe_dropped_fraction is None
    assert len({given["learning_rate"] for given in trainer.steps}) == 5


def test_a_resumed_run_goes_on_where_it_was(meshes, corpus):
    """A step that updates nothing counts as an iteration and its samples as read, but not as an optimizer's step."""
    settings = settings_of(corpus, "--nan-policy skip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_deepseek.runtime.loop.find_origin", lambda *args: "somewhere")
        ended, trainer, told = run(settings, meshes, TrainState(2, 4, 1, ((2, 2),)), skipped=(2,))
    assert ended.state == TrainState(5, 20, 3, ((2, 2), (1, 4), (2, 6)))
    assert [given["batch"].num_rows for given in trainer.steps] == SIZES[2:]
    assert torch.equal(trainer.steps[0]["batch"].tokens_BS, samples(settings, 0, range(4, 8)))
    assert [metrics.iteration for metrics in told.steps] == [3, 4, 5]
    assert [metrics.skipped for metrics in told.steps] == [None, True, None]
    assert any(message.startswith("iteration 4: ") and "somewhere" in message for message in told.messages)


@pytest.mark.parametrize("size, sizes", [(8, [8, 8, 8]), (2, [2] * 12), (5, [5] * 4)])
def test_a_run_in_samples_resumed_with_other_batches(meshes, corpus, size, sizes):
    """24 of 48 samples are done, at batch 4: the rest is taken in whole batches, read on from where it was, of data of
    just that length; the rate falls to nothing at 48; the bias stops after 40; the end is validated.
    """
    done = TrainState(6, 24, 6, ((6, 4),))
    told = parse(f"--model tiny --data-path {corpus} --tokenizer-type NullTokenizer --tokenizer-model {EOD} "
                 f"--seq-length {SEQ} --train-samples 48 --global-batch-size {size} --lr 1e-2 --lr-decay-style linear "
                 "--moe-router-bias-update-samples 40 --split 50,50,0 --eval-iters 1".split(), 1)
    settings, state = go_on(told, done)
    assert (settings.run.train_iters, state) == (6 + len(sizes), done)
    assert num_samples(settings, state) == (24 + sum(sizes), size, 0)
    ended, trainer, heard = run(settings, meshes, state)
    assert [given["batch"].num_rows for given in trainer.steps] == sizes
    consumed = [24 + size * step for step in range(len(sizes))]
    assert torch.equal(trainer.steps[0]["batch"].tokens_BS, samples(settings, 0, range(24, 24 + size)))
    rates = [given["learning_rate"] for given in trainer.steps]
    assert rates == pytest.approx([1e-2 * (1 - before / 48) for before in consumed], rel=1e-14)
    assert [bool(given["bias_rate"]) for given in trainer.steps] == [before + size <= 40 for before in consumed]
    assert [iteration for iteration, *_ in heard.validations] == [6 + len(sizes)]
    assert (ended.state.iteration, ended.state.consumed_samples) == (6 + len(sizes), 24 + sum(sizes))


def test_a_schedule_is_checked_with_the_batches_that_a_run_had(corpus, tmp_path, monkeypatch):
    """A warm-up of 90 samples is too long for 20 iterations of 2, but not after 10 of 8 of them: 100 samples in all."""
    directory = tmp_path / "save" / "iter_0000010"
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(json.dumps(asdict(TrainState(10, 80, 10, ((10, 8),)))))
    command = (f"--model tiny --data-path {corpus} --tokenizer-type NullTokenizer --tokenizer-model {EOD} --seq-length "
               f"{SEQ} --train-iters 20 --global-batch-size 2 --lr-warmup-samples ")
    with pytest.raises(ValueError, match="--lr-warmup-samples 90 .* --train-iters 20 .40 samples"):
        parse(f"{command} 90".split(), 1)
    command = command.replace("--lr-warmup", f"--save {tmp_path / 'save'} --lr-warmup")
    monkeypatch.setattr("megatron_deepseek.runtime.resume.end_on_user_error", lambda lock: nullcontext())
    monkeypatch.setattr("megatron_deepseek.runtime.resume.decide", lambda *args: Start())
    with pytest.raises(ValueError, match="--lr-warmup-samples 90 .* --train-iters 20 .40 samples"):
        check_and_decide(parse(f"{command} 90".split(), 1), None, None, Pretraining())
    monkeypatch.setattr("megatron_deepseek.runtime.resume.decide", lambda *args: Start(load=directory))
    assert check_and_decide(parse(f"{command} 90".split(), 1), None, None, Pretraining()).load == directory
    with pytest.raises(ValueError, match="--lr-warmup-samples 100 .* --train-iters 20 .100 samples"):
        check_and_decide(parse(f"{command} 100".split(), 1), None, None, Pretraining())
    with pytest.raises(ValueError, match="--min-lr"):
        parse(f"{command} 90 --min-lr 1".split(), 1)


def test_a_run_in_iterations_resumed_with_other_batches_has_its_iterations(meshes, corpus):
    """3 of 5 iterations were of 8, the last two are of 6: 36 samples, though 5 of 6 are 30; over these the rate falls,
    and so many are prepared. One past its end has none, and its data are those that it read.
    """
    settings, state = go_on(settings_of(corpus), TrainState(3, 24, 3))
    assert (settings.run.train_iters, state.batches) == (5, ((3, 8),))
    assert num_samples(settings, state)[0] == 36
    ended, trainer, _ = run(settings, meshes, state)
    assert ended.state == TrainState(5, 36, 5, ((3, 8), (2, 6)))
    rates = [given["learning_rate"] for given in trainer.steps]
    assert rates == pytest.approx([1e-2 * 12 / 36, 1e-2 * 6 / 36], rel=1e-14)
    assert ended.train_data.dataset.num_samples == 36
    settings, state = go_on(settings_of(corpus), TrainState(9, 24, 9))
    assert num_samples(settings, state)[0] == 24 and not run(settings, meshes, state)[1].steps


def test_a_batch_without_labels_is_told_in_training_and_in_validation(meshes, corpus, monkeypatch):
    monkeypatch.setattr("test_loop.losses", lambda number, batch: NO_LABELS)
    *_, told = run(settings_of(corpus, "--split 50,50,0 --eval-iters 2"), meshes)
    assert len([line for line in told.messages if "all labels of the batch are masked; its loss is 0" in line]) == 1
    assert len([line for line in told.messages if line.startswith("validation: all labels are masked")]) == 2


def test_validation_is_a_mean_over_the_same_batches_every_time(meshes, corpus):
    """Before the first step, every eval_interval, and after the last; a resumed run has done so before."""
    settings = settings_of(corpus, "--split 50,50,0 --eval-iters 3 --eval-interval 2")
    assert num_samples(settings) == (20, 18, 0)
    _, trainer, told = run(settings, meshes)
    numbers = {0: (1, 2, 3), 2: (4, 5, 6), 4: (7, 8, 9), 5: (10, 11, 12)}  # of each validation's batches
    assert [(iteration, loss) for iteration, loss, *_ in told.validations] == [
        (iteration, sum(batches) / 3) for iteration, batches in numbers.items()]
    for (_, _, mtp, *_), batches in zip(told.validations, numbers.values()):  # batch n has n labels of depth 1
        assert mtp == pytest.approx((10 * sum(n * n for n in batches) / sum(batches),), rel=1e-14)
    assert told.validations[0][4] == pytest.approx([(0.01 * 1 + 0.02 * 2 + 0.03 * 3) / (1 + 2 + 3)])  # over all drafts
    for number, given in enumerate(trainer.evaluations):
        first = number % 3 * 6
        assert torch.equal(given.tokens_BS, samples(settings, 1, range(first, first + 6)))
    assert [what[0] for what in run(settings, meshes, TrainState(2, 4, 2, ((2, 2),)))[2].validations] == [4, 5]
    assert not run(settings_of(corpus), meshes)[2].validations


def test_documents_masks_and_sources_are_those_of_the_data(meshes, corpus):
    """In training and in validation."""
    blend = f"--data-path 0.5 {corpus} 0.5 {corpus} --split 50,50,0 --eval-iters 2"
    _, trainer, told = run(settings_of(corpus, f"{blend} --reset-attention-mask --eod-mask-loss"), meshes)
    trained = [given["batch"] for given in trainer.steps]
    for batch in (*trained, *trainer.evaluations):
        assert torch.equal(batch.documents_BS, number_documents(batch.tokens_BS, EOD))
        assert torch.equal(batch.weights_BS, (batch.tokens_BS != EOD).float())
        assert batch.sources_BK.sum(1).tolist() == [1] * batch.num_rows
    assert any(batch.documents_BS.any() for batch in trained)
    assert told.validations[0][3] == {"data": 1.5, "data#2": 1.5}  # of two batches
    assert told.steps[2].source_loss == {"data": 3.0, "data#2": 3.0}
    assert told.steps[2].source_tokens == {"data": 2, "data#2": 2}


def test_what_is_told_of_experts_is_what_there_is(meshes, corpus):
    """Bytes where experts are on several ranks, dropped tokens under a capacity, a balance loss where there is one."""
    settings = settings_of(corpus, "--moe-expert-capacity-factor 1 --moe-router-load-balancing-type none")
    spread = replace(settings, layout=replace(settings.layout, dp=2, ep=2))  # of the batch this rank has all rows
    (first, *_) = run(spread, meshes)[2].steps
    assert (first.moe_bytes_within_node, first.moe_bytes_across_nodes) == (3, 5)
    assert (first.moe_dropped_fraction, first.moe_crossings_per_token, first.balance_loss) == (0.25, 1.5, None)


def test_throughput_counts_the_models_operations_of_each_rank(meshes, corpus):
    settings = settings_of(corpus, "--log-throughput")
    first = run(settings, meshes)[2].steps[0]
    operations = first.tokens * model_flops_per_token(settings.model, SEQ)
    assert first.tflops_per_rank == pytest.approx(operations / first.step_seconds / 1e12, rel=1e-12)
    assert run(settings_of(corpus), meshes)[2].steps[0].tflops_per_rank is None


OPTIONS = """--bf16 --micro-batch-size 2 --adam-eps 1e-6 --clip-grad 0.5 --mtp-loss-scaling-factor 0.7
    --recompute-granularity full --cp-comm-type allgather --cpu-offloading-num-layers 1 --seed 7
    --data-parallel-sharding-strategy optim_grads_params --num-virtual-stages-per-pipeline-rank 2
    --pipeline-model-parallel-size 2 --pipeline-schedule ZBVZeroBubble --fp8-format e4m3"""


def test_a_training_spec_has_everything_that_was_asked_for(corpus):
    plain = training_spec(settings_of(corpus))
    assert plain.build.precision == Precision() and not plain.build.reshard_after_forward and plain.build.seed == 1234
    settings = parse(f"--model tiny --data-path {corpus} --train-iters 1 --seq-length 64 {OPTIONS} "
                     "--global-batch-size 16".split(), 2)
    spec = training_spec(settings)
    assert spec.build.precision == Precision(torch.float32, torch.bfloat16, fp8=True)
    assert (spec.model, spec.schedule, spec.seq_length) == (settings.model, "ZBVZeroBubble", 64)
    assert spec.micro_batch_size == 2
    assert len(spec.stages) == 4 and spec.build.reshard_after_forward and spec.build.seed == 7
    assert spec.build.loss.mtp_loss_scaling_factor == 0.7
    assert (spec.optimizer.adam_eps, spec.optimizer.clip_grad) == (1e-6, 0.5)
    assert spec.build.recompute.granularity == "full" and spec.build.offload.cpu_offloading_num_layers == 1
    assert spec.build.communication.cp_comm_type == "allgather"
    gathered = parse(f"--model tiny --data-path {corpus} --train-iters 1 --seq-length 64 --fp8-format e4m3 "
                     "--fp8-param-gather".split(), 1)
    assert training_spec(gathered).build.precision == Precision(fp8=True, fp8_gather=True)
