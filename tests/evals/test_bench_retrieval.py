"""The search benchmark: corpora, sides, the report and its targets, and the verb."""

from __future__ import annotations

import gzip
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lfm2_evals.bench import passages, searchers
from lfm2_evals.bench.retrieval import Plan, RetrievalBench, SideResult, measure
from lfm2_evals.bench.rounds import spread
from lfm2_evals.bench.workers import peak_bytes
from lfm2_evals.commands import plugin
from lfm2_mm.errors import InputError, SettingError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    passages.draw(120, folder, queries=3, dim=16)
    return folder


def test_drawn_passages_have_their_lengths_and_queries(drawn: Path) -> None:
    corpus = searchers.Corpus(str(drawn))
    assert len(corpus) == 120
    assert corpus.lengths.min() >= 8 and corpus.lengths.max() <= 24
    assert corpus.queries.shape == (3, 16, 16)
    np.testing.assert_allclose(np.linalg.norm(corpus.queries, axis=-1), 1, rtol=1e-5)
    rows = np.asarray(corpus.rows, np.float32)
    assert len(rows) == corpus.lengths.sum()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, rtol=1e-2)
    blocks = [one for _, block in corpus.blocks(50) for one in block]
    assert [len(one) for one in blocks] == corpus.lengths.tolist()


@pytest.mark.parametrize("name", ["lfm2_mm", "exact", "numpy", "sentence-transformers"])
def test_every_side_finds_the_same(name: str, drawn: Path, tmp_path: Path) -> None:
    where = {"corpus": str(drawn), "folder": str(tmp_path)}
    requests: list[dict[str, Any]] = [
        {"do": "build", **where},
        {"do": "load", **where},
        {"do": "search", "query": 1, "k": 5},
        {"do": "dance"},
        {"do": "search", "query": 99, "k": 5},
    ]
    said, answers = io.StringIO("".join(json.dumps(one) + "\n" for one in requests)), io.StringIO()
    searchers.serve(searchers.SIDES[name](), said, answers, peak_bytes)
    built, loaded, found, strange, broken = map(json.loads, answers.getvalue().splitlines())
    assert built["seconds"] >= 0
    assert loaded["versions"]
    corpus = searchers.Corpus(str(drawn))
    rows = [one for _, block in corpus.blocks(50) for one in block]
    scores = [(corpus.queries[1] @ one.T).max(1).sum() for one in rows]
    assert found["found"] == np.argsort(scores)[::-1][:5].tolist()
    assert strange["error"] == "there is no request 'dance'"
    assert broken["error"].startswith("IndexError")


def test_passages_of_manual_pages_lose_their_markup(tmp_path: Path) -> None:
    page = '.TH LS 1\n.\\" a comment\n.SH NAME\n' + "\\fBls\\fR \\- list \\(bu files " * 40
    (tmp_path / "ls.1.gz").write_bytes(gzip.compress(page.encode()))
    (tmp_path / "notes.md").write_text("one two " * 100)
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    found = passages.passages(tmp_path, 100)
    assert 3 <= len(found) <= 6
    text = " ".join(found)
    assert "ls - list files" in " ".join(text.split())
    assert "\\" not in text and ".SH" not in text
    assert len(passages.passages(tmp_path, 2)) == 2


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no text to search in; name a folder with --corpus"):
        passages.passages(tmp_path, 5)


def test_encoded_passages_and_queries_are_stored(tmp_path: Path) -> None:
    from tests.retrieval.index_fakes import DIM, WordEncoder

    texts = [f"alpha beta gamma delta epsilon zeta {n}" for n in range(30)]
    told = []
    stored = passages.encode(
        texts, WordEncoder(), tmp_path, queries=4, progress=lambda a, b: told.append((a, b))
    )
    assert stored.passages == 30 and stored.tokens == 30 * 8
    assert len(stored.queries) == 4 and all(q in " ".join(texts) for q in stored.queries)
    assert told == [(30, 30)]
    corpus = searchers.Corpus(str(tmp_path))
    assert corpus.queries.shape[0] == 4 and corpus.queries.shape[2] == DIM


def test_vectors_are_kept_carried_on_and_used_again(tmp_path: Path) -> None:
    from tests.retrieval.index_fakes import DIM, WordEncoder

    encoder, texts = WordEncoder(), [f"alpha beta gamma {n}" for n in range(1200)]
    encoder.fingerprint = "abc"

    def encode(count: int, where: str) -> tuple[int, np.ndarray]:
        folder = tmp_path / where
        folder.mkdir()
        stored = passages.encode(texts[:count], encoder, folder, queries=1, cache=tmp_path / "kept")
        corpus = searchers.Corpus(str(folder))
        assert len(corpus) == count and len(corpus.rows) == stored.tokens
        return stored.encoded, np.array(corpus.rows)

    encoded, whole = encode(1200, "whole")
    assert encoded == 1200
    # fewer passages are the beginning of the same file
    encoded, some = encode(700, "some")
    assert encoded == 0
    np.testing.assert_array_equal(some, whole[: len(some)])
    # a write that was cut short costs the passages it was about, and nothing else
    (kept,) = (tmp_path / "kept").iterdir()
    with open(kept / "vectors.f2", "r+b") as file:
        file.truncate((kept / "vectors.f2").stat().st_size - 3)
    with open(kept / "passages.u8", "ab") as more:
        more.write(b"half")
    encoded, again = encode(1200, "again")
    assert encoded == 1
    np.testing.assert_array_equal(again, whole)
    # what stands behind a passage that changed goes
    texts[600] = "delta"
    encoded, _ = encode(1200, "changed")
    assert encoded == 600
    assert (kept / "vectors.f2").stat().st_size % (2 * DIM) == 0


def test_the_whole_benchmark_on_a_few_passages() -> None:
    plan = Plan(passages=60, corpus=None, queries=2, rounds=1, threads=1, sides=("numpy", "qdrant"))
    plan = replace(plan, peer_python=sys.executable + "-of-nowhere")
    result = measure(plan)
    assert [side.name for side in result.sides] == ["lfm2_mm", "exact", "numpy"]
    assert [side.recall for side in result.sides] == [1.0, 1.0, 1.0]
    assert "left out" in result.facts["qdrant"]
    assert result.targets() == {}
    text = result.markdown()
    assert text.startswith("# Search in 60 passages")
    assert "| numpy |" in text and "bytes a token" in text
    assert json.loads(json.dumps(result.to_dict()))["plan"]["passages"] == 60


def test_our_index_is_kept_and_used_again(tmp_path: Path) -> None:
    plan = Plan(passages=60, corpus=None, queries=2, rounds=2, threads=1, sides=(), keep=tmp_path)
    first = measure(plan)
    (kept,) = tmp_path.iterdir()
    assert (kept / "built.json").exists() and (kept / "index").is_dir()
    assert "index" not in first.facts
    again = measure(plan)
    assert again.facts["index"].startswith("kept from an earlier run")
    assert again.sides[0].build == first.sides[0].build > 0
    # who begins changes from query to query and from round to round
    order = [one.side for one in again.measurements][::2]
    assert order == ["lfm2_mm", "exact", "exact", "lfm2_mm"]
    assert [one.round for one in again.measurements][::2] == [0, 0, 1, 1]
    assert {"cpu_seconds", "faults", "seconds", "peak_bytes"} <= set(again.measurements[0].values)


def test_targets_hold_for_a_hundred_thousand_passages_of_text() -> None:
    def side(name: str, p50: float, **more: Any) -> SideResult:
        common: dict[str, Any] = {"recall": 0.98, "build": 1.0, "build_memory": 1.0, "memory": 1.2}
        common["slowest"] = (90.0, 30.0, 250.0)
        return SideResult(name=name, p50=p50, p95=p50, **{**common, **more})

    result = RetrievalBench(
        plan=Plan(passages=100_000),
        facts={},
        sides=[
            side("lfm2_mm", 30.0, with_model=(41.0, 52.0)),
            side("exact", 600.0, sooner=spread([9.0])),
        ],
        bytes_per_token=70.0,
    )
    reached = {name: ok for name, (_, _, ok) in result.targets().items()}
    assert reached == {"p50": True, "sooner": False, "recall": True, "bytes": True, "memory": True}
    assert "Target sooner: 9 of 10, missed." in result.markdown()
    assert "slowest twentieth: 90.0 ms, of which 30.0 ms of CPU time" in result.markdown()
    assert "and 250 page faults that waited for the disk" in result.markdown()
    assert "With the query's encoding: p50 41.0 ms, p95 52.0 ms." in result.markdown()


def test_plans_that_cannot_be_measured() -> None:
    with pytest.raises(SettingError, match="rounds is 0; it must be at least 1"):
        Plan(rounds=0)
    with pytest.raises(SettingError, match="there is no side 'google'; choose from lfm2_mm, exact"):
        Plan(sides=("google",))


def test_the_verb_prints_and_writes(tmp_path: Path) -> None:
    command = next(one for one in plugin.commands if one.name == "bench")
    arguments = "retrieval --drawn --alone --passages 40 --queries 1 --rounds 1 --threads 1 -q"
    done = CliRunner().invoke(command, [*arguments.split(), "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sides"][0]["name"] == "lfm2_mm"
    assert (tmp_path / "bench-retrieval.md").read_text().startswith("# Search in 40 passages")
