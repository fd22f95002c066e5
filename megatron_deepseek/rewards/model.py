"""The reward `model:DIR`: the scores of a reward model, trained by --objective reward, in a process of its own."""

from collections.abc import Sequence
from pathlib import Path

from megatron_deepseek.finetuning.preference.reward_model import RewardModel
from megatron_deepseek.inference.text import prompt_ids
from megatron_deepseek.rewards.answer import asked_messages, split_answer


class ModelReward:
    """A reward model, loaded once. Raise ValueError, of one line, for a directory that holds none."""

    def __init__(self, directory: Path):
        self.model = RewardModel.open(directory)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> list[float]:
        """Return the score of each completion.

        Rows with messages are scored in the template of the reward model, others by prompt and completion as they are,
        with the end of sentence behind them.
        """
        chats = [_conversation(*each) for each in zip(prompts, completions, rows)]
        of_chats = iter(self.model.scores([each for each in chats if each is not None]))
        bare = [self._ids(*each) for each, chat in zip(zip(prompts, completions), chats) if chat is None]
        of_bare = iter(self.model.scores_of_ids(bare))
        return [next(of_bare if chat is None else of_chats) for chat in chats]

    def _ids(self, prompt: str, completion: str) -> list[int]:
        tokenizer = self.model.encoder.tokenizer
        return [*prompt_ids(tokenizer, prompt + completion), tokenizer.eod]


def _conversation(prompt: str, completion: str, row: dict) -> list[dict] | None:
    """Return the messages of a row with the completion behind them, None for a row without messages."""
    asked = asked_messages(row)
    if asked is None:
        return None
    reasoning, answer = split_answer(prompt, completion)
    return [*asked, {"role": "assistant", "content": answer, **({"reasoning_content": reasoning} if reasoning else {})}]
