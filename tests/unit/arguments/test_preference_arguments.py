"""The command line of preference tuning: what it refuses, and TRL's defaults."""

import json

import pytest

from megatron_deepseek.arguments import Settings, parse
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.arguments.preference import OBJECTIVES, PREFERENCE
from megatron_deepseek.fine_tuning_settings import PreferenceSettings
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import HEAD, SCORE, parameters

BASE = "--model tiny --dataset pairs.jsonl --seq-length 256"
ALL_BUT_MTP = "--freeze-parameters model.embed_tokens.weight model.layers.[0-3].* model.norm.weight lm_head.weight"
REFUSED = {
    "--beta is for other objectives": ("--beta 0.1", "--beta 0.1 is for --objective dpo or ipo"),
    "--label-smoothing is for other objectives": ("--objective ipo --label-smoothing 0.1", "dpo or simpo, not ipo"),
    "--rpo-alpha is for other objectives": ("--objective orpo --rpo-alpha 1", "--rpo-alpha 1.0 is for --objective"),
    "--simpo-gamma is for other objectives": ("--objective dpo --simpo-gamma 1", "--objective simpo, not dpo"),
    "--desirable-weight is for other objectives": ("--objective dpo --desirable-weight 2", "--objective kto, not dpo"),
    "--undesirable-weight is for other objectives": ("--undesirable-weight 2", "--objective kto, not sft"),
    "--center-rewards-coefficient is for other objectives": ("--objective dpo --center-rewards-coefficient 0.1",
                                                             "--objective reward, not dpo"),
    "half of all labels are wrong": ("--objective dpo --label-smoothing 0.5", "0.5 must be less than 0.5"),
    "a pair does not fit into a row": ("--objective dpo --max-length 130", "--max-length 130 does not fit twice"),
    "preferences are means over pairs": ("--objective dpo --loss-average sample", "sample is for --objective sft"),
    "preferences train no MTP modules, the only ones that are not frozen": (
        f"--objective dpo {ALL_BUT_MTP}", "leaves no parameter to train: --objective dpo leaves MTP modules"),
    "preferences are of whole answers": ("--objective dpo --split-turns reasoning", "is for --objective sft"),
    "a reward model has a whole head to train": ("--objective reward --lora-rank 4 --load x", "would stay random"),
    "a reward model writes no answers": ("--objective reward --generate-every 2 --eval-dataset x", "gives scores"),
    "a reward model answers no tasks": ("--objective reward --eval-tasks arc_easy", "--eval-tasks ['arc_easy']"),
    "a reward model has no MTP modules": ("--objective reward --mtp-num-layers 1", "predicts no tokens"),
}


def settings(more: str = "") -> Settings:
    return parse(f"{BASE} {more}".split(), 1, None, build_finetuning_parser)


@pytest.mark.parametrize("name", REFUSED)
def test_table_refuses(name):
    arguments, fragment = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        settings(arguments)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_every_rule_is_tried():
    """One needs a file, and is tried below."""
    assert {rule.name for rule in PREFERENCE} - REFUSED.keys() == {"a reward model predicts no tokens"}


@pytest.mark.parametrize("option", ["--beta 0", "--beta -0.1", "--beta nan", "--label-smoothing 2", "--rpo-alpha -1"])
def test_numbers_out_of_bounds(option):
    with pytest.raises(ValueError, match=option.split()[0]):
        settings(f"--objective dpo {option}")


def test_defaults_are_trls():
    assert settings().fine_tuning.preference is None
    assert settings("--objective dpo").fine_tuning.preference == PreferenceSettings("dpo", 0.1, 0.0, 0.0, 0.5, 1.0, 1.0)
    assert settings("--objective simpo").fine_tuning.preference.beta == 2.0
    assert settings("--objective simpo --beta 3").fine_tuning.preference.beta == 3.0
    with_reference = {name for name in OBJECTIVES if name != "sft" and PreferenceSettings(name).has_reference}
    assert with_reference == {"dpo", "ipo", "hinge", "kto"}


def test_a_reward_models_architecture(tmp_path):
    """A score in place of the head, no MTP, and back from its config.json; elsewhere it is refused."""
    made = settings("--objective reward --model deepseek-v3")
    names = [row.name for row in parameters(made.model)]
    assert SCORE in names and HEAD not in names and made.model.num_nextn_predict_layers == 0 and made.run.drop_mtp
    fields = made.model.to_hf_dict()
    assert fields["architectures"] == ["DeepseekV3ForSequenceClassification"] and len(fields["id2label"]) == 1
    assert ModelConfig.from_hf_dict(fields) == made.model
    with pytest.raises(ValueError, match="2 labels: only a reward model, of one label"):
        ModelConfig.from_hf_dict(fields | {"id2label": {"0": "a", "1": "b"}})
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = f"--model {tmp_path / 'config.json'}"
    assert settings(f"--objective reward {model}").model.reward_head
    with pytest.raises(ValueError, match="only --objective reward trains it"):
        settings(f"--objective dpo {model}")
    with pytest.raises(ValueError, match="only --objective reward trains it"):
        parse(f"{model} --mock-data --seq-length 256 --train-iters 1".split(), 1, None, build_parser)
