"""Callers who take long keep nobody out: whose pictures are fetched, whose recordings heard."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest
import torch

from lfm2_audio.serving import recordings
from lfm2_audio.serving.recordings import Recordings
from lfm2_audio.serving.remote import RemoteLoop
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import FetchError
from lfm2_mm.server import Limits, ServerOptions
from lfm2_mm.server.problems import ApiError
from lfm2_mm.server.registry import Served
from lfm2_mm.server.safe_fetch import PublicFetcher
from tests.audio import speaking
from tests.server.running import running
from tests.server.test_realtime import calling, write

pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    models = {"tiny": speaking.model()}
    limits = Limits(running=1, sockets=1, waiting=64, max_tokens=8)
    with running(
        ServerOptions(models=tuple(models), limits=limits), load=models.__getitem__
    ) as url:
        yield url


@contextmanager
def busy(work: Any, n: int) -> Iterator[None]:
    """So many threads that do something meanwhile."""
    threads = [threading.Thread(target=work, daemon=True) for _ in range(n)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(30)


def test_slow_pictures_keep_nobody_waiting(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go, asked = threading.Event(), threading.Semaphore(0)

    def slow(self: PublicFetcher, url: str) -> bytes:
        asked.release()
        go.wait(60)
        raise FetchError("no picture came; send it as a data URL")

    monkeypatch.setattr(PublicFetcher, "__call__", slow)
    picture = {"type": "image_url", "image_url": {"url": "https://slow.example/a.png"}}

    def ask() -> None:
        body = {"messages": [{"role": "user", "content": [picture] * 30}]}
        answer = httpx2.post(f"{base}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 422

    with busy(ask, 40):
        try:
            for _ in range(2):  # as many as this machine's threads may be two
                assert asked.acquire(timeout=20)
            with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
                answer = client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "Hi"}], timeout=20
                )
            assert answer.choices[0].finish_reason in ("stop", "length")
        finally:
            go.set()


def test_pictures_of_one_request_take_so_long_at_most(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2_mm.server.answering._PATIENCE", 0)
    picture = {"type": "input_image", "image_url": "http://slow.example/a.png"}
    body = {"input": [{"role": "user", "content": [picture]}]}
    answer = httpx2.post(f"{base}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 422
    assert "took more than 0 seconds; send them as data URLs" in answer.json()["error"]["message"]


def test_recordings_keep_no_voice_waiting(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go, hearing = threading.Event(), threading.Semaphore(0)

    def slow(*_: Any, **__: Any) -> list[Any]:
        hearing.release()
        go.wait(60)
        return []

    monkeypatch.setattr("lfm2_audio.serving.listening.hear", slow)
    wav = speaking.recording("x", 16000).to_bytes("wav")

    def transcribe() -> None:
        url = f"{base}/v1/audio/transcriptions"
        answer = httpx2.post(url, files={"file": ("x.wav", wav)}, timeout=60)
        assert answer.status_code in (200, 503)

    with busy(transcribe, 3):
        try:
            assert hearing.acquire(timeout=20)
            with calling(base, "tiny") as caller:
                write(caller, "Hello")
                caller.until("conversation.item.done")
        finally:
            go.set()


def test_a_busy_voice_keeps_no_other_caller_waiting(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[RemoteLoop] = []

    class Noted(RemoteLoop):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            made.append(self)

    monkeypatch.setattr("lfm2_audio.serving.realtime.RemoteLoop", Noted)
    output = {"type": "function_call_output", "call_id": "x", "output": "y"}
    with calling(base, "tiny") as caller:
        write(caller, "Hello")
        caller.until("conversation.item.done")
        with made[0]._lock:  # as one that hears something long
            caller.line.conversation.item.create(item=output)
            for _ in range(5):
                assert httpx2.get(f"{base}/health", timeout=5).status_code == 200
        assert "no function was called" in caller.until("error")["error"]["message"]


def test_a_prompt_whose_caller_left_is_made_before_the_next() -> None:
    async def work() -> list[str]:
        served, done = Served("m", "m"), list[str]()
        begun, go = threading.Event(), threading.Event()

        def first() -> None:
            begun.set()
            go.wait(10)
            done.append("first")

        task = asyncio.ensure_future(served.prepare(first))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        second = asyncio.ensure_future(served.prepare(lambda: done.append("second")))
        await asyncio.sleep(0.1)
        go.set()
        await second
        return done

    assert asyncio.run(work()) == ["first", "second"]


def sound(size: int) -> Audio:
    return Audio(torch.zeros(size // 4), 16000)


def test_recordings_wait_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "_MOST", 100)

    async def work() -> None:
        room, read = Recordings(waiting=2), list[int]()

        async def one(size: int) -> Audio:
            read.append(size)
            return sound(size)

        large = await room.take(lambda: one(400))  # alone even what is larger than all room
        waits = [asyncio.ensure_future(room.take(lambda: one(60))) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert read == [400, 60, 60] and not any(task.done() for task in waits)
        with pytest.raises(ApiError, match="2 recordings are already waiting") as caught:
            await room.take(lambda: one(4))
        assert caught.value.status == 429
        room.give(large)
        await asyncio.sleep(0.01)
        assert [task.done() for task in waits] == [True, False]
        waits[1].cancel()
        await asyncio.gather(waits[1], return_exceptions=True)
        assert await asyncio.wait_for(room.take(lambda: one(40)), 5)
        room.give(waits[0].result())
        assert await asyncio.wait_for(room.take(lambda: one(60)), 5)

    asyncio.run(work())


def test_what_models_keep_of_prompts_is_bounded_as_told() -> None:
    model = speaking.model()
    size = 3 << 20
    options = ServerOptions(models=("tiny",), limits=Limits(cache_bytes=size))
    with running(options, load={"tiny": model}.__getitem__) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        engine = model.engine
        assert engine.features.max_bytes + engine.prefixes.max_bytes == size
        for i in range(12):
            content = " ".join(f"{i} and {j}" for j in range(150))
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=1
            )
        assert 0 < engine.prefixes.nbytes <= size
