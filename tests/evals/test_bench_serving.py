"""`bench serving`: clients stream, ratios are taken in pairs, and what fails is said."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from lfm2_evals.bench import serving
from lfm2_evals.bench.rounds import Measurement
from lfm2_evals.bench.serving import FIRST, OURS, PEER, SECOND, Plan, ServingBench
from lfm2_evals.bench.serving_clients import ServerProcess, ask, free_port
from lfm2_mm.cli import cli
from lfm2_mm.errors import Lfm2Error, SettingError
from lfm2_mm.server import ServerOptions
from tests.server.running import running


@contextmanager
def inside(plan: Plan, model: Path) -> Iterator[Any]:
    """The server in this process."""
    with running(ServerOptions(models=(str(model),))) as url:
        yield SimpleNamespace(name=OURS, port=urlsplit(url).port, cpu_seconds=time.process_time)


def test_real_clients_stream_and_a_picture_is_asked_about_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "_ours", inside)
    monkeypatch.setenv("LFM2_MM_THREADS", "1")
    command = "bench serving --shapes tiny --form bf16 --vision tiny --clients 3 --tokens 6 -q"
    command += f" --rounds 1 --models {tmp_path / 'm'} --out {tmp_path} --threads 1"
    result = CliRunner().invoke(cli, command.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "## 3 clients, 6 tokens each, tiny shapes in bf16" in result.output
    assert "llama-server was not measured beside: --peer-server names one." in result.output
    written = json.loads((tmp_path / "bench-serving.json").read_text("utf-8"))
    rows = {one["case"]: one["values"] for one in written["measurements"]}
    assert rows["1 client"]["tokens"] == 6 and rows["3 clients"]["tokens"] == 18
    assert 0 < rows["3 clients"]["fair"] <= 1
    assert 0 < rows["3 clients"]["first"] < rows["3 clients"]["seconds"]
    assert 0 < rows[SECOND]["first"] and 0 < rows[FIRST]["first"]
    # every token of the model has a text, so that each is streamed
    words = json.loads((tmp_path / "m/serving-tiny/bf16/tokenizer.json").read_text("utf-8"))
    taken = {*words["model"]["vocab"].values(), *(t["id"] for t in words["added_tokens"])}
    assert taken >= set(range(1024))


def found(plan: Plan, **rates: float) -> ServingBench:
    measurements = []
    for number in range(2):
        for side in (OURS, PEER):
            for case, rate in (("1 client", 10.0), ("4 clients", rates[side.split("-")[0]])):
                values = {"rate": rate, "cpu_rate": rate, "first": 0.1, "fair": 0.8}
                measurements.append(Measurement(number, side, case, values))
        for case, seconds in ((FIRST, rates["first"]), (SECOND, 1.0)):
            measurements.append(Measurement(number, OURS, case, {"first": seconds, "cpu": seconds}))
    return ServingBench(plan=plan, facts={"cores": "2"}, measurements=measurements)


def test_targets_are_judged() -> None:
    plan = Plan(clients=4)
    good = found(plan, lfm2=40.0, llama=20.0, first=9.0)
    assert good.more(OURS).median == 4 and good.sooner().median == 9
    text = good.markdown()
    assert "| lfm2-mm serve: 4 clients / 1 client | 4.00 | 3, reached |" in text
    assert "| lfm2-mm serve / llama-server, 4 clients | 2.00 |  |" in text
    assert "| first question / second question | 9.00 | 8, reached |" in text
    poor = found(plan, lfm2=29.0, llama=20.0, first=7.0).markdown()
    assert "| 2.90 | 3, missed |" in poor and "| 7.00 | 8, missed |" in poor


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shapes": "x"}, "there is no shape 'x'; choose from tiny"),
        ({"parts": ("y",)}, "there is no part 'y'; choose from clients, picture"),
        ({"clients": 1}, "clients is 1; it takes at least 2"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
    ],
)
def test_plans_that_make_no_sense(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        Plan(**changes)


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """Something that says this to whoever calls."""
    with socket.create_server(("127.0.0.1", 0)) as ear:

        def answer() -> None:
            line, _ = ear.accept()
            with line:
                line.recv(1 << 16)
                line.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield ear.getsockname()[1]
        thread.join()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\nwait", r"the server answered 429 \(wait\)"),
        (b"", "the server answered nothing"),
        (HEAD + b'data: {"error": {"message": "no"}}\n\n', "the server broke off"),
        (HEAD + b'data: {"choices": []}\n\n', "an answer ended without its count of tokens"),
    ],
)
def test_answers_that_are_none(reply: bytes, text: str) -> None:
    with answering(reply) as port, pytest.raises(Lfm2Error, match=text):
        asyncio.run(ask(port, {}))


def test_nobody_listens() -> None:
    with pytest.raises(Lfm2Error, match="the connection broke in the midst of an answer"):
        asyncio.run(ask(free_port(), {}))


def test_a_server_that_does_not_start() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    text = r"it ended while it started \(exit status 1, no such model\); run it alone"
    with pytest.raises(Lfm2Error, match=text), ServerProcess("it", command, free_port()):
        raise AssertionError("it is there")
    with (
        pytest.raises(Lfm2Error, match="it could not be started with '/no/such'"),
        ServerProcess("it", ["/no/such"], free_port()),
    ):
        raise AssertionError("it is there")


def test_a_server_is_waited_for_and_ended() -> None:
    port = free_port()
    code = (
        "import http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        f"h.HTTPServer(('127.0.0.1', {port}), H).serve_forever()"
    )
    with ServerProcess("it", [sys.executable, "-c", code], port) as server:
        assert server.cpu_seconds() >= 0
        pid = server.pid
    assert not Path(f"/proc/{pid}").exists()
