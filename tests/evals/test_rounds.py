"""Interleaving, ratios, and processes that answer, fail or die."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lfm2_evals.bench.rounds import Worker, interleave, machine, ratios, spread
from lfm2_mm.errors import Lfm2Error

ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        print("first words", file=sys.stderr)
        sys.exit("last words")
    answer = {"error": "no luck"} if request["do"] == "fail" else {"said": request}
    print(json.dumps(answer), flush=True)
"""


def worker() -> Worker:
    return Worker("echo", [sys.executable, "-c", ECHO], {"LFM2_TEST_SIDE": "echo"})


def test_spreads_and_ratios_go_pair_by_pair() -> None:
    assert spread([3.0, 1.0, 2.0]).to_dict() == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert spread([3.0, 1.0, 2.0]).show() == "2.00 (1.00 to 3.00)"
    assert spread([2.0]).show(1) == "2.0"
    # a slow minute hits both sides of its round: the ratio of medians would say 2, not 4
    assert ratios([4.0, 40.0, 8.0], [1.0, 10.0, 4.0]).median == 4.0
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_rounds_change_who_begins_and_drop_the_warm_up() -> None:
    calls: list[str] = []

    def side(name: str) -> Any:
        def work(case: Mapping[str, Any]) -> dict[str, float]:
            calls.append(f"{name}{case['n']}")
            return {"value": len(calls)}

        return work

    seen: list[tuple[int, int]] = []
    found = interleave(
        {"a": side("a"), "b": side("b")},
        {"one": {"n": 1}, "two": {"n": 2}},
        rounds=2,
        progress=lambda *n: seen.append(n),
    )
    assert calls == ["b1", "a1", "b2", "a2"] + ["a1", "b1", "a2", "b2"] + ["b1", "a1", "b2", "a2"]
    assert [(m.round, m.side, m.case) for m in found][:3] == [
        (0, "a", "one"),
        (0, "b", "one"),
        (0, "a", "two"),
    ]
    assert len(found) == 8 and {m.round for m in found} == {0, 1}
    assert seen[-1] == (12, 12)


@pytest.mark.parametrize(("stop_at", "kept"), [(7, 4), (5, 4)])
def test_an_interruption_keeps_whole_rounds(stop_at: int, kept: int) -> None:
    calls = 0

    def work(_: Mapping[str, Any]) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls > stop_at:
            raise KeyboardInterrupt
        return {}

    cases: dict[str, dict[str, Any]] = {"one": {}, "two": {}}
    found = interleave({"a": work, "b": work}, cases, rounds=9, warm_up=0)
    assert len(found) == kept


def test_an_interruption_before_anything_is_measured_is_passed_on() -> None:
    def work(_: Mapping[str, Any]) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": work}, {"one": {}}, rounds=1)


def test_a_worker_answers_and_ends() -> None:
    with worker() as one:
        said = one.call("ask", image="ä.png")["said"]
    assert said == {"do": "ask", "image": "ä.png"}


def test_a_worker_that_fails_is_one_sentence_and_can_go_on() -> None:
    with worker() as one:
        with pytest.raises(Lfm2Error, match=r"^echo failed at 'fail' \(no luck\); run it alone$"):
            one.call("fail")
        assert one.call("ask")["said"] == {"do": "ask"}


def test_a_worker_that_dies_says_its_last_words() -> None:
    with worker() as one:
        message = r"^echo ended during 'die' \(exit status 1, last words\); run it alone$"
        with pytest.raises(Lfm2Error, match=message):
            one.call("die")
        with pytest.raises(Lfm2Error, match="ended during 'ask'"):
            one.call("ask")


def test_a_worker_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Lfm2Error, match=r"^peer could not be started with '.*/nothing' \(No such"):
        Worker("peer", [str(tmp_path / "nothing")])


def test_the_machine_is_described() -> None:
    facts = machine(2)
    assert facts["processor"] and "2 threads used" in facts["cores"]
