"""A file that grows by records while a run goes on, whatever happens to its disk, its permissions or its directory."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_COPIED_BYTES = 1 << 20


class AppendedFile:
    """A file that is written record by record. No record is lost or torn.

    What cannot be written waits in memory, and is written before the next record. `tell` gets a line at the first
    failure and one when it is over. A file that was removed, with its directory or without, is made again from its
    content, which is still held open. A file that the server of a network file system no longer knows (ESTALE, as after
    a restart of the server) is opened anew by its name.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]):
        """Open the file. Raise OSError if it cannot be opened now."""
        self.path, self.tell = path, tell
        self._waiting, self._trouble = bytearray(), False
        self._file = self._open(path)

    def write(self, record: bytes) -> None:
        self._waiting += record
        try:
            self._write_waiting()
        except OSError as error:
            if not self._trouble:
                self.tell(f"{self.path} cannot be written: {error.strerror}. Training goes on; what belongs there is "
                          "kept, and written once it can be")
            self._trouble = True
        else:
            if self._trouble:
                self.tell(f"{self.path} is written again, and nothing is missing")
            self._trouble = False

    def flush(self) -> None:
        """Do nothing: a record is written at once, or waits because it cannot be."""

    def close(self) -> None:
        """Close the file. Raise OSError if something still waits and cannot be written."""
        try:
            self._write_waiting()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: the last {len(self._waiting):,} bytes are missing",
                          str(self.path)) from error
        finally:
            os.close(self._file)

    def _write_waiting(self) -> None:
        try:
            self._write_out()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            self._recreate()
            self._write_out()

    def _write_out(self) -> None:
        if self._waiting and self._is_elsewhere():
            self._recreate()
        while self._waiting:
            written = os.write(self._file, self._waiting)
            del self._waiting[:written]

    def _is_elsewhere(self) -> bool:
        """Return whether the path no longer names the file that is open."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return True

    def _recreate(self) -> None:
        if self.path.exists():  # the same file, or another that somebody put in its place and that stays as it is
            replacement = self._open(self.path)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replacement = self._copy()
            self.tell(f"{self.path} was removed while the run wrote it, and is made again")
        with suppress(OSError):  # a removed file may report at its end what it could not write
            os.close(self._file)
        self._file = replacement

    def _copy(self) -> int:
        """Write the open file's content under its name again, and return the new file's descriptor.

        On NFS a file that another machine removed cannot be read; its content is lost.
        """
        aside = self.path.with_name(self.path.name + ".partial")
        aside.unlink(missing_ok=True)
        copy = self._open(aside)
        try:
            position = 0
            while block := self._read(position):
                position += len(block)
                while block:
                    block = block[os.write(copy, block):]
            os.replace(aside, self.path)
        except BaseException:
            os.close(copy)
            aside.unlink(missing_ok=True)
            raise
        return copy

    def _read(self, position: int) -> bytes:
        try:
            return os.pread(self._file, _COPIED_BYTES, position)
        except OSError:
            self.tell(f"{self.path}: what was in it is lost")
            return b""

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
