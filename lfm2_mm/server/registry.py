"""The models a server offers: loaded one after the other at start, found by the name callers use.

Knows `load` and the worker; nothing of what a model is for, beyond its methods.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lfm2_mm.model import Model
from lfm2_mm.server.options import ServerOptions
from lfm2_mm.server.problems import ApiError
from lfm2_mm.server.worker import Worker

__all__ = ["Registry", "Served"]

log = logging.getLogger("lfm2_mm.server")
_T = TypeVar("_T")


@dataclass(eq=False)
class Served:
    """One model as it is offered.

    Attributes:
        id: What callers call it; never a path of this machine.
        name: What `load` was given.
        model: What `load` returned, once it is there.
        state: Where it stands.
        problem: Why it failed, for the log.
        created: Unix time at which the server began to load it.
    """

    id: str
    name: str
    model: Any = None
    state: Literal["loading", "ready", "failed"] = "loading"
    problem: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def abilities(self) -> tuple[str, ...]:
        """What may be asked of it, as words of `/v1/models`."""
        model = self.model
        found = []
        if isinstance(model, Model):
            found.append("chat")
            found += sorted({"image", "audio"} & set(model.encoders))
        for method, word in (
            ("transcribe", "transcription"),
            ("speak", "speech"),
            ("converse", "realtime"),
            ("encode_documents", "embeddings"),
        ):
            if hasattr(model, method):
                found.append(word)
        return tuple(found)

    async def prepare(self, work: Callable[[], _T]) -> _T:
        """Run what gets a request ready in a thread of its own, one at a time for this model."""
        async with self._turn:
            running = asyncio.ensure_future(asyncio.to_thread(work))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:  # a thread cannot be stopped: it keeps its turn
                await asyncio.gather(running, return_exceptions=True)
                raise


class Registry:
    """All models of a server.

    Args:
        options: Which ones.
        worker: Who loads them.
        load: Name to model; another one only in tests.
    """

    def __init__(
        self, options: ServerOptions, worker: Worker, load: Callable[[str], Any] | None = None
    ) -> None:
        self._worker = worker
        self._load = load if load is not None else _load
        self._limits = options.limits
        self.served: dict[str, Served] = {}
        for name in options.models:
            label = _label(name)
            if label in self.served:
                label = f"{label}-{len(self.served) + 1}"
            self.served[label] = Served(label, name)

    async def load_all(self) -> None:
        """Load every model, and let each say a word so that the first caller does not wait."""
        for served in self.served.values():
            try:
                served.model = await self._worker.run(
                    functools.partial(self._ready, served), guarded=False
                )
                served.state = "ready"
                log.info("%s is ready", served.id)
            except Exception as problem:
                served.state, served.problem = "failed", str(problem)
                log.error("%s cannot be served: %s", served.id, problem)
        # what lives as long as the server is left alone from now on: else a full collection waits
        # for a quarter as many new objects, and errors keep requests and pictures until then
        gc.collect()
        gc.freeze()

    def _ready(self, served: Served) -> Any:
        model = self._load(served.name)
        if isinstance(model, Model):
            model.engine.max_running = self._limits.running
            model.engine.features.max_bytes = self._limits.cache_bytes // 3
            model.engine.prefixes.max_bytes = self._limits.cache_bytes * 2 // 3
            model.engine.prefill_chunk = 512  # so that those who stream wait for no long prompt
            prompt = model.prompt([{"role": "user", "content": "Hello"}])
            model.generate(prompt, max_tokens=2, reuse=False).answer  # noqa: B018
        elif hasattr(model, "encode_queries"):
            model.encode_queries(["hello"])
        return model

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        """Ready once every model is, or once what failed is known and something else is there."""
        states = {served.state for served in self.served.values()}
        if "loading" in states:
            return "loading"
        return "ready" if "ready" in states else "failed"

    def find(self, name: str | None, ability: str) -> Served:
        """The model of this name, or the first that can do it where no name is given.

        Raises:
            ApiError: 404 if there is none, 400 if it cannot do this, 503 while it is loading.
        """
        if name is None:
            able = [s for s in self.served.values() if ability in s.abilities]
            waiting = [s for s in self.served.values() if s.state == "loading"]
            if not able and not waiting:
                raise ApiError(
                    404,
                    f"no model of this server does {ability}; it offers {self._names()}",
                    code="model_not_found",
                    param="model",
                )
            served = (able or waiting)[0]
        elif name in self.served:
            served = self.served[name]
        else:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; this server offers {self._names()}",
                code="model_not_found",
                param="model",
            )
        if served.state == "loading":
            raise ApiError(
                503,
                f"{served.id} is still loading; try again in a moment",
                code="loading",
                retry_after=5,
            )
        if served.state == "failed":
            raise ApiError(
                503, f"{served.id} could not be loaded; the server's log says why", code="failed"
            )
        if ability not in served.abilities:
            raise ApiError(
                400,
                f"{served.id} does not do {ability}; it does {', '.join(served.abilities)}",
                code="unsupported",
                param="model",
            )
        return served

    def _names(self) -> str:
        return ", ".join(self.served)


def _load(name: str) -> Any:
    from lfm2_mm.loading import load

    return load(name)


def _label(name: str) -> str:
    """A Hub id or embedded name as it is; of a folder its own name only."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() or name.startswith((".", "/", "~")) else name
