"""The page as the server hands it out: whole, its own, and of nobody else's making."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import httpx2
import pytest

from lfm2_mm.server import ServerOptions
from tests.server.running import running

STATIC = files("lfm2_mm.web").joinpath("static")
NAMES = sorted(item.name for item in STATIC.iterdir() if item.is_file())
FRIEND = "https://friend.example"


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    options = ServerOptions(models=("none",), api_key="a-key-for-tests", origins=(FRIEND,))
    with running(options, load=lambda name: object(), ready=True) as url:
        yield url


def test_the_page_needs_no_key_and_allows_no_stranger(base: str) -> None:
    answer = httpx2.get(base)
    assert answer.status_code == 200
    assert "<picture-room" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_served_and_points_nowhere_else(base: str, name: str) -> None:
    answer = httpx2.get(f"{base}/static/{name}")
    assert answer.status_code == 200
    text = answer.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", re.sub(r"// .*", "", text))
    assert "innerHTML" not in text and "eval(" not in text
    for found in re.findall(r"""["'](?:/static/|\./)([\w.-]+\.(?:js|css|svg))["']""", text):
        assert found in NAMES
    if name.endswith(".html"):
        assert not re.search(r"<script(?![^>]*src=)|style=|\son\w+=", text)


def test_nothing_beside_the_page_is_served(base: str) -> None:
    for path in ("/static/../__init__.py", "/static/%2e%2e/__init__.py", "/static/", "/static"):
        assert httpx2.get(base + path).status_code in (401, 404)


def test_a_friend_may_call_from_its_pages(base: str) -> None:
    asked = {
        "origin": FRIEND,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    answer = httpx2.request("OPTIONS", f"{base}/v1/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == FRIEND
    refused = httpx2.get(f"{base}/v1/models", headers={"origin": FRIEND})
    assert refused.status_code == 401
    key = {"origin": FRIEND, "authorization": "Bearer a-key-for-tests"}
    allowed = httpx2.get(f"{base}/v1/models", headers=key)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == FRIEND
