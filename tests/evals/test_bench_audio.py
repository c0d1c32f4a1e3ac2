from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lfm2_audio.codec import Codec
from lfm2_evals.bench import audio, rounds, speech_worker
from lfm2_evals.bench.audio import AudioBench, Plan
from lfm2_evals.bench.rounds import Measurement
from lfm2_evals.bench.speech_shapes import SHAPES, Reading, write_checkpoint
from lfm2_evals.commands import bench
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import SettingError

READING = Reading(backbone=1_000_000_000, head=100_000_000, depth=200_000_000, codec=80_000_000)


def found() -> list[Measurement]:
    answer = {"first_audio": 0.5, "rest": 2.0, "rest_audio": 2.5, "encode": 0.1, "prefill": 0.2}
    hear = {"seconds": 6.0, "tokens": 99.0}
    return [
        Measurement(0, audio.OURS, case, {**values, "peak_bytes": 3 * 2**30})
        for case, values in (("answer", answer), ("hear", hear))
    ]


def report(plan: Plan) -> AudioBench:
    measured = found()
    return AudioBench(
        plan=plan,
        facts={"processor": "abacus"},
        reading=READING,
        bytes_per_second=READING.per_second(n_text=6, n_audio=12, frame_rate=12.5, run=8),
        bandwidth=100e9,
        rows=audio._rows(plan, measured),
        measurements=measured,
    )


def test_bytes_of_a_second_of_speech_are_counted_by_steps() -> None:
    got = READING.per_second(n_text=6, n_audio=12, frame_rate=12.5, run=8)
    assert got == pytest.approx(1e9 * 18.75 + 1e8 * 6.25 + 2e8 * 12.5 + 8e7 * 12.5 / 8)


def test_the_report_says_what_was_reached_and_what_bounds_it() -> None:
    text = report(Plan()).markdown()
    assert "| real-time factor of interleaved speech | 0.80 | at most 0.7, missed |" in text
    assert "| first audio after a question, s | 0.50 | at most 0.6, reached |" in text
    assert "| seconds transcribed per second | 5.00 |" in text
    assert "reads 22.0 GB of weights; this machine's memory gives 100.0 GB/s" in text
    assert "at least 0.22 s. Measured: 0.80 s, 28 % of it explained by memory." in text
    value = report(Plan()).to_dict()
    json.dumps(value)
    assert value["rows"][0]["reached"] is False and value["floor"] == pytest.approx(0.22, abs=0.01)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shapes": "9b"}, "the shapes are '9b'; choose from 1.5b, tiny"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"frames": 1}, "frames is 1; it must be at least 2"),
        ({"recording": 31.0}, "recording is 31; longer ones are cut"),
    ],
)
def test_plans_that_make_no_sense_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        Plan(**change)


def test_the_released_shapes_have_the_released_size() -> None:
    import torch

    from lfm2_audio.depthformer import Depthformer
    from lfm2_mm.backbone import Backbone

    shapes = SHAPES["1.5b"].audio
    with torch.device("meta"):
        backbone, depth = Backbone(shapes.backbone), Depthformer(shapes)
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(1170.34e6, rel=1e-5)
    stack = sum(p.numel() for p in depth.depthformer.parameters())
    assert stack == pytest.approx(67.65e6, rel=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "checkpoint"
    write_checkpoint(SHAPES["tiny"], folder)
    return folder


def test_the_worker_measures(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_worker, "bandwidth", lambda: 1e9)
    side = speech_worker.Speech()
    requests = [
        {
            "do": "load",
            "folder": str(checkpoint),
            "threads": 1,
            "dtype": "auto",
            "quantize": "none",
        },
        {"do": "answer", "seconds": 1.0, "frames": 4, "seed": 1},
        {"do": "hear", "seconds": 1.0, "tokens": 5, "seed": 1},
        {"do": "dance"},
    ]
    answers = io.StringIO()
    speech_worker.serve(side, io.StringIO("\n".join(json.dumps(r) for r in requests)), answers)
    loaded, answered, heard, unknown = map(json.loads, answers.getvalue().splitlines())
    assert isinstance(side.model.codec, Codec)
    assert loaded["bandwidth"] == 1e9 and min(loaded["reading"].values()) > 0
    assert loaded["reading"]["head"] == 2048 * 128 * 4  # small models compute in fp32
    assert answered["first_audio"] > 0 and answered["cached"] > 10
    assert 0 < answered["rest_audio"] <= 3 * 0.08 + 0.02 + 1e-6
    assert heard["tokens"] == 5 and heard["peak_bytes"] > 0
    assert unknown["error"] == "ValueError: there is no request 'dance'"


def test_the_verb_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def measure(plan: Plan, *, progress: Any = None) -> AudioBench:
        plans.append(plan)
        return report(plan)

    monkeypatch.setattr(audio, "measure", measure)
    words = ["audio", "--shapes", "tiny", "--rounds", "2", "--quantize", "int8", "-q"]
    words += ["--keep", str(tmp_path / "kept")]
    result = CliRunner().invoke(bench, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# Speech at the tiny shapes, random weights, int8")
    assert plans[0] == Plan(shapes="tiny", rounds=2, quantize="int8", keep=tmp_path / "kept")
    assert json.loads((tmp_path / "bench-audio.json").read_text())["facts"]
    assert (tmp_path / "bench-audio.md").read_text() == result.stdout
    shown = CliRunner().invoke(bench, [*words, "--json"])
    assert json.loads(shown.stdout)["plan"]["shapes"] == "tiny"


def test_a_worker_that_is_asked_nothing_ends() -> None:
    command = [sys.executable, speech_worker.__file__]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Near:
    """A worker in this process."""

    def __init__(self, *_: Any) -> None:
        self._side = speech_worker.Speech()

    def call(self, do: str, **request: Any) -> dict[str, Any]:
        answers = io.StringIO()
        speech_worker.serve(self._side, io.StringIO(json.dumps({"do": do, **request})), answers)
        answer: dict[str, Any] = json.loads(answers.getvalue())
        assert "error" not in answer
        return answer

    def __enter__(self) -> Near:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "Worker", Near)
    monkeypatch.setattr(speech_worker, "bandwidth", lambda: 1e9)
    plan = Plan(shapes="tiny", rounds=1, threads=1, frames=3, recording=1.0, keep=tmp_path)
    result = audio.measure(plan)
    assert [row.what.split(" ")[0] for row in result.rows][:2] == ["real-time", "first"]
    assert all(row.value.median >= 0 for row in result.rows)
    assert result.bandwidth == 1e9 and result.bytes_per_second > 1e5
    assert result.measurements[0].values["cached"] > 10
    folder = tmp_path / "speech-tiny-int4"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"]
    names = Checkpoint.open(folder).names
    for part in ("lfm.layers.0.feed_forward.w1", "depth_embeddings.0.embedding"):
        assert f"{part}.weight.codes" in names

    def rewritten(*_: Any, **__: Any) -> None:
        raise AssertionError("what is kept is not written again")

    monkeypatch.setattr(audio, "write_checkpoint", rewritten)
    assert audio.measure(plan).reading == result.reading
