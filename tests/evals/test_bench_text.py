"""`bench text`: every side does the same, rates and ratios are right, missing parts are named."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import lfm2_mm
from lfm2_evals.bench import generators, text
from lfm2_evals.bench.rounds import Measurement
from lfm2_evals.bench.text import CASES, Case, Plan, TextBench, measure
from lfm2_evals.bench.text_models import (
    TEXT_SHAPES,
    bytes_per_token,
    weights_per_token,
    write_forms,
)
from lfm2_mm.cli import cli
from lfm2_mm.errors import MissingExtra, SettingError
from lfm2_mm.quantize.layers import PackedLinear


def test_weights_of_the_released_shapes() -> None:
    body, head = weights_per_token(TEXT_SHAPES["350m"])
    assert head == 65536 * 1024
    assert 0.98 < (body + head) / 354_483_968 < 1.0  # norms and taps are left out
    body, head = weights_per_token(TEXT_SHAPES["1.2b"])
    assert 0.98 < (body + head) / 1_170_340_608 < 1.0
    body, head = weights_per_token(TEXT_SHAPES["8b-a1b"])
    assert 1.4e9 < body + head < 1.6e9
    # 350M with 4 bits and an 8-bit head, scales included
    assert 225e6 < bytes_per_token(TEXT_SHAPES["350m"], "int4") < 240e6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "models"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LFM2_MM_THREADS", "1")
        write_forms(TEXT_SHAPES["tiny"], folder, ("int4", "int8"), gguf=True)
    return folder


def test_all_forms_are_written_once_and_alike(models: Path) -> None:
    told: list[str] = []
    forms = ("int4", "int8", "bf16")
    places = write_forms(TEXT_SHAPES["tiny"], models, forms, gguf=True, told=told.append)
    assert told == ["GGUF bf16"]
    assert sorted(places) == sorted([*forms, *(f"{form}.gguf" for form in forms)])
    ids = list(range(300, 330))
    scores = {
        name: lfm2_mm.load(place, dtype="float32", threads=1).logits(ids)
        for name, place in places.items()
    }
    assert (scores["bf16"] == scores["bf16.gguf"]).all()
    for form in ("int4", "int8"):
        near = (scores[form] - scores["bf16"]).norm() / scores["bf16"].norm()
        assert near < (0.06 if form == "int8" else 0.6)
    packed = lfm2_mm.load(places["int4"], threads=1)
    assert isinstance(packed.backbone.layers[0].feed_forward.w1, PackedLinear)
    with pytest.raises(SettingError, match="holds something else than this benchmark's models"):
        write_forms(TEXT_SHAPES["350m"], models, (), gguf=False)


def test_ours_and_transformers_generate(models: Path) -> None:
    prompts = [list(range(300, 310)), list(range(400, 410))]
    for side, form in ((generators.Ours(), "int8"), (generators.Transformers(), "bf16")):
        versions = side.load(str(models / form), 1)
        assert versions["torch"]
        first, rest, made = side.generate(prompts[:1], 5)
        assert first > 0 and rest > 0 and made == 4
        assert side.generate(prompts, 4)[2] == 6


class FakeLlama:
    """What `LlamaCpp` calls of llama-cpp-python, with scores that name the next token."""

    __version__ = "0"

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, bool]] = []
        self.freed = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1

    def llama_log_callback(self, function: Any) -> Any:
        return function

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace(kv_unified=False)

    def llama_vocab_n_tokens(self, _: Any) -> int:
        return 8

    def llama_batch_init(self, n: int, *_: Any) -> Any:
        return SimpleNamespace(
            token=[0] * n,
            pos=[0] * n,
            n_seq_id=[0] * n,
            seq_id=[[0] for _ in range(n)],
            logits=[False] * n,
        )

    def llama_decode(self, _: Any, batch: Any) -> int:
        self.last = batch
        for i in range(batch.n_tokens):
            self.rows.append((batch.token[i], batch.pos[i], batch.seq_id[i][0], batch.logits[i]))
        return 0

    def llama_batch_free(self, _: Any) -> None:
        self.freed += 1

    def llama_get_logits_ith(self, _: Any, row: int) -> Any:
        import ctypes

        following = (self.last.token[row] + 1) % 8
        return ctypes.cast(
            (ctypes.c_float * 8)(*(float(i == following) for i in range(8))),
            ctypes.POINTER(ctypes.c_float),
        )


def test_llama_cpp_is_called_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    side = generators.LlamaCpp()
    assert side.load("model.gguf", 2) == {"llama-cpp-python": "0"}
    made = side.generate([[1, 2], [5, 6]], 3)[2]
    assert made == 4 and fake.freed == 3
    assert fake.rows == [
        (1, 0, 0, False),
        (2, 1, 0, True),
        (5, 0, 1, False),
        (6, 1, 1, True),
        (3, 2, 0, True),
        (7, 2, 1, True),
        (4, 3, 0, True),
        (0, 3, 1, True),
    ]


def test_requests_and_failures() -> None:
    class Side:
        def load(self, path: str, threads: int) -> dict[str, str]:
            return {"x": path}

        def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Any:
            if tokens == 0:
                raise RuntimeError("no  tokens")
            return 1.0, 2.0, tokens

    lines = [
        {"do": "load", "path": "p", "threads": 1},
        {"do": "generate", "prompts": [[1]], "tokens": 3},
        {"do": "generate", "prompts": [[1]], "tokens": 0},
        {"do": "dance"},
    ]
    given = io.StringIO("".join(json.dumps(line) + "\n" for line in lines))
    out = io.StringIO()
    generators.serve(Side(), given, out, lambda: 5)
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert answers[0]["versions"] == {"x": "p"} and answers[0]["seconds"] >= 0
    assert answers[1] == {"first": 1.0, "rest": 2.0, "tokens": 3, "peak_bytes": 5}
    assert answers[2] == {"error": "RuntimeError: no tokens"}
    assert answers[3] == {"error": "there is no request 'dance'"}


def found() -> TextBench:
    values = {
        "ours int4": {"first": 1.0, "rest": 0.5, "tokens": 64.0, "peak_bytes": 2.0**30},
        "llama.cpp Q4_0": {"first": 2.5, "rest": 0.6, "tokens": 64.0, "peak_bytes": 2.0**29},
    }
    return TextBench(
        plan=Plan(sides=tuple(values), cases=("prefill 512", "decode"), llama_python="x"),
        facts={"processor": "p"},
        memory_rate=40e9,
        int8_rate=1e12,
        loading={side: 0.5 for side in values},
        measurements=[
            Measurement(0, side, case, numbers)
            for case in ("prefill 512", "decode")
            for side, numbers in values.items()
        ],
    )


def test_rates_shares_and_ratios() -> None:
    report = found().markdown()
    assert "| prefill 512 | ours int4 | 512.0 |" in report
    done = 2 * 512 * weights_per_token(TEXT_SHAPES["350m"])[0]
    assert f"| {done / 1e9:.0f} | {done / 1e10:.0f} % |" in report
    assert "| prefill 512 | ours int4 / llama.cpp Q4_0 | 2.50 | 2, reached |" in report
    needed = bytes_per_token(TEXT_SHAPES["350m"], "int4")
    speed, share = needed * 128 / 1e9, 100 * needed * 128 / 40e9
    assert f"| decode | ours int4 | 128.0 | {speed:.1f} | {share:.0f} % |" in report
    assert "| decode | ours int4 / llama.cpp Q4_0 | 1.20 | 1.15, reached |" in report
    assert f"| ours int4 | 0.50 | 1024 | {needed / 1e6:.0f} |" in report
    assert json.dumps(found().to_dict())


def test_a_mixture_of_experts_has_targets_of_its_own() -> None:
    dense = found()
    report = replace(dense, plan=replace(dense.plan, shapes="8b-a1b")).markdown()
    assert "| decode | ours int4 / llama.cpp Q4_0 | 1.20 | 1.1, reached |" in report
    assert "| prefill 512 | ours int4 / llama.cpp Q4_0 | 2.50 |  |" in report


def test_plans_that_make_no_sense() -> None:
    for options, message in (
        ({"shapes": "9b"}, "there is no shape '9b'"),
        ({"sides": ("ours int3",)}, "there is no side 'ours int3'"),
        ({"cases": ("sleep",)}, "there is no case 'sleep'"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
    ):
        with pytest.raises(SettingError, match=message):
            Plan(**options)
    assert "llama.cpp Q4_0" not in Plan().runnable
    assert "llama.cpp Q4_0" in Plan(llama_python="x").runnable


def test_a_peer_that_is_not_there(tmp_path: Path) -> None:
    plan = Plan(shapes="tiny", llama_python=sys.executable, models=tmp_path / "models")
    with pytest.raises(MissingExtra) as error:
        measure(plan)
    assert str(error.value) == (
        f"{sys.executable!r} cannot import llama_cpp; install it there (make bench-text does), "
        "name another interpreter, or leave the side out with --side"
    )
    assert not (tmp_path / "models").exists()


def test_a_whole_run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text.CASES, "decode", Case(4, 3))
    assert CASES["decode"].tokens == 3
    words = ["bench", "text", "--shapes", "tiny", "--rounds", "1", "--threads", "1"]
    words += ["--side", "ours int4", "--case", "decode", "--models", str(models)]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "| decode | ours int4 |" in done.stdout
    report = json.loads((tmp_path / "out" / "bench-text.json").read_text("utf-8"))
    kept = [one for one in report["measurements"] if one["side"] == "ours int4"]
    assert len(kept) == 1 and kept[0]["values"]["tokens"] == 2
