from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfm2_mm.cli import chat, terminal

from .conftest import Run

CHAT = ("chat", "--max-tokens", 4)


def test_each_piped_line_is_a_turn(run: Run) -> None:
    result = run(*CHAT, "--json", stdin="Hello.\n\nAnd now?\n")
    assert result.exit_code == 0
    first, second = (json.loads(row) for row in result.stdout.splitlines())
    assert first["usage"]["completion_tokens"] <= 4
    # the second prompt holds the first turn, and its state is not computed again
    assert second["usage"]["cached_tokens"] > first["usage"]["prompt_tokens"]
    assert result.stderr == ""


def test_an_image_is_attached_to_the_next_question_and_encoded_once(
    run: Run, picture: Path
) -> None:
    talk = f"/image '{picture}'\nWhat?\nAnd?\n"
    result = run(*CHAT, "--json", stdin=talk)
    first, second = (json.loads(row) for row in result.stdout.splitlines())
    assert result.stderr.startswith("image: 96x64, ")
    assert [len(row["images"]) for row in (first, second)] == [1, 1]
    assert [row["usage"]["encoded_parts"] for row in (first, second)] == [1, 0]


def test_plain_answers_go_to_stdout(run: Run) -> None:
    result = run(*CHAT, stdin="Hello.\n/clear\nHello.\n")
    one, two = result.stdout.splitlines()[0], result.stdout.splitlines()[-1]
    assert one == two
    assert result.stderr == "the conversation is forgotten\n"


def test_a_failed_turn_changes_nothing_and_is_reported(run: Run, picture: Path) -> None:
    talk = "/image gone.png\n/image\n/imgae x\n/nothing\nHello.\n"
    result = run(*CHAT, "--json", stdin=talk)
    assert result.exit_code == 1
    missing, empty, near, unknown = result.stderr.splitlines()
    assert missing == "error: there is no file 'gone.png'; check the path"
    assert empty == "error: /image needs a path or a URL: /image photo.jpg"
    assert near.startswith("error: there is no command /imgae; did you mean /image?")
    assert unknown == (
        "error: there is no command /nothing; there are "
        "/image, /clear, /system, /save, /stats, /help, /exit"
    )
    assert json.loads(result.stdout)["images"] == []


def test_a_text_model_has_no_image_command(run: Run, text_folder: Path) -> None:
    result = run(*CHAT, "-m", text_folder, stdin="/help\n/image a.png\n/exit\nnever asked\n")
    assert result.exit_code == 1 and result.stdout == ""
    assert "attach" not in result.stderr and "there is no command /image" in result.stderr


def test_save_writes_the_conversation(run: Run, picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "talk.json"
    talk = f"/system Be brief.\n/image {picture}\nWhat?\n/save {target}\n/stats\n/save\n"
    result = run(*CHAT, "-q", stdin=talk)
    saved = json.loads(target.read_text())
    system, user, assistant = saved["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == [
        {"type": "image", "image": str(picture)},
        {"type": "text", "text": "What?"},
    ]
    assert assistant["role"] == "assistant"
    assert assistant["content"].strip() == result.stdout.strip()
    assert result.stderr.startswith("1 answer, ")
    assert "/save needs a file" in result.stderr
    bad = run(*CHAT, stdin=f"/save {tmp_path}/no/talk.json\n")
    assert bad.exit_code == 1 and "cannot be written" in bad.stderr


def test_show_tiles_works_in_a_chat(run: Run, picture: Path, tmp_path: Path) -> None:
    tiles = tmp_path / "tiles.png"
    run(*CHAT, "--show-tiles", tiles, stdin=f"/image {picture}\nWhat?\n")
    assert tiles.exists()


class Endless:
    """A stream that ends when it is cancelled, as the engine's does."""

    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def test_ctrl_c_stops_the_answer_only() -> None:
    stream: Any = Endless()
    before = signal.getsignal(signal.SIGINT)
    with chat._stoppable(stream):
        signal.raise_signal(signal.SIGINT)
        assert stream.cancelled
        with pytest.raises(KeyboardInterrupt):  # the second one is meant
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_answer_stays_in_the_conversation(
    run: Run, nano_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_mm.model import Stream

    read = Stream.__next__
    seen: list[str] = []

    def stopping(self: Stream) -> str:
        piece = read(self)
        seen.append(piece)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return piece

    monkeypatch.setattr(Stream, "__next__", stopping)
    talk = "Hello.\n/stats\nAnd?\n"
    result = run("chat", "--max-tokens", 50, "--json", stdin=talk)
    first, second = (json.loads(row) for row in result.stdout.splitlines())
    assert (first["finish_reason"], first["answer"]) == ("cancelled", "".join(seen[:2]))
    assert second["finish_reason"] != "cancelled"
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + 2


def test_a_person_gets_a_prompt_and_ends_with_ctrl_d(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: stream is sys.stdin)
    typed: Iterator[str | BaseException] = iter(["/help", KeyboardInterrupt(), "Hello."])
    prompts = []

    def type_in(prompt: str = "") -> str:
        prompts.append(prompt)
        line: str | BaseException = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_in)
    result = run(*CHAT, stdin=io.BytesIO().getvalue())
    assert result.exit_code == 0 and prompts == ["> "] * 4
    assert result.stdout.strip()
    assert "/image PATH|URL" in result.stderr and "Ctrl-D ends" in result.stderr
