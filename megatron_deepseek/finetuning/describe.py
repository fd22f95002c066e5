"""What a dry run prints of the data: first samples with their trained tokens marked, counts, lengths, epochs."""

from megatron_deepseek.finetuning.prepare import Prepared


def describe(prepared: Prepared, global_batch_size: int, samples: int = 3, colour: bool = False) -> str:
    """Return the text: trained tokens are coloured, or within ⟦ ⟧ where `colour` is False. No model, no torch."""
    raise NotImplementedError
