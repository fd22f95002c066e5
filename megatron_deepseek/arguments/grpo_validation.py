"""The validation rules of reinforcement learning: a part of the table in validation.py."""

from collections.abc import Callable

from megatron_deepseek.arguments.grpo import CONSTANT, NO_CORRECTION, NO_KL, PENALTY
from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.rule import Rule
from megatron_deepseek.model.architecture.freezing import trains_mtp_only
from megatron_deepseek.rewards.spec import parse_rewards


def _rule(name: str, when: Callable[[Request], bool], message: str) -> Rule:
    """Return a rule on arguments that only reinforcement learning has."""
    return Rule(name, lambda r: r.reinforces and when(r), message)


def _alone(dest: str, without: Callable[[Request], bool], needed: str) -> Rule:
    """Return the rule against an option that is not read without another."""
    option = f"--{dest.replace('_', '-')}"
    return _rule(f"{option} needs {needed}", lambda r: getattr(r.args, dest) is not None and without(r),
                 f"{option} {{r.args.{dest}}} needs {needed}")


def _uneven(r: Request) -> bool:
    return bool(r.rollout_samples % r.batch.global_batch_size)


def _no_experts(r: Request) -> bool:
    return not r.model.n_routed_experts


def _reward_error(r: Request) -> bool:
    """Return False, or raise the ValueError of the reader of --reward. That it is missing, the parser says."""
    parse_rewards(r.args.reward or ())
    return False


def _cuts_heads(r: Request) -> bool:
    size = r.args.rollout_tensor_parallel_size
    return size is not None and bool(r.model.num_attention_heads % size)


_UNUSED = "--rollout-{0}-parallel-size {{r.args.rollout_{0}_parallel_size}} does not divide "

GRPO = (
    _rule("a reward is unknown, unreadable or there twice", _reward_error,
          "(the reader of --reward says which, and what is wrong with it)"),
    _rule("a group needs two answers", lambda r: r.args.grpo_group_size < 2,
          "--grpo-group-size {r.args.grpo_group_size} must be at least 2: an answer is compared with the others to its "
          "prompt"),
    _rule("the updates of a rollout do not have its samples", _uneven,
          "--grpo-prompts-per-step {r.args.grpo_prompts_per_step} x --grpo-group-size {r.args.grpo_group_size} = "
          "{r.rollout_samples} samples are not a multiple of --global-batch-size {r.batch.global_batch_size}"),
    _rule("rewards train no MTP modules, the only ones that are not frozen",
          lambda r: bool(r.frozen) and trains_mtp_only(r.model, r.frozen),
          "--freeze-parameters {r.args.freeze_parameters} leaves no parameter to train: reinforcement learning leaves "
          "MTP modules as they are"),
    _rule("samples of a rollout are no ramp", lambda r: r.args.rampup_batch_size is not None,
          "--rampup-batch-size {r.args.rampup_batch_size} conflicts with rollouts, which all have {r.rollout_samples} "
          "samples"),
    _rule("a completion does not fit into a row", lambda r: r.args.max_completion_length >= r.args.seq_length,
          "--max-completion-length {r.args.max_completion_length} leaves no room for a prompt in rows of --seq-length "
          "{r.args.seq_length}"),
    _rule("a prompt with its completion does not fit into a row",
          lambda r: r.args.max_completion_length < r.args.seq_length
          < (r.args.max_prompt_length or 0) + r.args.max_completion_length,
          "--max-prompt-length {r.args.max_prompt_length} with --max-completion-length "
          "{r.args.max_completion_length} does not fit into rows of --seq-length {r.args.seq_length}"),
    _rule("dropout is for training alone, and rollouts have none", lambda r: bool(r.args.lora_dropout),
          "--lora-dropout {r.args.lora_dropout} conflicts with reinforcement learning: rollouts have no dropout, so "
          "that every ratio would be wrong"),
    _rule("a reference needs --load", lambda r: r.args.kl != NO_KL and r.args.load is None,
          "--kl {r.args.kl} needs --load: random weights are no reference"),
    _alone("kl_beta", lambda r: r.args.kl == NO_KL, "--kl k3 or unbiased"),
    _alone("reference_refresh_interval", lambda r: r.args.kl == NO_KL, "--kl k3 or unbiased"),
    _rule("the reference would change within a rollout",
          lambda r: not _uneven(r) and r.args.reference_refresh_interval is not None
          and bool(r.args.reference_refresh_interval % r.updates_per_rollout),
          "--reference-refresh-interval {r.args.reference_refresh_interval} is not a multiple of the "
          "{r.updates_per_rollout} updates of a rollout"),
    _rule("evaluation needs held-out prompts",
          lambda r: r.args.eval_interval is not None and not r.args.eval_prompts,
          "--eval-interval {r.args.eval_interval} needs --eval-prompts"),
    _rule("all held-out prompts are answered", lambda r: r.args.eval_iters is not None,
          "--eval-iters {r.args.eval_iters} is not for this entry, which answers all --eval-prompts"),
    _alone("loss_constant", lambda r: r.args.loss_aggregation != CONSTANT, f"--loss-aggregation {CONSTANT}"),
    _alone("overlong_buffer", lambda r: r.args.overlong != PENALTY, f"--overlong {PENALTY}"),
    _rule("the buffer is longer than a completion",
          lambda r: (r.args.overlong_buffer or 0) > r.args.max_completion_length,
          "--overlong-buffer {r.args.overlong_buffer} is longer than --max-completion-length "
          "{r.args.max_completion_length}"),
    _alone("max_sampling_rounds", lambda r: not r.args.dynamic_sampling, "--dynamic-sampling"),
    _alone("rollout_correction_threshold", lambda r: r.args.rollout_correction == NO_CORRECTION,
           "--rollout-correction"),
    _rule("a sampling mask is kept of a draw from all tokens",
          lambda r: r.args.keep_sampling_mask and (r.args.top_p, r.args.top_k, r.args.min_p) == (1, 0, 0),
          "--keep-sampling-mask needs --top-p, --top-k or --min-p: without them a token is drawn from all"),
    _rule("nothing is drawn from no probability", lambda r: r.args.top_p == 0,
          "--top-p {r.args.top_p} leaves one token to draw from; it must be above 0"),
    _rule("kept routing needs experts", lambda r: r.args.keep_routing and _no_experts(r),
          "--keep-routing conflicts with --num-experts 0: there are no experts to keep"),
    _rule("kept routing is not forced routing",
          lambda r: r.args.keep_routing and r.args.moe_router_force_load_balancing,
          "--keep-routing conflicts with --moe-router-force-load-balancing, which chooses experts by position"),
    _rule("the rollouts' tensor-parallel size does not divide the number of ranks",
          lambda r: bool(r.world_size % (r.args.rollout_tensor_parallel_size or 1)),
          _UNUSED.format("tensor") + "the {r.world_size} ranks of the job"),
    _rule("the rollouts' tensor-parallel size does not divide the number of attention heads", _cuts_heads,
          _UNUSED.format("tensor") + "--num-attention-heads {r.model.num_attention_heads}"),
    _rule("the rollouts' expert-parallel size does not divide the number of ranks",
          lambda r: bool(r.world_size % (r.args.rollout_expert_parallel_size or 1)),
          _UNUSED.format("expert") + "the {r.world_size} ranks of the job"),
    _rule("the rollouts' expert-parallel size does not divide the number of experts",
          lambda r: (r.args.rollout_expert_parallel_size or 1) > 1
          and (_no_experts(r) or bool(r.model.n_routed_experts % r.args.rollout_expert_parallel_size)),
          _UNUSED.format("expert") + "--num-experts {r.model.n_routed_experts}"),
)
