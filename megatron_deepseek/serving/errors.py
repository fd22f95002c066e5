"""What goes wrong with a request, in the form in which OpenAI's clients read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

KINDS = MappingProxyType({
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError",
    405: "MethodNotAllowedError", 408: "RequestTimeoutError", 413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError", 429: "RateLimitError", 500: "InternalServerError",
    503: "ServiceUnavailableError", 504: "GatewayTimeoutError"})


@dataclass(eq=False)
class ApiError(Exception):
    """An answer other than 200. `param` is the field of the request that is wrong, as a path: `messages[2].content`."""

    status: int
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict:
        """Return {"error": ...} as OpenAI and vLLM have it."""
        kind = KINDS.get(self.status, "InvalidRequestError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def bad_field(param: str, message: str) -> ApiError:
    """Return the error of a field whose value cannot be; the message begins with the field's name."""
    return ApiError(400, message, param)


def from_words(message: str, param: str | None) -> ApiError:
    """Return the error of a ValueError's message, which may begin with the path of a field and a colon.

    Where it does not, the field is `param`.
    """
    path, found, _ = message.partition(": ")
    return ApiError(400, message, path if found and " " not in path else param)
