"""The command line of reinforcement learning: what it refuses, its defaults, and others' names of its options."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deepseek.arguments import Settings, parse
from megatron_deepseek.arguments.grpo import build_grpo_parser
from megatron_deepseek.arguments.grpo_validation import GRPO
from megatron_deepseek.rl_settings import PolicyLossSettings, ReinforcementSettings, RolloutSettings

BASE = "--model tiny --prompts p.jsonl --reward exact --train-iters 8 --seq-length 256 --max-completion-length 64"
REFUSED = {
    "a reward is unknown, unreadable or there twice": ("--reward mathe", "--reward mathe: mathe is none of"),
    "a group needs two answers": ("--grpo-group-size 1", "--grpo-group-size 1 must be at least 2"),
    "the updates of a rollout do not have its samples": (
        "--global-batch-size 24", "32 x --grpo-group-size 8 = 256 samples are not a multiple of --global-batch-size"),
    "rewards train no MTP modules, the only ones that are not frozen": (
        "--freeze-parameters model.embed_tokens.weight model.layers.[0-3].* model.norm.weight lm_head.weight",
        "leaves no parameter to train: reinforcement learning"),
    "samples of a rollout are no ramp": (
        "--rampup-batch-size 64 64 1024 --global-batch-size 256", "--rampup-batch-size [64, 64, 1024] conflicts"),
    "a completion does not fit into a row": ("--max-completion-length 256", "--seq-length 256"),
    "a prompt with its completion does not fit into a row": (
        "--max-prompt-length 193", "--max-prompt-length 193 with --max-completion-length 64 does not fit"),
    "dropout is for training alone, and rollouts have none": (
        "--load x --lora-rank 4 --lora-dropout 0.1", "--lora-dropout 0.1 conflicts"),
    "--kl-beta needs --kl k3 or unbiased": ("--kl-beta 0.1", "--kl-beta 0.1 needs --kl k3 or unbiased"),
    "--reference-refresh-interval needs --kl k3 or unbiased": (
        "--reference-refresh-interval 4", "--reference-refresh-interval 4 needs --kl"),
    "the reference would change within a rollout": (
        "--load x --kl k3 --reference-refresh-interval 6 --global-batch-size 64", "is not a multiple of the 4 updates"),
    "evaluation needs held-out prompts": ("--eval-interval 5", "--eval-interval 5 needs --eval-prompts"),
    "all held-out prompts are answered": ("--eval-prompts e.jsonl --eval-iters 5", "--eval-iters 5 is not for this"),
    "a reference needs --load": ("--kl k3", "--kl k3 needs --load"),
    "--loss-constant needs --loss-aggregation constant": ("--loss-constant 9", "needs --loss-aggregation constant"),
    "--overlong-buffer needs --overlong penalty": ("--overlong-buffer 9", "needs --overlong penalty"),
    "the buffer is longer than a completion": (
        "--overlong penalty --overlong-buffer 65", "--overlong-buffer 65 is longer than --max-completion-length 64"),
    "--max-sampling-rounds needs --dynamic-sampling": ("--max-sampling-rounds 3", "needs --dynamic-sampling"),
    "--rollout-correction-threshold needs --rollout-correction": (
        "--rollout-correction-threshold 3", "needs --rollout-correction"),
    "a sampling mask is kept of a draw from all tokens": ("--keep-sampling-mask", "needs --top-p, --top-k or --min-p"),
    "nothing is drawn from no probability": ("--top-p 0", "--top-p 0.0 leaves one token"),
    "kept routing needs experts": ("--keep-routing --num-experts 0", "--keep-routing conflicts with --num-experts 0"),
    "kept routing is not forced routing": (
        "--keep-routing --moe-router-force-load-balancing", "conflicts with --moe-router-force-load-balancing"),
    "the rollouts' tensor-parallel size does not divide the number of ranks": (
        "--rollout-tensor-parallel-size 2", "size 2 does not divide the 1 ranks"),
    "the rollouts' tensor-parallel size does not divide the number of attention heads": (
        "--rollout-tensor-parallel-size 3", "size 3 does not divide --num-attention-heads 4"),
    "the rollouts' expert-parallel size does not divide the number of ranks": (
        "--rollout-expert-parallel-size 2", "size 2 does not divide the 1 ranks"),
    "the rollouts' expert-parallel size does not divide the number of experts": (
        "--rollout-expert-parallel-size 3", "size 3 does not divide --num-experts"),
}


def settings(more: str = "", ranks: int = 1) -> Settings:
    return parse(f"{BASE} {more}".split(), ranks, None, build_grpo_parser)


def message(more: str) -> str:
    with pytest.raises(ValueError) as caught:
        settings(more)
    return str(caught.value)


@pytest.mark.parametrize("name", [rule.name for rule in GRPO])
def test_table_refuses(name):
    arguments, fragment = REFUSED[name]
    assert fragment in message(arguments)


def test_what_is_at_the_border_is_taken():
    settings("--max-prompt-length 192 --overlong penalty --overlong-buffer 64 --grpo-group-size 2")
    settings("--load x --kl unbiased --reference-refresh-interval 8 --global-batch-size 64 --grpo-iterations 2")


def test_each_pass_over_a_rollout_has_updates():
    twice = "--load x --kl k3 --global-batch-size 64 --grpo-iterations 2"
    assert "is not a multiple of the 8 updates" in message(f"{twice} --reference-refresh-interval 4")


def test_defaults_are_those_of_the_settings():
    made = settings()
    assert made.policy_loss == PolicyLossSettings()
    assert made.rollout == RolloutSettings(max_tokens=64)
    assert made.reinforcement == ReinforcementSettings(("p.jsonl",), ("exact",))
    assert made.fine_tuning is None and made.data.data_path == ()
    assert (made.learning_rate.lr, made.learning_rate.lr_decay_style, made.optimizer.weight_decay) == (
        1e-6, "constant", 0.0)
    assert made.batch.global_batch_size == 32 * 8 and made.loss.moe_router_bias_update_rate == 0.0


def test_a_constant_is_the_longest_completion_and_a_buffer_a_fifth_of_it():
    made = settings("--loss-aggregation constant --overlong penalty")
    assert (made.policy_loss.loss_constant, made.reinforcement.overlong_buffer) == (64, 12)


def test_names_of_trl_and_megatron_mean_the_same():
    ours = settings("--grpo-group-size 4 --grpo-iterations 2 --clip-low 0.1 --clip-high 0.3 --dynamic-sampling "
                    "--load x --kl k3 --kl-beta 0.5")
    assert settings("--num-generations 4 --num-iterations 2 --grpo-clamp-eps-lower 0.1 --grpo-clamp-eps-upper 0.3 "
                    "--grpo-filter-groups-with-same-reward --load x --kl k3 --grpo-kl-beta 0.5") == ours
    assert (ours.rollout.group_size, ours.rollout.iterations, ours.policy_loss.clip_high) == (4, 2, 0.3)


def test_a_run_begins_from_weights_alone():
    assert settings("--load other --save own").run.finetune and not settings("--load own --save own").run.finetune


def test_rules_of_pretraining_hold_too_and_name_this_entry():
    assert "train_grpo.py" in message("--tensor-model-parallel-size 2")
    assert "--data-path is no option" in message("--data-path corpus")
    assert settings("--micro-batch-size 3", 2).batch.micro_batch_size == 3  # rows are not samples


def test_a_missing_reward_is_said_beside_other_mistakes():
    without = BASE.replace("--reward exact", "")
    with pytest.raises(ValueError, match="required: --reward$"):
        parse(without.split(), 1, None, build_grpo_parser)
    with pytest.raises(ValueError, match="(?s)required: --reward.*--grpo-group-size 1 must be at least 2"):
        parse(f"{without} --grpo-group-size 1".split(), 1, None, build_grpo_parser)


def test_what_there_is_instead_of_a_dry_run():
    said = message("--dry-run-memory --world-size 8")
    assert "finetune_deepseek.py --dry-run-memory makes an update's step" in said
    assert "plan.py memory --task grpo" in said and "--world-size is for --dry-run-memory" in said


def test_mistakes_are_found_before_torch_is_imported():
    root = Path(__file__).parents[3]
    code = ("import sys; sys.argv = ['train_grpo.py', *sys.argv[1:]]; import runpy\n"
            "try: runpy.run_path('train_grpo.py', run_name='__main__')\n"
            "except SystemExit as end: print(end.code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *BASE.split(), "--grpo-group-size", "1"], cwd=root, text=True,
                          capture_output=True, timeout=60)
    assert done.stdout.split() == ["2", "False"] and done.stderr.count("\n") == 1, done.stderr
