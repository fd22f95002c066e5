"""The arguments of LoRA, for every entry that trains, and their validation rules: a part of the table in validation.py.
"""

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.rule import Rule
from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture.adapters import (
    ALL,
    ATTENTION,
    EXPERTS,
    GROUPS,
    MLP,
    ROUTER,
    LoraSettings,
    adapted_rows,
)

_ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FOR = ("peft", "vllm")
ALPHA_OF_RANK = 2  # LLaMA-Factory's default: alpha is twice the rank


def add_lora(parser):
    add = parser.add_argument_group("LoRA", "adapters beside frozen weights (docs/lora.md)").add_argument
    add("--lora-rank", type=values.positive_int, metavar="R", help="train adapters of rank R alone (all weights)")
    add("--lora-alpha", type=values.positive, metavar="ALPHA", help="they are multiplied by ALPHA / R (2 R)")
    add("--lora-rs", action="store_true", help="by ALPHA / sqrt(R): rank-stabilised")
    add("--lora-dropout", type=values.beta, metavar="P",
        help="in training each feature of their input is 0 with probability P (that of --load-adapter, or 0)")
    add("--lora-target", type=str, nargs="+", metavar="NAME",
        help=f"layers that get one: {', '.join(GROUPS)}, or names as q_b_proj, shared_experts.*; all is {ATTENTION}, "
        f"{MLP} and {EXPERTS} (all)")
    add("--lora-plus-ratio", type=values.positive, metavar="X", help="learning rate of B over that of A: LoRA+ (1)")
    add("--use-dora", action="store_true", help="refused: routed experts cannot have it in PEFT or vLLM")
    add("--load-adapter", type=values.path, metavar="DIR", help="begin from an adapter of PEFT")
    add("--save-adapter", type=values.path, metavar="DIR", help="at the end, write the adapter as PEFT's files")
    add("--adapter-for", type=str, choices=ADAPTER_FOR,
        help="who reads them: vllm leaves out kv_b_proj, which it does not apply (peft)")


def lora_settings(args) -> LoraSettings | None:
    """Return what parsed arguments ask for, None without --lora-rank."""
    if args.lora_rank is None:
        return None
    alpha = ALPHA_OF_RANK * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    return LoraSettings(args.lora_rank, float(alpha), tuple(args.lora_target or (ALL,)), args.lora_rs, _dropout(args))


def _dropout(args) -> float:
    """Return --lora-dropout, or else that of the adapter that the run begins from. Raise ValueError if it has a wrong
    one.
    """
    if args.lora_dropout is not None or args.load_adapter is None:
        return args.lora_dropout or 0.0
    config = args.load_adapter / _ADAPTER_CONFIG
    found = read_object(config).number("lora_dropout", 0.0, 1.0, default=0.0) if config.is_file() else 0.0
    if found == 1.0:
        raise ValueError(f"{config} has lora_dropout 1, with which nothing is learnt; --lora-dropout sets another")
    return found


def _adapts(r: Request) -> bool:
    return r.args.lora_rank is not None


def _moves_a_frozen_routers_bias(r: Request) -> bool:
    if not _adapts(r) or not r.args.moe_router_bias_update_rate:
        return False
    routers = set(adapted_rows(r.model, LoraSettings(1, 1.0, (ROUTER,))))
    return not routers & set(adapted_rows(r.model, lora_settings(r.args)))


LORA = (
    Rule("DoRA is not supported", lambda r: r.args.use_dora,
         "--use-dora is not supported: PEFT and vLLM have none for routed experts; --lora-rs or a higher --lora-rank "
         "do something similar"),
    Rule("options of LoRA need --lora-rank", lambda r: r.lora_option_alone is not None,
         "{r.lora_option_alone} needs --lora-rank"),
    Rule("no layer has the name of a LoRA target", lambda r: r.unknown_lora_target is not None,
         "--lora-target {r.unknown_lora_target}"),
    Rule("LoRA needs --load", lambda r: _adapts(r) and r.args.load is None,
         "--lora-rank {r.args.lora_rank} needs --load: adapters of random weights are of no use"),
    Rule("LoRA has frozen the weights already", lambda r: _adapts(r) and bool(r.frozen),
         "--freeze-parameters {r.args.freeze_parameters} conflicts with --lora-rank {r.args.lora_rank}, which freezes "
         "every weight; --lora-target chooses the adapters",
         (("LoRA", "frozen parameters"), ("LoRA dropout", "frozen parameters"))),
    Rule("new MTP modules would stay random under LoRA", lambda r: _adapts(r) and r.args.init_mtp,
         "--init-mtp conflicts with --lora-rank {r.args.lora_rank}: new MTP modules would stay random"),
    Rule("there is no model to export beside an adapter", lambda r: _adapts(r) and r.args.save_hf is not None,
         "--save-hf {r.args.save_hf} conflicts with --lora-rank {r.args.lora_rank}: --save-adapter writes the adapter, "
         "and tools/merge_lora.py merges it into its base"),
    Rule("an adapter is written from a checkpoint", lambda r: r.args.save_adapter is not None and r.args.save is None,
         "--save-adapter {r.args.save_adapter} needs --save: it is made from the last checkpoint"),
    Rule("a reader of the adapter needs --save-adapter",
         lambda r: r.args.adapter_for is not None and r.args.save_adapter is None,
         "--adapter-for {r.args.adapter_for} needs --save-adapter"),
    Rule("a router without an adapter has a bias that stays", _moves_a_frozen_routers_bias,
         "--moe-router-bias-update-rate {r.args.moe_router_bias_update_rate} needs --lora-target router: a frozen "
         "router goes on choosing as it did"),
)
