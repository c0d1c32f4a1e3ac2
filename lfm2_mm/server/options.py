"""How the server is run: where it listens, who may call it, and its limits.

Imports no torch and no web framework, so that the command line can read it at start.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from lfm2_mm.errors import SettingError

__all__ = ["Limits", "ServerOptions", "is_loopback"]

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one caller may ask for.

    Attributes:
        body_bytes: Size of a request body.
        header_seconds: Time in which a whole body must have come, against slow senders.
        unread_seconds: A connection is cut when its caller reads nothing of what waits for so long.
        image_bytes: Size of one image, decoded from base64 or fetched.
        images: Images of one conversation.
        audio_bytes: Size of one recording.
        audio_seconds: Length of one recording.
        fetch_seconds: Time for one image to be fetched, redirects included.
        fetch_redirects: Hops of one fetch.
        max_tokens: Tokens of one answer.
        choices: Answers to one request (`n`).
        waiting: Requests that may wait for the model; further ones get 429.
        running: Requests that the model answers at once.
        cache_bytes: Kept by each model of prompts, pictures and recordings that it has computed:
            two thirds of states of the backbone, one third of what encoders made.
        seconds: Time a request may take in all, waiting included.
        documents: Texts of one embeddings, rerank or index request.
        sockets: Realtime conversations at once.
        idle_seconds: A realtime conversation ends when its client is silent for so long.
        frame_bytes: Size of one message of a realtime conversation.
    """

    body_bytes: int = 64 * _MIB
    header_seconds: float = 60.0
    unread_seconds: float = 10.0
    image_bytes: int = 32 * _MIB
    images: int = 32
    audio_bytes: int = 32 * _MIB
    audio_seconds: float = 3600.0
    fetch_seconds: float = 15.0
    fetch_redirects: int = 3
    max_tokens: int = 8192
    choices: int = 8
    waiting: int = 256
    running: int = 32
    cache_bytes: int = 768 * _MIB
    seconds: float = 600.0
    documents: int = 2048
    sockets: int = 8
    idle_seconds: float = 300.0
    frame_bytes: int = 4 * _MIB


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Everything `lfm2-mm serve` is told.

    Attributes:
        models: Names for `lfm2_mm.load`; the first is the default.
        indexes: Search indexes by the name they are served under: folders.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        api_key: What callers must send as a bearer token; None asks for nothing.
        hosts: Further values of the Host header that are accepted, beside those of this machine.
        origins: Further origins whose pages may call, beside the server's own.
        fetch_hosts: Hosts that pictures may be fetched from; empty allows every public one.
        fetch: Whether pictures are fetched from URLs at all.
        limits: What one caller may ask for.

    Raises:
        SettingError: if another address than this machine's own is asked for without a key.
    """

    models: tuple[str, ...] = ("nano-vl",)
    indexes: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    fetch_hosts: tuple[str, ...] = ()
    fetch: bool = True
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not self.models:
            raise SettingError("no model is named; give at least one, for instance nano-vl")
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.isprintable() and len(self.api_key) >= 8
        ):
            raise SettingError(
                f"the API key has {len(self.api_key)} characters or some that headers cannot "
                "carry; use at least 8 printable ASCII characters"
            )
        if self.api_key is None and not is_loopback(self.host):
            raise SettingError(
                f"the address {self.host} can be reached from other machines; give --api-key (or "
                "LFM2_MM_API_KEY), or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
