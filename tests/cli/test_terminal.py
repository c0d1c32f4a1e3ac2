from __future__ import annotations

import pytest

from lfm2_mm.cli import terminal
from lfm2_mm.cli.terminal import Answers, amount, clean, count, size


def test_clean_takes_out_what_steers_a_terminal() -> None:
    assert clean("a\x1b[31mred\x07\r\x9b2J\u202e\nb\tc é 😀") == "a[31mred2J\nb\tc é 😀"


def test_words() -> None:
    assert (count(1, "image"), count(2000, "token")) == ("1 image", "2,000 tokens")
    assert (amount(3_123_483_888), amount(354_483_968), amount(12)) == ("3.1B", "354M", "12")
    assert (size(1_900_000_000), size(7_112_376), size(0)) == ("1.9 GB", "7.1 MB", "0 B")


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("raw", "opened", "out"),
    [
        ("red", False, "red\n"),
        ("red\n", False, "red\n"),
        ("<think>hm, a < b</think>\n\nred", False, "red\n"),
        ("hm</think>red", True, "red\n"),
        ("<thin air>", False, "<thin air>\n"),
        ("a <think> b", False, "a <think> b\n"),
        ("<think>never ends", False, "\n"),
        ("", False, "\n"),
    ],
)
def test_thinking_stays_out_of_the_answer(
    raw: str, opened: bool, out: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = Answers(thinking=opened)
    for at in range(0, len(raw), step):
        answers.write(raw[at : at + step])
    answers.close()
    assert capsys.readouterr() == (out, "")


def test_control_characters_pass_into_a_pipe_but_not_onto_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for person, out in ((False, "a\x1b[2Jb\n"), (True, "a[2Jb\n")):
        monkeypatch.setattr(terminal, "is_terminal", lambda stream, person=person: person)
        answers = Answers(quiet=True)
        answers.write("a\x1b[2Jb")
        answers.close()
        assert capsys.readouterr().out == out


def test_a_line_of_stderr_is_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.fail("no file '\x1b[2J'")
    assert capsys.readouterr().err == "error: no file '[2J'\n"
