"""The vision benchmark: arithmetic, checkpoints, workers, both sides faked, and its verb."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lfm2_evals.bench.shapes import SHAPES, work, write_checkpoint
from lfm2_evals.bench.vision import Plan, VisionBench, draw_images, measure, parse_sizes
from lfm2_evals.bench.workers import Ours, peak_bytes, serve
from lfm2_evals.commands import TIER_NAMES, plugin
from lfm2_evals.scenes import TIERS
from lfm2_mm.errors import Lfm2Error, MissingExtra, SettingError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evals-bench") / "tiny"
    write_checkpoint(SHAPES["tiny"], folder)
    return folder


def fake_python(folder: Path, *, prompt_tokens: int = 90) -> str:
    """An interpreter that ignores its script: the peer takes ten times as long as we do."""
    script = folder / f"python-{prompt_tokens}"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "peer = sys.argv[2] == 'transformers'\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    answer = {}\n"
        "    if request['do'] == 'load':\n"
        "        answer['versions'] = {sys.argv[2]: '1.0'}\n"
        "    if request['do'] == 'see':\n"
        "        answer = {'seconds': 0.3 if peer else 0.1}\n"
        "    if request['do'] == 'ask':\n"
        "        second = request['tokens'] == 1\n"
        "        answer = {'first_token': 2.0 if peer else 0.1 if second else 0.4,\n"
        "                  'decode': 4.0 if peer else 2.0, 'tokens': request['tokens'],\n"
        f"                  'prompt_tokens': {prompt_tokens} if peer else 90,\n"
        "                  'peak_bytes': (300 if peer else 400) * 2**20}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    script.chmod(0o755)
    return str(script)


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tokens", "prefill", "vision"),
    [
        ((256, 256), 64, 37, 46),
        ((512, 512), 256, 148, 213),
        ((1024, 1024), 1280, 756, 1063),
        ((1920, 1080), 2300, 1387, 1910),
    ],
)
def test_the_arithmetic_agrees_with_the_published_counts(
    size: tuple[int, int], tokens: int, prefill: int, vision: int
) -> None:
    done = work(SHAPES["450m-2.5"], *size)
    assert done.tokens == tokens
    assert round(done.prefill) == prefill
    assert done.vision == pytest.approx(vision, rel=0.03)  # they leave out scores or connector
    assert done.vision_padded >= done.vision
    assert done.total == done.vision + done.prefill


def test_the_released_shapes_have_about_450_million_weights() -> None:
    import torch

    from lfm2_vision.model import VisionLanguageModel

    shapes = SHAPES["450m"]
    with torch.device("meta"):
        model = VisionLanguageModel(shapes.tower, shapes.connector, shapes.backbone)
    assert 440e6 < sum(p.numel() for p in model.parameters()) < 460e6


def test_a_written_checkpoint_loads_and_answers(tiny: Path, tmp_path: Path) -> None:
    import lfm2_mm

    model = lfm2_mm.load(tiny, dtype="bfloat16")
    image = draw_images([(96, 64)], tmp_path)["96x64"]
    answer = model.ask("What?", images=[image], max_tokens=2)
    assert answer.done.usage.completion_tokens == 2
    assert answer.done.usage.attachment_tokens == work(SHAPES["tiny"], 96, 64).tokens


def test_a_checkpoint_drawn_packed_loads_and_answers(tmp_path: Path) -> None:
    import lfm2_mm
    from lfm2_mm.quantize.layers import PackedLinear

    write_checkpoint(SHAPES["tiny"], tmp_path / "packed", quantize="int4")
    model = lfm2_mm.load(tmp_path / "packed")
    tower = model.parts["model.vision_tower.vision_model."]
    layer = tower.encoder.layers[0].mlp.fc1
    assert isinstance(layer, PackedLinear) and layer.weight.scheme == "int8"
    assert model.backbone.layers[0].feed_forward.w1.weight.scheme == "int4-g32"
    image = draw_images([(96, 64)], tmp_path)["96x64"]
    assert model.ask("What?", images=[image], max_tokens=2).done.usage.completion_tokens == 2
    assert 0.3 < float(layer.weight.dense().std()) * 32**0.5 < 1.2


def test_drawn_images_have_their_sizes_and_formats(tmp_path: Path) -> None:
    from PIL import Image

    for name, path in draw_images([(512, 512), (1024, 600)], tmp_path).items():
        with Image.open(path) as image:
            assert f"{image.width}x{image.height}" == name
            assert image.format == ("PNG" if name == "512x512" else "JPEG")


# --- the worker ---------------------------------------------------------------------------------


def test_our_side_serves_forgets_and_survives_a_failure(tiny: Path, tmp_path: Path) -> None:
    image = str(draw_images([(64, 64)], tmp_path)["64x64"])
    question = {"do": "ask", "image": image, "question": "What?", "tokens": 3}
    requests: list[dict[str, Any]] = [
        {"do": "load", "folder": str(tiny), "threads": 1},
        question,
        {**question, "question": "Which?", "tokens": 1},
        {"do": "see", "rows": 4, "columns": 6},
        {"do": "forget"},
        {**question, "image": str(tmp_path / "none.png")},
        {"do": "dance"},
    ]
    side, out = Ours(), io.StringIO()
    serve(side, io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), out)
    loaded, first, second, saw, forgot, failed, danced = map(
        json.loads, out.getvalue().splitlines()
    )
    assert set(loaded["versions"]) == {"lfm2_mm", "torch"}
    assert (first["tokens"], second["tokens"]) == (3, 1)
    assert first["prompt_tokens"] > 64 and first["first_token"] > 0 < first["peak_bytes"]
    assert saw["seconds"] > 0
    assert forgot == {} and len(side.model.engine.prefixes) == 0
    assert failed["error"].startswith("ImageError: ") and "none.png" in failed["error"]
    assert danced == {"error": "there is no request 'dance'"}


def test_the_worker_runs_without_this_package_and_keeps_its_answers_apart() -> None:
    import lfm2_evals.bench.workers as module

    code = f"import sys; sys.argv = ['workers.py', 'transformers']; print('noise'); " \
        f"import runpy; runpy.run_path({module.__file__!r}, run_name='__main__')"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        input='{"do": "dance"}\n',
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == '{"error": "there is no request \'dance\'"}'


def test_the_peak_is_that_of_this_process() -> None:
    before = peak_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_bytes() >= before and peak_bytes() > 64 << 20


# --- the whole ----------------------------------------------------------------------------------


def fake_run(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> VisionBench:
    python = fake_python(folder, **changes)
    monkeypatch.setattr(sys, "executable", python)
    sizes = ((256, 256), (96, 64))
    return measure(Plan(shapes="tiny", sizes=sizes, rounds=2, tokens=5, peer_python=python))


def test_ratios_and_targets_come_out_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_run(tmp_path, monkeypatch)
    rows = {(row.image, row.what): row for row in found.rows}
    first = rows["256x256", "first token, s"]
    assert first.ratio is not None and first.ratio.median == pytest.approx(5.0)
    assert (first.target, first.reached) == (2.5, True)
    assert rows["96x64", "first token, s"].target is None
    second = rows["96x64", "first token of a second question, s"]
    assert second.ratio is not None and second.ratio.median == pytest.approx(20.0)
    decode = rows["96x64", "decode, tokens/s"]
    assert decode.ours.median == 2.0 and decode.ratio is not None
    assert decode.ratio.median == pytest.approx(2.0)
    memory = rows["all", "peak memory, MiB"]
    assert (memory.ours.median, memory.reached) == (400.0, False)
    text = found.markdown()
    assert "| 256x256 | first token, s | 0.400 | 2.000 | 5.00 | 2.5, reached |" in text
    assert "| all | peak memory, MiB | 400 | 300 | 0.75 | 1, missed |" in text
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["reached"] is True
    assert "| 1024 patches | vision tower, s | 0.100 | 0.300 | 3.00 |  |" in text
    assert len(found.measurements) == 12


def test_packed_weights_have_targets_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python(tmp_path)
    monkeypatch.setattr(sys, "executable", python)
    plan = Plan(
        shapes="tiny", sizes=((256, 256),), rounds=1, tokens=5, quantize="int8", peer_python=python
    )
    text = measure(plan).markdown()
    assert "random weights, ours int8, theirs bf16" in text
    assert "| 256x256 | first token, s | 0.400 | 2.000 | 5.00 | 3.5, reached |" in text
    assert "| 1024 patches | vision tower, s | 0.100 | 0.300 | 3.00 | 2, reached |" in text


def test_sides_that_see_different_prompts_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Lfm2Error, match=r"different lengths for 256x256 \(\{'lfm2_mm': 90, "):
        fake_run(tmp_path, monkeypatch, prompt_tokens=91)


def test_plans_are_checked() -> None:
    with pytest.raises(
        SettingError, match="^the shapes are '7b'; choose from 450m, 450m-2.5, tiny"
    ):
        Plan(shapes="7b")
    with pytest.raises(SettingError, match="^tokens is 1; it must be at least 2$"):
        Plan(tokens=1)
    assert parse_sizes("256x256, 1920X1080,256x256") == ((256, 256), (1920, 1080))
    for bad, said in (("big", "write it as 1920x1080"), ("9x9", "sides of 64 to 4096 pixels")):
        with pytest.raises(SettingError, match=f"the image size is '{bad}'.*{said}"):
            parse_sizes(bad)


# --- the verbs ----------------------------------------------------------------------------------


def invoke(*words: str) -> Result:
    command = next(c for c in plugin.commands if c.name == words[0])
    return CliRunner().invoke(command, list(words[1:]), prog_name=f"lfm2-mm {words[0]}")


def test_the_verbs_are_found_without_importing_torch() -> None:
    code = "import sys, lfm2_evals.commands as c; print([v.name for v in c.plugin.commands], " \
        "'torch' in sys.modules)"  # fmt: skip
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['eval', 'bench'] False"
    assert tuple(TIERS) == TIER_NAMES


def test_a_missing_peer_is_one_sentence_that_says_how_to_get_it() -> None:
    result = invoke("bench", "vision", "--peer-python", "nowhere/python")
    assert isinstance(result.exception, MissingExtra)
    assert str(result.exception) == (
        "there is no interpreter 'nowhere/python' to run transformers with; `make bench-peers` "
        "builds it, --peer-python names another, --alone measures ours only"
    )


def test_bench_prints_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python(tmp_path)
    monkeypatch.setattr(sys, "executable", python)
    words = ["vision", "--shapes", "tiny", "--images", "64x64", "--rounds", "1", "--out"]
    result = invoke("bench", *words, str(tmp_path / "out"), "--peer-python", python, "--json")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["plan"]["sizes"] == [[64, 64]]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"bench-vision.md", "bench-vision.json"}
    alone = invoke("bench", *words[:-1], "--alone")
    assert alone.exit_code == 0, alone.exception
    assert "| 64x64 | first token, s | 0.400 |  |  |  |" in alone.stdout


def test_eval_refuses_what_it_does_not_know() -> None:
    result = invoke("eval", "mmlu")
    assert result.exit_code == 2
    assert "there is no task 'mmlu'; the tasks are scenes" in result.stderr


def test_eval_scores_a_model_and_compares_with_an_earlier_run(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_evals.scenes import Scenes

    monkeypatch.setattr(Scenes, "max_tokens", 2)
    out = tmp_path / "report"
    words = ["eval", "scenes", "-m", str(tiny), "--count", "1", "--tier", "signs"]
    result = invoke(*words, "--out", str(out))
    assert result.exit_code == 0, result.exception
    assert result.stdout == (out / "scenes.md").read_text("utf-8")
    assert "## Words on signs" in result.stdout and "| sign | 0.0 |" in result.stdout
    assert "wrote" in result.stderr
    again = invoke(*words, "--json", "-q", "--against", str(out / "scenes.json"))
    assert again.exit_code == 0, again.exception
    assert json.loads(again.stdout)["sections"][0]["scores"][0]["n"] == 1
    assert again.stderr == ""
    third = invoke(*words, "--against", str(out / "scenes.json"))
    assert "Against the earlier run, on 1 common questions: 0.0 % then, 0.0 % now" in third.stdout


def test_eval_prints_what_it_has_when_it_is_interrupted(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lfm2_evals.task as task

    def interrupted(*args: Any, **options: Any) -> task.Run:
        return task.Run("scenes/core", total=5)

    monkeypatch.setattr(task, "run", interrupted)
    result = invoke("eval", "scenes", "-m", str(tiny), "--count", "1")
    assert "Stopped early: these are the answers until then." in result.stdout
    assert result.exit_code != 0


@pytest.mark.parametrize("content", [None, "[]", "{", '{"outcomes": {"a": [{}]}}'])
def test_an_earlier_run_that_is_none_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    result = invoke("eval", "scenes", "--against", str(path))
    assert isinstance(result.exception, Lfm2Error)
    assert "old.json' cannot be compared with (" in str(result.exception)
