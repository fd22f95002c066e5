"""What single tokens say: the bytes of all tokens of a text, one after the other, are those of the text."""

import pytest
from chat_tokenizers import write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_deepseek.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, build_tokenizer
from megatron_deepseek.serving.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from megatron_deepseek.serving.token_text import TokenText

TEXT = "what is 北京?  “naïve” \U0001f600\n\n12"


def sentencepiece(folder) -> HuggingFaceTokenizer:
    """A tokenizer in the manner of SentencePiece: blanks as low lines, lone bytes by their numbers."""
    pieces = {"</s>": 0, "<unk>": 1, "\u2581": 2, "\u2581what": 3, "\u2581is": 4,
              **{f"<0x{byte:02X}>": 5 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return build_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["byte-level", "bytes"])
def test_bytes_of_tokens_are_those_of_the_text(tmp_path, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else build_tokenizer(
        "HuggingFaceTokenizer", write_tokenizer(tmp_path))
    tokens = TokenText(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert b"".join(map(tokens.bytes_of, ids)) == TEXT.encode()
    pieces = [tokens.text_of(each) for each in ids]
    assert any(each.startswith("bytes:\\x") for each in pieces) and len(set(ids)) == len(set(pieces))


def test_pieces_and_bytes_in_the_manner_of_sentencepiece(tmp_path):
    tokenizer = sentencepiece(tmp_path)
    tokens = TokenText(tokenizer)
    assert [tokens.bytes_of(each) for each in (2, 3, 4)] == [b" ", b" what", b" is"]
    assert [tokens.bytes_of(5 + byte) for byte in (0x41, 0xE4)] == [b"A", b"\xe4"]
    assert tokens.text_of(5 + 0xE4) == "bytes:\\xe4" and tokens.text_of(0) == "</s>"


def test_control_tokens_are_as_they_are_written(tmp_path):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", write_tokenizer(tmp_path))
    tokens = TokenText(tokenizer)
    assert tokens.text_of(tokenizer.eod) == "<｜end▁of▁sentence｜>"
    assert tokens.bytes_of(tokenizer.backend.token_to_id("</think>")) == b"</think>"


def test_numbers_that_json_has_not_and_equal_texts():
    """-infinity is shown as -9999; of two tokens with one text the likelier is listed, and by ids both are."""
    tokens = TokenText(build_tokenizer("NullTokenizer", "9"))
    tokens.bytes_of = lambda token: b"same" if token < 2 else b"other"
    top = {1: -2.0, 0: -1.0, 2: float("-inf")}
    shown = completion_logprobs(tokens, [1], [-2.0], [top], [0], 3, False)
    assert shown == {"text_offset": [0], "token_logprobs": [-2.0], "tokens": ["same"],
                     "top_logprobs": [{"same": -1.0, "other": -9999.0}]}
    by_id = completion_logprobs(tokens, [1], [-2.0], [top], [0], 3, True)["top_logprobs"][0]
    assert by_id == {"token_id:0": -1.0, "token_id:1": -2.0, "token_id:2": -9999.0}
    (entry,) = chat_logprobs(tokens, [1], [-2.0], [top], 1, True)
    assert [each["token"] for each in entry["top_logprobs"]] == ["token_id:0"] and entry["logprob"] == -2.0


def test_of_more_than_was_asked_for_the_likeliest_are_shown_and_the_chosen_one():
    tokens = TokenText(build_tokenizer("NullTokenizer", "9"))
    top = {7: -9.0, 1: -1.0, 2: -2.0, 3: -3.0}
    shown = completion_logprobs(tokens, [7], [-9.0], [top], [0], 2, False)["top_logprobs"][0]
    assert shown == {"1": -1.0, "2": -2.0, "7": -9.0}
    ranks = {1: 1, 2: 2, 3: 3, 7: None}
    assert prompt_logprobs(tokens, [None, top], 3) == [None, {
        str(token): {"logprob": top[token], "rank": rank, "decoded_token": str(token)}
        for token, rank in ranks.items()}]
