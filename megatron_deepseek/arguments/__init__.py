"""The command line of pre-training, from Megatron-named arguments to the settings that everything else is given.

Nothing here imports torch: --help and a refusal take no time.
"""

from megatron_deepseek.arguments.settings import Settings, parse, parse_or_exit

__all__ = ["Settings", "parse", "parse_or_exit"]
