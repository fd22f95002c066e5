"""Datasets that exist under the output prefix already: the ones that are asked for, or others, which are kept."""

import hashlib
import json
import os
from dataclasses import asdict

from megatron_deepseek.data.preprocess.inputs import STANDARD_INPUT
from megatron_deepseek.data.preprocess.settings import PreprocessSettings
from megatron_deepseek.foreign_json import LARGEST_LIST, read_object


def digest_of(settings: PreprocessSettings, described: dict) -> str:
    """Return a digest of what decides the output's bytes and number of files; `described` is the ledger's."""
    asked = [described, asdict(settings.selection), settings.execution.merge, settings.prefixes]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def is_finished(settings: PreprocessSettings, described: dict) -> bool:
    """Return whether there is nothing to do. Without --overwrite, raise ValueError where files of another run exist."""
    endings = (".idx", ".bin", ".blend")
    there = [prefix + ending for prefix in settings.prefixes for ending in endings if os.path.exists(prefix + ending)]
    if not there or settings.execution.overwrite:
        return False
    report = _read_report(report_path(settings))
    if report.get("made_from") != digest_of(settings, described) or STANDARD_INPUT in settings.input:
        raise ValueError(f"--output-prefix {settings.output_prefix}: {there[0]} exists already, made from another "
                         f"input or by other arguments; --overwrite replaces it")
    execution = settings.execution
    for option, limit, found in (("--allow-damaged-files", execution.allow_damaged_files, report["damaged"]),
                                 ("--max-errors", execution.max_errors, report["errors"]),
                                 ("--on-error fail: --max-errors", 0, report["errors"][:execution.on_error == "fail"])):
        if len(found) > limit:
            raise ValueError(f"--output-prefix {settings.output_prefix}: {there[0]} exists already, made with more "
                             f"tolerance than {option} {limit}, as its report says: {found[0]}")
    if not all(map(_is_whole, (each for own in report["datasets"].values() for each in own))):
        raise ValueError(f"--output-prefix {settings.output_prefix}: its files are not what this command made once; "
                         f"--overwrite makes them again")
    return True


def report_path(settings: PreprocessSettings) -> str:
    return f"{settings.output_prefix}_report.json"


def _read_report(path: str) -> dict:
    """Return the parts of a report on the input, its faults and the datasets; {} if it lacks one of them."""
    try:
        report = read_object(path, LARGEST_LIST)
        datasets = report.object("datasets")
        return {"made_from": report.text("made_from"), "damaged": report.list("damaged"),
                "errors": report.list("errors"), "datasets": {key: datasets.list(key) for key in datasets.fields}}
    except ValueError:
        return {}


def _is_whole(dataset: dict) -> bool:
    try:
        return all(os.path.getsize(dataset["prefix"] + ending) == dataset[size]
                   for ending, size in ((".bin", "bin_bytes"), (".idx", "idx_bytes")))
    except (OSError, TypeError, KeyError):
        return False
