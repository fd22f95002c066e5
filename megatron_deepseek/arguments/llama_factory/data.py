"""What LLaMA-Factory says of the data: texts for `stage: pt`, conversations or answers for all others."""

import shlex
from pathlib import Path

from megatron_deepseek.arguments.llama_factory.recipe import Recipe
from megatron_deepseek.foreign_json import read_object

SAMPLES = "$samples"  # a variable of the script
TEMPLATES = {"deepseek": "deepseek-v2", "deepseek3": "deepseek-v3", "deepseekr1": "deepseek-r1"}
_INFO = "dataset_info.json"


def conversations(r: Recipe) -> None:
    """Translate the datasets of all stages but pt, and how they become rows."""
    names = r.names("dataset")
    if not names:
        raise ValueError("dataset is missing")
    r.put("--dataset", *_weighted(r, _files(r, names)))
    _held_out(r)
    _template(r)
    length = r.integer("cutoff_len", 2048)
    r.put("--seq-length", length)
    r.put("--overlong", "truncate")
    packing, neat = r.take("packing"), r.flag("neat_packing")
    if packing or neat:
        r.put("--packing")
        if not neat:
            r.differs.append("packing: conversations of a row do not see each other, as with neat_packing")
    else:
        r.put("--no-packing")
        r.differs.append("--no-packing: a conversation in a row, as LLaMA-Factory pads them; --packing gives the same "
                         "losses in less time, with fewer updates in an epoch")
    workers = r.integer("preprocessing_num_workers")
    if workers is not None:
        r.put("--num-workers", workers)
    cache = r.text("tokenized_path")
    if cache is not None:
        r.put("--data-cache-path", cache)
    r.put("--loss-average", "token")


def _files(r: Recipe, names: list[str]) -> list[str]:
    """Return what --dataset calls the entries of dataset_info.json; a file keeps its name."""
    folder = r.text("dataset_dir", "data")
    if folder.startswith(("REMOTE:", "ONLINE")):
        r.first.append(f"# download {folder} with its {_INFO}, and name that directory below")
        folder = folder.partition(":")[2] or "data"
    return [name if Path(name).suffix else str(Path(folder) / f"{_INFO}:{name}") for name in names]


def _weighted(r: Recipe, files: list[str]) -> list[str]:
    strategy, odds = r.text("mix_strategy", "concat"), r.names("interleave_probs")
    if strategy == "concat":
        return files
    if len(odds) != len(files):
        r.leave("mix_strategy", strategy, "datasets are read one after the other, or mixed by weights: give "
                "interleave_probs")
        return files
    r.differs.append(f"mix_strategy {strategy}: a mix by weights takes each dataset so often in an epoch, and repeats "
                     "or leaves out samples for it")
    return [word for pair in zip(odds, files) for word in pair]


def _held_out(r: Recipe) -> None:
    names, part = r.names("eval_dataset"), r.number("val_size", 0.0)
    r.leave("val_size", part or None, "nothing is split off: give a file of its own as eval_dataset")
    strategy, steps = r.text("eval_strategy", "no"), r.number("eval_steps")
    r.take("do_eval")
    if not names:
        return
    r.take("eval_on_each_dataset")
    r.put("--eval-dataset", *_files(r, names))
    if strategy == "steps":
        interval = steps or r.given.get("logging_steps") or 500
        r.put("--eval-interval", max(1, int(interval)))
    elif strategy == "epoch":
        r.leave("eval_strategy", strategy, "evaluations are every --eval-interval iterations")


def _template(r: Recipe) -> None:
    name = r.text("template")
    if name in TEMPLATES:
        r.put("--template", TEMPLATES[name])
    else:
        r.put("--template", "auto")
        if name is not None:
            r.differs.append(f"template {name}: only DeepSeek's templates are known here ({', '.join(TEMPLATES)}); "
                             "--template auto takes what the tokenizer's tokens say")
    thinking, kept = r.take("enable_thinking", True), r.flag("preserve_thinking")
    if name != "deepseekr1":
        return
    r.put("--history-reasoning", "keep")
    r.differs.append("template deepseekr1: an answer without thoughts stays without; LLaMA-Factory puts an empty "
                     "<think> before it")
    if thinking is False:
        r.leave("enable_thinking", "false", "thoughts in the data are not removed; remove them from the files")
    if kept:
        r.take("preserve_thinking")


def texts(r: Recipe, length: int, epochs: float) -> None:
    """Translate the datasets of pt: indexed files must be made of the texts first; then their size is the run's."""
    tokenizer, prefix = r.given["model_name_or_path"], Path(r.given.get("output_dir") or "runs").name + "-data"
    key = _preprocess(r, tokenizer, prefix)
    document = f"{prefix}_{key}_document"
    r.put("--data-path", document)
    r.put("--split", "1,0,0")
    r.put("--tokenizer-type", "HuggingFaceTokenizer")
    r.put("--tokenizer-model", tokenizer)
    r.put("--seq-length", length)
    if "--train-iters" not in r.arguments:
        r.first.append(f"samples=$(( {round(100 * epochs)} * $(stat -c %s {document}.bin) / 100 / 4 / {length} ))   "
                       f"# {epochs:g} epochs, of tokens of 4 bytes")
        r.put("--train-samples", SAMPLES)


def _preprocess(r: Recipe, tokenizer: str, prefix: str) -> str:
    """Say how the indexed files are made. Return the key of the texts in their rows."""
    names, workers, most = r.names("dataset"), r.integer("preprocessing_num_workers"), r.integer("max_samples")
    if not names:
        raise ValueError("dataset is missing")
    found = _texts(r, names)
    files, keys = [file for file, _ in found], list(dict.fromkeys(key for _, key in found))
    if len(keys) > 1:
        raise ValueError(f"dataset: the texts of {' and '.join(names)} are under {' and '.join(keys)}; translate one "
                         "dataset at a time, and give all of them as --data-path")
    command = ["python", "tools/preprocess_data.py", "--input", *files, "--json-keys", keys[0], "--tokenizer-model",
               tokenizer, "--append-eod", "--output-prefix", prefix]
    command += ["--workers", str(workers)] if workers else []
    command += ["--max-documents", str(most)] if most else []
    r.first.append(shlex.join(command))
    return keys[0]


def _texts(r: Recipe, names: list[str]) -> list[tuple[str, str]]:
    """Return the file of each dataset, and the key of its texts, as dataset_info.json says where it is there."""
    folder = Path(r.text("dataset_dir", "data"))
    entries = dict(read_object(folder / _INFO).fields) if (folder / _INFO).is_file() else {}
    found = []
    for name in names:
        entry = entries.get(name) or {}
        if not Path(name).suffix and "file_name" not in entry:
            r.differs.append(f"dataset {name}: the file_name of its entry in {folder / _INFO} is the file to give as "
                             "--input, and its column for prompt the --json-keys")
        file = name if Path(name).suffix else str(folder / entry.get("file_name", f"{name}.json"))
        found.append((file, (entry.get("columns") or {}).get("prompt", "text")))
    return found
