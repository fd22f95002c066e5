"""An iteration in Megatron-LM's legacy format, opened as the source of a conversion."""

from dataclasses import replace
from pathlib import Path

from megatron_deepseek.checkpoint.convert.megatron import MTP_PREFIX, PADDED, megatron_places
from megatron_deepseek.checkpoint.convert.mtp import LEFT_OUT, as_stored
from megatron_deepseek.checkpoint.convert.source import StackedSource, open_stacked
from megatron_deepseek.checkpoint.dcp.files import StoredTensors
from megatron_deepseek.checkpoint.legacy.joining import copied, join, parts_of, transposed_experts
from megatron_deepseek.checkpoint.legacy.rank_files import read_legacy
from megatron_deepseek.model.architecture.config import ModelConfig

_EMBEDDING, _HEAD = PADDED


def open_legacy(directory: Path, announced: ModelConfig, without_mtp: bool) -> StackedSource:
    """Open the iteration in `directory` of a model of the architecture `announced`.

    What a later stage holds once more (the embedding for MTP, a tied head) is compared with the first stage's. Raise
    ValueError if a file is damaged or missing, or does not fit the architecture.
    """
    iteration = read_legacy(directory)
    parts = parts_of(iteration, announced.n_routed_experts or 0)
    stored = frozenset(part.whole for part in parts)
    config, absent = as_stored(announced, any(name.startswith(MTP_PREFIX) for name in stored), without_mtp)
    places = transposed_experts(megatron_places(config, stored), stored, iteration.expert_tensor_ranks)
    shapes = {place.whole: place.whole_shape for place in places}
    joined = join(iteration, parts, {_HEAD: shapes[_EMBEDDING]} | shapes)
    copies = {name: original for name in joined.shapes if (original := copied(name)) is not None}
    if config.tie_word_embeddings and _HEAD in stored:
        copies |= {_HEAD: _EMBEDDING}
    dropped = {MTP_PREFIX: LEFT_OUT} if without_mtp else {}
    source = open_stacked(directory, config, _without(joined, copies.keys()), places, "", dropped, PADDED, absent)
    if iteration.optimizer:
        source = replace(source, dropped=source.dropped | {"optimizer": "state of the optimizer"})
    return _with_copies(source, joined, copies)


def _without(stored: StoredTensors, names) -> StoredTensors:
    kept = {name: shape for name, shape in stored.shapes.items() if name not in names}
    return StoredTensors(stored.directory, stored.index_files, kept, stored.dtypes, stored.items)


def _with_copies(source: StackedSource, stored: StoredTensors, copies: dict[str, str]) -> StackedSource:
    """Return the source with the `copies` in it, of which each name is mapped to that of the tensor it must equal.

    A copy of what was left out is left out.
    """
    by_whole = {place.whole: place for place in source.places.values()}
    places = {name: replace(by_whole[original], name=name, whole=name) for name, original in copies.items()
              if original in by_whole}
    return replace(source, directory=stored, places=source.places | places,
                   copies={name: by_whole[copies[name]].name for name in places})
