"""Words, scripts and repetitions of a text, for rewards and filters: no list of words, no model."""

import re
import unicodedata
from collections import Counter
from functools import cache

# How the names of a script's letters begin in the Unicode standard, by the code of a language (ISO 639-1).
SCRIPTS = {"en": ("LATIN",), "de": ("LATIN",), "es": ("LATIN",), "fr": ("LATIN",), "zh": ("CJK",),
           "ja": ("HIRAGANA", "KATAKANA", "CJK"), "ko": ("HANGUL", "CJK"), "ru": ("CYRILLIC",), "el": ("GREEK",),
           "ar": ("ARABIC",), "he": ("HEBREW",), "hi": ("DEVANAGARI",), "th": ("THAI",)}
_LONGEST_WORD = 16  # characters; a longer run, such as "hahaha...", counts as several words

# What is written alike in all languages: fenced and quoted code, formulas, commands of LaTeX, addresses.
_NO_LANGUAGE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+"
                          r"|https?://\S+", re.S)
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # characters that are words without blanks between
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w){{1,{_LONGEST_WORD}}}|[^\w\s]")


def words(text: str) -> list[str]:
    """Return the words and signs of a text in small letters; each Chinese and Japanese character is a word."""
    return _WORD.findall(text.lower())


def repetition(text: str, size: int = 4) -> float:
    """Return which share of a text's runs of `size` words was there before: 0 where none was, near 1 for a loop."""
    found = words(text)
    runs = [tuple(found[place:place + size]) for place in range(len(found) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@cache
def script_of(letter: str) -> str:
    """Return the script of a letter, as its Unicode name begins; "" for what is no letter."""
    return re.split("[ -]", unicodedata.name(letter, ""))[0] if letter.isalpha() else ""


def scripts(text: str) -> Counter[str]:
    """Return how many letters of each script a text has outside of code and formulas."""
    found = Counter(script_of(letter) for letter in _NO_LANGUAGE.sub(" ", text))
    found.pop("", None)
    return found


def language_share(text: str, language: str) -> float:
    """Return which share of a text's letters is of the script of `language`, a key of SCRIPTS; 1 without letters."""
    found = scripts(text)
    return sum(found[each] for each in SCRIPTS[language]) / found.total() if found else 1.0


def language_of(text: str) -> str | None:
    """Return the language whose script most letters of a text have, None without letters: "en" stands for all Latin.

    A text with kana is Japanese, though most of its letters be Chinese.
    """
    found = scripts(text)
    if not found:
        return None
    if (found["HIRAGANA"] + found["KATAKANA"]) / found.total() > 0.1:
        return "ja"
    most = found.most_common(1)[0][0]
    return next((language for language, names in SCRIPTS.items() if most in names), None)
