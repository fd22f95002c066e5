"""The command line of pre-training, from Megatron-named arguments to the settings that everything else is given.

Nothing here imports torch, so that --help and the message of a mistake take no time.
"""

from megatron_deepseek.arguments.settings import parse, parse_or_exit
from megatron_deepseek.settings import Settings

__all__ = ["Settings", "parse", "parse_or_exit"]
