"""The chat page: files of the package, read once, and headers that keep the page to this server."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from megatron_deepseek.serving.errors import ApiError

FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
_KINDS = MappingProxyType({
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".woff2": "font/woff2",
    ".json": "application/json", ".webmanifest": "application/manifest+json"})
_HEADERS = MappingProxyType({
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
                               "connect-src 'self'; font-src 'self'; manifest-src 'self'; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache"})


@dataclass(frozen=True)
class Page:
    """The page's files by their names."""

    files: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path = FOLDER) -> "Page":
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return cls({path.name: path.read_bytes() for path in found if path.suffix in _KINDS})

    @property
    def routes(self) -> list[Route]:
        return [Route("/", self.index), Route("/page/{name}", self.file)]

    async def index(self, request: Request) -> Response:
        return self._response(_INDEX)

    async def file(self, request: Request) -> Response:
        return self._response(request.path_params["name"])

    def _response(self, name: str) -> Response:
        if name not in self.files:
            raise ApiError(404, f"There is no page {name[:100]}")
        return Response(self.files[name], headers=dict(_HEADERS), media_type=_KINDS[Path(name).suffix])
