"""`/health`, `/v1/models` and `/metrics`: what there is, and how it is doing."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lfm2_mm.server.context import context_of
from lfm2_mm.server.document import gives
from lfm2_mm.server.problems import ApiError
from lfm2_mm.server.registry import Served

__all__ = ["router"]

router = APIRouter()


@router.get("/health", tags=["status"], responses=gives("application/json", status=503))
async def health(request: Request) -> Response:
    """`ready` (200), or `loading` and `failed` (503)."""
    state = context_of(request).registry.state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/v1/models", tags=["models"])
async def models(request: Request) -> dict[str, Any]:
    """The models of this server and what may be asked of each."""
    served = context_of(request).registry.served.values()
    return {"object": "list", "data": [_row(one) for one in served]}


@router.get("/v1/models/{model:path}", tags=["models"])
async def model(model: str, request: Request) -> dict[str, Any]:
    """One model."""
    served = context_of(request).registry.served.get(model)
    if served is None:
        raise ApiError(
            404, f"there is no model {model[:100]!r} here; see /v1/models", code="model_not_found"
        )
    return _row(served)


@router.get("/metrics", tags=["status"], response_class=Response, responses=gives("text/plain"))
async def metrics(request: Request) -> Response:
    """Counts and times in the text format of Prometheus."""
    return Response(context_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


def _row(served: Served) -> dict[str, Any]:
    return {
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "lfm2_mm",
        "status": served.state,
        "abilities": list(served.abilities),
    }
