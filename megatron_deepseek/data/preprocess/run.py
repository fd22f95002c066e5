"""A whole run of preprocessing: plan, parts, assembly, report.

The bytes of the output depend on the input and on `Content` and `Selection` alone: not on the number of workers or
ranks, the size of the parts, or whether the run was killed and continued on the way.
"""

import functools
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from megatron_deepseek.data.preprocess.assembly import Assembled, assemble
from megatron_deepseek.data.preprocess.documents import DocumentEncoder
from megatron_deepseek.data.preprocess.encoders import Encoder, choose_encoder
from megatron_deepseek.data.preprocess.files import write_json
from megatron_deepseek.data.preprocess.finished import digest_of, is_finished, report_path
from megatron_deepseek.data.preprocess.inputs import STANDARD_INPUT, InputFile, find_inputs
from megatron_deepseek.data.preprocess.ledger import Ledger, describe
from megatron_deepseek.data.preprocess.part import PartMaker, Summary
from megatron_deepseek.data.preprocess.plan import Part, Segment, default_part_bytes, plan_parts
from megatron_deepseek.data.preprocess.progress import Progress
from megatron_deepseek.data.preprocess.report import Report, describe_damage, describe_errors, measure_all
from megatron_deepseek.data.preprocess.sample import sample_texts
from megatron_deepseek.data.preprocess.sentences import sentence_splitter
from megatron_deepseek.data.preprocess.settings import PreprocessSettings
from megatron_deepseek.data.preprocess.workers import Counters, run_tasks
from megatron_deepseek.packages import how_to_install

PACKAGES = {"parquet": "pyarrow", "zstd": "zstandard"}


@dataclass(frozen=True)
class Made:
    """The parts of all ranks, in order, and the summaries of this rank's by number; `reused` were made before."""

    parts: list[Part]
    summaries: dict[int, Summary]
    reused: int


def preprocess(settings: PreprocessSettings, say=functools.partial(print, file=sys.stderr)) -> Report | None:
    """Write the dataset of each key and return the report.

    Return None where the dataset exists already, made by the same command, and where parts of other ranks are still
    missing: the last rank assembles. Raise ValueError, in one line, for whatever is wrong with the input or the output.
    """
    start = time.perf_counter()
    input_files = find_inputs(settings.input, settings.content.input_format,
                              without=(settings.parts_directory, report_path(settings)))
    if not input_files:
        raise ValueError(f"--input {' '.join(settings.input)}: nothing but what this command writes itself")
    _check_packages(input_files)
    ledger = Ledger(settings)
    if not ledger.has_plan and is_finished(settings, describe(settings, input_files)):
        say(f"--output-prefix {settings.output_prefix}: finished before, by this very command: nothing is left to do")
        ledger.remove()  # a kill may have left some of the folder
        return None
    try:
        with ledger.opened():
            return _preprocess(settings, input_files, ledger, say, start)
    except OSError as error:
        raise ValueError(f"--output-prefix {settings.output_prefix}: cannot write there: {error}") from error


def _check_packages(input_files: list[InputFile]):
    for input_file in input_files:
        package = PACKAGES.get(input_file.format) or PACKAGES.get(input_file.compression)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ValueError(f"--input {input_file.path}: reading it needs the package {package}: "
                             f"{how_to_install(package)}")
        if input_file.format == "parquet" and (input_file.compression is not None or input_file.path == STANDARD_INPUT):
            raise ValueError(f"--input {input_file.path}: parquet is read from plain files only")


def _preprocess(settings: PreprocessSettings, input_files: list[InputFile], ledger: Ledger, say, start: float):
    described = describe(settings, input_files)
    plan = ledger.read_plan(described)
    execution = settings.execution
    part_bytes = plan["part_bytes"] if plan else execution.part_bytes or default_part_bytes(
        input_files, execution.workers * execution.world_size)
    spool_path = functools.partial(_spool_path, ledger, execution, input_files)
    parts = plan_parts(input_files, part_bytes, settings.content.text_unit, spool_path)
    sampled = _segments_to_sample(input_files, parts)
    parts = itertools.chain(sampled.taken, parts)
    encoder = _choose_encoder(settings, plan, sampled.segments, say)
    if plan is None:
        plan = ledger.write_plan({"described": described, "part_bytes": part_bytes, "backend": encoder.backend})
        _check_plan(settings, plan, part_bytes, encoder)
    split = (sentence_splitter(settings.content, lambda: sample_texts(sampled.segments, settings, whole=True), say)
             if settings.content.split_sentences else None)
    maker = PartMaker(settings, DocumentEncoder(settings.content, encoder, split))
    progress = Progress(Counters(), sum(input_file.size for input_file in input_files), execution.log_interval, say)
    try:
        made = _make_parts(settings, parts, maker, ledger, progress)
    finally:
        progress.close()
    return _finish(settings, described, made, maker, ledger, say, start)


@dataclass(frozen=True)
class _Sampled:
    segments: list[Segment]
    taken: list[Part]


def _segments_to_sample(input_files: list[InputFile], parts: Iterator[Part]) -> _Sampled:
    """Return the segments to sample: all files, or the first part of standard input, taken from `parts`."""
    if input_files[0].path != STANDARD_INPUT:
        return _Sampled([Segment(input_file, size=input_file.size) for input_file in input_files], [])
    taken = list(itertools.islice(parts, 1))
    return _Sampled([segment for part in taken for segment in part.segments], taken)


def _spool_path(ledger: Ledger, execution, input_files: list[InputFile], part: int) -> str | None:
    """Return the file for the spool of a part, None for a part of another rank or one that is made already.

    The first part of standard input always gets one, as sample texts are taken from it.
    """
    ours = part % execution.world_size == execution.rank and not ledger.has(part)
    return ledger.spool_path(part) if ours or part == 0 and input_files[0].path == STANDARD_INPUT else None


def _choose_encoder(settings: PreprocessSettings, plan: dict | None, segments: list[Segment], say) -> Encoder:
    content, execution = settings.content, settings.execution
    backend = execution.tokenizer_backend
    if plan is not None and plan["backend"] in ("gigatoken", "tokenizers") and backend in ("auto", plan["backend"]):
        backend = plan["backend"]
    encoder = choose_encoder(content, backend, execution.workers, lambda: sample_texts(segments, settings), say)
    for option, wanted, there in (("--append-bos", content.append_bos, encoder.special.bos),
                                  ("--fim-rate", content.fim_rate, encoder.special.fim)):
        if wanted and there is None:
            raise ValueError(f"{option}: the tokenizer (--tokenizer-type {content.tokenizer_type}, --tokenizer-model "
                             f"{content.tokenizer_model}) has no such special tokens")
    if plan is not None:
        _check_plan(settings, plan, plan["part_bytes"], encoder)
    return encoder


def _check_plan(settings: PreprocessSettings, plan: dict, part_bytes: int, encoder: Encoder):
    for name, theirs, ours in (("--tokenizer-backend", plan["backend"], encoder.backend),
                               ("--part-bytes", plan["part_bytes"], part_bytes)):
        if theirs != ours:
            raise ValueError(f"--output-prefix {settings.output_prefix}: {settings.parts_directory} holds parts made "
                             f"with {name} {theirs}, not {ours}: --discard-parts starts over")


def _make_parts(settings: PreprocessSettings, parts: Iterator[Part], maker: PartMaker, ledger: Ledger,
                progress: Progress) -> Made:
    execution, made = settings.execution, Made([], {}, 0)
    reused = 0

    def work(part: Part) -> tuple[Summary, bool]:
        there = ledger.finished(part, maker)
        if there is not None:
            progress.counters.add(part.size, 0, 0)
            return there, True
        _check_spools(part, ledger)
        summary = maker.make(part, progress.counters.add)
        for segment in part.segments:
            if segment.spool is not None:
                os.unlink(segment.spool)
        return summary, False

    def own_parts():
        for part in parts:
            made.parts.append(part)
            if part.number % execution.world_size == execution.rank:
                yield part
            if _has_enough(settings, made):
                return

    for summary, was_there in run_tasks(own_parts(), work, execution.workers, progress.tick):
        made.summaries[summary.part] = summary
        reused += was_there
        check_errors(settings, *_known(made))
    return Made(made.parts, made.summaries, reused)


def _check_spools(part: Part, ledger: Ledger):
    """Raise ValueError for a damaged part whose spool was not kept, because the part had a summary; remove that."""
    if part.checksum is not None and part.segments[0].spool is None:
        ledger.summary_path(part.number).unlink(missing_ok=True)
        raise ValueError(f"{ledger.directory}: part {part.number} was damaged and is removed; "
                         f"the same command again makes it anew")


def _has_enough(settings: PreprocessSettings, made: Made) -> bool:
    """Return whether the parts made so far hold --max-documents, from the first part on without a gap."""
    limit = settings.selection.max_documents
    if limit is None or settings.selection.dedup is not None or settings.execution.world_size > 1:
        return False
    leading = itertools.takewhile(lambda number: number in made.summaries, range(len(made.parts)))
    return sum(made.summaries[number].documents for number in leading) >= limit


def _known(made: Made) -> tuple[list[Part], list[Summary]]:
    """Return the parts whose summaries are known, and these."""
    parts = [part for part in made.parts if part.number in made.summaries]
    return parts, [made.summaries[part.number] for part in parts]


def check_errors(settings: PreprocessSettings, parts: list[Part], summaries: list[Summary]):
    count, limit = sum(len(summary.errors) for summary in summaries), settings.execution.max_errors
    if count > limit:
        raise ValueError(f"--max-errors {limit}: {count} documents cannot be used so far, such as "
                         f"{describe_errors(parts, summaries)[0]}; the same command with a higher limit continues")
    if any(summary.damage for summary in summaries):
        damaged, limit = describe_damage(parts, summaries), settings.execution.allow_damaged_files
        if len(damaged) > limit:
            raise ValueError(f"--allow-damaged-files {limit}: {len(damaged)} files cannot be read to their ends so "
                             f"far, such as {damaged[-1]}; the same command with a higher limit continues")


def _finish(settings: PreprocessSettings, described: dict, made: Made, maker: PartMaker, ledger: Ledger, say,
            start: float):
    missing = sum(not ledger.has(part.number) for part in made.parts)
    with ledger.assembling() as ours:
        if missing or not ours:
            why = (f"{missing} of {len(made.parts)} parts are still missing; the last rank to finish puts them together"
                   if ours else "another rank puts them together")
            say(f"rank {settings.execution.rank}: its parts are done; {why}")
            return None
        summaries = [made.summaries.get(part.number) or ledger.summary(part.number) for part in made.parts]
        check_errors(settings, made.parts, summaries)  # of all ranks together
        if not sum(summary.documents for summary in summaries):
            ledger.remove()  # nothing to continue: the command with another key need not discard it
            raise ValueError(_nothing_there(settings, made.parts, summaries))
        assembled = assemble(settings, summaries, maker.dtype, lambda: None)
        made_from = digest_of(settings, described)
        report = _report(settings, made, summaries, maker, assembled, made_from, start)
        write_json(report_path(settings), asdict(report))
        ledger.remove()
        return report


def _nothing_there(settings: PreprocessSettings, parts: list[Part], summaries: list[Summary]) -> str:
    reasons = _total(summary.skipped for summary in summaries)
    skipped = "".join(f"; skipped {count}: {reason}" for reason, count in reasons.items())
    first = next(iter(describe_errors(parts, summaries) + describe_damage(parts, summaries)), None)
    return (f"--input {' '.join(settings.input)}: no documents there{skipped}" + (f"; first: {first}" if first else ""))


def _total(counts) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def _report(settings: PreprocessSettings, made: Made, summaries: list[Summary], maker: PartMaker, assembled: Assembled,
            made_from: str, start: float) -> Report:
    datasets = measure_all(assembled.prefixes)
    skipped = _total(summary.skipped for summary in summaries)
    for reason, count in (("duplicate of an earlier document", assembled.duplicates),
                          (f"beyond --max-documents {settings.selection.max_documents}", assembled.beyond_limit)):
        skipped |= {reason: count} if count else {}
    notes = _total(summary.notes for summary in summaries)
    if settings.selection.seq_length is not None:
        notes["tokens left at the end, too few for a sequence, and dropped"] = assembled.cut_off
    return Report(
        datasets=datasets, documents=sum(each.documents for each in next(iter(datasets.values()))),
        tokens=sum(each.tokens for own in datasets.values() for each in own),
        input_bytes=sum(part.size for part in made.parts), chars=sum(summary.chars for summary in summaries),
        skipped=skipped, notes=notes,
        errors=describe_errors(made.parts, summaries), damaged=describe_damage(made.parts, summaries),
        made_from=made_from, tokenizer_backend=maker.encoder.encoder.backend,
        parts=len(made.parts), parts_reused=made.reused, seconds=time.perf_counter() - start)
