"""The index cache under attack: whatever happens to its files, a run reads the right samples, or says why not."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from full_disks import full_after
from small_datasets import settings_of, tokens_of, train_set, write_dataset

from megatron_deepseek.data import cache
from megatron_deepseek.data.indexed import written_whole
from megatron_deepseek.data.pretraining import build_datasets, check_data, make_plan, shared_plan

NUM_SAMPLES = (100, 9, 0)
TOOL = Path(__file__).resolve().parents[3] / "tools" / "build_data_cache.py"


@pytest.fixture
def blend(tmp_path):
    """Two datasets and their cache, for seven files: two surveys, four indices of samples, one of a blend."""
    for seed, name in enumerate("ab"):
        write_dataset(tmp_path / name, base=2000 * seed, seed=seed)
    return settings_of(1, tmp_path / "a", 2, tmp_path / "b", split="90,10,0", data_cache_path=str(tmp_path / "cache"))


def read(settings):
    check_data(settings, 10_000, NUM_SAMPLES)
    return [tokens_of(split, count) for split, count in zip(build_datasets(settings, NUM_SAMPLES)[:2], NUM_SAMPLES)]


def attacks(folder: Path, seed: int):
    """(what is done, how) for every file: bits flipped, cut, longer, emptied, other numbers in place, exchanged."""
    draw = random.Random(seed)

    def change(path, change):
        return lambda: path.write_bytes(change(path.read_bytes()))
    for path in sorted(folder.iterdir()):
        place = draw.randrange(path.stat().st_size)
        yield f"{path.name}: bit of byte {place} flipped", change(
            path, lambda data, place=place: data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)])
            + data[place + 1:])
        yield f"{path.name}: cut at {place}", change(path, lambda data, place=place: data[:place])
        yield f"{path.name}: emptied", change(path, lambda data: b"")
        yield f"{path.name}: longer", change(path, lambda data: data + bytes(8))
        yield f"{path.name}: zeros", change(path, lambda data: bytes(len(data)))
        yield f"{path.name}: other order", change(path, lambda data: data[4:8] + data[:4] + data[8:])
        yield f"{path.name}: nested", change(path, lambda data: b"[" * 100_000)
        yield f"{path.name}: gone", path.unlink
        others = [other for other in folder.glob(f"*{path.suffix}") if other != path]
        for other in others:
            yield f"{path.name}: as {other.name}", change(path, lambda data, other=other: other.read_bytes())
        if path.suffix == ".json":
            for key, value in (("digest", "0"), ("least", 0), ("tokens", 10), ("sequences", "many"), ("least", [1]),
                               ("prefix", 5), ("contiguous", None), ("token_dtype", "float64")):
                def edit(data, key=key, value=value):
                    written = json.loads(data)
                    (written if key == "digest" else written["survey"])[key] = value
                    return json.dumps(written).encode()
                yield f"{path.name}: {key} {value!r}", change(path, edit)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_change_of_the_cache_gives_other_samples(blend, seed):
    """Each damaged file is made anew, byte for byte, but for the times that the surveys hold."""
    right, folder = read(blend), Path(blend.data_cache_path)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(kept) == 7
    for what, attack in list(attacks(folder, seed)):
        attack()
        assert read(blend) == right, what
        assert {path: path.read_bytes() for path in folder.iterdir()} == kept, what


def test_exchanged_indices_of_equal_sizes(tmp_path):
    """Of datasets with the same documents in opposite orders; and a survey as another dataset's, times and all."""
    lengths = np.arange(20, 40)
    for name, own, base in (("a", lengths, 1000), ("b", lengths[::-1], 3000)):
        with written_whole([str(tmp_path / name)], "<u2") as (writer,):
            writer.add(np.arange(base, base + lengths.sum(), dtype="<u2"), [[length] for length in own])
        for ending in (".bin", ".idx"):
            os.utime(tmp_path / (name + ending), ns=(5, 5))
    alone = [settings_of(tmp_path / name, data_cache_path=str(tmp_path / "cache")) for name in "ab"]
    right = [tokens_of(train_set(settings, 50), 50) for settings in alone]
    for pattern in ("*.samples", "*.survey.json"):
        first, second = (tmp_path / "cache").glob(pattern)
        kept = first.read_bytes(), second.read_bytes()
        assert kept[0] != kept[1] and len(kept[0]) == len(kept[1])
        first.write_bytes(kept[1])
        second.write_bytes(kept[0])
        assert [tokens_of(train_set(settings, 50), 50) for settings in alone] == right
        assert (first.read_bytes(), second.read_bytes()) == kept


def test_a_sound_cache_is_left_as_it_is_and_read_once(blend, monkeypatch):
    """By the first rank of each node only where it sees other files than rank 0 has found sound."""
    read(blend)
    looked = []
    original = cache.block_digest
    monkeypatch.setattr(cache, "block_digest", lambda *given: looked.append(given[0].name) or original(*given))
    before = {path: path.stat().st_mtime_ns for path in Path(blend.data_cache_path).iterdir()}
    said = []
    plan = shared_plan(blend, NUM_SAMPLES, said.append)
    assert sorted(looked) == sorted(plan.stamps) and len(looked) == 5 and not said
    assert not plan.missing().samples and len(looked) == 5, "known by their stamps"
    os.utime(plan.folder / min(plan.stamps), ns=(0, 0))
    assert not plan.missing().samples and looked[5:] == [min(plan.stamps)]
    os.utime(plan.folder / min(plan.stamps), ns=(0, before[plan.folder / min(plan.stamps)]))
    assert {path: path.stat().st_mtime_ns for path in Path(blend.data_cache_path).iterdir()} == before


def test_blocks_make_one_seal(tmp_path, monkeypatch):
    """However the content is cut for writing, and whatever a block is; each byte and the name count."""
    monkeypatch.setattr(cache, "BLOCK_BYTES", 16)
    content = np.arange(25, dtype="<u2")
    for name, parts in (("x", [content]), ("x", np.split(content, [1, 9, 9, 20])), ("y", [content])):
        with cache.sealing(tmp_path / name) as file:
            for part in parts:
                file.write(part)
        seal = (tmp_path / name).read_bytes()[50:]
        assert (tmp_path / name).read_bytes()[:50] == content.tobytes() and len(seal) == cache.SEAL_BYTES
    assert cache.sound_files(tmp_path, {"x": 50, "y": 50, "z": 50}) == {"x", "y"}
    whole = (tmp_path / "x").read_bytes()
    for place in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1:])
        assert cache.sound_files(tmp_path, {"x": 50}) == set(), place
    (tmp_path / "x").write_bytes((tmp_path / "y").read_bytes())
    assert cache.sound_files(tmp_path, {"x": 50}) == set(), "the file of another name"


def test_what_kills_leave_is_removed_and_what_is_being_written_is_not(blend):
    folder = Path(blend.data_cache_path)
    folder.mkdir()
    dead, live = (folder / f"{'ab' * 16}.samples.{hexadecimal * 16}.tmp" for hexadecimal in "0f")
    dead.write_bytes(b"half")
    others = [folder / name for name in ("my.tmp", "x.samples.tmp", "notes.samples.0123.tmp")]
    for path in others:
        path.touch()
    with open(live, "xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        read(blend)
        assert not dead.exists() and live.exists() and all(path.exists() for path in others)
    read(blend)
    assert not live.exists()


@pytest.mark.parametrize("moment", ["replace", "fstat"])
def test_another_start_does_not_remove_a_file_between_two_steps(tmp_path, monkeypatch, moment):
    """Before it gets its name, and where it is not locked yet: then another one is begun."""
    original, calls = getattr(os, moment), []

    def after_another_start(*given, **options):
        calls.append(given)
        if len(calls) == 1:
            for path in tmp_path.glob("*.tmp") if moment == "fstat" else ():
                path.unlink()
            cache.remove_unfinished(tmp_path)
        return original(*given, **options)
    monkeypatch.setattr(cache.os, moment, after_another_start)
    with cache.sealing(tmp_path / "x.samples") as file:
        file.write(b"content")
    monkeypatch.undo()
    assert calls and cache.sound_files(tmp_path, {"x.samples": 7}) and len(list(tmp_path.iterdir())) == 1


def test_a_killed_writer_leaves_what_the_next_start_removes(blend):
    def write_and_die():
        with cache.sealing(Path(blend.data_cache_path) / f"{'0' * 32}.samples") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    right, folder = read(blend), Path(blend.data_cache_path)
    process = multiprocessing.get_context("fork").Process(target=write_and_die)
    process.start()
    process.join()
    assert len(list(folder.glob("*.tmp"))) == 1
    assert read(blend) == right and not list(folder.glob("*.tmp")) and len(list(folder.iterdir())) == 7


@contextlib.contextmanager
def read_only(folder: Path):
    """As on a file system that is mounted so; permissions alone do not stop root."""
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True)
        if mounted.returncode or os.access(folder, os.W_OK):
            subprocess.run(["umount", folder], capture_output=True)
            pytest.skip("root, and mounting is not allowed here: nothing is read-only")
        try:
            yield
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)


def test_a_read_only_cache_serves_what_it_holds(blend):
    right, folder = read(blend), Path(blend.data_cache_path)
    with read_only(folder):
        assert read(blend) == right
        longer = settings_of(*blend.data_path, split=blend.split, data_cache_path=str(folder), seed=2)
        with pytest.raises(ValueError, match=f"--data-cache-path {folder}: cannot write indices to {folder}: "):
            check_data(longer, 10_000, NUM_SAMPLES)
    survey = next(folder.glob("*.survey.json"))
    survey.unlink()
    with read_only(folder):
        assert read(blend) == right, "a survey is not needed to be kept"
    samples = next(folder.glob("*.samples"))
    samples.write_bytes(samples.read_bytes()[:-1] + b"\0")
    with read_only(folder), pytest.raises(ValueError, match=f"the index cache: {samples} cannot be written: "):
        read(blend)


def test_the_cache_beside_the_data_is_told_when_it_cannot_be_written(tmp_path):
    write_dataset(tmp_path / "data")
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match=f"the index cache beside the data, {tmp_path}/cache, cannot be written: .*; "
                                         f"--data-cache-path puts it elsewhere"):
        check_data(settings_of(tmp_path / "data"), 1000)


def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(blend):
    folder = Path(blend.data_cache_path)
    with full_after(400), pytest.raises(ValueError, match=r"the index cache: .*/cache/\w+.samples cannot be written: "
                                        r"File too large \(.* GB are free there\); --data-cache-path puts") as caught:
        build_datasets(blend, NUM_SAMPLES)
    assert "\n" not in str(caught.value) and not list(folder.glob("*.tmp")) and not list(folder.glob("*.samples"))


def test_the_tool_on_a_full_disk(tmp_path, blend):
    """Processes that build tell their parent; one line, status 2, no traceback. Then the disk has room."""
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    command = [sys.executable, TOOL, "--data-path", *blend.data_path, "--split", "1,0,0", "--tokenizer-type",
               "NullTokenizer", "--tokenizer-model", "999", "--seq-length", "8", "--train-samples", "100",
               "--data-cache-path", tmp_path / "cache"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    lines = [line for line in done.stderr.splitlines() if "indices:" not in line]  # the bar
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("build_data_cache.py: error: the index cache: ")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "2 indices built" in done.stdout, done.stderr


def test_plans_of_equal_weights_share_their_blend(blend):
    """Train and validation, of one name and two lengths: both find what they need."""
    plan = make_plan(blend, (100, 9, 0))
    assert len({split.index.name for split in plan.splits[:2]}) == 1
    plan = plan.build(plan.missing())
    assert [path.name[-10:] for path in plan.folder.glob("*.blend")] == ["-100.blend"]
    assert not plan.missing().blends
