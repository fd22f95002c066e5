"""Middleware that lets through what access.py allows."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_deepseek.serving.access import Access
from megatron_deepseek.serving.errors import ApiError
from megatron_deepseek.serving.responses import error_response


class Guard:
    """Answers with the error of what `access` refuses."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.access.check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
