"""Pre-training data: from the data arguments to endless datasets of samples (seq_length tokens and labels).

Documents are split, packed, shuffled and blended as megatron-core does. One thing differs: its GPTDataset shuffles all
the epochs of a run together, so that a run resumed with more iterations would see another order from its first sample
on. Here a dataset is one epoch of Megatron's, repeated in an order that is drawn anew for each epoch: the order depends
on the seed and the number of consumed samples alone. Within one epoch it is Megatron's.

Rank 0 surveys the files (survey.py), checks what is in the cache (cache.py) and builds what it lacks (data_plan.py).
The other ranks receive the plan, and open files as they read from them.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_deepseek.data.blend import SPLITS, SplitBlend, split_blends
from megatron_deepseek.data.cache import remove_unfinished
from megatron_deepseek.data.data_plan import DataPlan, SplitPlan
from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.sample_index import PackedSplit
from megatron_deepseek.data.survey import Survey, survey_all
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.settings import DataSettings

def check_data(settings: DataSettings, model_vocab_size: int | None, num_samples=(1, 0, 0)):
    """Raise ValueError, with the argument, its value and the conflict, for data that training would trip over.

    Call it once, before anything is built. `num_samples` are those of (train, valid, test); a split with 0 is not
    needed. 2^28 token ids, spread evenly over the datasets, are compared with `model_vocab_size`, or none if that is
    None; `check_token_ids` later looks at each batch.
    """
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    if model_vocab_size is not None and tokenizer.vocab_size > model_vocab_size:
        raise ValueError(f"--tokenizer-model {settings.tokenizer_model}: its vocabulary of {tokenizer.vocab_size} is "
                         f"larger than the model's vocab_size {model_vocab_size}")
    _plan(settings, num_samples, model_vocab_size)


def make_plan(settings: DataSettings, num_samples) -> DataPlan:
    """Return the plan of `build_datasets` without building it. Raise ValueError for data that cannot be used."""
    return _plan(settings, num_samples, None)


def _plan(settings: DataSettings, num_samples, vocab_size: int | None) -> DataPlan:
    blends, plans = _needed(settings, num_samples), {}
    for blend, surveys in zip(blends, _survey(settings, blends)):
        for survey in surveys if vocab_size is not None else ():
            if survey.least < 0 or survey.greatest >= vocab_size:
                raise ValueError(f"{blend.argument} {survey.prefix}: token ids from {survey.least} to "
                                 f"{survey.greatest} in {survey.prefix}.bin, outside the model's vocab_size "
                                 f"{vocab_size}")
        plans[blend.name] = _plan_split(settings, blend, surveys, num_samples)
    plan = DataPlan(tuple(map(plans.get, SPLITS)), cache_folder(settings))
    missing = plan.missing(look_inside=False)
    if missing.samples or missing.blends:
        check_writable(settings, plan.folder)
    return plan


def _plan_split(settings: DataSettings, blend: SplitBlend, surveys: list[Survey], num_samples) -> SplitPlan:
    """Return the plan of one split.

    Raise ValueError where a dataset to train on, or every dataset of another split, holds no sample.
    """
    packed = [_pack(settings, blend, survey) for survey in surveys]
    small = [place for place, split in enumerate(packed) if not split.num_samples]
    alone = blend.name == "valid" and settings.multiple_validation_sets
    if small and (blend.name == "train" or len(small) == len(packed) or alone):
        split, survey = packed[small[0]], surveys[small[0]]
        raise ValueError(f"{blend.argument} {split.prefix}: its {blend.name} split ({blend.share_argument}: "
                         f"{split.end - split.first} of {survey.sequences} sequences, {split.tokens} tokens) is too "
                         f"small for one sample of --seq-length {settings.seq_length} + 1 tokens")
    if blend.name == "valid" and (settings.full_validation or alone):
        return _plan_apart(settings, packed, num_samples[SPLITS.index("valid")])
    weights = np.array(blend.blend.weights or [survey.tokens for survey in surveys], np.float64)
    weights[small] = 0
    kept = [(split, weight) for split, weight in zip(packed, (weights / np.sum(weights)).tolist()) if split.num_samples]
    sources, weights = zip(*kept)
    return SplitPlan(sources, weights, num_samples[SPLITS.index(blend.name)],
                     tuple(packed[place].prefix for place in small))


def _plan_apart(settings: DataSettings, packed: list[PackedSplit], num_samples: int) -> SplitPlan:
    """Return the plan of validation data of which every dataset is read by itself: all of it, or `num_samples` each.

    Raise ValueError where there are not as many names as sets.
    """
    names = settings.validation_set_names
    if names and len(names) != len(packed):
        raise ValueError(f"--validation-set-names {' '.join(names)} has {len(names)} names, but the validation data "
                         f"has {len(packed)} sets: {' '.join(split.prefix for split in packed)}")
    sources = tuple(split for split in packed if split.num_samples)
    counts = [split.num_samples if settings.full_validation else num_samples for split in sources]
    return SplitPlan(sources, tuple(count / sum(counts) for count in counts), sum(counts),
                     tuple(split.prefix for split in packed if not split.num_samples), apart=True)


def build_datasets(settings: DataSettings, num_samples: tuple[int, int, int]):
    """Return datasets of (train, valid, test), each with at least its `num_samples`, None where that is 0: samples.py.

    Every rank must call it, with the default process group initialised; a single process needs none. Rank 0 builds the
    indices; on other nodes that do not see its folder the first rank builds them again.
    """
    return open_datasets(settings, shared_plan(settings, num_samples))


def open_datasets(settings: DataSettings, plan: DataPlan):
    """Return the datasets of a plan whose indices are built; of a split that is `apart` a list of them."""
    from megatron_deepseek.data.samples import BlendedSamples, PackedSamples
    eod = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model).eod
    masked = eod if settings.eod_mask_loss else None
    datasets = []
    for split in plan.splits:
        packed = [PackedSamples(source, plan.folder, split.num_samples, masked) for source in split.sources] \
            if split is not None else [None]
        blended = split is not None and split.index is not None
        datasets.append(packed if split is not None and split.apart else
                        BlendedSamples(packed, split.index, plan.folder) if blended else packed[0])
    return tuple(datasets)


def shared_plan(settings: DataSettings, num_samples, say=lambda line: None) -> DataPlan:
    """Return the plan, after everything that it needs is built where this rank will look for it.

    Every rank must call it. Raise ValueError on all of them where one fails.
    """
    import torch.distributed as dist
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    plan, error = None, None
    if alone or dist.get_rank() == 0:
        plan, error = _caught(lambda: _built(make_plan(settings, num_samples), say))
    if not alone:
        told = [(plan, error)]
        dist.broadcast_object_list(told)
        plan, error = told[0]
        if error is None and _first_of_its_node() and dist.get_rank() != 0:
            _, error = _caught(lambda: _built(plan))  # where the folder is shared, all stamps are known
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = next(filter(None, errors), None)
    if error is not None:
        raise ValueError(error)
    return plan


def _built(plan: DataPlan, say=lambda line: None) -> DataPlan:
    with contextlib.suppress(OSError):  # of a node that does not share rank 0's
        plan.folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(plan.folder)
    missing = plan.missing(say=say)
    if missing.samples:
        sequences = sum(split.end - split.first for split in missing.samples)
        say(f"indexing {sequences:,} sequences for {len(missing.samples)} files in {plan.folder}")
    return plan.build(missing)


def _caught(work: Callable[[], DataPlan]) -> tuple[DataPlan | None, str | None]:
    """Return the result of `work` and None, or None and the message of its error: other ranks wait to be told."""
    try:
        return work(), None
    except (ValueError, OSError) as error:
        return None, str(error)


def _first_of_its_node() -> bool:
    """Return whether this rank is the first of its node.

    Without word from the launcher every rank is: that several of them build the same files is slow, not wrong.
    """
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _needed(settings: DataSettings, num_samples) -> list[SplitBlend]:
    """Return the splits that samples are needed of. Raise ValueError where no argument names their data."""
    if settings.seq_length < 1:
        raise ValueError(f"--seq-length {settings.seq_length}: it must be at least 1")
    blends = split_blends(settings)
    for name, blend, needed in zip(SPLITS, blends, num_samples):
        if needed and blend is None:
            raise ValueError(f"--{name}-data-path is missing, and {needed} samples of it are needed")
    return [blend for blend, needed in zip(blends, num_samples) if needed]


def _survey(settings: DataSettings, blends: list[SplitBlend]) -> list[list[Survey]]:
    """Return the survey of each dataset of each blend."""
    for blend in blends:
        for prefix in blend.blend.prefixes:
            open_index(prefix, blend.argument)  # refuses a missing dataset before the folder for the cache is made
    folder = cache_folder(settings)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("*.samples")):  # with some the cache may be complete, and need not be writable
        check_writable(settings, folder)
    known = {}
    for blend in blends:
        new = [prefix for prefix in dict.fromkeys(blend.blend.prefixes) if prefix not in known]
        known |= zip(new, survey_all(new, blend.argument, folder)) if new else {}
    return [[known[prefix] for prefix in blend.blend.prefixes] for blend in blends]


def _pack(settings: DataSettings, blend: SplitBlend, survey: Survey) -> PackedSplit:
    first, end = blend.bounds(survey.sequences)
    return PackedSplit(survey.prefix, survey.digest, first, end, survey.tokens_between(first, end),
                       settings.seq_length, settings.seed)


def check_writable(settings: DataSettings, folder: Path):
    """Raise ValueError where no file can be written to `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if settings.data_cache_path is None:
            raise ValueError(f"the index cache beside the data, {folder}, cannot be written: {error.strerror}; "
                             f"--data-cache-path puts it elsewhere") from error
        raise ValueError(f"--data-cache-path {settings.data_cache_path}: cannot write indices to {folder}: "
                         f"{error.strerror}") from error


def check_token_ids(tokens, vocab_size: int, prefix: str):
    """Raise ValueError for an id outside the vocabulary, which a kernel would meet by a crash or in silence.

    It is cheap enough for each batch.
    """
    least, greatest = int(tokens.min()), int(tokens.max())
    if least < 0 or greatest >= vocab_size:
        raise ValueError(f"--data-path {prefix}: token ids from {least} to {greatest} in a batch, outside the model's "
                         f"vocab_size {vocab_size}")


def cache_folder(settings: DataSettings) -> Path:
    """Return the folder of the index cache: `--data-cache-path`, or `cache/` beside the first dataset."""
    first = next(blend for blend in split_blends(settings) if blend is not None).blend.prefixes[0]
    return Path(settings.data_cache_path or Path(first).parent / "cache")
