"""Mistakes of GGUF files: which numbers go where, what llama.cpp is told of a model, and how it is to cut texts."""

from mutant import of

FILES = ("tests/unit/checkpoint/gguf/test_gguf.py",)
VOCABULARY = ("tests/unit/checkpoint/gguf/test_gguf_vocabulary.py",)

GGUF = of(
    FILES,
    ("output._blocks", ".T.contiguous()", ".view(part.stop - part.start, -1)"),
    ("output._blocks", ".transpose(0, 1).flatten(0, 1)", ".flatten(0, 1)"),
    ("output._read", "begin = start - start % BLOCK", "begin = start"),
    ("_key_and_value", "start + nope, start + nope + value", "start, start + value"),
    ("gguf.tensors._kind", "or name.endswith(_ALWAYS_FLOAT32)", ""),
    ("gguf_output", "more=repr((header.config, header.vocabulary, sorted(header.generation.items())))", 'more=""'),
    ("_header_bytes", "sum(len(file.tensors) for file in files)", "len(files[number].tensors)"),
    ("_commonest", "torch.Size(shape).numel()", "1"),
    ("_rope_factor", "turns > scaling.high_freq_factor", "turns > scaling.low_freq_factor"),
    ("add_general", '("top_k", writer.add_sampling_top_k)', '("top_p", writer.add_sampling_top_k)'),
    ("check_supported", "_LATENT if config.kv_lora_rank else _GROUPED", "_GROUPED"),
) + of(
    VOCABULARY,
    ("vocabulary._name_of", 'not rest["add_prefix_space"]', 'True'),
    ("vocabulary._splits", "rest[0] if len(rest) == 1 else None", "rest[0] if rest else None"),
    ("vocabulary._entries", "added[identity].special or _looks_special(texts[identity])", "added[identity].special"),
    ("read_vocabulary", "chat_template or _template_in(directory)", "_template_in(directory) or chat_template"),
    ("read_vocabulary", "tokenizer.adds_bos", "True"),
)
