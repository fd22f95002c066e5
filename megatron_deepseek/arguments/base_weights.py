"""The arguments that say what the frozen weights beside adapters are kept as, and their validation rules: a part of the
table in validation.py. The names are LLaMA-Factory's.
"""

import argparse

from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.rule import Rule
from megatron_deepseek.model.architecture.base_weights import (
    BITS,
    FP8_BITS,
    NF4_BITS,
    BaseSettings,
    frozen_shape,
    quantised_rows,
    refuse_cut,
)
from megatron_deepseek.model.architecture.placements import EP, ETP, TP


def add_base_weights(parser):
    add = parser.add_argument_group("base weights", "what weights beside adapters are kept as (docs/lora.md)"
                                    ).add_argument
    add("--quantization-bit", type=int, choices=BITS, metavar="BITS",
        help="4: NF4, as QLoRA; 8: FP8 in blocks of 128x128, as released (plain numbers)")
    add("--double-quantization", action=argparse.BooleanOptionalAction, help="of NF4: quantise its scales too (yes)")


def base_settings(args) -> BaseSettings | None:
    """Return what the weights beside adapters are kept as, None for plain numbers."""
    if args.quantization_bit is None:
        return None
    return BaseSettings(args.quantization_bit, args.double_quantization is not False)


def _switches_scales(r: Request) -> bool:
    return r.args.double_quantization is not None and r.args.quantization_bit != NF4_BITS


def _nf4_in_fp8(r: Request) -> bool:
    return r.args.quantization_bit == NF4_BITS and r.args.fp8_format is not None


def _cuts_a_block(r: Request) -> bool:
    """Return False; raise ValueError where ranks divide a weight inside a block."""
    base, ranks = base_settings(r.args), {TP: r.tp, EP: r.ep, ETP: r.etp}
    for row in quantised_rows(r.model) if base is not None else ():
        refuse_cut(row, base, ranks)
        of_rank = frozen_shape(row, base, ranks)
        if base.quantization_bit == FP8_BITS and r.args.fp8_format is not None and of_rank.rows_of_scale == 1:
            rows = of_rank.local_codes[-2] // max(1, len(row.stacked))
            raise ValueError(f"--quantization-bit {FP8_BITS} with --fp8-format {r.args.fp8_format}: a rank has {rows} "
                             f"rows of {row.name}, and FP8 products need whole blocks of {base.block}")
    return False


BASE_WEIGHTS = (
    Rule("a quantised base needs --lora-rank", lambda r: r.args.quantization_bit is not None and
         r.args.lora_rank is None,
         "--quantization-bit {r.args.quantization_bit} needs --lora-rank: what is kept so is not trained"),
    Rule("--double-quantization is of NF4", _switches_scales,
         f"--double-quantization and --no-double-quantization need --quantization-bit {NF4_BITS}"),
    Rule("NF4 is not multiplied as FP8", _nf4_in_fp8,
         f"--quantization-bit {NF4_BITS} conflicts with --fp8-format {{r.args.fp8_format}}, which would round its "
         f"numbers once more; --quantization-bit {FP8_BITS} keeps weights as FP8 products take them"),
    Rule("a quantised weight needs whole blocks on each rank", _cuts_a_block,
         "(which weight, and where ranks would divide it)"),
)
