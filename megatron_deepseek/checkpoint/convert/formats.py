"""The formats that a conversion reads and writes: hf (Hugging Face), native (checkpoints of training) and megatron.

`open_hf`, `open_native` and `open_megatron` return the source of a conversion with what goes beside the weights;
`hf_output`, `native_output` and `megatron_output` say what is to be written.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_deepseek.checkpoint.adapter.base import holds_adapters, read_base
from megatron_deepseek.checkpoint.convert.assets import (
    DIRECTORY,
    Assets,
    carry,
    read_assets,
    write_config,
    write_generation_config,
    write_native_assets,
)
from megatron_deepseek.checkpoint.convert.block_fp8 import SCALE_SUFFIX
from megatron_deepseek.checkpoint.convert.blocks import FP8, OutputTensor
from megatron_deepseek.checkpoint.convert.conversion import OutputFormat, Scales, dtype_bytes, output_tensors
from megatron_deepseek.checkpoint.convert.huggingface import INDEX, open_huggingface
from megatron_deepseek.checkpoint.convert.megatron import MTP_PREFIX, PADDED, megatron_places
from megatron_deepseek.checkpoint.convert.mtp import LEFT_OUT, as_stored, module_prefixes
from megatron_deepseek.checkpoint.convert.names import Place, mtp_copies, native_places
from megatron_deepseek.checkpoint.convert.output_file import OutputFile, divide, write_dcp, write_safetensors
from megatron_deepseek.checkpoint.convert.source import TensorSource, open_stacked
from megatron_deepseek.checkpoint.dcp.files import DcpDirectory, METADATA, open_dcp, refuse_legacy
from megatron_deepseek.checkpoint.dcp.metadata_writer import write_metadata
from megatron_deepseek.checkpoint.destination import new_iteration, stay_outside
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.integrity import checksum_directory
from megatron_deepseek.checkpoint.legacy.opening import open_legacy
from megatron_deepseek.checkpoint.legacy.rank_files import is_legacy
from megatron_deepseek.checkpoint.loadable import checkpoint_directory, native_architecture
from megatron_deepseek.checkpoint.native import CONFIG, OPTIMIZER, WEIGHTS
from megatron_deepseek.checkpoint.tracker import TRACKER
from megatron_deepseek.checkpoint.train_state import STATE, TrainState
from megatron_deepseek.checkpoint.workspace import write_aside
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import EMBEDDING, HEAD

_PADDED = (WEIGHTS + EMBEDDING, WEIGHTS + HEAD)  # their rows may be more than the vocabulary's
_NATIVE_FILE_BYTES = 1 << 30


def open_hf(path: Path, without_mtp: bool) -> tuple[TensorSource, Assets]:
    """Open a Hugging Face directory."""
    source = open_huggingface(path, without_mtp)
    copies = any(name in source.copies for name in mtp_copies(source.config))
    return source, Assets(path, source.fields, copies or not source.config.num_nextn_predict_layers)


def open_native(path: Path, without_mtp: bool) -> tuple[TensorSource, Assets]:
    """Open one iteration's directory, or the last finished one of a directory of checkpoints.

    Rows by which training padded the vocabulary are left out.
    """
    directory = path
    refuse_legacy(path)
    if not (path / METADATA).is_file():
        directory = checkpoint_directory(path)
    if holds_adapters(directory):
        base = read_base(directory)[0].directory
        raise ValueError(f"{directory} holds LoRA adapters alone: tools/merge_lora.py --base {base} --adapter {path} "
                         "--save DIR merges them into their base")
    announced, stored = native_architecture(directory), open_dcp(directory)
    modules = [WEIGHTS + prefix for prefix in module_prefixes(announced)]
    config, absent = as_stored(announced, _any_begins(stored, modules), without_mtp)
    dropped = {OPTIMIZER: "state of the optimizer"}
    if config != announced:
        dropped |= dict.fromkeys(modules, LEFT_OUT)
    assets = read_assets(directory.parent / DIRECTORY)
    if assets.vocab_size is not None and assets.vocab_size < config.vocab_size:
        config = replace(config, vocab_size=assets.vocab_size)
    source = open_stacked(directory, config, stored, native_places(config), WEIGHTS, dropped, _PADDED, absent)
    return source, replace(assets, vocab_size=None)


def open_megatron(path: Path, without_mtp: bool, config_from: Path | None = None) -> tuple[TensorSource, Assets]:
    """Open one iteration's directory of Megatron-LM, or the last one of a directory of checkpoints.

    Both of its formats are read: torch_dist, and the legacy one of a file for each rank. The files do not say the
    architecture: it is that of config.json in `config_from`, or in huggingface/ beside them.
    """
    directory = path if (path / METADATA).is_file() or is_legacy(path) else _megatron_iteration(path)
    assets = read_assets(config_from or directory.parent / DIRECTORY)
    if assets.fields is None:
        raise ValueError(f"--load {path} does not say the architecture: --assets must name a directory with its "
                         f"config.json")
    if not (directory / METADATA).is_file() and is_legacy(directory):
        return open_legacy(directory, ModelConfig.from_hf_dict(assets.fields), without_mtp), assets
    stored = open_dcp(directory)
    in_files = _any_begins(stored, [MTP_PREFIX])
    config, absent = as_stored(ModelConfig.from_hf_dict(assets.fields), in_files, without_mtp)
    dropped = {OPTIMIZER: "state of the optimizer", "chained_": "state of the optimizer"}
    if without_mtp:
        dropped[MTP_PREFIX] = LEFT_OUT
    places = megatron_places(config, frozenset(stored.shapes))
    return open_stacked(directory, config, stored, places, "", dropped, PADDED, absent), assets


def _any_begins(stored: DcpDirectory, prefixes: list[str]) -> bool:
    return any(name.startswith(tuple(prefixes)) for name in stored.shapes)


def _megatron_iteration(path: Path) -> Path:
    """Return the last iteration's directory; the tracker holds its number, or "release" for converted weights."""
    tracker = path / TRACKER
    if tracker.is_file() and tracker.read_text().strip() == "release":
        return path / "release"
    return checkpoint_directory(path)


def hf_output(source: TensorSource, assets: Assets, save: Path, dtype: torch.dtype | None, largest: int,
              origin: dict[str, Any] | None = None, scale_format: str | None = None,
              changed: Collection[str] = ()) -> OutputFormat:
    """Return the output in Hugging Face's form: files of at most `largest` bytes, index, config.json, copied files.

    `origin` goes into the metadata of the index, of which other programs read the size alone. `scale_format`: that of
    the scales of FP8 weights, by default the source's. `changed` names weights whose numbers are not those that are
    stored: in FP8 they get new scales.
    """
    stay_outside(save)
    scales = Scales.of(assets.fields, scale_format)
    copies = mtp_copies(source.config) if assets.mtp_copies else {}
    tensors = output_tensors(source, dtype, True, copies, scales)
    tensors = [replace(tensor, scale_format=scales.wanted) if tensor.dtype == FP8 and tensor.original in changed
               else tensor for tensor in tensors]
    made = scales.wanted if scale_format or any(tensor.scale_format for tensor in tensors) else None
    groups = divide(tensors, largest)
    files = tuple(OutputFile(_hf_file_name(number, len(groups)), group) for number, group in enumerate(groups))

    def write(path: Path, file: OutputFile, advance: Callable[[int], None]) -> Fingerprint:
        return write_safetensors(path, file, source, advance)

    def complete(directory: Path, _fingerprints: dict[str, Fingerprint]) -> None:
        carry(assets, directory)
        _write_index(directory, files, origin or {})
        write_config(directory, source.config, assets, dtype_bytes(files), made)
        write_generation_config(directory, source.config, assets)

    return OutputFormat("hf", save, files, write, complete)


def _hf_file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(directory: Path, files: tuple[OutputFile, ...], origin: dict[str, Any]) -> None:
    weight_map = {}
    for file in files:
        for tensor in file.tensors:
            weight_map[tensor.name] = file.name
            if tensor.dtype == FP8:
                weight_map[tensor.name + SCALE_SUFFIX] = file.name
    total = sum(file.nbytes for file in files)
    index = {"metadata": {"total_size": total, **origin}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def native_output(source: TensorSource, assets: Assets, save: Path, dtype: torch.dtype | None) -> OutputFormat:
    """Return the output as a checkpoint of training: an iteration 0 without optimizer state, from which runs start."""
    if dtype == FP8:
        raise ValueError("--dtype fp8 is a format of released weights; a native checkpoint takes bf16, fp16 or fp32")
    destination = new_iteration(save, 0)

    def add_files(directory: Path, fingerprints: dict[str, Fingerprint]) -> None:
        (directory / CONFIG).write_text(json.dumps(source.config.to_hf_dict(), indent=2))
        (directory / STATE).write_text(json.dumps(TrainState().to_json(), indent=2))
        checksum_directory(directory, {name: fingerprint.checksum for name, fingerprint in fingerprints.items()})

    places = native_places(source.config)
    return _stacked_output("native", source, assets, destination, dtype, places, WEIGHTS, add_files)


def megatron_output(source: TensorSource, assets: Assets, save: Path, dtype: torch.dtype | None) -> OutputFormat:
    """Return the output as megatron.core.dist_checkpointing reads it: an iteration 0 of weights alone."""
    if dtype == FP8:
        raise ValueError("--dtype fp8 is a format of released weights; a Megatron checkpoint takes bf16, fp16 or fp32")
    destination = new_iteration(save, 0)

    def add_files(directory: Path, _fingerprints: dict[str, Fingerprint]) -> None:
        torch.save({"iteration": 0, "checkpoint_version": 3.0}, directory / "common.pt")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
                   "common_backend_version": 1}
        (directory / "metadata.json").write_text(json.dumps(backend))

    places = megatron_places(source.config)
    return _stacked_output("megatron", source, assets, destination, dtype, places, "", add_files)


def _stacked_output(name: str, source: TensorSource, assets: Assets, destination: Path, dtype: torch.dtype | None,
                    all_places: list[Place], prefix: str,
                    add_files: Callable[[Path, dict[str, Fingerprint]], None]) -> OutputFormat:
    """Return the output as a DCP directory of stacked parameters at `destination`.

    `add_files` writes the files that are neither weights nor .metadata.
    """
    save = destination.parent
    places = {place.name: place for place in all_places}
    shapes = {prefix + place.whole: place.whole_shape for place in all_places}
    groups = divide(_one_dtype_a_stack(output_tensors(source, dtype, False, {}), places), _NATIVE_FILE_BYTES)
    files = tuple(OutputFile(f"weights-{number:05d}.distcp", group) for number, group in enumerate(groups))

    def write(path: Path, file: OutputFile, advance: Callable[[int], None]) -> Fingerprint:
        return write_dcp(path, file, source, advance, places, prefix)

    def complete(directory: Path, fingerprints: dict[str, Fingerprint]) -> None:
        write_metadata(directory, shapes, [item for fingerprint in fingerprints.values() for item in fingerprint.items])
        add_files(directory, fingerprints)

    def publish() -> None:
        write_native_assets(save / DIRECTORY, assets, source.config)
        write_aside(save / TRACKER, "0\n")

    return OutputFormat(name, destination, files, write, complete, publish)


def _one_dtype_a_stack(tensors: list[OutputTensor], places: dict[str, Place]) -> list[OutputTensor]:
    """Give the tensors of a stacked parameter one dtype: the widest that any of its experts has."""
    widest: dict[str, torch.dtype] = {}
    for tensor in tensors:
        whole = places[tensor.name].whole
        widest[whole] = torch.promote_types(widest.get(whole, tensor.dtype), tensor.dtype)
    return [replace(tensor, dtype=widest[places[tensor.name].whole]) for tensor in tensors]


OPEN = {"hf": open_hf, "native": open_native, "megatron": open_megatron}
