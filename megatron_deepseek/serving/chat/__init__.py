"""What a chat request means: messages to a prompt, and an answer to reasoning, text and tool calls."""

from megatron_deepseek.serving.chat.delta import ChatDelta
from megatron_deepseek.serving.chat.format import AUTO, ChatFormat, Question
from megatron_deepseek.serving.chat.options import CHAT_FIELDS
from megatron_deepseek.serving.chat.parser import AnswerParser
from megatron_deepseek.serving.chat.response_format import GRAMMAR_FIELDS, grammar_of

__all__ = ["AUTO", "CHAT_FIELDS", "GRAMMAR_FIELDS", "AnswerParser", "ChatDelta", "ChatFormat", "Question", "grammar_of"]
