"""The decompressed bytes of a file as a buffered stream, in bounded memory, which tells damage from the file's end.

The readers of the libraries are not used: python-zstandard's takes a cut-off file for a whole one, and the standard
library's for gzip loses what it has already decompressed when it meets damage.

A decompressor needs the window that the file was written with: 8 MiB for `zstd -19`, 64 MiB for `xz -9`, 2 GiB for
`zstd --long=31`, 4 GiB at most for xz. It is reserved at once, but filled only as far as the text goes.
"""

import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_deepseek.packages import how_to_install

BUFFER_BYTES = 1 << 18
MOST_ZSTD_WINDOW = 1 << 31  # of `zstd --long=31 --ultra`; no decoder takes more


class DamagedStream(ValueError):
    """Raised where the bytes end, or are no longer valid, before the end that the format has."""


@dataclass(frozen=True)
class _Format:
    """A compression. `new` makes a decompressor with `eof` and `unused_data`.

    `fed_at_once` bytes of input become 70 MB of output at most.
    """

    name: str
    new: Callable
    fed_at_once: int


def open_stream(path: str, compression: str | None) -> io.BufferedIOBase:
    """Open a file for reading. Raise ValueError where a package is missing; reading raises DamagedStream."""
    if compression is None:
        return open(path, "rb", buffering=BUFFER_BYTES)
    return io.BufferedReader(_Frames(open(path, "rb", buffering=BUFFER_BYTES), _FORMATS[compression]()), BUFFER_BYTES)


class _Frames(io.RawIOBase):
    """Reads frame after frame (gzip's members, xz's streams), each with a decompressor of its own."""

    def __init__(self, file, form: _Format):
        self._file, self._format = file, form
        self._decompressor = form.new()
        self._began, self._ended, self._at_header = False, 0, True
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self):
        return True

    def fileno(self):
        return self._file.fileno()

    def readinto(self, buffer) -> int:
        while not self._ready:
            fed = self._rest or self._file.read(self._format.fed_at_once)
            self._rest = b""
            if not fed:
                if not self._decompressor.eof:
                    raise DamagedStream(f"the {self._format.name} file breaks off at its byte {self._file.tell()}"
                                        if self._began else
                                        f"the {self._format.name} file is empty, without even a header")
                return 0
            self._feed(fed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _feed(self, fed: bytes):
        if self._decompressor.eof:
            fed = fed.lstrip(b"\0")  # padding after the end is allowed
            if not fed:
                return
            self._decompressor = self._format.new()
            self._ended, self._at_header = self._ended + 1, True
        self._began = True
        try:
            self._ready = memoryview(self._decompressor.decompress(fed))
        except Exception as error:  # each library has its own class
            raise self._refusal(error) from error
        self._at_header = False
        if self._decompressor.eof:
            self._rest = self._decompressor.unused_data

    def _refusal(self, error: Exception) -> ValueError:
        """Return the error to raise. Too little memory is a ValueError, but no damage of the file."""
        name, place = self._format.name, self._file.tell()
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            return ValueError(f"--input {self._file.name}: no memory for the window of this {name} file (up to 2 GiB "
                              f"for zstd, 4 GiB for xz, in each of --workers)")
        sound = f"{self._ended} sound stream{'s' * (self._ended > 1)}"
        behind = f", behind the end of {sound}" if self._at_header and self._ended else ""
        return DamagedStream(f"damaged {name} before its byte {place}{behind}: {error}")

    def close(self):
        self._decompressor = None  # and its window
        self._file.close()
        super().close()


def _gzip() -> _Format:
    return _Format("gzip", lambda: zlib.decompressobj(wbits=31), 1 << 15)


def _xz() -> _Format:
    return _Format("xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_AUTO), 1 << 13)


def _zstd() -> _Format:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"reading .zst needs the package zstandard: {how_to_install('zstandard')}") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=MOST_ZSTD_WINDOW)
    return _Format("zstd", decompressor.decompressobj, 1 << 11)


_FORMATS = {"gzip": _gzip, "xz": _xz, "zstd": _zstd}
