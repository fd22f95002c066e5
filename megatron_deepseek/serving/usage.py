"""How many tokens a request took."""

from dataclasses import dataclass, field

from megatron_deepseek.serving.stream_options import StreamOptions
from megatron_deepseek.serving.ticket import Ask


@dataclass
class Usage:
    """Tokens of the prompts, and of each answer as far as it has come."""

    prompt_tokens: int
    answers: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, ask: Ask) -> "Usage":
        return cls(sum(map(len, ask.prompts)))

    def count(self, number: int, tokens: int) -> None:
        """Take note of an answer's length."""
        self.answers[number] = tokens

    @property
    def shown(self) -> dict:
        """Return OpenAI's `usage`."""
        answered = sum(self.answers.values())
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": answered,
                "total_tokens": self.prompt_tokens + answered}

    def in_chunk(self, stream: StreamOptions) -> dict:
        """Return what an ordinary chunk says of it: null where a last chunk will tell, nothing where none will."""
        if stream.continuous_usage:
            return {"usage": self.shown}
        return {"usage": None} if stream.include_usage else {}
