"""The encoding benchmark: documents, checkpoint, both sides alike, the report and the verb."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lfm2_evals.bench import encoders
from lfm2_evals.bench.documents import BACKBONES, draw, write_retriever
from lfm2_evals.bench.encoding import Plan, measure
from lfm2_evals.bench.workers import peak_bytes
from lfm2_evals.commands import plugin
from lfm2_mm.errors import Lfm2Error, MissingExtra, SettingError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evals-encoding") / "tiny"
    write_retriever(BACKBONES["tiny"], folder)
    return folder


def fake_python(folder: Path, *, vectors: int = 256) -> str:
    """An interpreter that ignores its script: the peer takes 1.2 times as long as we do."""
    script = folder / f"python-{vectors}"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "peer = sys.argv[-1] == 'sentence-transformers'\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    answer = {'versions': {sys.argv[-1]: '1.0'}}\n"
        "    if request['do'] == 'encode':\n"
        "        words = sum(len(text.split()) + 2 for text in request['texts'])\n"
        "        answer = {'seconds': 2.4 if peer else 2.0, 'cpu_seconds': 4.0,\n"
        f"                  'vectors': words if not peer or words != 256 else {vectors},\n"
        "                  'peak_bytes': (300 if peer else 200) * 2**20}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    script.chmod(0o755)
    return str(script)


def test_drawn_documents_have_their_lengths() -> None:
    texts, lengths = draw("128", 3)
    assert lengths == [128] * 3 and [len(text.split()) for text in texts] == [126] * 3
    texts, lengths = draw("mixed", 200)
    assert (min(lengths), max(lengths)) == (8, 512) and 60 < sorted(lengths)[100] < 90
    assert draw("mixed", 200) == (texts, lengths) != draw("mixed", 200, seed=1)


def test_the_released_shape_has_about_350_million_weights() -> None:
    import torch

    from lfm2_mm.backbone import Backbone

    with torch.device("meta"):
        backbone = Backbone(BACKBONES["350m"])
    assert 345e6 < sum(p.numel() for p in backbone.parameters()) < 365e6


def test_both_sides_make_the_same_vectors_of_the_drawn_tokens(tiny: Path) -> None:
    texts, lengths = draw("mixed", 3)
    found = {}
    for name, side in ((name, make()) for name, make in encoders.SIDES.items()):
        versions = side.load(str(tiny), 1)
        assert {name, "torch"} <= set(versions)
        found[name] = side.encode(texts)
        assert [len(one) for one in found[name]] == lengths
    for ours, theirs in zip(found["lfm2_mm"], found["sentence-transformers"], strict=True):
        assert (ours * theirs.float()).sum(-1).min() > 0.98
        assert (ours @ ours.T).mean() < 0.5  # they are not all the same vector


def test_a_side_serves_and_survives_a_failure(tiny: Path) -> None:
    requests: list[dict[str, Any]] = [
        {"do": "load", "folder": str(tiny), "threads": 1},
        {"do": "encode", "texts": draw("128", 2)[0]},
        {"do": "load", "folder": str(tiny / "none"), "threads": 1},
        {"do": "dance"},
    ]
    out = io.StringIO()
    said = io.StringIO("".join(json.dumps(one) + "\n" for one in requests))
    encoders.serve(encoders.Ours(), said, out, peak_bytes)
    loaded, encoded, failed, danced = map(json.loads, out.getvalue().splitlines())
    assert set(loaded["versions"]) == {"lfm2_mm", "torch"}
    assert encoded["vectors"] == 256 and encoded["seconds"] > 0 < encoded["peak_bytes"]
    assert failed["error"].startswith("ModelNotFound: ")
    assert danced == {"error": "there is no request 'dance'"}


def test_a_kept_checkpoint_is_used_again_and_another_is_refused(tiny: Path, tmp_path: Path) -> None:
    before = (tiny / "model.safetensors").stat().st_mtime_ns
    write_retriever(BACKBONES["tiny"], tiny)
    assert (tiny / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SettingError, match="something else than this benchmark's checkpoint; name"):
        write_retriever(BACKBONES["350m"], tiny)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="something else"):
        write_retriever(BACKBONES["tiny"], tmp_path)


def test_ratios_and_targets_come_out_right(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python(tmp_path)
    monkeypatch.setattr(sys, "executable", python)
    plan = Plan(shapes="tiny", documents=2, rounds=2, peer_python=python, checkpoint=tiny)
    found = measure(plan)
    assert [one.reached for one in found.sets] == [True, True, False]
    text = found.markdown()
    assert "| 128 | 2 | 256 | 2.00 | 2.40 | 128 | 107 | 1.20 | 1, reached |" in text
    assert "1.3, missed |" in text
    assert "Peak memory: lfm2_mm 200 MiB, sentence-transformers 300 MiB." in text
    assert json.loads(json.dumps(found.to_dict()))["sets"][2]["reached"] is False
    assert len(found.measurements) == 12


def test_packed_weights_are_drawn_and_have_targets_of_their_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python(tmp_path)
    monkeypatch.setattr(sys, "executable", python)
    plan = Plan(
        shapes="tiny",
        sets=("512",),
        documents=2,
        rounds=1,
        quantize="int8",
        peer_python=python,
        checkpoint=tmp_path / "checkpoint",
    )
    found = measure(plan)
    assert [one.target for one in found.sets] == [1.3]
    assert "random weights, ours int8, theirs bf16" in found.markdown()
    side = encoders.Ours()
    side.load(str(tmp_path / "checkpoint-int8"), 1)
    assert side.model.packed
    texts, lengths = draw("mixed", 3)
    assert [len(one) for one in side.encode(texts)] == lengths


def test_sides_that_see_other_tokens_are_not_compared(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python(tmp_path, vectors=255)
    monkeypatch.setattr(sys, "executable", python)
    plan = Plan(
        shapes="tiny", sets=("128",), documents=2, rounds=1, peer_python=python, checkpoint=tiny
    )
    with pytest.raises(
        Lfm2Error, match="^sentence-transformers made 255 vectors of the 256 tokens of 128, so"
    ):
        measure(plan)


def test_plans_that_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="^there is no shape '7b'; choose from 350m, tiny$"):
        Plan(shapes="7b")
    with pytest.raises(SettingError, match="^there is no set '64'; choose from 128, 512, mixed$"):
        Plan(sets=("64",))
    with pytest.raises(SettingError, match="^rounds is 0; it must be at least 1$"):
        Plan(rounds=0)
    with pytest.raises(MissingExtra, match="cannot import sentence-transformers; install `sent"):
        measure(Plan(peer_python=str(tmp_path / "python")))


def invoke(*words: str) -> Result:
    command = next(one for one in plugin.commands if one.name == "bench")
    return CliRunner().invoke(command, ["encoding", *words], prog_name="lfm2-mm bench")


def test_the_verb_prints_and_writes(tiny: Path, tmp_path: Path) -> None:
    """Ours alone, in a real process."""
    words = ["--shapes", "tiny", "--set", "128", "--documents", "2", "--rounds", "1"]
    words += ["--threads", "1", "--alone", "--checkpoint", str(tiny)]
    result = invoke(*words, "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.exception
    said = json.loads(result.stdout)
    assert said["sets"][0]["tokens"] == 256 and said["sets"][0]["peer"] is None
    text = (tmp_path / "out" / "bench-encoding.md").read_text("utf-8")
    assert text.startswith("# Encoding documents at the tiny shapes, random weights, bf16\n")
    assert json.loads((tmp_path / "out" / "bench-encoding.json").read_text("utf-8")) == said
