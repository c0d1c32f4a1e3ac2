"""`/v1/embeddings`, `/v1/rerank`, `/v1/search` and `/v1/indexes`: retrieval over HTTP.

Found by the server through the entry point `lfm2_mm.routes`. Knows the server's context and the
public face of retrieval; how anything is computed is theirs.
"""

from __future__ import annotations

import base64
import uuid
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile

from lfm2_mm.server.context import Context, context_of
from lfm2_mm.server.problems import ApiError
from lfm2_retrieval.index.model import AddReport
from lfm2_retrieval.reranking import rerank
from lfm2_retrieval.serving.indexes import add_files, indexes_of, upload_name
from lfm2_retrieval.serving.schema import (
    AddTexts,
    Delete,
    EmbeddingsRequest,
    RerankRequest,
    SearchRequest,
    body_schema,
)

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/embeddings", tags=["retrieval"])
async def embeddings(body: EmbeddingsRequest, request: Request) -> dict[str, Any]:
    """Vectors of texts: one each, or, of a late-interaction model, one for each token.

    The latter is an extension: `"object": "multi_embedding"`, and `embedding` a list of vectors
    (never base64).
    """
    context = context_of(request)
    texts = _texts([body.input] if isinstance(body.input, str) else body.input, "input", context)
    served = context.registry.find(body.model, "embeddings")
    encoder = served.model
    if body.dimensions not in (None, encoder.dim):
        raise ApiError(
            400,
            f"dimensions is {body.dimensions}, and vectors of {served.id} have {encoder.dim}; "
            "leave it out",
            code="unsupported_value",
            param="dimensions",
        )
    encode = encoder.encode_queries if body.input_type == "query" else encoder.encode_documents
    rows = await context.worker.run(lambda: encode(texts))
    single = encoder.spec.pooling is not None
    data = []
    for index, vectors in enumerate(rows):
        if single:
            flat = vectors[0].contiguous()
            value: Any = flat.tolist()
            if body.encoding_format == "base64":
                value = base64.b64encode(flat.numpy().tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": value})
        else:
            data.append(
                {"object": "multi_embedding", "index": index, "embedding": vectors.tolist()}
            )
    tokens = sum(encoder.count_tokens(text) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": served.id, "data": data, "usage": usage}


@router.post("/v1/rerank", tags=["retrieval"])
@router.post("/v2/rerank", tags=["retrieval"], include_in_schema=False)
@router.post("/rerank", tags=["retrieval"], include_in_schema=False)
async def reranked(body: RerankRequest, request: Request) -> dict[str, Any]:
    """Passages sorted by how well they answer a query."""
    context = context_of(request)
    texts = []
    for place, document in enumerate(body.documents):
        text = document.get("text") if isinstance(document, dict) else document
        if not isinstance(text, str):
            raise ApiError(
                400,
                f"documents[{place}] has no text; give a string or an object with one",
                code="invalid_value",
                param=f"documents[{place}]",
            )
        texts.append(text)
    _texts([body.query, *texts], "documents", context)
    served = context.registry.find(body.model, "embeddings")
    ranked = await context.worker.run(
        lambda: rerank(body.query, texts, encoder=served.model, k=body.top_n)
    )
    results = []
    for index, score in ranked:
        row: dict[str, Any] = {"index": index, "relevance_score": score}
        if body.return_documents:
            row["document"] = {"text": texts[index].encode("utf-8", "replace").decode()}
        results.append(row)
    return {"id": f"rerank-{uuid.uuid4().hex}", "model": served.id, "results": results}


@router.post("/v1/search", tags=["retrieval"])
async def search(body: SearchRequest, request: Request) -> dict[str, Any]:
    """The best passages of an index, with the words that matched."""
    hits = await indexes_of(context_of(request)).use(
        body.index,
        lambda index: index.search(
            body.query, body.k, filter=body.filter, hybrid=body.hybrid, exact=body.exact
        ),
    )
    return {"object": "list", "data": [asdict(hit) for hit in hits]}


@router.get("/v1/indexes", tags=["retrieval"])
async def indexes(request: Request) -> dict[str, Any]:
    """The indexes of this server."""
    return {
        "object": "list",
        "data": [{"id": name, "object": "index"} for name in indexes_of(context_of(request)).names],
    }


@router.get("/v1/indexes/{name}", tags=["retrieval"])
async def index_status(name: str, request: Request) -> dict[str, Any]:
    """How an index stands."""
    status = await indexes_of(context_of(request)).use(name, lambda index: index.status())
    row = asdict(status)
    del row["path"]  # where it lies is nobody's business
    return {"id": name, "object": "index", **row}


@router.get("/v1/indexes/{name}/documents", tags=["retrieval"])
async def documents(name: str, request: Request) -> dict[str, Any]:
    """The documents of an index."""
    rows = await indexes_of(context_of(request)).use(
        name, lambda index: [asdict(row) for row in index.documents()]
    )
    return {"object": "list", "data": rows}


@router.post(
    "/v1/indexes/{name}/documents",
    tags=["retrieval"],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": body_schema(AddTexts)},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "files": {
                                "type": "array",
                                "items": {"type": "string", "format": "binary"},
                            }
                        },
                    }
                },
            },
        }
    },
)
async def add_documents(name: str, request: Request) -> dict[str, Any]:
    """Add texts (JSON) or files (multipart, field `files`); durable once this has answered."""
    context = context_of(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _add_uploads(name, request, context)
    if kind != "application/json":
        raise ApiError(
            415,
            f"the body is {kind[:60]!r}; send application/json or multipart/form-data",
            code="unsupported_media_type",
        )
    body = await _parsed(request)
    _texts([document.text for document in body.documents], "documents", context)
    ids = [document.id or uuid.uuid4().hex for document in body.documents]
    stored = await indexes_of(context).use(
        name,
        lambda index: index.add_texts(
            [document.text for document in body.documents],
            ids,
            [document.metadata for document in body.documents],
        ),
    )
    return {"object": "list", "ids": stored, "added": len(stored)}


@router.delete("/v1/indexes/{name}/documents", tags=["retrieval"])
async def delete_documents(name: str, body: Delete, request: Request) -> dict[str, Any]:
    """Delete documents or passages by id; gone for good once this has answered."""
    found = await indexes_of(context_of(request)).use(name, lambda index: index.delete(body.ids))
    return {"object": "list", "deleted": found}


async def _parsed(request: Request) -> AddTexts:
    from pydantic import ValidationError

    try:
        return AddTexts.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "the body"
        raise ApiError(
            400,
            f"{place}: {first['msg'][:200].lower()}; correct the field",
            code="invalid_value",
            param=place,
        ) from None


async def _add_uploads(name: str, request: Request, context: Context) -> dict[str, Any]:
    most = context.options.limits.documents
    async with request.form(max_files=most, max_fields=100) as form:
        given = [item for item in form.getlist("files") if isinstance(item, UploadFile)]
        if not given:
            raise ApiError(
                400, "the form has no files; send them in fields named files", code="no_files"
            )
        files = [
            (upload_name(item.filename, place), await item.read())
            for place, item in enumerate(given)
        ]
    report: AddReport = await indexes_of(context).use(name, lambda index: add_files(index, files))
    return {"object": "index.report", **asdict(report)}


def _texts(texts: list[str], param: str, context: Context) -> list[str]:
    """The texts, if there are not too many.

    Raises:
        ApiError: 400 if there are none, 413 if there are too many.
    """
    most = context.options.limits.documents
    if not texts or not any(text.strip() for text in texts):
        raise ApiError(
            400, f"{param} holds no text; give at least one", code="invalid_value", param=param
        )
    if len(texts) > most:
        raise ApiError(
            413,
            f"{param} holds {len(texts)} texts, and the limit is {most}; send them in parts",
            code="too_many",
            param=param,
        )
    return texts
