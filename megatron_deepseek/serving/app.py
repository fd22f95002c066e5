"""The ASGI application: its routes, and what every request passes before it reaches one."""

import uuid
from collections.abc import AsyncGenerator, Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_deepseek.serving import chat_answer, completion_answer
from megatron_deepseek.serving.access import Access
from megatron_deepseek.serving.body import read_request
from megatron_deepseek.serving.chat_request import read_chat
from megatron_deepseek.serving.completion_request import read_completion
from megatron_deepseek.serving.errors import ApiError
from megatron_deepseek.serving.guard import Guard
from megatron_deepseek.serving.page import Page
from megatron_deepseek.serving.responses import EventStream, Json, as_api_error, error_response, unless_gone, within
from megatron_deepseek.serving.service import Service
from megatron_deepseek.serving.token_routes import TokenRoutes
from megatron_deepseek.serving.watched import NEVER, Watched


class Routes:
    """What is done for each path."""

    def __init__(self, service: Service, version: str, verbose: bool = False):
        self.service, self.version, self.verbose = service, version, verbose

    @property
    def routes(self) -> list[Route]:
        return [Route("/health", self.health), Route("/version", self.show_version),
                Route("/metrics", self.show_metrics), Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"])]

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.service.healthy else 503)

    async def show_version(self, request: Request) -> Response:
        return Json({"version": self.version})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.shown(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._card(name) for name in self.service.model.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.service.model.check_name(name)
        return Json(self._card(name))

    def _card(self, name: str) -> dict:
        model = self.service.model
        return {"id": name, "object": "model", "created": model.created, "owned_by": "megatron_deepseek",
                "root": model.name, "parent": None, "max_model_len": model.defaults.max_model_len}

    async def completions(self, request: Request) -> Response:
        asked = await read_request(request, self.service.limits, lambda body: read_completion(body, self.service))
        return await self._answer(request, asked, "cmpl", completion_answer.completion,
                                  completion_answer.completion_chunks)

    async def chat_completions(self, request: Request) -> Response:
        asked = await read_request(request, self.service.limits, lambda body: read_chat(body, self.service))
        return await self._answer(request, asked, "chatcmpl", chat_answer.chat_completion, chat_answer.chat_chunks)

    async def _answer(self, request: Request, asked, kind: str, whole: Callable, chunks: Callable) -> Response:
        """Return a checked request's answer, as a stream if it is to be one; an empty one if nobody waits for it."""
        name, seconds = f"{kind}-{uuid.uuid4().hex}", self.service.limits.request_seconds

        async def events() -> AsyncGenerator[dict, None]:
            async with self.service.asked(asked.ask) as ticket:
                async for chunk in chunks(asked, self.service, ticket, name):
                    yield chunk

        async def answer() -> dict:
            with within(seconds):
                async with self.service.asked(asked.ask) as ticket:
                    return await whole(asked, self.service, ticket, name)

        if asked.stream is not None:
            return EventStream(events, seconds, self.verbose)
        found = await unless_gone(request.receive, answer)
        return Json(found) if found is not None else Response(status_code=NEVER)


def make_app(service: Service, access: Access, version: str, verbose: bool = False, says: bool = False) -> ASGIApp:
    """Return the application. Errors of all kinds have OpenAI's form; it `says` a line for each request if asked."""

    async def told(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error, verbose))

    async def of_starlette(request: Request, error: HTTPException) -> Response:
        words = {404: f"There is nothing at {request.url.path[:200]}",
                 405: f"{request.method} is not for {request.url.path[:200]}"}
        message = words.get(error.status_code, error.detail)
        return error_response(ApiError(error.status_code, message, headers=error.headers or {}))

    routes = [*Routes(service, version, verbose).routes, *TokenRoutes(service).routes, *Page.read().routes]
    inner = Starlette(routes=routes, exception_handlers={ApiError: told, HTTPException: of_starlette})
    guarded: ASGIApp = Guard(Caught(inner, verbose), access)
    if access.origins:
        guarded = CORSMiddleware(guarded, allow_origins=access.origins, allow_methods=["GET", "POST"],
                                 allow_headers=["Authorization", "Content-Type"])
    return Watched(guarded, service.metrics, frozenset(each.path for each in routes), says)


class Caught:
    """Middleware that answers what no route foresaw with 500, and leaves words and traceback of it out."""

    def __init__(self, app: ASGIApp, verbose: bool):
        self.app, self.verbose = app, verbose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            told = as_api_error(error, self.verbose)
            if not begun:
                await error_response(told)(scope, receive, send)
