"""Notices: what follows from arguments and config that a user may not expect, one line each at the start of a run."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_deepseek.arguments.request import Request
from megatron_deepseek.model.architecture.presets import load_config


@dataclass(frozen=True)
class Notice:
    """A line for the user: `message`, a format string over a Request `r`, is shown where `when` is true of it."""

    when: Callable[[Request], bool]
    message: str


def _dense_layers_removed(r: Request) -> bool:
    if r.args.model is None or r.args.moe_layer_freq is None or not r.model.n_routed_experts:
        return False
    base = load_config(r.args.model)
    return any(r.model.is_moe_layer(layer) for layer in range(base.first_k_dense_replace))


def _no_balance_loss(r: Request) -> bool:
    asked = r.args.moe_router_load_balancing_type is not None or r.args.moe_aux_loss_coeff is not None
    return r.model.n_routed_experts > 0 and not asked and r.balance[0] == "none"


_NO_BALANCE = "no balance loss is trained on: aux_loss_alpha of the config is {r.model.aux_loss_alpha:g}; " \
    "--moe-aux-loss-coeff gives one"

NOTICES = (
    Notice(lambda r: r.fine_tunes and r.args.load is None, "without --load the weights are random: nothing is there to "
           "be fine-tuned"),
    Notice(lambda r: r.reinforces and r.args.load is None, "without --load the weights are random: no answer will be "
           "rewarded for what it says"),
    Notice(lambda r: r.args.compile, "functions of the layers are compiled in the first step, which takes longer; a "
           "line will say how long"),
    Notice(lambda r: r.args.save is None, "without --save nothing will be saved"),
    Notice(lambda r: r.args.num_nextn_predict_layers is None and r.model.num_nextn_predict_layers > 0
           and r.pretrains,
           "MTP is trained too, as the config has it (num_nextn_predict_layers "
           "{r.model.num_nextn_predict_layers}); --mtp-num-layers 0 leaves it out"),
    Notice(_dense_layers_removed, "--moe-layer-freq gives experts to layers at the beginning that are dense in the "
           "config (first_k_dense_replace {r.model.first_k_dense_replace} now)"),
    Notice(lambda r: _no_balance_loss(r) and r.model.topk_method == "noaux_tc",
           _NO_BALANCE + ". The routers' biases balance the experts"),
    Notice(lambda r: _no_balance_loss(r) and r.model.topk_method != "noaux_tc",
           _NO_BALANCE + ". Nothing balances the experts"),
)


def notices(request: Request) -> tuple[str, ...]:
    """Return the lines that apply to `request`, in the order of the table."""
    return tuple(notice.message.format(r=request) for notice in NOTICES if notice.when(request))
