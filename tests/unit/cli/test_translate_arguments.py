"""Recipes of LLaMA-Factory: the printed script is run with a torchrun that only notes its words, which are parsed then.
"""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
from transformers import TrainingArguments

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.arguments.llama_factory.keys import IGNORED, NO_EQUIVALENT
from megatron_deepseek.arguments.llama_factory.reading import read_words
from megatron_deepseek.arguments.llama_factory.translation import Processes, translate
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.cli.translate_arguments import main
from megatron_deepseek.fine_tuning_settings import PreferenceSettings
from megatron_deepseek.settings import Settings

LITE = "deepseek-ai/DeepSeek-V2-Lite"
LORA = f"""
### model
model_name_or_path: {LITE}
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
dataset: identity, chats.jsonl
template: deepseek
cutoff_len: 1024
preprocessing_num_workers: 16
output_dir: saves/lite
save_steps: 250
overwrite_output_dir: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 5.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
REQUIRED = {"model_name_or_path": LITE, "dataset": "chats.jsonl", "output_dir": "saves"}
# What stands in for commands in the script; torchrun prints the words behind the entry.
FAKED = """set -e
NODE_RANK=0 MASTER_ADDR=first MASTER_PORT=1
torchrun() { shift 2; [ "$1" != --nnodes ] || shift 8; printf '%s\\n' "$@"; }
hf() { :; }
python() { :; }
stat() { echo 8192000; }
"""


@pytest.fixture
def printed(tmp_path, capsys):
    """Return the script that is printed for a file of this text, or for the given words."""
    def of(text: str = "", *words: str, name: str = "recipe.yaml") -> str:
        if text:
            (tmp_path / name).write_text(text)
            words = (*(word for word in words if word.startswith("--")), str(tmp_path / name),
                     *(word for word in words if not word.startswith("--")))
        assert main(words) == 0
        return capsys.readouterr().out

    return of


def words_of(script: str) -> list[str]:
    done = subprocess.run(["bash", "-c", FAKED + script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def settings_of(script: str, ranks: int = 1) -> Settings:
    entry, *words = words_of(script)
    return parse(words, ranks, ranks, {"finetune_deepseek.py": build_finetuning_parser,
                                       "pretrain_deepseek.py": build_parser}[entry])


def test_lora_on_eight_ranks(printed):
    script = printed(LORA, "--nproc-per-node=8")
    s = settings_of(script, 8)
    assert "torchrun --nproc_per_node 8 finetune_deepseek.py" in script
    assert f"hf download {LITE} --local-dir {LITE}" in script
    assert (s.lora.lora_rank, s.lora.lora_alpha, s.lora.lora_target) == (16, 32.0, ("all",))
    assert (s.batch.micro_batch_size, s.batch.global_batch_size) == (2, 2 * 8 * 8)
    assert s.data.seq_length == 1024 and s.run.epochs == 5 and s.run.bf16 and s.run.save_interval == 250
    rate, adam = s.learning_rate, s.optimizer
    assert (rate.lr, rate.min_lr, rate.lr_decay_style, rate.lr_warmup_fraction) == (1e-4, 0.0, "cosine", 0.1)
    assert (adam.adam_beta2, adam.weight_decay, adam.clip_grad, s.run.seed) == (0.999, 0.0, 1.0, 42)
    tuning = s.fine_tuning
    assert tuning.dataset == ("data/dataset_info.json:identity", "chats.jsonl") and tuning.num_workers == 16
    assert (tuning.template, tuning.overlong, tuning.packing) == ("deepseek-v2", "truncate", False)
    assert s.recompute.granularity == "full" and s.run.save_adapter == Path("saves/lite-adapter")
    assert "Left out" not in script and "--no-packing" in script.partition("hf download")[0]


def test_two_nodes(printed):
    script = printed(LORA, "--nproc-per-node=4", "--nnodes=2")
    assert "--nnodes 2 --node_rank $NODE_RANK" in script and settings_of(script, 8).batch.global_batch_size == 128


def test_every_form_is_read_alike(printed):
    """A YAML file, a JSON file, a file with key=value behind it, and a command line with variables."""
    import yaml

    keys = yaml.safe_load(LORA)
    from_json = printed(json.dumps(keys), name="recipe.json")
    words = [word for key, value in keys.items() for word in
             ([f"--{key}"] if value is True else [f"--{key}", *str(value).split()])]
    command = printed("", "--", "FORCE_TORCHRUN=1", "NPROC_PER_NODE=1", "llamafactory-cli", "train", *words)
    changed = printed(LORA.replace("lora_rank: 16", "lora_rank: 8"), "lora_rank=16")
    assert words_of(printed(LORA)) == words_of(from_json) == words_of(command) == words_of(changed)
    assert "one process" in from_json and "one process" not in command


def test_defaults_are_those_of_transformers(printed):
    """A recipe that says only what it must: every other number is what transformers' TrainingArguments has."""
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    s = settings_of(printed(json.dumps(REQUIRED | {"finetuning_type": "full"}), name="recipe.json"))
    rate, adam = s.learning_rate, s.optimizer
    assert (rate.lr, rate.lr_decay_style, rate.min_lr) == (theirs["learning_rate"], theirs["lr_scheduler_type"], 0.0)
    assert (adam.adam_beta1, adam.adam_beta2) == (theirs["adam_beta1"], theirs["adam_beta2"])
    assert (adam.adam_eps, adam.weight_decay) == (theirs["adam_epsilon"], theirs["weight_decay"])
    assert adam.clip_grad == theirs["max_grad_norm"] and s.run.seed == theirs["seed"]
    assert s.batch.micro_batch_size == s.batch.global_batch_size == theirs["per_device_train_batch_size"]
    assert s.run.epochs == theirs["num_train_epochs"] and s.run.save_interval == theirs["save_steps"]
    assert s.lora is None and s.run.save_hf == Path("saves-hf") and s.data.seq_length == 2048


def test_no_key_of_transformers_is_passed_over():
    """Each is translated, refused, or named with a reason that is not that it is unknown."""
    for field in dataclasses.fields(TrainingArguments):
        try:
            found = translate(REQUIRED | {field.name: "x"}, Processes())
        except ValueError as error:
            assert field.name in str(error), field.name
        else:
            assert not [key for key, why in found.recipe.left_out if "known here" in why], field.name


def test_no_key_is_listed_twice():
    names = [name for keys in (IGNORED, *NO_EQUIVALENT) for name, _ in keys.each()]
    assert len(names) == len(set(names))


def test_what_nothing_stands_for_is_named_with_its_reason(printed):
    script = printed(LORA + "use_dora: true\nmax_samples: 1000\noptim: adamw_8bit\nneftune_noise_alpha: 5\n"
                     "lora_dropuot: 0.1\npref_beta: 0.1\nfp16: true\nval_size: 0.1\n"
                     "kto_chosen_weight: 2.0\n")
    remarks = script.partition("hf download")[0].replace("\n#  ", "")
    for remark in ("use_dora: true (adapters are A and B", "max_samples: 1000 (all rows are read",
                   "optim: adamw_8bit (the optimizer is AdamW", "val_size: 0.1 (nothing is split off",
                   "lora_dropuot: 0.1 (it is no key of LLaMA-Factory or transformers that is known here; did you mean "
                   "lora_dropout?", "fp16: --bf16 stands for it",
                   "kto_chosen_weight: 2.0 (it is for preference tuning"):
        assert remark in " ".join(remarks.split()), remark
    assert "pref_beta" not in script  # it is the default
    assert "--neftune-alpha 5" in script


@pytest.mark.parametrize("more, expected", [
    ({"lora_dropout": 0.05, "use_rslora": True, "loraplus_lr_ratio": 16.0, "adapter_name_or_path": "old"},
     ["--lora-dropout 0.05", "--lora-rs", "--lora-plus-ratio 16", "--load-adapter old"]),
    ({"neat_packing": True, "disable_gradient_checkpointing": True}, ["--packing"]),
    ({"torch_compile": True, "torch_compile_backend": "inductor"}, ["--compile"]),
    ({"max_steps": 30, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "learning_rate": 2e-5},
     ["--train-iters 30", "--lr-decay-style constant", "--lr-warmup-iters 3", "--min-lr 2e-05"]),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "learning_rate": 1e-4},
     ["--min-lr 1e-05"]),
    ({"deepspeed": "examples/deepspeed/ds_z3_offload_config.json", "finetuning_type": "full"},
     ["--data-parallel-sharding-strategy optim_grads_params", "--optimizer-cpu-offload"]),
    ({"eval_dataset": "held_out.jsonl", "eval_strategy": "steps", "eval_steps": 50},
     ["--eval-dataset held_out.jsonl", "--eval-interval 50"]),
    ({"dataset": "a.jsonl,b.jsonl", "mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3"},
     ["--dataset 0.7 a.jsonl 0.3 b.jsonl"]),
    ({"report_to": ["tensorboard", "wandb"], "run_name": "one", "save_total_limit": 2, "save_only_model": True},
     ["--tensorboard-dir saves/tensorboard", "--wandb-exp-name one", "--keep-last 2", "--no-save-optim"]),
    ({"model_name_or_path": "deepseek-ai/DeepSeek-V3", "template": "deepseek3"},
     ["--mtp-num-layers 0", "--template deepseek-v3"]),
    ({"expert_model_parallel_size": 4, "moe_token_dispatcher_type": "alltoall"},
     ["--expert-model-parallel-size 4", "--global-batch-size 64"])])
def test_single_keys(printed, more, expected):
    recipe = json.dumps(REQUIRED | {"finetuning_type": "lora"} | more)
    script = printed(recipe, "--nproc-per-node=8", name="recipe.json")
    settings_of(script, 8)
    for words in expected:
        assert words in " ".join(script.replace("\\\n", " ").split()), words


@pytest.mark.parametrize("more, expected", [
    ({"stage": "dpo", "pref_beta": 0.3, "pref_ftx": 0.5, "dpo_label_smoothing": 0.1},
     PreferenceSettings("dpo", 0.3, 0.1, 0.5)),
    ({"stage": "dpo", "pref_loss": "ipo"}, PreferenceSettings("ipo", 0.1)),
    ({"stage": "dpo", "pref_loss": "orpo", "pref_ftx": 0.5}, PreferenceSettings("orpo", 0.1)),
    ({"stage": "dpo", "pref_loss": "simpo", "simpo_gamma": 0.7}, PreferenceSettings("simpo", 0.1, simpo_gamma=0.7)),
    ({"stage": "kto", "kto_chosen_weight": 2.0}, PreferenceSettings("kto", desirable_weight=2.0)),
    ({"stage": "rm", "finetuning_type": "full"}, PreferenceSettings("reward"))])
def test_stages_of_preference_tuning(printed, more, expected):
    """A pair, or two of KTO's answers, have a row of twice cutoff_len; batches have as many answers as there."""
    script = printed(json.dumps(REQUIRED | {"per_device_train_batch_size": 4} | more), name="recipe.json")
    s = settings_of(script)
    assert s.fine_tuning.preference == expected
    assert (s.fine_tuning.max_length, s.data.seq_length) == (2048, 4096)
    assert s.batch.global_batch_size == (2 if expected.objective == "kto" else 4)
    assert "Left out" not in script


def test_pretraining_makes_indexed_files_first(printed, tmp_path):
    """Of 8,192,000 bytes, 2,048,000 tokens: 3 epochs are 3,000 samples of 2,048."""
    (tmp_path / "dataset_info.json").write_text(json.dumps({"web": {"file_name": "web.json",
                                                                    "columns": {"prompt": "content"}}}))
    script = printed(LORA + f"dataset: web\ndataset_dir: {tmp_path}\nnum_train_epochs: 3\ncutoff_len: 2048\n"
                     "stage: pt\nmax_samples: 500\n")
    s = settings_of(script)
    assert f"--input {tmp_path}/web.json --json-keys content" in script and "--max-documents 500" in script
    assert s.data.data_path == ("lite-data_content_document",) and s.run.train_samples == 3000
    assert s.fine_tuning is None and s.lora.lora_rank == 16


@pytest.mark.parametrize("more, message", [
    ({"stage": "ppo"}, "stage ppo is not translated: sft, pt and dpo, kto, rm are"),
    ({"stage": "dpo", "pref_loss": "kto_pair"}, "pref_loss kto_pair is not there"),
    ({"stage": "rm"}, "stage rm with finetuning_type lora is not there"),
    ({"finetuning_type": "freeze"}, "--freeze-parameters"),
    ({"model_name_or_path": None}, "model_name_or_path is missing"), ({"dataset": None}, "dataset is missing"),
    ({"output_dir": None}, "output_dir is missing"), ({"learning_rate": "fast"}, "learning_rate: fast is no number"),
    ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type polynomial is not there"),
    ({"bf16": "maybe"}, "bf16: maybe is neither true nor false"),
    ({"tensor_model_parallel_size": 2}, "1 ranks are not a multiple of the 2")])
def test_mistakes(more, message):
    with pytest.raises(ValueError, match=message):
        translate(REQUIRED | more, Processes())


@pytest.mark.parametrize("words, message", [
    (["missing.yaml"], "missing.yaml cannot be read"), (["chats.jsonl"], "neither a YAML or JSON file nor an option"),
    (["llamafactory-cli", "export", "x.yaml"], "only llamafactory-cli train is translated")])
def test_words_that_cannot_be_read(words, message):
    with pytest.raises(ValueError, match=message):
        read_words(words)


def test_a_file_that_is_no_mapping(tmp_path):
    for text, message in (("- a", "holds no keys"), ("a: [", "is no YAML")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_words([str(tmp_path / "x.yaml")])
