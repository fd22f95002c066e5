"""Pre-training data: from the data arguments to endless datasets of samples (seq_length tokens and labels).

Documents are split, packed, shuffled and blended as megatron-core does. One thing differs: its GPTDataset shuffles all
the epochs of a run together, so that a run resumed with more iterations would see another order from its first sample
on. Here a dataset is one epoch of Megatron's, repeated in an order that is drawn anew for each epoch: the order depends
on the seed and the number of consumed samples alone. Within one epoch it is Megatron's.

Rank 0 looks at the files (survey.py) and builds what the cache lacks (sample_index.py, blend_index.py); the other ranks
are told the plan and open files as they read from them.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepseek.data.blend import SPLITS, SplitBlend, split_blends
from megatron_deepseek.data.blend_index import BlendIndex
from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.sample_index import PackedSplit, build_all
from megatron_deepseek.data.survey import Survey, survey_all
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.settings import DataSettings


@dataclass(frozen=True)
class SplitPlan:
    """What one split is read from: a source for each dataset of its blend, with weights that add up to 1.

    `left_out`: prefixes whose share of a split that is not trained on is less than a sample.
    """

    sources: tuple[PackedSplit, ...]
    weights: tuple[float, ...]
    num_samples: int
    left_out: tuple[str, ...] = ()

    @property
    def index(self) -> BlendIndex | None:
        """None for a single dataset, whose samples come in its own order."""
        return BlendIndex(self.weights, self.num_samples) if len(self.sources) > 1 else None


@dataclass(frozen=True)
class DataPlan:
    """Plans of (train, valid, test), None where no samples are needed, and the folder of the indices."""

    splits: tuple[SplitPlan | None, ...]
    folder: Path

    def missing(self) -> list[PackedSplit]:
        """What the folder lacks indices of, each once."""
        sources = (source for split in self.splits if split is not None for source in split.sources)
        return list({source.file_name: source for source in sources if not source.is_built(self.folder)}.values())

    def build(self, workers: int | None = None, built=lambda split: None):
        """Build what the folder lacks; `built` is told of each index of samples."""
        build_all(self.missing(), self.folder, workers, built)
        for split in self.splits:
            if split is not None and split.index is not None and split.index.find(self.folder) is None:
                split.index.build(self.folder)


def check_data(settings: DataSettings, model_vocab_size: int | None, num_samples=(1, 0, 0)):
    """Refuse data that training would trip over, by a ValueError that names the argument, its value and the conflict.

    To be called once, before anything is built. `num_samples` of (train, valid, test): splits with 0 are not needed.
    Of the token ids, 2^28 are looked at, spread evenly over the datasets: `check_token_ids` then looks at each batch.
    `model_vocab_size` None: ids are not compared.
    """
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    if model_vocab_size is not None and tokenizer.vocab_size > model_vocab_size:
        raise ValueError(f"--tokenizer-model {settings.tokenizer_model}: its vocabulary of {tokenizer.vocab_size} is "
                         f"larger than the model's vocab_size {model_vocab_size}")
    blends = _needed(settings, num_samples)
    for blend, surveys in zip(blends, _survey(settings, blends)):
        for survey in surveys:
            if model_vocab_size is not None and (survey.least < 0 or survey.greatest >= model_vocab_size):
                raise ValueError(f"{blend.argument} {survey.prefix}: token ids from {survey.least} to "
                                 f"{survey.greatest} in {survey.prefix}.bin, outside the model's vocab_size "
                                 f"{model_vocab_size}")
        _plan_split(settings, blend, surveys, num_samples)


def make_plan(settings: DataSettings, num_samples) -> DataPlan:
    """What `build_datasets` builds, and nothing built; ValueError for data that cannot be used."""
    blends = _needed(settings, num_samples)
    plans = {blend.name: _plan_split(settings, blend, surveys, num_samples)
             for blend, surveys in zip(blends, _survey(settings, blends))}
    return DataPlan(tuple(map(plans.get, SPLITS)), cache_folder(settings))


def _plan_split(settings: DataSettings, blend: SplitBlend, surveys: list[Survey], num_samples) -> SplitPlan:
    """ValueError where a dataset to train on, or every dataset of another split, holds no sample."""
    packed = [_pack(settings, blend, survey) for survey in surveys]
    small = [place for place, split in enumerate(packed) if not split.num_samples]
    if small and (blend.name == "train" or len(small) == len(packed)):
        split, survey = packed[small[0]], surveys[small[0]]
        raise ValueError(f"{blend.argument} {split.prefix}: its {blend.name} split ({blend.share_argument}: "
                         f"{split.end - split.first} of {survey.sequences} sequences, {split.tokens} tokens) is too "
                         f"small for one sample of --seq-length {settings.seq_length} + 1 tokens")
    weights = np.array(blend.blend.weights or [survey.tokens for survey in surveys], np.float64)
    weights[small] = 0
    kept = [(split, weight) for split, weight in zip(packed, (weights / np.sum(weights)).tolist()) if split.num_samples]
    sources, weights = zip(*kept)
    return SplitPlan(sources, weights, num_samples[SPLITS.index(blend.name)],
                     tuple(packed[place].prefix for place in small))


def build_datasets(settings: DataSettings, num_samples: tuple[int, int, int]):
    """Datasets of (train, valid, test), each with at least its `num_samples`; None where that is 0. See samples.py.

    To be called by every rank, with the default process group initialised, or in a single process without one. Rank 0
    builds the indices; on other nodes that do not see its folder the first rank builds them again.
    """
    return open_datasets(settings, shared_plan(settings, num_samples))


def open_datasets(settings: DataSettings, plan: DataPlan):
    """The datasets of a plan that is built."""
    from megatron_deepseek.data.samples import BlendedSamples, PackedSamples
    eod = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model).eod
    masked = eod if settings.eod_mask_loss else None
    datasets = []
    for split in plan.splits:
        packed = [PackedSamples(source, plan.folder, split.num_samples, masked) for source in split.sources] \
            if split is not None else [None]
        blended = split is not None and split.index is not None
        datasets.append(BlendedSamples(packed, split.index, plan.folder) if blended else packed[0])
    return tuple(datasets)


def shared_plan(settings: DataSettings, num_samples, say=lambda line: None) -> DataPlan:
    """The plan, once everything that it needs is built where this rank will look for it. Every rank calls this."""
    import torch.distributed as dist
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    plan = [None]
    if alone or dist.get_rank() == 0:
        plan = [make_plan(settings, num_samples)]
        missing = plan[0].missing()
        if missing:
            sequences = sum(split.end - split.first for split in missing)
            say(f"indexing {sequences:,} sequences for {len(missing)} files in {plan[0].folder}")
        plan[0].build()
    if alone:
        return plan[0]
    dist.broadcast_object_list(plan)
    if _first_of_its_node():
        plan[0].build()  # what the folder of this node lacks: nothing where it is shared
    dist.barrier()
    return plan[0]


def _first_of_its_node() -> bool:
    """True of every rank where the launcher does not say: to build side by side is slow, not wrong."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _needed(settings: DataSettings, num_samples) -> list[SplitBlend]:
    """The splits that samples are needed of; ValueError where nothing says what they are made of."""
    if settings.seq_length < 1:
        raise ValueError(f"--seq-length {settings.seq_length}: it must be at least 1")
    blends = split_blends(settings)
    for name, blend, needed in zip(SPLITS, blends, num_samples):
        if needed and blend is None:
            raise ValueError(f"--{name}-data-path is missing, and {needed} samples of it are needed")
    return [blend for blend, needed in zip(blends, num_samples) if needed]


def _survey(settings: DataSettings, blends: list[SplitBlend]) -> list[list[Survey]]:
    """Of each dataset of each blend."""
    for blend in blends:
        for prefix in blend.blend.prefixes:
            open_index(prefix, blend.argument)  # what is missing is said before the folder for the cache is made
    folder = cache_folder(settings)
    _check_cache(settings, folder)
    known = {}
    for blend in blends:
        new = [prefix for prefix in dict.fromkeys(blend.blend.prefixes) if prefix not in known]
        known |= zip(new, survey_all(new, blend.argument, folder)) if new else {}
    return [[known[prefix] for prefix in blend.blend.prefixes] for blend in blends]


def _pack(settings: DataSettings, blend: SplitBlend, survey: Survey) -> PackedSplit:
    first, end = blend.bounds(survey.sequences)
    return PackedSplit(survey.prefix, survey.digest, first, end, survey.tokens_between(first, end),
                       settings.seq_length, settings.seed)


def _check_cache(settings: DataSettings, folder: Path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--data-cache-path {settings.data_cache_path}: cannot write indices to {folder}: "
                         f"{error.strerror}") from error


def check_token_ids(tokens, vocab_size: int, prefix: str):
    """Cheap enough for each batch: an id outside the embedding would otherwise be a crash deep in a kernel, or none."""
    least, greatest = int(tokens.min()), int(tokens.max())
    if least < 0 or greatest >= vocab_size:
        raise ValueError(f"--data-path {prefix}: token ids from {least} to {greatest} in a batch, outside the model's "
                         f"vocab_size {vocab_size}")


def cache_folder(settings: DataSettings) -> Path:
    """`--data-cache-path`, else `cache/` beside the first dataset."""
    first = next(blend for blend in split_blends(settings) if blend is not None).blend.prefixes[0]
    return Path(settings.data_cache_path or Path(first).parent / "cache")
