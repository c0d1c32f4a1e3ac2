"""The OpenAPI document: FastAPI's, with the statuses and media types that really come.

FastAPI says of every route that it may answer 422 in a form of its own, and of no other error.
Knows documents; no route.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

__all__ = ["STREAMED", "described", "gives"]

_ERRORS = {
    400: "A field that cannot be understood or honoured.",
    401: "No API key, or a wrong one.",
    403: "A Host or Origin that is not let in.",
    404: "No such model, index or document.",
    408: "The body did not come in time.",
    409: "Another process writes to the index.",
    413: "More than the limits allow.",
    415: "A body of another kind than is read here.",
    422: "Content that cannot be used: a picture, a recording, a document.",
    429: "Too much is waiting; `Retry-After` says when to come again.",
    503: "Loading, stopping, or failed.",
}
_WITHOUT_BODY = (400, 401, 403, 404, 429, 503)
_METHODS = ("get", "post", "put", "patch", "delete")

_ERROR = {
    "type": "object",
    "title": "Error",
    "description": "An error in OpenAI's form.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def gives(*kinds: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: the media types that it answers with.

    Args:
        kinds: Such as `audio/wav`.
        status: With which.
    """
    content: dict[str, dict[str, Any]] = {kind: {"schema": {}} for kind in kinds}
    return {status: {"description": "Done.", "content": content}}


STREAMED = gives("application/json", "text/event-stream")
"""An answer as a whole, or as server-sent events."""


def described(app: FastAPI) -> None:
    """Let an application describe itself with the errors that its routes give."""
    first = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = first()
            _mend(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _mend(document: dict[str, Any]) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = _ERROR
    for routes in document["paths"].values():
        for method in _METHODS:
            if (operation := routes.get(method)) is not None:
                _add_errors(operation)


def _add_errors(operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    for status in _ERRORS if "requestBody" in operation else _WITHOUT_BODY:
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        error = {"description": _ERRORS[status], "content": content}
        answers.setdefault(str(status), error)
