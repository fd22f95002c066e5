"""The command line of fine-tuning: what it refuses, its recipes, and what is another default than in pre-training."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_deepseek.arguments import Settings, finetuning, parse
from megatron_deepseek.arguments.finetuning import RECIPES, build_finetuning_parser
from megatron_deepseek.arguments.finetuning_validation import FINE_TUNING
from megatron_deepseek.finetuning import objectives
from megatron_deepseek.finetuning import settings as data_settings
from megatron_deepseek.settings import FineTuningSettings
from megatron_deepseek.training.timeline import last_iteration

BASE = "--model tiny --dataset chats.jsonl --seq-length 256"
REFUSED = {
    "the longest conversation exceeds the row": ("--max-length 257", "--max-length 257 does not fit into rows of"),
    "evaluation needs held-out conversations": ("--eval-interval 5", "--eval-interval 5 need --eval-dataset"),
    "answers need held-out conversations": ("--generate-every 5", "--generate-every 5 needs --eval-dataset"),
}


def settings(more: str = "", ranks: int = 1) -> Settings:
    return parse(f"{BASE} {more}".split(), ranks, None, build_finetuning_parser)


@pytest.mark.parametrize("name", [rule.name for rule in FINE_TUNING])
def test_table_refuses(name):
    arguments, fragment = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        settings(arguments)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_rules_of_pretraining_hold_too_and_name_this_entry():
    with pytest.raises(ValueError, match="finetune_deepseek.py"):
        settings("--tensor-model-parallel-size 2")
    with pytest.raises(ValueError, match="--global-batch-size 3 is not a multiple"):
        settings("--global-batch-size 3", 2)
    with pytest.raises(ValueError, match="not allowed with argument"):
        settings("--epochs 2 --train-iters 3")
    with pytest.raises(ValueError, match="--data-path is no option"):
        settings("--data-path corpus")


def test_defaults_are_those_of_v3s_fine_tuning():
    made = settings()
    rates = made.learning_rate
    assert (rates.lr, rates.min_lr, rates.lr_decay_style, made.run.epochs) == (5e-6, 1e-6, "cosine", 2)
    assert made.fine_tuning == FineTuningSettings(("chats.jsonl",)) and made.data.data_path == ()
    assert made.loss.moe_router_bias_update_rate == 0.0
    assert settings("--moe-router-bias-update-rate 0.001").loss.moe_router_bias_update_rate == 1e-3
    assert any("without --load the weights are random" in note for note in made.notes)


def test_recipes_are_what_was_published():
    r1, guide = settings("--recipe deepseek-r1"), settings("--recipe scienceone")
    assert (r1.learning_rate.lr, r1.learning_rate.min_lr, r1.run.epochs) == (5e-5, 5e-6, 2)
    assert (r1.batch.global_batch_size, RECIPES["deepseek-r1"]["seq_length"]) == (128, 32768)
    rates, adam = guide.learning_rate, guide.optimizer
    assert (rates.lr, rates.min_lr, rates.lr_warmup_fraction, rates.lr_warmup_init) == (2e-7, 0.0, 0.03, 2e-12)
    assert (adam.adam_beta2, adam.weight_decay, guide.run.epochs) == (0.999, 0.0, 1)
    assert not guide.fine_tuning.packing and guide.fine_tuning.train_think_prefix


def test_what_is_given_wins_over_the_recipe():
    made = settings("--recipe scienceone --packing --lr 1e-5 --weight-decay 0.1 --train-iters 4")
    assert made.fine_tuning.packing and made.optimizer.weight_decay == 0.1
    assert (made.run.train_iters, made.run.epochs) == (4, None)
    assert (made.learning_rate.lr, made.learning_rate.lr_warmup_init) == (1e-5, pytest.approx(1e-10))
    assert settings("--lr 1e-3").learning_rate.min_lr == pytest.approx(2e-4)
    assert settings("--lr 1e-3 --min-lr 1e-5").learning_rate.min_lr == 1e-5
    assert settings("--min-lr 0").learning_rate.min_lr == 0.0
    assert settings("--recipe scienceone --lr-warmup-init 0").learning_rate.lr_warmup_init == 0.0


def test_a_run_begins_from_weights_unless_it_loads_itself():
    assert settings("--load released").run.finetune and settings("--load released --save here").run.finetune
    assert not settings("--load here --save here").run.finetune and not settings("--save here").run.finetune


def test_freeze_is_freeze_parameters():
    assert settings("--freeze model.embed_tokens.weight").run.freeze_parameters == ("model.embed_tokens.weight",)


def test_held_out_conversations_are_evaluated_by_default():
    assert settings("--eval-dataset held.jsonl").run.eval_interval == 1000
    assert settings("--eval-dataset held.jsonl --eval-iters 0").run.eval_interval is None
    assert settings().run.eval_interval is None


@pytest.mark.parametrize("rows, epochs, batch, expected", [(10, 2, 4, 5), (9, 2, 4, 5), (8, 1, 4, 2), (1, 1, 4, 1)])
def test_epochs_end_with_a_batch_that_may_not_be_full(rows, epochs, batch, expected):
    made = settings(f"--epochs {epochs} --global-batch-size {batch}")
    run = replace(made.run, train_samples=epochs * rows)
    assert last_iteration(run, made.batch) == expected
    assert last_iteration(replace(run, epochs=None), made.batch) == epochs * rows // batch


def test_choices_are_those_of_the_data():
    for name in ("TEMPLATES", "OVERLONG", "HISTORY_REASONING"):
        assert getattr(finetuning, name) == getattr(data_settings, name)
    assert finetuning.LOSS_AVERAGES == objectives.LOSS_AVERAGES
    shared = {field: value for field, value in asdict(FineTuningSettings(("a",))).items()
              if field in data_settings.DataSettings.__dataclass_fields__ and field != "dataset"}
    ours = asdict(data_settings.DataSettings(("a",)))
    assert {name: ours[name] for name in shared} == shared and len(shared) >= 8


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_has_the_recipes_defaults(recipe):
    """For an option that a recipe sets, its value; by name where the default recipe has another."""
    parser = build_finetuning_parser()
    help = {action.dest: parser.formatter_class("")._get_help_string(action) for action in parser._actions}  # noqa: SLF001
    assert "(0, the bias" in help["moe_router_bias_update_rate"] and "(all of a set" in help["eval_iters"]
    for name, value in RECIPES[recipe].items():
        shown = "yes" if value is True else "no" if value is False else value
        usual = RECIPES["deepseek-v3"].get(name)
        before = rf"\((.*; )?{recipe}: " if value != usual else r"\(()"
        found = re.search(before + r"([^;]*)(;.*)?\)$", help[name])
        assert found[2] == shown or float(found[2]) == shown, (name, help[name])


def test_every_option_is_on_the_page():
    page = (Path(__file__).parents[3] / "docs" / "finetuning.md").read_text()
    help = build_finetuning_parser().format_help().partition("\nconversations:")[2].partition("\ncheckpoints:")[0]
    own = set(re.findall(r"^  (--[a-z-]+)", help, re.M)) - {"--tokenizer-type"}
    assert len(own) > 15 and not [option for option in own if option not in page]
