"""The validation rules of experts, their balance and their dispatch: a part of the table in validation.py."""

from megatron_deepseek.arguments.model_options import DROP_POLICIES
from megatron_deepseek.arguments.rule import EP, PP, Rule
from megatron_deepseek.parallel import schedule_rules

OVERLAPPED_DISPATCH = "overlapped dispatch"  # a name in features.py


def without_experts(*features: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs of a model without experts and each of `features`, which a rule refuses."""
    return tuple(("no experts", feature) for feature in features)


EXPERTS = (
    Rule("a capacity of experts needs experts",
         lambda r: r.args.moe_expert_capacity_factor and not r.model.n_routed_experts,
         "--moe-expert-capacity-factor {r.args.moe_expert_capacity_factor} conflicts with --num-experts 0",
         without_experts(*(f"capacity, {policy}" for policy in DROP_POLICIES))),
    Rule("a drop policy needs a capacity of experts",
         lambda r: r.args.moe_token_drop_policy is not None and r.args.moe_expert_capacity_factor is None,
         "--moe-token-drop-policy {r.args.moe_token_drop_policy} needs --moe-expert-capacity-factor: without it no "
         "token is dropped"),
    Rule("overlap of shared experts needs shared experts",
         lambda r: r.args.moe_shared_expert_overlap and not (r.model.n_routed_experts and r.model.n_shared_experts),
         "--moe-shared-expert-overlap needs shared experts: --num-experts {r.model.n_routed_experts}, "
         "--moe-shared-expert-intermediate-size {r.shared_width}",
         without_experts("shared experts overlapped")),
    Rule("forced load balancing needs experts",
         lambda r: r.args.moe_router_force_load_balancing and not r.model.n_routed_experts,
         "--moe-router-force-load-balancing conflicts with --num-experts 0", without_experts("forced balance")),
    Rule("shared experts need routed experts",
         lambda r: bool(r.args.moe_shared_expert_intermediate_size) and not r.model.n_routed_experts,
         "--moe-shared-expert-intermediate-size {r.args.moe_shared_expert_intermediate_size} conflicts with "
         "--num-experts 0", without_experts("shared experts")),
    Rule("an update rate of the router's bias needs that bias",
         lambda r: bool(r.args.moe_router_bias_update_rate) and r.model.topk_method != "noaux_tc",
         "--moe-router-bias-update-rate {r.args.moe_router_bias_update_rate} needs --moe-router-enable-expert-bias; "
         "topk_method is {r.model.topk_method}"),
    Rule("a balance loss needs experts", lambda r: bool(r.args.moe_aux_loss_coeff) and not r.model.n_routed_experts,
         "--moe-aux-loss-coeff {r.args.moe_aux_loss_coeff} conflicts with --num-experts 0"),
    Rule("a balance loss is given a weight, but switched off",
         lambda r: bool(r.args.moe_aux_loss_coeff) and r.balance[0] == "none",
         "--moe-aux-loss-coeff {r.args.moe_aux_loss_coeff} conflicts with --moe-router-load-balancing-type none"),
    Rule("a balance loss needs a weight",
         lambda r: r.balance[0] != "none" and r.args.moe_aux_loss_coeff is None and not r.balance[1],
         "--moe-router-load-balancing-type {r.balance[0]} needs --moe-aux-loss-coeff: aux_loss_alpha is 0"),
    Rule("the device balance loss needs groups of experts",
         lambda r: r.args.moe_device_aux_loss_coeff > 0 and r.model.n_group == 1,
         "--moe-device-aux-loss-coeff {r.args.moe_device_aux_loss_coeff} needs groups of experts; "
         "--moe-router-num-groups is 1"),
    Rule("the communication balance loss needs groups of experts",
         lambda r: r.args.moe_communication_aux_loss_coeff > 0 and r.model.n_group == 1,
         "--moe-communication-aux-loss-coeff {r.args.moe_communication_aux_loss_coeff} needs groups of experts; "
         "--moe-router-num-groups is 1"),
)

OVERLAP = (
    Rule("overlapped dispatch needs DualPipeV on several pipeline ranks",
         lambda r: r.args.overlap_moe_expert_parallel_comm and (r.pp == 1 or r.schedule != "DualPipeV"),
         "--overlap-moe-expert-parallel-comm needs the forward and backward pairs of --pipeline-schedule DualPipeV "
         f"on several pipeline ranks: {PP}, {{r.schedule}}",
         tuple((OVERLAPPED_DISPATCH, name) for name in schedule_rules.SCHEDULES if name != "DualPipeV")),
    Rule("overlapped dispatch needs an all-to-all",
         lambda r: r.args.overlap_moe_expert_parallel_comm
         and (r.ep == 1 or r.args.moe_token_dispatcher_type == "allgather"),
         f"--overlap-moe-expert-parallel-comm needs tokens that travel by all-to-all: {EP}, "
         "--moe-token-dispatcher-type {r.args.moe_token_dispatcher_type}",
         ((OVERLAPPED_DISPATCH, "expert parallel, allgather"),)),
)
