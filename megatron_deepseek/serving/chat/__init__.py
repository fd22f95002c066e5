"""What a chat request means: messages to a prompt, and an answer to reasoning, text and tool calls."""

from megatron_deepseek.serving.chat.format import ChatFormat, Question
from megatron_deepseek.serving.chat.parser import AnswerParser

__all__ = ["AnswerParser", "ChatFormat", "Question"]
