"""What a chat request means: messages to a prompt, and an answer to reasoning, text and tool calls."""

from megatron_deepseek.serving.chat.format import AUTO, ChatFormat, Question
from megatron_deepseek.serving.chat.parser import AnswerParser
from megatron_deepseek.serving.chat.response_format import grammar_of

__all__ = ["AUTO", "AnswerParser", "ChatFormat", "Question", "grammar_of"]
