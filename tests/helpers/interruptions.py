"""What disks and kills do to a command, in this process."""

import resource
from contextlib import contextmanager

from megatron_deepseek.checkpoint import workspace


@contextmanager
def largest_file(size: int):
    """What a full disk does to a write, for every file of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stop_after(files: int, monkeypatch) -> None:
    """Let the process fail when it has finished so many files, as a kill would: nothing is cleaned up."""
    finish, done = workspace.Workspace.finish, []

    def failing(self, name, record):
        if len(done) == files:
            raise RuntimeError("killed")
        finish(self, name, record)
        done.append(name)

    monkeypatch.setattr(workspace.Workspace, "finish", failing)
