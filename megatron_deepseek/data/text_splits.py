"""How byte-level tokenizers cut a text into pieces before they merge bytes within each: the regular expressions.

They are those of the released tokenizer.json files. A piece is what an expression matches, and what lies between.
"""

PUNCTUATION = r"[\p{P}\p{S}]|\p{N}"
# DeepSeek-V3's: digits by threes, CJK apart, then words, punctuation, line ends, blanks.
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = (_WORDS.replace("NUMBERS", r"\p{N}"),)
LLAMA3 = (_WORDS.replace("NUMBERS", r"\p{N}{1,3}"),)
