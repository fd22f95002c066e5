"""Who may ask: holders of a key where there are keys, and web pages of this server or of named ones alone.

A page of any other origin could otherwise have a visitor's browser ask a server on the visitor's own machine. Its POST
bears the page's origin; a name that such a page lets point to 127.0.0.1 ("DNS rebinding") is in Host.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from megatron_deepseek.serving.errors import ApiError

_OPEN = ("/", "/health")  # and /page/: the page is no secret, and asks for the key itself
_ANY = "*"


@dataclass(frozen=True)
class Access:
    """`keys`: digests of those of which one must be brought, none for everyone; `origins`: of pages elsewhere that may
    ask, like https://chat.example, or * for all; `local`: the server listens at this machine's own address alone.
    """

    keys: tuple[bytes, ...] = ()
    origins: tuple[str, ...] = ()
    local: bool = True

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raise ApiError, 403 or 401, for a request that may not be answered."""
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and not self._is_known(origin, host):
            raise ApiError(403, "Pages of another origin may not ask this server; --allowed-origins names those that "
                                "may.")
        if self.local and not self.keys and not self._is_local(host):
            raise ApiError(403, "The server is asked by a name that is not this machine's; --allowed-origins names "
                                "those by which it may be.")
        if self.keys and path not in _OPEN and not path.startswith("/page/"):
            self._check_key(headers.get("authorization", ""))

    def _is_known(self, origin: str, host: str) -> bool:
        return _ANY in self.origins or origin in self.origins or urlsplit(origin).netloc.lower() == host.lower()

    def _is_local(self, host: str) -> bool:
        if _ANY in self.origins or host in (urlsplit(each).netloc for each in self.origins):
            return True
        name = urlsplit(f"//{host}").hostname or ""
        try:
            ipaddress.ip_address(name)  # no name that could point elsewhere
            return True
        except ValueError:
            return name in ("", "localhost") or name.endswith(".localhost")

    def _check_key(self, authorization: str) -> None:
        """Raise ApiError unless the header has one of the keys. All are compared, each in constant time."""
        scheme, _, key = authorization.partition(" ")
        brought = digest(key.strip().encode("latin-1"))
        right = sum(hmac.compare_digest(brought, each) for each in self.keys)
        if scheme.lower() != "bearer" or not right:
            raise ApiError(401, "Incorrect API key provided." if key else
                           "You didn't provide an API key: Authorization: Bearer KEY.",
                           headers={"WWW-Authenticate": "Bearer"})


def digest(key: bytes) -> bytes:
    """Return a key's digest: of equal length for all keys, so that comparing tells nothing of theirs."""
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Return the digests of a file's keys, one a line; empty lines and those that begin with # are none.

    Raise ValueError for a file without a key.
    """
    lines = (line.strip() for line in path.read_bytes().splitlines())
    keys = tuple(digest(line) for line in lines if line and not line.startswith(b"#"))
    if not keys:
        raise ValueError(f"--api-key-file {path} has no key")
    return keys


def check_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Return the origins; raise ValueError for what is neither one nor *."""
    for each in origins:
        parts = urlsplit(each)
        if each != _ANY and (each != f"{parts.scheme}://{parts.netloc}" or parts.scheme not in ("http", "https")):
            raise ValueError(f"--allowed-origins {each} is no origin like https://chat.example, without a path, nor *")
    return tuple(origins)


def is_loopback(address: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    return ipaddress.ip_address(address).is_loopback
