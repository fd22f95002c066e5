"""--save-hf: the export at the end of a run, and the files that it needs, which are kept beside the checkpoints."""

import torch.distributed as dist

from megatron_deepseek.checkpoint.job.export import (
    export_hf,
    is_exported,
    keep_assets,
    keep_model_file,
    keep_tokenizer,
    keep_vocab_size,
)
from megatron_deepseek.checkpoint.tracker import find_iteration
from megatron_deepseek.runtime.decision import Start
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.user_errors import end_on_user_error
from megatron_deepseek.settings import RunSettings, Settings


def keep_beside(settings: Settings, start: Start) -> None:
    """Keep beside the checkpoints what an export needs: the files of what the run began from, and the tokenizer."""
    if settings.run.save is not None:
        keep_assets(start.load, settings.run.save)
        keep_model_file(settings.run.save, settings.run.model_file, settings.model)
        keep_tokenizer(settings.run.save, settings.data, settings.run.chat_template)
        keep_vocab_size(settings.run.save, settings.run.unpadded_vocab_size)


def export(run: RunSettings, iteration: int, report: Report) -> None:
    """Export the last checkpoint for --save-hf in the form of released models, each rank writing its part of the files.

    `iteration` is the one that the run has reached. A run that leaves before its end exports nothing: whoever stopped
    it may not wait, and its next start could not write where this one's export is.
    """
    if run.save_hf is None:
        return
    by_hand = f"tools/convert_checkpoint.py --from native --to hf --load {run.save} --save DIR exports it"
    if iteration < run.train_iters:
        report.message(f"{run.save_hf} is not written after {iteration} of {run.train_iters} iterations, but after "
                       f"the last one. Until then {by_hand}")
        return
    with end_on_user_error(f"; the training itself is saved: {by_hand}"):
        if _is_exported(run, iteration):
            report.message(f"{run.save_hf} is the export of iteration {iteration} already")
            return
        export_hf(run, dist.get_rank(), dist.get_world_size())
    report.message(f"exported {run.save_hf}")


def _is_exported(run: RunSettings, iteration: int) -> bool:
    """Return on all ranks whether rank 0 finds the export: an earlier start of this run may have got to its end."""
    answer = [False]
    if dist.get_rank() == 0:
        saved = find_iteration(run.save, iteration)
        answer = [saved is not None and is_exported(run, saved)]
    dist.broadcast_object_list(answer)
    return answer[0]
