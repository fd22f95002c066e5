"""Stop strings: the automaton against a search for each string, and the text of an answer as its tokens come."""

import random
from dataclasses import replace

import pytest

from megatron_deepseek.data.tokenizer import ByteTokenizer, NullTokenizer
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.stop_strings import StopSearch, StopStrings
from megatron_deepseek.inference.text import AnswerText


def first_end(text: str, strings: list[str]) -> tuple[int, int] | None:
    """Where the first of them ends in the text, and how long the longest is that ends there."""
    for end in range(len(text) + 1):
        lengths = [len(each) for each in strings if text[:end].endswith(each)]
        if lengths:
            return end, max(lengths)
    return None


def longest_beginning(text: str, strings: list[str]) -> int:
    """How much of the text's end begins one of the strings."""
    return max((size for each in strings for size in range(len(each)) if text.endswith(each[:size])), default=0)


def test_the_automaton_finds_what_a_search_finds():
    rng = random.Random(0)
    for _ in range(300):
        strings = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        text, cuts = "".join(rng.choices("abc", k=12)), sorted(rng.choices(range(13), k=2))
        search, found, before = StopSearch(StopStrings(strings)), None, 0
        for piece in (text[:cuts[0]], text[cuts[0]:cuts[1]], text[cuts[1]:]):
            found = search.feed(piece)
            if found is not None:
                found = before + found[0], found[1]
                break
            before += len(piece)
            assert search.held == longest_beginning(text[:before], strings), (strings, text[:before])
        assert found == first_end(text, strings), (strings, text, cuts)


def answer(tokens, stop=(), prompt=(65,), tokenizer=ByteTokenizer(), **options) -> tuple[list[str], bool]:
    """The settled text after each token, and whether it stopped."""
    text = AnswerText(tokenizer, tuple(prompt), StopStrings(stop) if stop else None)
    seen = []
    for token in tokens:
        stopped = text.add(token, **options)
        seen.append(text.settled)
        if stopped:
            return seen, True
    text.end()
    return [*seen, text.settled], False


def test_what_may_become_a_stop_string_is_held_back():
    assert answer(b"xabab", ["abac"])[0] == ["x", "x", "x", "x", "xab", "xabab"]
    assert answer(b"xabac!", ["abac"]) == (["x", "x", "x", "x", "x"], True)
    assert answer(b"xab", ["xa"], may_stop=False) == (["", "", "xab", "xab"], False)


def test_a_character_is_shown_when_it_is_whole():
    assert answer("a€b".encode())[0] == ["a", "a", "a", "a€", "a€b", "a€b"]
    assert answer(b"a\xe2\x82")[0][-1] == "a\ufffd"  # it never came
    assert answer(b"\x82\xac!", prompt=b"A\xe2")[0][-1] == "€!"  # the prompt ends within it
    assert answer(b"\xff\xfe" * 40 + "é".encode())[0][-1] == "\ufffd" * 80 + "é"


def test_blanks_before_words_stay_however_long_the_text():
    tokens = list(range(100))
    assert answer(tokens, prompt=(7,), tokenizer=NullTokenizer(100))[0][-1] == "".join(f" {i}" for i in tokens)


@pytest.mark.parametrize("stop", [["€"], ["\ufffd"]])
def test_pieces_of_a_character_are_no_stop_string(stop):
    seen, stopped = answer("a€b".encode(), stop)
    assert (seen[-1], stopped) == (("a", True) if stop == ["€"] else ("a€b", False))


@pytest.mark.parametrize("tokens, stop, ends", [
    ("a€b".encode(), (), [1, 1, 1, 2, 3]), (b"xabac", ("abac",), [1, 1, 1, 1, 1]), (b"a\xe2\x82", (), [1, 1, 2])])
def test_each_token_has_its_end_in_the_text(tokens, stop, ends):
    """A character in pieces is there with its last one, at the end of the answer with what there is; what a stop
    string takes with it, no token has.
    """
    text = AnswerText(ByteTokenizer(), (65,), StopStrings(stop) if stop else None)
    if not any([text.add(token) for token in tokens]):
        text.end()
    assert text.ends == ends and ends[-1] == len(text.settled)


def test_tokens_are_settled_with_their_text():
    """While a text may become a stop string, its tokens are held back as it is; at the end none are."""
    running = Output("a", 0, (), [7, 8, 9], "x", text_ends=[1, 1, 3])
    assert running.settled == 2
    assert replace(running, finish_reason="length").settled == replace(running, text=None).settled == 3
