"""How many rows the embedding has, as Megatron-LM counts them.

The vocabulary is --vocab-size, that of --model, or without --model that of the tokenizer. The option
--make-vocab-size-divisible-by rounds it up. Exports have the rows of the vocabulary alone.
"""

from argparse import Namespace

from megatron_deepseek.data.tokenizer import build_tokenizer


def vocabulary(args: Namespace) -> tuple[int | None, str]:
    """Return the ids of a vocabulary that --model does not give, None where nothing gives them, and then why."""
    size, why = (args.vocab_size, "") if args.vocab_size is not None else _of_tokenizer(args)
    if size is not None:
        return size + (args.extra_vocab_size or 0), ""
    return args.padded_vocab_size, why


def padded(size: int, args: Namespace) -> int:
    """Return the rows of an embedding of `size` ids: --padded-vocab-size, or a multiple of
    --make-vocab-size-divisible-by x tensor-parallel ranks. Raise ValueError where it has too few.
    """
    if args.padded_vocab_size is not None:
        if args.padded_vocab_size < size:
            raise ValueError(f"--padded-vocab-size {args.padded_vocab_size} is less than the vocabulary of {size}")
        return args.padded_vocab_size
    if args.make_vocab_size_divisible_by is None:
        return size
    unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-size // unit) * unit


def _of_tokenizer(args: Namespace) -> tuple[int | None, str]:
    try:
        return build_tokenizer(args.tokenizer_type, args.tokenizer_model).vocab_size, ""
    except ValueError as error:
        return None, f"the tokenizer gives none: {error}"
