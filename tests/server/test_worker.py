"""The worker: limits, deadlines, jobs between steps, and how it ends."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any, cast

import pytest

from lfm2_mm.engine import Engine
from lfm2_mm.events import Done, TextDelta, Timings, Usage
from lfm2_mm.request import Handle, Request
from lfm2_mm.server.options import Limits
from lfm2_mm.server.problems import ApiError
from lfm2_mm.server.worker import Ticket, Worker


class Letters:
    """An engine that gives each request one letter a step."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.handles: list[tuple[Handle, list[str]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def submit(self, request: Request) -> Handle:
        handle = Handle(self, cast(Any, None))
        self.handles.append((handle, []))
        return handle

    def step(self) -> bool:
        self.gate.wait(5)
        for handle, letters in self.handles:
            if handle.ended:
                continue
            if handle.cancelled or len(letters) == self.length:
                reason = cast(Any, "cancelled" if handle.cancelled else "stop")
                usage = Usage(completion_tokens=len(letters))
                handle.put(Done(reason, usage, Timings()))
            elif self.length >= 0:
                letters.append("x")
                handle.put(TextDelta("x"))
        return True

    def sweep(self) -> None:
        pass


async def text_of(ticket: Ticket) -> str:
    return "".join([event.text async for event in ticket if isinstance(event, TextDelta)])


def submit(worker: Worker, engine: Letters, seconds: float | None = None) -> Ticket:
    return worker.submit(cast(Engine, engine), cast(Request, None), seconds)


def run(work: Any, limits: Limits | None = None) -> Any:
    async def whole() -> Any:
        worker = Worker(limits if limits is not None else Limits())
        worker.start()
        try:
            return await asyncio.wait_for(work(worker), 20)
        finally:
            await asyncio.to_thread(worker.stop, 5)

    return asyncio.run(whole())


def test_several_requests_share_the_steps() -> None:
    async def work(worker: Worker) -> None:
        engine = Letters(5)
        found = await asyncio.gather(*(text_of(submit(worker, engine)) for _ in range(4)))
        assert found == ["xxxxx"] * 4
        assert worker.steps < 20

    run(work)


def test_a_full_queue_is_said_with_a_time_to_come_back() -> None:
    async def work(worker: Worker) -> None:
        engine = Letters(5)
        engine.gate.clear()
        tickets = [submit(worker, engine) for _ in range(3)]
        with pytest.raises(ApiError, match="3 requests are already waiting") as caught:
            submit(worker, engine)
        assert (caught.value.status, caught.value.retry_after) == (429, 2)
        engine.gate.set()
        assert await asyncio.gather(*map(text_of, tickets)) == ["xxxxx"] * 3
        assert await text_of(submit(worker, engine)) == "xxxxx"

    run(work, Limits(waiting=2, running=1))


def test_a_request_that_is_late_ends_with_what_it_has() -> None:
    async def work(worker: Worker) -> None:
        ticket = submit(worker, Letters(10**9), seconds=0.2)
        text = await text_of(ticket)
        assert text and ticket.late
        assert ticket.done is not None and ticket.done.finish_reason == "cancelled"

    run(work)


def test_a_request_that_never_began_is_refused() -> None:
    async def work(worker: Worker) -> None:
        engine = Letters(-1)  # gives nothing, never ends
        ticket = submit(worker, engine, seconds=-1)
        with pytest.raises(ApiError, match="the model was too busy to begin this answer in time"):
            await text_of(ticket)

    run(work)


def test_closing_a_ticket_cancels_it() -> None:
    async def work(worker: Worker) -> None:
        ticket = submit(worker, Letters(10**9))
        async for _ in ticket:
            break
        ticket.cancel()
        for _ in range(200):
            if worker.running == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it still runs")

    run(work)


def test_jobs_run_between_steps_and_their_errors_come_back() -> None:
    async def work(worker: Worker) -> None:
        ticket = submit(worker, Letters(10**9))
        assert await worker.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        ticket.cancel()

    run(work)


def test_what_was_begun_is_finished_at_the_end_and_nothing_new_begins() -> None:
    async def work(worker: Worker) -> None:
        engine = Letters(50)
        engine.gate.clear()
        reading = asyncio.ensure_future(text_of(submit(worker, engine)))
        await asyncio.sleep(0.05)
        stopping = asyncio.ensure_future(asyncio.to_thread(worker.stop, 10))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="the server is shutting down"):
            submit(worker, engine)
        engine.gate.set()
        assert await reading == "x" * 50
        await stopping

    run(work)


# --- guests ------------------------------------------------------------------------------------


async def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


def test_a_guest_is_called_when_it_is_nudged_and_not_before() -> None:
    async def work(worker: Worker) -> None:
        calls: list[str] = []

        def guest() -> bool:
            calls.append(threading.current_thread().name)
            return len(calls) in (1, 2)  # has more to do, twice

        worker.invite(guest)
        await until(lambda: len(calls) == 3)
        await asyncio.sleep(0.05)
        assert calls == ["lfm2-worker"] * 3
        worker.nudge()
        await until(lambda: len(calls) == 4)
        worker.dismiss(guest)
        worker.nudge()
        await asyncio.sleep(0.05)
        assert len(calls) == 4

    run(work)


def test_an_engine_that_a_guest_waits_for_steps_once_a_cycle_for_all() -> None:
    async def work(worker: Worker) -> None:
        engine = Letters(10)
        mine = engine.submit(cast(Request, None))
        seen: list[int] = []

        def guest() -> Any:
            seen.append(len(mine.drain()))
            return False if mine.ended else cast(Engine, engine)

        ticket = submit(worker, engine)
        worker.invite(guest)
        assert await text_of(ticket) == "x" * 10
        await until(lambda: mine.ended)
        assert max(seen) <= 2 and worker.steps <= 13  # ten letters and the end; begun apart

    run(work)


def test_guests_and_requests_take_turns() -> None:
    async def work(worker: Worker) -> None:
        calls: list[int] = []

        def guest() -> bool:
            calls.append(worker.steps)
            return True  # never has enough

        worker.invite(guest)
        assert await text_of(submit(worker, Letters(30))) == "x" * 30
        assert await worker.run(lambda: 7) == 7
        assert len(calls) >= 30
        worker.dismiss(guest)

    run(work)


def test_a_guest_that_fails_is_sent_away_and_the_others_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(worker: Worker) -> None:
        calls: list[int] = []

        def broken() -> bool:
            raise ZeroDivisionError

        def sound() -> bool:
            calls.append(1)
            return False

        worker.invite(broken)
        worker.invite(sound)
        await until(lambda: calls)
        n = len(calls)
        worker.nudge()
        await until(lambda: len(calls) > n)
        assert await text_of(submit(worker, Letters(5))) == "x" * 5

    run(work)
    assert sum("a guest failed and is sent away" in r.message for r in caplog.records) == 1


def test_a_guest_does_not_keep_the_server_from_ending() -> None:
    async def work(worker: Worker) -> None:
        worker.invite(lambda: True)
        assert await text_of(submit(worker, Letters(3))) == "xxx"

    run(work)


def test_what_ended_is_let_go_while_all_wait() -> None:
    class Talker:
        def work(self) -> bool:
            return False

    async def work(worker: Worker) -> None:
        talker = Talker()
        gone = weakref.ref(talker)
        worker.invite(talker.work)
        await worker.run(lambda: None)
        worker.dismiss(talker.work)
        del talker
        for _ in range(100):
            if gone() is None:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the worker still holds it")

    run(work)


def test_a_step_that_fails_ends_its_requests_and_not_the_worker() -> None:
    class Broken(Letters):
        def step(self) -> bool:
            raise RuntimeError("out of luck")

    async def work(worker: Worker) -> None:
        with pytest.raises(RuntimeError, match="out of luck"):
            await text_of(submit(worker, Broken(3)))
        assert await text_of(submit(worker, Letters(3))) == "xxx"
        for _ in range(100):  # it is counted out behind its last event
            if worker.load == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(worker.load)

    run(work)
