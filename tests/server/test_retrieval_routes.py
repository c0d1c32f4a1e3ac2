"""Embeddings, reranking, search and uploads over HTTP, on the embedded retriever."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from lfm2_mm.loading import load
from lfm2_mm.server import Limits, ServerOptions
from lfm2_retrieval import Index
from tests.server.running import running

TEXTS = ["Delete the selected file", "Open a new window", "The password is wrong"]
GERMAN = "Datei löschen"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served") / "notes.idx"
    encoder = load("nano-colbert")
    with Index.open(folder, encoder) as index:
        index.add_texts(TEXTS, ids=["delete", "open", "password"])
    options = ServerOptions(
        models=("nano-colbert",),
        indexes={"notes": str(folder), "fresh": str(folder.parent / "fresh.idx")},
        limits=Limits(documents=20),
    )
    with running(options, load=lambda name: encoder) as url:
        yield url


def post(base: str, path: str, body: Any) -> Any:
    answer = httpx2.post(base + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(base: str, path: str, body: Any, status: int, text: str) -> None:
    answer = httpx2.post(base + path, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]["message"]


def test_multi_vector_embeddings_equal_the_encoders(base: str) -> None:
    found = post(base, "/v1/embeddings", {"input": TEXTS, "model": "nano-colbert"})
    wanted = load("nano-colbert").encode_documents(TEXTS)
    assert [row["object"] for row in found["data"]] == ["multi_embedding"] * 3
    for row, rows in zip(found["data"], wanted, strict=True):
        np.testing.assert_allclose(row["embedding"], rows.numpy(), atol=1e-6)
    query = post(base, "/v1/embeddings", {"input": GERMAN, "input_type": "query"})
    assert len(query["data"]) == 1
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        same = client.embeddings.create(model="nano-colbert", input=TEXTS)
        assert len(same.data) == 3 and same.usage.total_tokens == found["usage"]["total_tokens"]


def test_dense_embeddings_in_both_encodings(tmp_path: Path) -> None:
    from tests.retrieval import colbert_checkpoints

    colbert_checkpoints.write(tmp_path / "dense", "embedding")
    encoder = load(tmp_path / "dense")
    with (
        running(ServerOptions(models=("tiny",)), load=lambda name: encoder) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        wanted = encoder.encode_documents(["hello"])[0][0].numpy()
        for encoding in ("float", "base64"):
            found = (
                client.embeddings.create(model="tiny", input="hello", encoding_format=encoding)
                .data[0]
                .embedding
            )
            if isinstance(found, str):
                found = np.frombuffer(base64.b64decode(found), dtype=np.float32).tolist()
            np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank(base: str, path: str) -> None:
    body = {"query": GERMAN, "documents": [*TEXTS[1:], {"text": TEXTS[0]}], "top_n": 2}
    found = post(base, path, {**body, "return_documents": True})["results"]
    assert found[0]["index"] == 2 and found[0]["document"] == {"text": TEXTS[0]}
    assert len(found) == 2 and found[0]["relevance_score"] > found[1]["relevance_score"]


def test_search(base: str) -> None:
    hits = post(base, "/v1/search", {"index": "notes", "query": GERMAN, "k": 2})["data"]
    assert [hit["id"] for hit in hits][0] == "delete#0" and len(hits) == 2
    assert hits[0]["text"] == TEXTS[0] and hits[0]["spans"]


def test_documents_come_and_go(base: str) -> None:
    body = {"documents": [{"id": "tea", "text": "How to make tea", "metadata": {"year": 2026}}]}
    where = "/v1/indexes/fresh/documents"
    assert post(base, where, body)["ids"] == ["tea"]
    query = {"index": "fresh", "query": "tea", "filter": {"year": 2026}}
    assert [hit["id"] for hit in post(base, "/v1/search", query)["data"]] == ["tea#0"]
    rows = httpx2.get(base + where).json()["data"]
    assert [row["id"] for row in rows] == ["tea"] and rows[0]["metadata"] == {"year": 2026}
    status = httpx2.get(f"{base}/v1/indexes/fresh").json()
    assert status["documents"] == 1 and "path" not in status
    gone = httpx2.request("DELETE", base + where, json={"ids": ["tea", "other"]})
    assert gone.json()["deleted"] == 1
    assert post(base, "/v1/search", {"index": "fresh", "query": "tea"})["data"] == []


def test_files_are_uploaded_under_their_own_names(base: str) -> None:
    where = f"{base}/v1/indexes/fresh/documents"
    files = [
        ("files", ("notes/tea.md", b"# Tea\n\nPour hot water over the leaves.", "text/markdown")),
        ("files", ("broken.pdf", b"%PDF-1.4 nothing", "application/pdf")),
    ]
    report = httpx2.post(where, files=files, timeout=60).json()
    assert report["added"] == 1
    assert [one["path"] for one in report["skipped"]] == ["broken.pdf"]
    again = httpx2.post(where, files=files[:1], timeout=60).json()
    assert (again["added"], again["unchanged"]) == (0, 1)
    hits = post(base, "/v1/search", {"index": "fresh", "query": "hot water"})["data"]
    assert hits[0]["path"] == "notes/tea.md" and hits[0]["line"] == 1


@pytest.mark.parametrize("name", ["../evil.md", "a/../../evil.md", ".hidden", ""])
def test_names_that_leave_the_folder(base: str, name: str) -> None:
    where = f"{base}/v1/indexes/fresh/documents"
    answer = httpx2.post(where, files=[("files", (name, b"text", "text/plain"))])
    assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/v1/search", {"query": "x"}, 404, "there is no index 'None' here; this server has"),
        ("/v1/search", {"query": "x", "index": "no"}, 404, "there is no index 'no' here"),
        ("/v1/search", {"query": " ", "index": "notes"}, 422, "the query is ' '; write what"),
        ("/v1/search", {"query": "x", "index": "notes", "k": 0}, 400, "k: input should be"),
        (
            "/v1/search",
            {"query": "x", "index": "notes", "filter": {"year": {"~": 1}}},
            400,
            "year",
        ),
        ("/v1/embeddings", {"input": []}, 400, "input holds no text"),
        ("/v1/embeddings", {"input": "x", "model": "no"}, 404, "there is no model 'no' here"),
        ("/v1/embeddings", {"input": "x", "dimensions": 5}, 400, "dimensions is 5, and vectors"),
        ("/v1/embeddings", {"input": ["x"] * 21}, 413, "input holds 21 texts, and the limit is 20"),
        ("/v1/rerank", {"query": "x", "documents": [{"a": 1}]}, 400, "documents[0] has no text"),
        ("/v1/indexes/fresh/documents", {"documents": []}, 400, "documents: list should have"),
        ("/v1/indexes/no/documents", {"documents": [{"text": "x"}]}, 404, "there is no index 'no'"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}]},
            404,
            "no model of this server does chat",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    base: str, path: str, body: Any, status: int, text: str
) -> None:
    refused(base, path, body, status, text)


def test_another_media_type(base: str) -> None:
    answer = httpx2.post(f"{base}/v1/indexes/fresh/documents", content=b"x")
    assert answer.status_code == 415


def test_without_an_index_there_is_a_scratch_one() -> None:
    encoder = load("nano-colbert")
    with running(ServerOptions(models=("nano-colbert",)), load=lambda name: encoder) as url:
        names = httpx2.get(f"{url}/v1/indexes").json()["data"]
        assert [row["id"] for row in names] == ["scratch"]
        post(url, "/v1/indexes/scratch/documents", {"documents": [{"text": TEXTS[0]}]})
        assert post(url, "/v1/search", {"query": GERMAN})["data"][0]["text"] == TEXTS[0]
