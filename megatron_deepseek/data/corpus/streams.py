"""Decompressed bytes of a file as a buffered stream, in bounded memory, with damage told from its end.

gzip's reader is the standard library's. The one for zstd and xz is here: python-zstandard's takes a cut-off file for a
whole one, and the standard library's for xz believes whatever dictionary size the header claims.
"""

import gzip
import io
import lzma
import zlib

BUFFER_BYTES = 1 << 18
FED_AT_ONCE = 1 << 11  # 2 KB of the densest zstd blocks are 64 MB
MOST_MEMORY = 1 << 27  # for the dictionary of xz and the window of zstd: all that `xz -9` and `zstd -19` use


class DamagedStream(ValueError):
    """The bytes end, or stop making sense, before the end that the format has."""


def open_stream(path: str, compression: str | None) -> io.BufferedIOBase:
    """ValueError in one line where a package is missing; DamagedStream when reading comes upon damage."""
    file = open(path, "rb", buffering=BUFFER_BYTES)
    if compression is None:
        return file
    if compression == "gzip":
        return io.BufferedReader(_Gzip(file), BUFFER_BYTES)
    return io.BufferedReader(_Frames(file, _FRAMES[compression]()), BUFFER_BYTES)


class _Gzip(io.RawIOBase):
    def __init__(self, file):
        self._file = file
        self._inner = gzip.GzipFile(fileobj=file)
        self._empty = not file.peek(1)

    def readable(self):
        return True

    def fileno(self):
        return self._file.fileno()

    def readinto(self, buffer) -> int:
        if self._empty:
            raise DamagedStream("the gzip file is empty, without even a header")
        try:
            return self._inner.readinto(buffer)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedStream(f"damaged gzip: {error}") from error

    def close(self):
        self._file.close()
        super().close()


class _Frames(io.RawIOBase):
    """Frame after frame (zstd) or stream after stream (xz), each by a decompressor of its own with `eof`."""

    def __init__(self, file, new_decompressor):
        self._file, self._new = file, new_decompressor
        self._decompressor = new_decompressor()
        self._began = False
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self):
        return True

    def fileno(self):
        return self._file.fileno()

    def readinto(self, buffer) -> int:
        while not self._ready:
            fed = self._rest or self._file.read(FED_AT_ONCE)
            self._rest = b""
            if not fed:
                if self._began and not self._decompressor.eof or not self._file.tell():
                    raise DamagedStream("the compressed file breaks off")
                return 0
            self._feed(fed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _feed(self, fed: bytes):
        try:
            if self._decompressor.eof:
                fed = fed.lstrip(b"\0")  # xz may pad its end
                if not fed:
                    return
                self._decompressor = self._new()
            self._began = True
            self._ready = memoryview(self._decompressor.decompress(fed))
        except DamagedStream:
            raise
        except Exception as error:  # each library has its own class
            raise DamagedStream(f"damaged {type(error).__name__.removesuffix('Error').lower()}: {error}") from error
        if self._decompressor.eof:
            self._rest = self._decompressor.unused_data

    def close(self):
        self._file.close()
        super().close()


def _new_xz():
    return lambda: lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=MOST_MEMORY)


def _new_zstd():
    try:
        import zstandard
    except ImportError as error:
        raise ValueError("reading .zst needs the package zstandard: pip install 'megatron-deepseek[data]'") from error
    return lambda: zstandard.ZstdDecompressor(max_window_size=MOST_MEMORY).decompressobj()


_FRAMES = {"xz": _new_xz, "zstd": _new_zstd}
