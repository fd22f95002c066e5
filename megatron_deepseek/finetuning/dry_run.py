"""--dry-run: what a fine-tuning would train on, without a model."""

import os
import sys
from functools import partial

from megatron_deepseek.finetuning.data import held_out_sets, training_set, with_tokenizer
from megatron_deepseek.finetuning.describe import describe
from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.runtime.user_errors import end_on_user_error
from megatron_deepseek.settings import Settings


def show_data(settings: Settings) -> None:
    """Print the description of every set, on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    with end_on_user_error():
        settings = with_tokenizer(settings)
        for each in (training_set(settings), *held_out_sets(settings)):
            prepared = prepare(each, partial(print, file=sys.stderr, flush=True))
            print(f"{each.option} {' '.join(each.dataset)}")
            print(describe(prepared, settings.batch.global_batch_size, colour=sys.stdout.isatty()), flush=True)
