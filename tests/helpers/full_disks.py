"""Disks that are full: files that may not grow beyond a size, and a small file system where one may be mounted."""

import contextlib
import resource
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def full_after(num_bytes: int):
    """Files take so many bytes, of this process and its children; Python ignores SIGXFSZ, so that a write fails."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int):
    """A file system of that size at `folder`; the test is skipped where nobody may mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
