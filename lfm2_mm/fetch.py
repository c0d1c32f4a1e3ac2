"""The bytes behind an http(s) or data URL, with a size cap, a deadline and one-sentence errors.

It knows nothing of what the bytes mean. Redirects are followed here, hop by hop, through a client
that the caller may supply: a server that must not reach private addresses hands in its own.
"""

from __future__ import annotations

import base64
import binascii
import re
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from lfm2_mm.errors import FetchError

if TYPE_CHECKING:
    import httpx2

__all__ = ["MAX_REDIRECTS", "fetch", "is_url", "shown"]

MAX_REDIRECTS = 5
_HEADERS = {"User-Agent": "lfm2-mm", "Accept": "*/*", "Accept-Encoding": "identity"}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://|(data):", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether the text starts like a URL of any scheme (`https://…`, `data:…`), not like a path."""
    return _SCHEME.match(text) is not None


def shown(url: str, width: int = 120) -> str:
    """The URL as messages name it: no user name, password, query or data, never very long."""
    if url[:5].lower() == "data:":
        return f"the data URL {_clip(url.partition(',')[0], 40)},…"
    try:
        parts = urlsplit(url)
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
        return _clip(plain.geturl(), width)
    except ValueError:
        return _clip(url, width)


def fetch(
    url: str,
    *,
    max_bytes: int = 64 * 1024 * 1024,
    timeout: float = 30.0,
    client: httpx2.Client | None = None,
) -> bytes:
    """Read what a URL points at.

    Args:
        url: `http://…`, `https://…` or `data:[type][;base64],…`.
        max_bytes: The most bytes that are accepted; reading stops at the first byte beyond.
        timeout: Seconds for the whole transfer, redirects included.
        client: Sends the requests; by default a fresh one per call. Its own redirect setting is
            not used: each hop is a request of its own, so its transport sees every address.

    Raises:
        FetchError: if the scheme is not supported, the host cannot be found or reached, the
            answer is not a success, there are over five redirects, or a limit is passed.
    """
    import httpx2

    if url[:5].lower() == "data:":
        return _decode_data_url(url, max_bytes)
    if client is not None:
        return _follow(url, client, max_bytes, timeout)
    with httpx2.Client() as own:
        return _follow(url, own, max_bytes, timeout)


def _follow(url: str, client: httpx2.Client, max_bytes: int, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    here = url
    for _ in range(MAX_REDIRECTS + 1):
        _check_address(here)
        body, onward = _request(here, client, max_bytes, deadline, timeout)
        if onward is None:
            return body
        here = urljoin(here, onward)
    raise FetchError(
        f"{shown(url)} redirects more than {MAX_REDIRECTS} times; "
        "open it in a browser and use the address it ends at"
    )


def _request(
    url: str, client: httpx2.Client, max_bytes: int, deadline: float, timeout: float
) -> tuple[bytes, str | None]:
    """One hop: the body, or where the server says to go on."""
    import httpx2

    late = f"{shown(url)} did not answer in full within {timeout:g} seconds; try again later"
    left = deadline - time.monotonic()
    if left <= 0:
        raise FetchError(late)
    try:
        with client.stream(
            "GET", url, headers=_HEADERS, timeout=left, follow_redirects=False
        ) as answer:
            if answer.has_redirect_location:
                return b"", answer.headers["location"]
            if not answer.is_success:
                code, reason = answer.status_code, answer.reason_phrase
                raise FetchError(
                    f"{shown(url)} answered {code} {reason}".rstrip() + f"; {_advice(code)}"
                )
            announced = answer.headers.get("content-length", "")
            if announced.isdecimal() and int(announced) > max_bytes:
                raise FetchError(_too_large(shown(url), int(announced), max_bytes))
            body = bytearray()
            for piece in answer.iter_bytes(65536):
                body += piece
                if len(body) > max_bytes:
                    raise FetchError(_too_large(shown(url), None, max_bytes))
                if time.monotonic() > deadline:
                    raise FetchError(late)
            return bytes(body), None
    except httpx2.TimeoutException as error:
        raise FetchError(late) from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
        raise FetchError(f"{shown(url)} is not a valid address; check its spelling") from error
    except httpx2.HTTPError as error:
        host = urlsplit(url).hostname
        if _has_cause(error, socket.gaierror):
            raise FetchError(
                f"no host named {host!r} was found for {shown(url)}; "
                "check the spelling and the network"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FetchError(
            f"{shown(url)} could not be fetched ({_clip(reason, 120)}); "
            f"check that {host} can be reached from here"
        ) from error


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        scheme, host, _ = parts.scheme, parts.hostname, parts.port  # each may be malformed
    except ValueError as error:
        raise FetchError(f"{shown(url)} is not a valid address; check its spelling") from error
    if scheme not in {"http", "https"}:
        raise FetchError(
            f"{shown(url)} has the scheme {scheme!r}, which is not fetched; "
            "give an http, https or data URL, or the path of a file"
        )
    if not host:
        raise FetchError(f"{shown(url)} names no host; write it as https://host/path")


def _advice(status: int) -> str:
    if status in {401, 403}:
        return "it may need a login, so download it yourself and give the file"
    if status in {404, 410}:
        return "check the address"
    return "try again later" if status == 429 or status >= 500 else "check the address"


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    """The payload of a data URL (RFC 2397), base64 or percent-encoded."""
    head, comma, payload = url.partition(",")
    if not comma:
        raise FetchError(
            f"{shown(url)} has no comma before its data; "
            "write it as data:image/png;base64,… with the encoded bytes"
        )
    if len(payload) > 4 * max_bytes:  # percent-encoded base64 at its longest
        raise FetchError(_too_large(shown(url), None, max_bytes))
    data = unquote_to_bytes(payload)
    if head.lower().rstrip().endswith(";base64"):
        packed = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
        try:
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error as error:
            raise FetchError(
                f"{shown(url)} does not hold valid base64 ({error}); encode the bytes again"
            ) from error
    if len(data) > max_bytes:
        raise FetchError(_too_large(shown(url), len(data), max_bytes))
    return data


def _too_large(name: str, size: int | None, limit: int) -> str:
    seen = "more than the limit" if size is None else f"{size:,} bytes, over the limit"
    return f"{name} holds {seen} of {limit:,} bytes; use a smaller file or raise the limit"


def _has_cause(error: BaseException, kind: type[BaseException]) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kind):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _clip(text: str, width: int) -> str:
    safe = "".join(c if c.isprintable() else "?" for c in text)
    return safe if len(safe) <= width else safe[: width - 1] + "…"
