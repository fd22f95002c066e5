"""From a sequence on its way to what is given out of it."""

from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.request import Sequence


def output_of(sequence: Sequence) -> Output:
    """Return the answer as far as it has come."""
    parameters, request = sequence.parameters, sequence.request
    wants, wants_prompt = parameters.logprobs is not None, parameters.prompt_logprobs is not None
    return Output(
        request_id=request.request_id, index=sequence.index, prompt=request.prompt, tokens=sequence.answer,
        text=None if sequence.text is None else sequence.text.settled, text_ends=_text_ends(sequence),
        finish_reason=sequence.finish_reason, stop_reason=sequence.stop_reason,
        log_probabilities=list(sequence.log_probabilities) if wants else None,
        top_log_probabilities=list(sequence.top_log_probabilities) if wants else None,
        prompt_log_probabilities=list(request.prompt_reading.log_probabilities) if wants_prompt else None,
        prompt_top_log_probabilities=list(request.prompt_reading.tops) if wants_prompt else None,
        drawn_log_probabilities=list(sequence.drawn_log_probabilities) if parameters.drawn_logprobs else None,
        kept_ids=list(sequence.kept_ids) if parameters.kept_ids else None, chosen_experts=sequence.experts,
        queue_seconds=None if sequence.admitted_at is None else sequence.admitted_at - sequence.added_at)


def _text_ends(sequence: Sequence) -> list[int] | None:
    """Return the length of the text after each token; the one that ended the answer adds nothing to it."""
    if sequence.text is None:
        return None
    return sequence.text.ends + [len(sequence.text.text)] * (sequence.num_answered - len(sequence.text.ends))
