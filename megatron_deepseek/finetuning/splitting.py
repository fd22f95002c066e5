"""--split-turns reasoning: every answer with thoughts as a sample of its own.

What was thought before the last question is no part of a release's prompt, so in one sample of a whole conversation
only the thoughts behind its last question can be trained on. Where the conversation ends behind each answer in turn,
every answer is the last one once: what comes before is written as the model is shown it, and loss is on this answer
alone.
"""

from dataclasses import replace
from itertools import groupby

from megatron_deepseek.finetuning.conversation import Conversation, Turn


def split_by_reasoning(conversation: Conversation) -> list[Conversation]:
    """Return a sample for each answer with thoughts, in order, and one for each series of answers without between them.

    An answer is all that the assistant says to one question, its calls of tools and what it says to their results
    included. Every turn that has loss has it in one of the samples; a sample without any is left out.
    """
    series = groupby(_exchanges(conversation.turns), lambda span: span if _thinks(conversation, span) else None)
    samples = [_sample(conversation, [*spans]) for _, spans in series]
    return [sample for sample in samples if any(turn.weight for turn in sample.turns if turn.role == "assistant")] or [
        conversation]


def _exchanges(turns: tuple[Turn, ...]) -> list[tuple[int, int]]:
    """Return (begin, end) of each user's turn with all that follows it up to the next user's."""
    begins = [index for index, turn in enumerate(turns) if turn.role == "user"]
    return list(zip(begins, [*begins[1:], len(turns)]))


def _thinks(conversation: Conversation, span: tuple[int, int]) -> bool:
    return any(turn.reasoning is not None and turn.weight for turn in conversation.turns[slice(*span)])


def _sample(conversation: Conversation, spans: list[tuple[int, int]]) -> Conversation:
    """Return the conversation up to the end of the last of `spans`, with loss from the begin of the first on."""
    begin, end = spans[0][0], spans[-1][1]
    before = tuple(replace(turn, weight=0.0) if turn.role == "assistant" else turn
                   for turn in conversation.turns[:begin])
    return Conversation(before + conversation.turns[begin:end], conversation.tools)
