"""Errors as OpenAI clients know them: a status, and `{"error": {message, type, param, code}}`.

Knows our exception tree and HTTP statuses; nothing of routes.
"""

from __future__ import annotations

from typing import Any

from lfm2_mm import errors

__all__ = ["ApiError", "body_of", "from_exception"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "server_error",
}

_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.ContextOverflow, 400, "context_length_exceeded"),
    (errors.ConstraintError, 400, "invalid_schema"),
    (errors.MessageError, 400, "invalid_messages"),
    (errors.FilterError, 400, "invalid_filter"),
    (errors.SettingError, 400, "invalid_value"),
    (errors.ImageError, 422, "invalid_image"),
    (errors.FetchError, 422, "fetch_failed"),
    (errors.DocumentError, 422, "invalid_document"),
    (errors.InputError, 422, "invalid_input"),
    (errors.ModelNotFound, 404, "model_not_found"),
    (errors.IndexLocked, 409, "index_locked"),
    (errors.IndexFault, 503, "index_unavailable"),
    (errors.MissingExtra, 503, "not_installed"),
)


class ApiError(Exception):
    """A problem with an HTTP status.

    Args:
        status: HTTP status.
        message: One sentence.
        code: A word for programs.
        param: The field of the request that is to blame.
        retry_after: Seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer beside the usual ones."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def _sendable(text: str) -> str:
    """Text that can be written as UTF-8: a lone surrogate of a caller becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def body_of(problem: ApiError) -> dict[str, Any]:
    """The JSON body that OpenAI clients expect."""
    return {
        "error": {
            "message": _sendable(str(problem)),
            "type": _TYPES.get(problem.status, "server_error"),
            "param": problem.param,
            "code": problem.code,
        }
    }


def from_exception(problem: BaseException) -> ApiError:
    """What a caller is told; of a problem of our own making nothing but that there was one."""
    if isinstance(problem, ApiError):
        return problem
    for kind, status, code in _STATUS:
        if isinstance(problem, kind):
            retry = 5 if status == 503 else None
            return ApiError(status, str(problem), code=code, retry_after=retry)
    return ApiError(
        503,
        "the server could not complete this request; its log has the reason under the request's id",
        code="internal",
        retry_after=5,
    )
