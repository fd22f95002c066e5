"""Damaged and malicious files, through everything that reads them: work, or one line; nothing in them is run."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import file_fuzz
from file_fuzz import READERS, make_sound, outcome
from pickle_damage import Bomb


@pytest.mark.slow
def test_damaged_files_cost_a_line(tmp_path):
    """The first cases of a fixed seed, in a process of their own; `python tests/helpers/file_fuzz.py` has no end."""
    here = Path(file_fuzz.__file__)
    done = subprocess.run([sys.executable, here, "--cases", "400"], capture_output=True, text=True,
                          env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture(autouse=True)
def no_job_stays():
    """Reading joins one, which other files of tests in this process would find in their way."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def files_of(root: Path) -> list[Path]:
    return [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("name, reader", [(name, reader) for name in READERS for reader in READERS[name]])
def test_a_pickle_for_any_file_is_not_run(sound, tmp_path, name, reader):
    """Each file in turn is one that makes a directory when it is unpickled: of Megatron-LM too those that we don't
    open, such as common.pt and mp_rank_00's. A checkpoint without checksums, which would stop most of them.
    """
    extra = Path("iter_0000000", "mp_rank_00", "model_optim_rng.pt")
    for file in [*files_of(sound[name]), extra]:
        root, bomb = tmp_path / "copy", pickle.dumps(Bomb(tmp_path / "exploded"))
        shutil.copytree(sound[name], root, copy_function=os.link)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).unlink(missing_ok=True)
        (root / file).write_bytes(bomb)
        assert outcome(READERS[name][reader], root, tmp_path / "out") is None, file
        assert not (tmp_path / "exploded").exists(), file
        for path in (root, tmp_path / "out", tmp_path / "out.incomplete"):
            shutil.rmtree(path, ignore_errors=True)


READERS_OF_DCP = [("megatron", "convert"), *(("native", reader) for reader in READERS["native"])]


def before_the_real_one(path: Path, directory: Path) -> bytes:
    """A pickle that makes `directory`, forgets that, and is the file's own from there on."""
    name = str(directory).encode()
    call = b"cos\nmkdir\n" + pickle.BINUNICODE + len(name).to_bytes(4, "little") + name + pickle.TUPLE1 + pickle.REDUCE
    own = path.read_bytes()
    return own[:2] + call + pickle.POP + own[2:]


@pytest.mark.parametrize("name, reader", READERS_OF_DCP)
def test_a_pickle_before_the_real_metadata_is_not_run(sound, tmp_path, name, reader):
    """The metadata is what it was, so the command does its work; Python's own reader would run the other first."""
    root = shutil.copytree(sound[name], tmp_path / "copy")
    metadata = root / "iter_0000000" / ".metadata"
    metadata.write_bytes(before_the_real_one(metadata, tmp_path / "exploded"))
    pickle.loads(metadata.read_bytes())
    (tmp_path / "exploded").rmdir()  # so it goes off where it is let
    assert outcome(READERS[name][reader], root, tmp_path / "out") is None
    assert not (tmp_path / "exploded").exists()
