"""The official package beside ours: its code is not here, so a stand-in of its shape is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lfm2_evals.bench import audio, official, official_worker, rounds, speech_worker
from lfm2_evals.bench.audio import AudioBench, Plan
from lfm2_evals.bench.rounds import Measurement
from lfm2_evals.bench.speech_shapes import Reading
from lfm2_mm.cli import cli
from lfm2_mm.errors import Lfm2Error, MissingExtra, SettingError

# what the worker calls, in the syntax of Python 3.12 and with what a CPU does not have
STAND_IN = """
import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch
import torchaudio

type Codes = torch.Tensor


def mel2emb_len[T: (int, torch.Tensor)](l: T) -> T:
    return -(l // -8)


class LFM2AudioProcessor:
    @classmethod
    def from_pretrained(cls, folder, *, device):
        assert device == "cpu" and isinstance(folder, Path)
        self = cls()
        self.text = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.net = torch.nn.Linear(1, 1).cuda()
        return self

    def eval(self):
        return self

    def decode(self, codes):
        assert codes.shape[:2] == (1, 8) and int(codes.max()) < 2048
        return torch.zeros(1, 1920 * codes.shape[2])


class ChatState(Mapping):
    def __init__(self, processor, *, codebooks):
        self.text, self.modality_flag = processor.text, torch.ones(1, 0)
        self.add_text("<|startoftext|>")

    def __getitem__(self, name):
        return {"flags": self.modality_flag}[name]

    def __iter__(self):
        return iter(["flags"])

    def __len__(self):
        return 1

    def grow(self, n):
        self.modality_flag = torch.ones(1, self.modality_flag.shape[1] + n)

    def add_text(self, text):
        self.grow(len(self.text.encode(text, add_special_tokens=False).ids))

    def add_audio(self, wave, rate):
        wave = torchaudio.functional.resample(wave, rate, 16_000)
        self.grow(mel2emb_len(wave.shape[1] // 160 + 1))

    def new_turn(self, role):
        self.add_text(f"<|im_start|>{role}\\n")

    def end_turn(self):
        self.add_text("<|im_end|>\\n")


class LFM2AudioModel:
    codebooks = 8

    @classmethod
    def from_pretrained(cls, folder, *, dtype, device):
        assert dtype is torch.bfloat16 and device == "cpu"
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        return cls()

    def eval(self):
        return self

    def generate_interleaved(self, flags, *, max_new_tokens):
        for step in range(max_new_tokens):
            if step % 3 == 0:
                yield torch.tensor([5])
            else:  # the second frame ends speech
                yield torch.full((8,), 2048 if step == 2 else step)

    def generate_sequential(self, flags, *, max_new_tokens):
        yield from (torch.tensor([5]) for _ in range(max_new_tokens))
"""


def unpacked(folder: Path, source: str = STAND_IN) -> Path:
    """A folder as an unpacked wheel."""
    (folder / "liquid_audio").mkdir(parents=True)
    (folder / "liquid_audio" / "__init__.py").write_text(source)
    (folder / "liquid_audio-1.3.0.dist-info").mkdir()
    return folder


def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours runs in this process, the peer in its own."""
    far = rounds.Worker

    class Near:
        def __init__(self) -> None:
            self._side = speech_worker.Speech()

        def call(self, do: str, **request: Any) -> dict[str, Any]:
            return {**getattr(self._side, do)(**request), "peak_bytes": 2**30}

        def __enter__(self) -> Near:
            return self

        def __exit__(self, *_: object) -> None: ...

    def choose(name: str, command: list[str], environment: dict[str, str]) -> Any:
        return Near() if name == audio.OURS else far(name, command, environment)

    monkeypatch.setattr(rounds, "Worker", choose)
    monkeypatch.setattr(speech_worker, "bandwidth", lambda: 1e9)


def plan_beside(tmp_path: Path, wheel: Path, **changes: Any) -> Plan:
    return Plan(
        shapes="tiny",
        threads=1,
        recording=1.0,
        keep=tmp_path / "kept",
        peer_python=sys.executable,
        peer_wheel=wheel,
        **changes,
    )


def test_both_sides_take_turns_on_weights_in_the_form_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near(monkeypatch)
    plan = plan_beside(tmp_path, unpacked(tmp_path / "wheel"), rounds=2, frames=4)
    result = audio.measure(plan)
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"speech-tiny-int4", "speech-tiny-none"}
    assert [(m.round, m.case, m.side) for m in result.measurements][:4] == [
        (0, "answer", "lfm2_mm"),
        (0, "answer", "liquid-audio"),
        (0, "hear", "lfm2_mm"),
        (0, "hear", "liquid-audio"),
    ]
    theirs = [m.values for m in result.measurements if m.side == "liquid-audio"]
    ours = [m.values for m in result.measurements if m.side == "lfm2_mm"]
    # of four frames the second is no sound, and the first was heard before the clock of the rest
    assert theirs[0]["rest_audio"] == pytest.approx(2 * 0.08)
    assert theirs[0]["frames"] == 4 and theirs[1]["tokens"] == 3
    assert [t["prompt_tokens"] for t in theirs] == [o["prompt_tokens"] for o in ours]
    assert result.facts["liquid-audio"].startswith("liquid_audio 1.3.0, transformers ")
    speech, first, *parts, heard, memory = result.rows
    assert all(row.peer and row.ratio for row in (speech, first, heard, memory))
    assert all(row.peer is None and row.ratio is None for row in parts)
    assert json.loads(json.dumps(result.to_dict()))["plan"]["peer_wheel"] == str(plan.peer_wheel)


def beside(theirs: dict[str, float]) -> list[Measurement]:
    answer = {"first_audio": 0.5, "rest": 2.0, "rest_audio": 2.5, "encode": 0.1, "prefill": 0.2}
    hear = {"seconds": 6.0, "tokens": 99.0, "peak_bytes": 2.0**30, "prompt_tokens": 30}
    answer |= {"frames": 48, "peak_bytes": 2.0**30, "prompt_tokens": 70}
    found = []
    for number, slower in enumerate((4.0, 8.0, 6.0)):
        found += [
            Measurement(number, "lfm2_mm", "answer", answer),
            Measurement(number, "lfm2_mm", "hear", hear),
            Measurement(
                number,
                "liquid-audio",
                "answer",
                {**answer, "first_audio": 0.5 * slower, "rest": 2.0 * slower, **theirs},
            ),
            Measurement(
                number, "liquid-audio", "hear", {**hear, "seconds": 6.0 * slower, **theirs}
            ),
        ]
    return found


def report(plan: Plan, measured: list[Measurement]) -> AudioBench:
    return AudioBench(
        plan=plan,
        facts={"processor": "abacus"},
        reading=Reading(backbone=1, head=1, depth=1, codec=1),
        bytes_per_second=1e10,
        bandwidth=1e11,
        rows=audio._rows(plan, measured),
        measurements=measured,
    )


def test_the_report_compares_pair_by_pair_and_says_on_what_terms(tmp_path: Path) -> None:
    plan = plan_beside(tmp_path, unpacked(tmp_path / "wheel"))
    text = report(plan, beside({"peak_bytes": 3.0 * 2**30})).markdown()
    assert text.startswith("# Speech at the tiny shapes, random weights, ours int4, theirs bf16\n")
    assert "|  | lfm2_mm | liquid-audio | times better | target |" in text
    speech = "| 0.80 | 4.80 (3.20 to 6.40) | 6.0 (4.0 to 8.0) | at most 0.7, missed |"
    assert f"| real-time factor of interleaved speech {speech}" in text
    assert "| first audio after a question, s | 0.50 | 3.00 (2.00 to 4.00) | 6.0 (4.0" in text
    assert "| … of it hearing, s | 0.10 |  |  |  |" in text
    assert "| seconds transcribed per second | 0.17 | 0.03 (0.02 to 0.04) | 6.0 (4.0" in text
    assert "| peak memory, MiB | 1024 | 3072 | 3.0 |  |" in text
    assert official.NOTE.strip() in text and "reads the system prompt anew" in text


def test_alone_the_report_names_no_peer() -> None:
    measured = [one for one in beside({}) if one.side == "lfm2_mm"]
    text = report(Plan(), measured).markdown()
    assert "|  | lfm2_mm | target |" in text and "liquid-audio" not in text
    assert "| peak memory, MiB | 1024 |  |" in text


def test_prompts_of_different_lengths_and_early_ends_are_said(tmp_path: Path) -> None:
    with pytest.raises(Lfm2Error, match=r"different lengths for 'answer' \(\{'lfm2_mm': 70, 'liq"):
        official.check_prompts(beside({"prompt_tokens": 71}))
    assert audio._early(Plan(), beside({})) == {}
    early = audio._early(Plan(rounds=1), beside({"frames": 7, "tokens": 12})[:4])
    assert early == {
        "ended early": "liquid-audio after 7 of 48 frames, liquid-audio after 12 of 99 tokens"
    }


def invoke(*words: str) -> Result:
    command = ["bench", "audio", "--shapes", "tiny", "--quantize", "none", "--rounds", "1", "-q"]
    return CliRunner().invoke(cli, [*command, *words])


@pytest.mark.parametrize(
    ("python", "wheel", "kind", "text"),
    [
        (sys.executable, None, SettingError, "needs an interpreter and its unpacked wheel; give b"),
        (None, "wheel", SettingError, "needs an interpreter and its unpacked wheel; give both"),
        ("no/python", "wheel", MissingExtra, "there is no interpreter 'no/python' to run liquid-"),
        (sys.executable, "absent", SettingError, "there is no folder '.*absent' with the wheel of"),
        (sys.executable, "empty", SettingError, "empty' holds no package liquid_audio; give --pee"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(
    tmp_path: Path, python: str | None, wheel: str | None, kind: type[Exception], text: str
) -> None:
    unpacked(tmp_path / "wheel")
    (tmp_path / "empty").mkdir()
    place = None if wheel is None else tmp_path / wheel
    with pytest.raises(kind, match=text):
        Plan(peer_python=python, peer_wheel=place)
    words = [] if python is None else ["--peer-python", python]
    words += [] if place is None else ["--peer-wheel", str(place)]
    result = invoke(*words)
    assert result.exit_code == 1 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr


def test_an_interpreter_that_fails_is_one_sentence(tmp_path: Path) -> None:
    wheel, python = unpacked(tmp_path / "wheel"), tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such thing as a snake >&2\nexit 3\n")
    python.chmod(0o755)
    result = invoke("--peer-python", str(python), "--peer-wheel", str(wheel))
    assert result.exit_code == 1 and result.stdout == ""
    said = "liquid-audio ended during 'load' (exit status 3, no such thing as a snake); run it "
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_an_interpreter_that_lacks_a_package_says_which(tmp_path: Path) -> None:
    wheel = unpacked(tmp_path / "wheel", "import no_such_einops\n")
    with (
        rounds.Worker("liquid-audio", [sys.executable, official_worker.__file__]) as worker,
        pytest.raises(
            Lfm2Error,
            match="^liquid-audio failed at 'load' [(]ModuleNotFoundError: No module named "
            "'no_such_einops'[)]; run it alone$",
        ),
    ):
        worker.call("load", folder=str(tmp_path), threads=1, wheel=str(wheel))


def test_the_version_is_what_the_wheel_says(tmp_path: Path) -> None:
    assert official_worker.version(unpacked(tmp_path / "wheel")) == "1.3.0"
    assert official_worker.version(tmp_path) == "?"


def test_a_worker_that_is_asked_nothing_ends_without_this_package() -> None:
    command = [sys.executable, "-I", "-S", official_worker.__file__]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
