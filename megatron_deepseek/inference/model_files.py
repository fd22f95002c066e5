"""The files that a model is loaded from, checked before anything is built: weights, tokenizer, its own sampling."""

from collections import Counter
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.convert.assets import DIRECTORY
from megatron_deepseek.checkpoint.convert.formats import open_native
from megatron_deepseek.checkpoint.convert.huggingface import open_huggingface
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.integrity import check_sizes, read_checksums
from megatron_deepseek.checkpoint.loadable import checkpoint_directory, refuse_damage
from megatron_deepseek.checkpoint.tracker import is_huggingface
from megatron_deepseek.data.tokenizer import Tokenizer, build_tokenizer
from megatron_deepseek.foreign_json import JsonObject, read_object
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.model.architecture.config import ModelConfig

HUGGINGFACE_TOKENIZER = "HuggingFaceTokenizer"
PLAIN, FP8, NF4 = "plain", "fp8", "nf4"
FORMS = (PLAIN, FP8, NF4)
_GENERATION = "generation_config.json"
_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer of --tokenizer-type and --tokenizer-model; without the latter the one that is with the weights."""

    type: str = HUGGINGFACE_TOKENIZER
    model: str | None = None


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """A model on disk. `directory` is a Hugging Face directory or that of one iteration; `source` reads its tensors."""

    directory: Path
    source: TensorSource
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    defaults: SamplingParameters

    @property
    def config(self) -> ModelConfig:
        """Return the architecture, which announces MTP modules only where drafts were asked for."""
        return self.source.config

    @property
    def form(self) -> str:
        """Return how the weights are kept unless the user says otherwise: as FP8 if they were released so."""
        return FP8 if torch.float8_e4m3fn in self.source.dtypes.values() else PLAIN

    @property
    def dtype(self) -> torch.dtype:
        """Return what is computed in unless the user says otherwise: bfloat16 if most weights are stored in it, or in
        other formats of 16 or 8 bits.
        """
        numbers = Counter()
        for name, dtype in self.source.dtypes.items():
            numbers[dtype in (torch.float32, torch.float64)] += prod(self.source.shapes[name])
        return torch.float32 if numbers[True] >= numbers[False] else torch.bfloat16


def open_model(load: Path, step: int | None = None, *, mtp: bool = False,
               tokenizer: TokenizerChoice | None = TokenizerChoice(),
               usual: SamplingParameters = SamplingParameters()) -> ModelFiles:
    """Look at the files of a model: a Hugging Face directory, or the checkpoints of a training.

    With `mtp` its MTP modules are read too. Without a `tokenizer` the model answers ids with ids. `usual` is the
    sampling where the model has none of its own. Raise ValueError, of one line, for whatever cannot work: a directory
    that is none, torn or damaged files, no tokenizer, no module.
    """
    directory = checkpoint_directory(load, step)
    if is_huggingface(directory):
        source, beside = open_huggingface(directory, without_mtp=not mtp), directory
    else:
        refuse_damage(directory, check_sizes(directory, read_checksums(directory) or {}))
        source, beside = open_native(directory, without_mtp=not mtp)[0], directory.parent / DIRECTORY
    if mtp and not source.config.num_nextn_predict_layers:
        raise ValueError(f"{directory} holds no Multi-Token Prediction module, which drafts are made by")
    if source.config.reward_head:
        raise ValueError(f"{directory} is a reward model, which writes no answers: tools/score_answers.py scores with "
                         "it")
    built = None if tokenizer is None else _tokenizer(tokenizer, load, beside)
    eos_ids, defaults = read_generation(beside, source.config.vocab_size, usual)
    if built is not None and built.eod < source.config.vocab_size:
        eos_ids = tuple(dict.fromkeys((*eos_ids, built.eod)))
    return ModelFiles(directory, source, built, eos_ids, defaults)


def _tokenizer(choice: TokenizerChoice, load: Path, beside: Path) -> Tokenizer:
    """Return the tokenizer that was chosen, or else the one that came with the weights."""
    model = choice.model
    if model is None and choice.type == HUGGINGFACE_TOKENIZER:
        if not (beside / "tokenizer.json").is_file():
            raise ValueError(f"--load {load} has no tokenizer.json with it: --tokenizer-model must name one")
        model = str(beside)
    return build_tokenizer(choice.type, model)


def read_generation(directory: Path, vocab_size: int, usual: SamplingParameters = SamplingParameters()
                    ) -> tuple[tuple[int, ...], SamplingParameters]:
    """Return what generation_config.json says: the ids that end a text, and how to sample.

    Without the file, or without ids in it, those of config.json. A model that says `do_sample: false` is greedy; what
    it does not say is as in `usual`. Raise ValueError for a value that cannot be.
    """
    path, config = directory / _GENERATION, directory / "config.json"
    found = read_object(path) if path.is_file() else JsonObject({}, str(path))
    ids = _ids(found)
    if not ids and config.is_file():
        ids = _ids(read_object(config))
    return tuple(each for each in ids if each < vocab_size), _sampling(found, usual)


def _ids(found: JsonObject) -> tuple[int, ...]:
    """Return eos_token_id, which is an id, a list of ids or null."""
    if found.fields.get("eos_token_id") is None:
        return ()
    if isinstance(found.fields["eos_token_id"], list):
        return found.integers("eos_token_id")
    return (found.integer("eos_token_id"),)


def _sampling(found: JsonObject, usual: SamplingParameters) -> SamplingParameters:
    """Return the sampling in a generation_config.json, whose other fields do not matter here."""
    known = {field.name: found.fields.get(field.name) for field in fields(SamplingParameters)
             if field.name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    known["max_tokens"] = found.fields.get("max_new_tokens")
    if found.fields.get("do_sample") is False:
        known["temperature"] = 0.0
    try:
        return replace(usual, **{name: value for name, value in known.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{found.where}: {error}") from error


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`; raise ValueError for one that models are not run in. float64 is for tests."""
    if dtype not in (*_FLOATS, torch.float64):
        raise ValueError(f"dtype {dtype} is not one of {', '.join(map(str, _FLOATS))}")
    return dtype
