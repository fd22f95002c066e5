"""How many rows the embedding has where arguments alone give the architecture, as Megatron-LM counts them.

The vocabulary is --vocab-size, or that of the tokenizer; --make-vocab-size-divisible-by rounds it up.
"""

from argparse import Namespace

from megatron_deepseek.data.tokenizer import build_tokenizer


def vocabulary(args: Namespace) -> tuple[int | None, str]:
    """Return the rows of the embedding, None where nothing gives them, and then why."""
    if args.padded_vocab_size is not None:
        return args.padded_vocab_size, ""
    size, why = (args.vocab_size, "") if args.vocab_size is not None else _of_tokenizer(args)
    return (None, why) if size is None else (rounded(size + (args.extra_vocab_size or 0), args), "")


def rounded(size: int, args: Namespace) -> int:
    """Return `size`, rounded up to a multiple of --make-vocab-size-divisible-by x tensor-parallel ranks if given."""
    if args.make_vocab_size_divisible_by is None:
        return size
    unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-size // unit) * unit


def _of_tokenizer(args: Namespace) -> tuple[int | None, str]:
    try:
        return build_tokenizer(args.tokenizer_type, args.tokenizer_model).vocab_size, ""
    except ValueError as error:
        return None, f"the tokenizer gives none: {error}"
