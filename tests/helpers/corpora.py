"""Small corpora and runs of preprocessing on them, for the tests of megatron_deepseek/data/corpus."""

import dataclasses
import gzip
import json
import lzma

from megatron_deepseek.data.indexed import open_indexed
from megatron_deepseek.data.preprocess.run import preprocess
from megatron_deepseek.data.preprocess.settings import Content, Execution, PreprocessSettings, Selection

KINDS = {"content": Content, "selection": Selection, "execution": Execution}


def write_lines(path, documents):
    """JSONL, compressed by the ending of `path`."""
    return write_bytes(path, "".join(json.dumps(document) + "\n" for document in documents).encode())


def write_bytes(path, content: bytes):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".xz":
        content = lzma.compress(content)
    elif path.suffix == ".zst":
        import zstandard
        content = zstandard.compress(content)
    path.write_bytes(content)
    return str(path)


def settings_of(tmp_path, source="in.jsonl", **changes):
    """Settings by the arguments' names: ids below 1000 by NullTokenizer, over what is there, unless told otherwise."""
    values = {"output_prefix": str(tmp_path / "out"), "tokenizer_type": "NullTokenizer", "tokenizer_model": "1000",
              "append_eod": True, "overwrite": True, "input": (str(tmp_path / source),)} | changes
    groups = {}
    for name, kind in KINDS.items():
        groups[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)
                               if field.name in values})
    return PreprocessSettings(**values, **groups)


def run(settings):
    return preprocess(settings, say=lambda line: None)


def contents(tmp_path, name="out_text_document"):
    return (tmp_path / f"{name}.bin").read_bytes(), (tmp_path / f"{name}.idx").read_bytes()


def documents_of(prefix) -> list[list[int]]:
    """The ids of each sequence."""
    file = open_indexed(str(prefix), "")
    ends = file.lengths.cumsum()
    return [file.ids[end - length:end].tolist() for end, length in zip(ends, file.lengths)]
