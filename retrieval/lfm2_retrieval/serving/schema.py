"""The bodies of the retrieval routes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AddTexts",
    "Delete",
    "EmbeddingsRequest",
    "NewText",
    "RerankRequest",
    "SearchRequest",
    "body_schema",
]


class EmbeddingsRequest(BaseModel):
    """Texts to be embedded. `input_type` is an extension: retrievers treat the two differently."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: str | list[str]
    model: str | None = None
    input_type: Literal["query", "document"] = "document"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class RerankRequest(BaseModel):
    """Passages to be sorted by how well they answer a query; the form of Jina and Cohere."""

    model_config = ConfigDict(extra="ignore", strict=True)

    query: str = Field(min_length=1)
    documents: list[str | dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class SearchRequest(BaseModel):
    """A question to an index."""

    model_config = ConfigDict(extra="ignore", strict=True)

    query: str = Field(min_length=1, max_length=20_000)
    index: str | None = None
    k: int = Field(10, ge=1, le=1000)
    filter: dict[str, Any] | str | None = None
    hybrid: bool | None = None
    exact: bool = False


class NewText(BaseModel):
    """A text to be indexed; the same id again replaces."""

    text: str = Field(min_length=1)
    id: str | None = Field(None, min_length=1, max_length=512)
    metadata: dict[str, str | int | float | bool] = Field(default_factory=dict)


class AddTexts(BaseModel):
    """Texts to be indexed."""

    documents: list[NewText] = Field(min_length=1)


class Delete(BaseModel):
    """Documents or passages to be deleted."""

    ids: list[str] = Field(min_length=1, max_length=10_000)


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body for a place in an OpenAPI document: nothing in it refers elsewhere.

    Args:
        model: Whose definitions do not hold themselves.
    """
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return whole(parts[value["$ref"].rpartition("/")[2]])
            return {name: whole(one) for name, one in value.items()}
        return [whole(one) for one in value] if isinstance(value, list) else value

    found: dict[str, Any] = whole(schema)
    return found
