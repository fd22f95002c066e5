"""Settings of the optimizer that are refused: types of moments in which they would be wrong, nothing left to train."""

from megatron_deepseek.arguments.rule import Rule
from megatron_deepseek.model.architecture.freezing import trains_nothing


def _moment_type(option: str) -> Rule:
    dest = option[2:].replace("-", "_")
    return Rule(f"{option} is of an unsupported type", lambda r: getattr(r.args, dest) in ("fp16", "fp8"),
                f"{option} {{r.args.{dest}}} is not supported, only fp32 and bf16: moments of fewer than bfloat16's "
                "exponent bits vanish unless each tensor is scaled")


def _moment_decay(option: str, beta: str) -> Rule:
    """Return the rule against bfloat16 moments with a `beta` under which they would never decay.

    bfloat16 has 8 significant bits: a factor above 1 - 2**-8 rounds some moments back to what they were.
    """
    dest, beta_dest = option[2:].replace("-", "_"), beta[2:].replace("-", "_")
    return Rule(f"{option} bf16 conflicts with a large {beta}",
                lambda r: getattr(r.args, dest) == "bf16" and getattr(r.args, beta_dest) > 1 - 2**-8,
                f"{option} {{r.args.{dest}}} conflicts with {beta} {{r.args.{beta_dest}}}: a bfloat16 moment times "
                "a factor above 0.996 rounds back to itself and would never decay")


OPTIMIZER = (
    _moment_type("--exp-avg-dtype"),
    _moment_type("--exp-avg-sq-dtype"),
    _moment_decay("--exp-avg-dtype", "--adam-beta1"),
    _moment_decay("--exp-avg-sq-dtype", "--adam-beta2"),
    Rule("the model has none of the frozen parameters", lambda r: r.unknown_frozen is not None,
         "--freeze-parameters {r.unknown_frozen}"),
    Rule("the frozen parameters leave nothing to train",
         lambda r: bool(r.frozen) and trains_nothing(r.model, r.frozen),
         "--freeze-parameters {r.args.freeze_parameters} leaves no parameter to train"),
)
