"""Abuse a real server for as long as you like: what the tests do in seconds, and a long soak.

    python tools/abuse_server.py --requests 10000 --frames 10000 --soak 1800

Starts `lfm2-mm serve` on the embedded models with an index, and then

    requests  malformed ones to every route of its OpenAPI document, and what is no HTTP
    frames    malformed messages of realtime conversations
    slow      callers who send a letter now and then, while others must be served
    lures     pictures at addresses of this machine and its network, however they are written
    soak      clients who chat, look, embed, search, add, delete, transcribe and hang up midway

No answer may be a failure of the server's own (5xx but 503), its log may hold no traceback, and its
memory may not grow by more than 5 % after the first fifth of the soak. `--schemathesis PROGRAM`
also lets that tool (which is no part of our environments) loose on the document, `--examples` times
an operation: with all of its checks but that everything which fits the schema must be accepted, for
a JSON schema does not say that a picture must be one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
from hypothesis import given
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lfm2_evals.bench.serving_clients import ServerProcess, free_port  # noqa: E402
from tests.server.hostile import Attack, attacks, broken_http, judged, many, send  # noqa: E402
from tests.server.hostile_lines import (  # noqa: E402
    canary,
    frames,
    inner_addresses,
    slow_callers,
)

GROWTH = 1.05
PICTURE = files("lfm2_vision").joinpath("examples/simple.png")
SPEECH = files("lfm2_audio").joinpath("samples/mike-open.wav")


class Failure(Exception):
    """The server did what it must not do."""


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise Failure("the server is gone")


def well(base: str) -> None:
    """The server answers."""
    answer = httpx2.get(f"{base}/health", timeout=60)
    if answer.status_code != 200:
        raise Failure(f"/health is {answer.status_code}: {answer.text}")


# --- malformed -----------------------------------------------------------------------------------


def requests(base: str, count: int) -> str:
    """Nine of ten from the document, one of ten that is no HTTP."""
    document = httpx2.get(f"{base}/openapi.json", timeout=60).json()
    found: Counter[int] = Counter()
    slowest = 0.0

    @many(count * 9 // 10)
    @given(attacks(document, ("notes", "nano-vl", "nano-colbert", "nano-audio")))
    def formed(one: Attack) -> None:
        nonlocal slowest
        reply = send(base, one, seconds=120)
        found[reply.status] += 1
        slowest = max(slowest, reply.seconds)
        if wrong := judged(reply):
            raise Failure(f"{wrong}, of {one}")

    @many(count - count * 9 // 10)
    @given(broken_http())
    def broken(data: bytes) -> None:
        reply = send(base, data, seconds=120, ends=True)
        found[reply.status] += 1
        if wrong := judged(reply, whole=False):
            raise Failure(f"{wrong}, of {data!r}")

    formed()
    broken()
    rows = ", ".join(f"{count} x {status or 'hung up'}" for status, count in sorted(found.items()))
    return f"{sum(found.values())} requests: {rows}; the slowest took {slowest:.1f} s"


def malformed_frames(base: str, count: int) -> str:
    """One conversation after the other, as long as each lasts."""
    address = f"{base.replace('http', 'ws')}/v1/realtime?model=nano-audio"
    open_: list[Any] = []
    told: Counter[str] = Counter()
    talks = 0

    @many(count)
    @given(frames())
    def attack(frame: str | bytes) -> None:
        nonlocal talks
        try:
            if not open_:
                talk = stack.enter_context(connect(address, open_timeout=120, proxy=None))
                open_.append(talk)
                talks += 1
            open_[0].send(frame)
            while True:
                event = json.loads(open_[0].recv(timeout=0.001))
                told[event["type"]] += 1
                if event["type"] == "error" and event["error"].get("type") == "server_error":
                    raise Failure(f"{event}, of {frame!r}")
        except TimeoutError:
            pass
        except ConnectionClosed as closed:
            open_.pop().close()
            if closed.rcvd is None or closed.rcvd.code == 1011:
                raise Failure(f"the conversation broke off ({closed}), of {frame!r}") from None

    with ExitStack() as stack:
        attack()
    rows = ", ".join(f"{number} x {kind}" for kind, number in told.most_common())
    return f"{count} frames in {talks} conversations: {rows}"


def slow(base: str, count: int) -> str:
    """Longer than a header may take."""

    def meanwhile() -> None:
        if httpx2.get(f"{base}/v1/models", timeout=60).status_code != 200:
            raise Failure("somebody was kept out by slow callers")

    left, longest = slow_callers(base, count, 75, meanwhile)
    if left:
        raise Failure(f"{left} of {count} slow connections are open after 75 seconds")
    return f"{count} slow connections, all closed; others waited {longest:.2f} s at most"


def lures(base: str) -> str:
    """None may be fetched."""
    with canary() as (port, came), httpx2.Client(base_url=base, timeout=120) as client:
        urls = inner_addresses(port)
        for url in urls:
            content = [{"type": "image_url", "image_url": {"url": url}}]
            body = {"model": "nano-vl", "messages": [{"role": "user", "content": content}]}
            status = client.post("/v1/chat/completions", json=body).status_code
            if status not in (400, 422):
                raise Failure(f"{url!r} was answered with {status}")
    if came:
        raise Failure(f"the server connected to this machine: {came[:3]}")
    return f"{len(urls)} addresses, none of them fetched"


# --- a soak --------------------------------------------------------------------------------------


def jobs(client: httpx2.Client, chance: random.Random) -> list[Callable[[], int]]:
    """What a client does; each gives a status."""
    import base64

    url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    speech = SPEECH.read_bytes()
    words = ("red", "blue", "circle", "square", "where", "how many", "notes", "of")

    def text() -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(2, 12)))

    def chat(content: Any, *, stream: bool = False, leave: bool = False) -> int:
        body = {
            "model": "nano-vl",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 24,
            "stream": stream,
        }
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for piece in answer.iter_bytes():
                if b'"internal"' in piece:
                    raise Failure(piece.decode(errors="replace"))
                if leave:
                    break
            return answer.status_code

    def look() -> int:
        image = {"type": "image_url", "image_url": {"url": url}}
        return chat([image, {"type": "text", "text": text()}], stream=True)

    def post(path: str, **body: Any) -> int:
        return client.post(path, json=body).status_code

    def change() -> int:
        name = f"d{chance.randrange(40)}"
        if chance.random() < 0.5:
            path = "/v1/indexes/notes/documents"
            return post(path, documents=[{"id": name, "text": text()}])
        answer = client.request("DELETE", "/v1/indexes/notes/documents", json={"ids": [name]})
        return answer.status_code

    def transcribe() -> int:
        form = {"model": "nano-audio"}
        named = {"file": ("a.wav", speech)}
        return client.post("/v1/audio/transcriptions", data=form, files=named).status_code

    return [
        lambda: chat(text()),
        lambda: chat(text(), stream=True),
        lambda: chat(text(), stream=True, leave=True),
        look,
        lambda: post("/v1/embeddings", model="nano-colbert", input=[text(), text()]),
        lambda: post("/v1/search", index="notes", query=text()),
        lambda: post("/v1/rerank", query=text(), documents=[text(), text()]),
        lambda: post("/v1/chat/completions", messages=[{"role": "user", "content": text()}], n=99),
        change,
        transcribe,
    ]


def soak(base: str, pid: int, seconds: float, clients: int) -> str:
    """Many clients for long; their statuses, and what became of the memory."""
    found: Counter[int] = Counter()
    problems: list[str] = []
    until = time.monotonic() + seconds

    def live(seed: int) -> None:
        chance = random.Random(seed)
        with httpx2.Client(base_url=base, timeout=300, trust_env=False) as client:
            own = jobs(client, chance)
            while time.monotonic() < until and not problems:
                try:
                    status = chance.choice(own)()
                except (Failure, httpx2.HTTPError) as error:
                    problems.append(f"{type(error).__name__}: {error}")
                    return
                found[status] += 1
                if status >= 500 and status != 503:
                    problems.append(f"a status of {status}")

    def talk() -> None:
        address = f"{base.replace('http', 'ws')}/v1/realtime?model=nano-audio"
        while time.monotonic() < until and not problems:
            try:
                with connect(address, proxy=None, open_timeout=120) as line:
                    item = {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
                    line.send(json.dumps({"type": "conversation.item.create", "item": item}))
                    session = {"type": "realtime", "max_output_tokens": 20}
                    line.send(json.dumps({"type": "session.update", "session": session}))
                    line.send(json.dumps({"type": "response.create"}))
                    while json.loads(line.recv(timeout=300))["type"] != "response.done":
                        pass
                found[101] += 1
            except (WebSocketException, OSError, TimeoutError) as error:
                problems.append(f"a conversation: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(max(1, clients - 1))]
    threads.append(threading.Thread(target=talk))
    for thread in threads:
        thread.start()
    sizes = []
    while any(thread.is_alive() for thread in threads):
        sizes.append(memory(pid))
        time.sleep(min(1.0, seconds / 100))
    for thread in threads:
        thread.join()
    if problems:
        raise Failure(problems[0])
    early = statistics.median(sizes[len(sizes) // 5 : len(sizes) * 3 // 10 + 1])
    late = statistics.median(sizes[len(sizes) * 9 // 10 :])
    rows = ", ".join(f"{count} x {status}" for status, count in sorted(found.items()))
    text = (
        f"{clients} clients for {seconds:g} s: {rows}; {early / 2**20:.0f} MiB after a fifth, "
        f"{late / 2**20:.0f} MiB at the end ({100 * (late / early - 1):+.1f} %)"
    )
    if late > GROWTH * early:
        raise Failure(f"memory grows: {text}")
    return text


def schemathesis(base: str, program: str, count: int) -> str:
    """Somebody else's tool."""
    command = [program, "run", f"{base}/openapi.json", "--max-examples", str(count)]
    command += ["--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
    command += ["--no-color", "--request-timeout", "120"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line[:400] for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        raise Failure("\n".join(lines[-300:]))
    cases = next((line.strip() for line in lines if re.match(r"\s*\d+ generated", line)), "")
    return f"{cases} ({lines[-1].strip('= ') if lines else 'nothing said'})"


def main() -> int:
    """Exit status: 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--slow", type=int, default=200, help="slow connections; 0 leaves them out")
    parser.add_argument("--soak", type=float, default=1800, help="seconds; 0 leaves it out")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--schemathesis", metavar="PROGRAM", default=None)
    parser.add_argument("--examples", type=int, default=20, help="of each operation, there")
    given_ = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lfm2-mm-abuse-") as folder:
        port = free_port()
        command = [sys.executable, "-m", "lfm2_mm", "serve", "--port", str(port), "-q"]
        command += ["--threads", str(given_.threads), "--index", f"notes={folder}/notes.idx"]
        command += ["--cache-mb", "8"]  # full in the first fifth, so that what grows is a leak
        environment = {"HF_HUB_OFFLINE": "1"}
        with ServerProcess("the server", command, port, environment, seconds=900) as server:
            base = f"http://127.0.0.1:{port}"
            parts: dict[str, tuple[float, Callable[[], str]]] = {
                "requests": (given_.requests, lambda: requests(base, given_.requests)),
                "frames": (given_.frames, lambda: malformed_frames(base, given_.frames)),
                "lures": (given_.requests, lambda: lures(base)),
                "slow": (given_.slow, lambda: slow(base, given_.slow)),
                "schemathesis": (
                    given_.schemathesis is not None,
                    lambda: schemathesis(base, given_.schemathesis, given_.examples),
                ),
                "soak": (
                    given_.soak,
                    lambda: soak(base, server.pid, given_.soak, given_.clients),
                ),
            }
            failed = 0
            for name, (wanted, part) in parts.items():
                if not wanted:
                    continue
                try:
                    text = part()
                    well(base)
                    print(f"ok      {name}: {text}", flush=True)
                except Failure as problem:
                    failed += 1
                    print(f"FAILED  {name}: {problem}", flush=True)
            log = server.log()
            if "Traceback" in log:
                failed += 1
                at = log.index("Traceback")
                print(f"FAILED  log: {log[max(0, at - 300) : at + 3000]}", flush=True)
            print(f"{'nothing was found' if not failed else f'{failed} parts failed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
