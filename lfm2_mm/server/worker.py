"""The one thread that runs models: requests of all callers join the engines' batches here.

The event loop hands in requests and jobs and never waits for a step. Between two steps at most one
job runs, so that whoever streams goes on streaming; guests, such as voice conversations, do a part
of their work in every cycle. Knows engines and handles; no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from lfm2_mm.engine import Engine
from lfm2_mm.events import Done, Error, Event
from lfm2_mm.request import Handle, Request
from lfm2_mm.server.options import Limits
from lfm2_mm.server.problems import ApiError

__all__ = ["Guest", "Ticket", "Worker"]

log = logging.getLogger("lfm2_mm.server")
_T = TypeVar("_T")

Guest = Callable[[], Engine | bool]
"""Does a short part of its work. Returns an engine that must step before it can go on; True if it
has more to do; False if it has nothing to do until somebody calls `Worker.nudge`."""


class Ticket:
    """One request on its way: iterate it for events; close or drop it to cancel.

    Attributes:
        begun: Done once the engine has taken the request; its result is what it was refused with,
            or None.
        done: The last event, once it was read.
        late: Whether the request's time was up before it ended.
    """

    def __init__(self, engine: Engine, handle_of: Callable[[], Handle], until: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.engine, self._open, self._until = engine, handle_of, until
        self._handle: Handle | None = None
        self._cancelled = False
        self.begun: asyncio.Future[Exception | None] = self._loop.create_future()
        self.done: Done | None = None
        self.late = False

    def cancel(self) -> None:
        """Ask for the end; from any thread."""
        self._cancelled = True
        if self._handle is not None:
            self._handle.cancel()

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Error):
                    raise event.exception
                if isinstance(event, Done):
                    self.done = event
                    if self.late and event.usage.completion_tokens == 0:
                        raise ApiError(
                            503,
                            "the model was too busy to begin this answer in time; try again later",
                            code="timeout",
                            retry_after=5,
                        )
                    yield event
                    return
                yield event
        finally:
            self.cancel()

    # -- the worker's side ----------------------------------------------------------------------

    def begin(self) -> bool:
        """Hand the request to its engine; False if that was refused or no longer wanted."""
        try:
            self._handle = self._open()
        except Exception as problem:
            self._tell([Error(problem)], problem)
            return False
        if self._cancelled:
            self._handle.cancel()
        self._tell([])
        return True

    def deliver(self) -> bool:
        """Pass on what there is; False after the last event."""
        handle = self._handle
        assert handle is not None
        if not self.late and time.monotonic() > self._until:
            self.late = True
            handle.cancel()
        if events := handle.drain():
            self._tell(events)
        return not handle.ended

    def fail(self, problem: Exception) -> None:
        """End it with a problem that is not of its own making."""
        self.cancel()
        self._tell([Error(problem)])

    def _tell(self, events: list[Event], problem: Exception | None = None) -> None:
        def put() -> None:
            if not self.begun.done():
                self.begun.set_result(problem)
            for event in events:
                self._events.put_nowait(event)

        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is gone, and with it whoever would read
            self.cancel()


class Worker:
    """Runs requests and jobs, one step at a time.

    Args:
        limits: How many may wait and run.

    Attributes:
        steps: Steps made so far.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.steps = 0
        self._inbox: deque[Ticket] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._tickets: list[Ticket] = []
        self._guests: list[Guest] = []
        self._nudged = False
        self._open = 0  # requests and jobs that were let in and have not ended
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="lfm2-worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """Finish what was begun, for so long at most; then break off."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(seconds)
        for ticket in [*self._tickets, *self._inbox]:
            ticket.cancel()
        self._thread.join(5)

    @property
    def running(self) -> int:
        """Requests handed to the engines."""
        return len(self._tickets)

    @property
    def waiting(self) -> int:
        """Requests and jobs not begun yet."""
        return max(0, self._open - len(self._tickets))

    @property
    def load(self) -> int:
        """Requests and jobs under way or waiting."""
        return self._open

    def submit(self, engine: Engine, request: Request, seconds: float | None = None) -> Ticket:
        """Queue a request; call it on the event loop.

        Raises:
            ApiError: 429 if too many wait, 503 if the server is closing.
        """
        return self.queue(engine, lambda: engine.submit(request), seconds)

    def queue(
        self, engine: Engine, handle_of: Callable[[], Handle], seconds: float | None = None
    ) -> Ticket:
        """Queue whatever gives a handle of this engine; `handle_of` runs in the worker."""
        self._admit()
        until = time.monotonic() + min(seconds or self.limits.seconds, self.limits.seconds)
        ticket = Ticket(engine, handle_of, until)
        with self._wake:
            self._inbox.append(ticket)
            self._open += 1
            self._wake.notify()
        return ticket

    async def run(self, job: Callable[[], _T], *, guarded: bool = True) -> _T:
        """Run a job between two steps and return what it returns.

        Args:
            job: Runs in the worker's thread.
            guarded: False lets it in however many wait (what the server itself wants done).

        Raises:
            ApiError: 429 if too many wait, 503 if the server is closing.
        """
        if guarded:
            self._admit()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def settle(setter: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                setter(value)

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = job()
            except BaseException as problem:
                loop.call_soon_threadsafe(settle, future.set_exception, problem)
            else:
                loop.call_soon_threadsafe(settle, future.set_result, result)

        with self._wake:
            self._jobs.append(work)
            self._open += 1
            self._wake.notify()
        return await future

    def invite(self, guest: Guest) -> None:
        """Call it in every cycle from now on, in the worker's thread."""
        with self._wake:
            self._guests.append(guest)
            self._nudged = True
            self._wake.notify()

    def dismiss(self, guest: Guest) -> None:
        """Call it no more; a call that is on is not waited for."""
        with self._wake:
            if guest in self._guests:
                self._guests.remove(guest)

    def invited(self, guest: Guest) -> bool:
        """Whether it is still called; one that failed is not."""
        with self._wake:
            return guest in self._guests

    def nudge(self) -> None:
        """Guests may have something to do; from any thread, and never waits for a step."""
        with self._wake:
            self._nudged = True
            self._wake.notify()

    def _admit(self) -> None:
        if self._closing:
            raise ApiError(503, "the server is shutting down; try another one", code="closing")
        if self.load >= self.limits.waiting + self.limits.running:
            raise ApiError(
                429,
                f"{self.load} requests are already waiting for the model; try again in a moment",
                code="queue_full",
                retry_after=2,
            )

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (
                    self._inbox or self._jobs or self._tickets or self._closing or self._nudged
                ):
                    self._wake.wait()
                if self._closing and not (self._inbox or self._jobs or self._tickets):
                    return
            self._cycle()

    def _cycle(self) -> None:
        """What is due now; keeps nothing of it, so that what ended is let go while all wait."""
        with self._wake:
            fresh = [self._inbox.popleft() for _ in range(len(self._inbox))]
            job = self._jobs.popleft() if self._jobs else None
            guests, self._nudged = list(self._guests), False
        self._tickets += [ticket for ticket in fresh if self._still(ticket.begin())]
        if job is not None:
            job()
            self._still(False)
        engines = [ticket.engine for ticket in self._tickets]
        waiting: list[tuple[Guest, Engine]] = []
        for guest in guests:
            wants = self._call(guest)
            if wants is not False:
                self._nudged = True  # this one needs another cycle
            if not isinstance(wants, bool):
                engines.append(wants)
                waiting.append((guest, wants))
        for engine in {id(engine): engine for engine in engines}.values():
            self._step(engine, [guest for guest, wants in waiting if wants is engine])
        self._tickets = [ticket for ticket in self._tickets if self._still(ticket.deliver())]

    def _step(self, engine: Engine, guests: list[Guest]) -> None:
        """One step; one that fails ends what this engine was doing, and nothing else."""
        try:
            engine.step()
        except Exception as problem:
            log.exception("a step failed; the requests and guests that shared it are ended")
            mine = [ticket for ticket in self._tickets if ticket.engine is engine]
            self._tickets = [ticket for ticket in self._tickets if ticket.engine is not engine]
            for ticket in mine:
                ticket.fail(problem)
                self._still(False)
            for guest in guests:
                self.dismiss(guest)
        self.steps += 1

    def _call(self, guest: Guest) -> Engine | bool:
        try:
            return guest()
        except Exception:
            log.exception("a guest failed and is sent away")
            self.dismiss(guest)
            return False

    def _still(self, going: bool) -> bool:
        """Count what ended; says whether it did not."""
        if not going:
            with self._wake:
                self._open -= 1
        return going
