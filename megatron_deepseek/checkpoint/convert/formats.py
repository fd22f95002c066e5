"""The formats that a conversion reads and writes: hf (Hugging Face), native (the checkpoints of training), megatron."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_deepseek.checkpoint.convert.assets import (
    DIRECTORY,
    Assets,
    carry,
    read_assets,
    write_config,
    write_generation_config,
    write_native_assets,
)
from megatron_deepseek.checkpoint.convert.blocks import FP8, Output
from megatron_deepseek.checkpoint.convert.conversion import OutputFormat, dtype_bytes, outputs
from megatron_deepseek.checkpoint.convert.huggingface import INDEX, open_huggingface
from megatron_deepseek.checkpoint.convert.megatron import MTP_PREFIX, PADDED, megatron_places
from megatron_deepseek.checkpoint.convert.mtp import LEFT_OUT, as_stored, module_prefixes
from megatron_deepseek.checkpoint.convert.names import Place, mtp_copies, native_places
from megatron_deepseek.checkpoint.convert.output_file import OutputFile, divide, write_dcp, write_safetensors
from megatron_deepseek.checkpoint.convert.source import TensorSource, open_stacked
from megatron_deepseek.checkpoint.dcp.files import METADATA, DcpDirectory, open_dcp, refuse_legacy
from megatron_deepseek.checkpoint.dcp.metadata_writer import write_metadata
from megatron_deepseek.checkpoint.destination import new_iteration, stay_outside
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.integrity import checksum_directory
from megatron_deepseek.checkpoint.loadable import checkpoint_directory, native_architecture
from megatron_deepseek.checkpoint.tracker import TRACKER
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.checkpoint.workspace import write_aside
from megatron_deepseek.model.architecture.config import ModelConfig

NATIVE_PREFIX = "model."
_NATIVE_FILE_BYTES = 1 << 30


def open_hf(path: Path, without_mtp: bool) -> tuple[TensorSource, Assets]:
    source = open_huggingface(path, without_mtp)
    copies = any(name in source.copies for name in mtp_copies(source.config))
    return source, Assets(path, source.fields, copies or not source.config.num_nextn_predict_layers)


def open_native(path: Path, without_mtp: bool) -> tuple[TensorSource, Assets]:
    """`path`: a directory of checkpoints, of which the last finished one is taken, or one iteration's."""
    directory = path
    if not (path / METADATA).is_file():
        directory = checkpoint_directory(path)
    announced, stored = native_architecture(directory), open_dcp(directory)
    modules = [NATIVE_PREFIX + prefix for prefix in module_prefixes(announced)]
    config, absent = as_stored(announced, _any_begins(stored, modules), without_mtp)
    dropped = {"optimizer.": "state of the optimizer"}
    if config != announced:
        dropped |= dict.fromkeys(modules, LEFT_OUT)
    source = open_stacked(directory, config, stored, native_places(config), NATIVE_PREFIX, dropped, absent_mtp=absent)
    return source, read_assets(directory.parent / DIRECTORY)


def open_megatron(path: Path, without_mtp: bool, config_from: Path | None = None) -> tuple[TensorSource, Assets]:
    """The last iteration of a Megatron-LM directory, or one iteration's; the architecture is that of `config_from`."""
    refuse_legacy(path)
    directory = path if (path / METADATA).is_file() else _megatron_iteration(path)
    refuse_legacy(directory)
    assets = read_assets(config_from or directory.parent / DIRECTORY)
    if assets.fields is None:
        raise ValueError(f"--load {path} does not say the architecture: --assets must name a directory with its "
                         f"config.json")
    stored = open_dcp(directory)
    in_files = _any_begins(stored, [MTP_PREFIX])
    config, absent = as_stored(ModelConfig.from_hf_dict(assets.fields), in_files, without_mtp)
    dropped = {"optimizer.": "state of the optimizer", "chained_": "state of the optimizer"}
    if without_mtp:
        dropped[MTP_PREFIX] = LEFT_OUT
    places = megatron_places(config, frozenset(stored.shapes))
    return open_stacked(directory, config, stored, places, "", dropped, PADDED, absent), assets


def _any_begins(stored: DcpDirectory, prefixes: list[str]) -> bool:
    return any(name.startswith(tuple(prefixes)) for name in stored.shapes)


def _megatron_iteration(path: Path) -> Path:
    """Its tracker file holds a number, or "release" for converted weights."""
    tracker = path / TRACKER
    if tracker.is_file() and tracker.read_text().strip() == "release":
        return path / "release"
    return checkpoint_directory(path)


def hf_target(source: TensorSource, assets: Assets, save: Path, dtype: torch.dtype | None, largest: int,
              origin: dict[str, Any] | None = None) -> OutputFormat:
    """Shards of at most `largest` bytes, their index, config.json and the carried files.

    `origin` goes into the metadata of the index, of which readers use the size alone.
    """
    stay_outside(save)
    copies = mtp_copies(source.config) if assets.mtp_copies else {}
    written = outputs(source, dtype, True, copies)
    new_scales = any(output.dtype == FP8 != source.dtypes[output.original] for output in written)
    groups = divide(written, largest)
    shards = tuple(OutputFile(_shard_name(number, len(groups)), group) for number, group in enumerate(groups))

    def write(path: Path, shard: OutputFile, advance: Callable[[int], None]) -> Fingerprint:
        return write_safetensors(path, shard, source, advance)

    def complete(directory: Path, _records: dict[str, Fingerprint]) -> None:
        carry(assets, directory)
        _write_index(directory, shards, origin or {})
        write_config(directory, source.config, assets, dtype_bytes(shards), new_scales)
        write_generation_config(directory, source.config, assets)

    return OutputFormat("hf", save, shards, write, complete)


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(directory: Path, shards: tuple[OutputFile, ...], origin: dict[str, Any]) -> None:
    weight_map = {}
    for shard in shards:
        for output in shard.outputs:
            weight_map[output.name] = shard.name
            if output.dtype == FP8:
                weight_map[output.name + "_scale_inv"] = shard.name
    total = sum(shard.nbytes for shard in shards)
    index = {"metadata": {"total_size": total, **origin}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def native_target(source: TensorSource, assets: Assets, save: Path, dtype: torch.dtype | None) -> OutputFormat:
    """An iteration 0 without optimizer state, from which training starts."""
    if dtype == FP8:
        raise ValueError("--dtype fp8 is a format of released weights; a native checkpoint takes bf16, fp16 or fp32")
    destination = new_iteration(save, 0)

    def add_files(directory: Path, fingerprints: dict[str, Fingerprint]) -> None:
        (directory / "config.json").write_text(json.dumps(source.config.to_hf_dict(), indent=2))
        (directory / "state.json").write_text(json.dumps(TrainState().to_json(), indent=2))
        checksum_directory(directory, {name: fingerprint.checksum for name, fingerprint in fingerprints.items()})

    places = native_places(source.config)
    return _stacked_target("native", source, assets, destination, dtype, places, NATIVE_PREFIX, add_files)


def megatron_target(source: TensorSource, assets: Assets, save: Path, dtype: torch.dtype | None) -> OutputFormat:
    """An iteration 0 of weights alone, as megatron.core.dist_checkpointing reads them."""
    if dtype == FP8:
        raise ValueError("--dtype fp8 is a format of released weights; a Megatron checkpoint takes bf16, fp16 or fp32")
    destination = new_iteration(save, 0)

    def add_files(directory: Path, _records: dict[str, Fingerprint]) -> None:
        torch.save({"iteration": 0, "checkpoint_version": 3.0}, directory / "common.pt")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
                   "common_backend_version": 1}
        (directory / "metadata.json").write_text(json.dumps(backend))

    places = megatron_places(source.config)
    return _stacked_target("megatron", source, assets, destination, dtype, places, "", add_files)


def _stacked_target(kind: str, source: TensorSource, assets: Assets, destination: Path, dtype: torch.dtype | None,
                    all_places: list[Place], prefix: str,
                    add_files: Callable[[Path, dict[str, Fingerprint]], None]) -> OutputFormat:
    """A DCP directory of stacked parameters at SAVE/iter_0000000; `add_files` adds what is not weights."""
    save = destination.parent
    places = {place.name: place for place in all_places}
    shapes = {prefix + place.whole: place.whole_shape for place in all_places}
    groups = divide(_one_type_a_stack(outputs(source, dtype, False, {}), places), _NATIVE_FILE_BYTES)
    shards = tuple(OutputFile(f"weights-{number:05d}.distcp", group) for number, group in enumerate(groups))

    def write(path: Path, shard: OutputFile, advance: Callable[[int], None]) -> Fingerprint:
        return write_dcp(path, shard, source, advance, places, prefix)

    def complete(directory: Path, fingerprints: dict[str, Fingerprint]) -> None:
        write_metadata(directory, shapes, [item for fingerprint in fingerprints.values() for item in fingerprint.items])
        add_files(directory, fingerprints)

    def publish() -> None:
        write_native_assets(save / DIRECTORY, assets, source.config)
        write_aside(save / TRACKER, "0\n")

    return OutputFormat(kind, destination, shards, write, complete, publish)


def _one_type_a_stack(written: list[Output], places: dict) -> list[Output]:
    """A stacked parameter has one type: the widest that any of its experts is stored in."""
    widest: dict[str, torch.dtype] = {}
    for output in written:
        whole = places[output.name].whole
        widest[whole] = torch.promote_types(widest.get(whole, output.dtype), output.dtype)
    return [Output(output.name, output.original, output.shape, widest[places[output.name].whole])
            for output in written]


OPEN = {"hf": open_hf, "native": open_native, "megatron": open_megatron}
