from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lfm2_mm
from lfm2_mm.cli import plugins, terminal
from lfm2_retrieval import Index
from lfm2_retrieval.documents import Changes
from lfm2_retrieval.index.lock import WriterLock
from tests.retrieval.colbert_checkpoints import folder
from tests.retrieval.verbs import Run, runner, sentence, write_documents
from tests.retrieval.word_encoder import WordEncoder

MODEL = str(folder("causal"))
IDS = ["brake.md", "library.txt", "manual/bremse.txt", "plants.csv#1", "plants.csv#2"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Documents and an index of them; not to be changed."""
    place = tmp_path_factory.mktemp("verbs")
    with Index.open(place / "notes.idx", MODEL) as index:
        index.add(write_documents(place / "docs"))
    return place / "docs", place / "notes.idx"


@pytest.fixture
def notes(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """An index of one's own."""
    shutil.copytree(made[1], tmp_path / "notes.idx")
    return tmp_path / "notes.idx"


def ids(index: Path) -> list[str]:
    with Index.open(index, create=False, read_only=True) as opened:
        return sorted(row.id for row in opened.documents())


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "faiss", "transformers", "numpy", "rich", "bm25s", "trafilatura")
    code = (
        "import sys\n"
        "from lfm2_retrieval.commands import index, search, plugin\n"
        "for verb, args in ((index, ['add', '--help']), (search, ['--help'])):\n"
        "    verb.main(args, standalone_mode=False)\n"
        "list(plugin.demos), dict(plugin.recipes)\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
    for option in ("--watch", "--pool-factor", "--model", "--explain", "--filter", "--no-hybrid"):
        assert option in done.stdout


def test_add_makes_an_index_and_says_what_it_could_not_read(run: Run, tmp_path: Path) -> None:
    docs, notes = write_documents(tmp_path / "docs"), tmp_path / "notes.idx"
    result = run("index", "add", notes, docs, "-m", MODEL)
    assert result.exit_code == 0
    assert result.stdout.startswith("documents: 5 added, 1 unreadable; ")
    assert result.stderr.startswith("could not be read (1):\n  noise.txt: ")
    assert ids(notes) == IDS
    (docs / "library.txt").write_text("La biblioteca abre a las diez y cierra a las siete.\n")
    found: Any = json.loads(run("index", "add", notes, docs, "--json").stdout)
    assert (found["added"], found["updated"], found["unchanged"]) == (0, 1, 4)
    assert (found["model"], found["documents"]) == (MODEL, 5)
    assert [one["path"] for one in found["unreadable"]] == ["noise.txt"]


def test_nothing_to_read_is_a_failure(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    notes = tmp_path / "notes.idx"
    said = sentence(run("index", "add", notes, tmp_path / "empty", "-m", MODEL))
    assert said == f"there are no documents in '{tmp_path / 'empty'}'; check the path"
    assert not notes.exists()
    result = run("index", "add", notes, tmp_path / "gone.txt", "-m", MODEL)
    assert result.exit_code == 1 and "there is no such file or folder" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == "error: nothing could be read of 1 file; the list above says why"


def test_ctrl_c_keeps_what_was_acknowledged(
    run: Run, made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Index.add

    def interrupted(self: Index, *args: Any, **options: Any) -> Any:
        real(self, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "add", interrupted)
    notes = tmp_path / "notes.idx"
    result = run("index", "add", notes, made[0] / "brake.md", "-m", MODEL)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == (
        "interrupted: the index holds 1 document (1 passage), and they stay; the same command "
        "again continues\n"
    )
    monkeypatch.undo()
    with Index.open(notes, create=False) as opened:
        assert opened.status(verify=True).documents == 1


def test_an_index_does_not_index_itself(run: Run, tmp_path: Path) -> None:
    docs = write_documents(tmp_path / "docs")
    said = sentence(run("index", "add", docs / "notes.idx", docs, "-m", MODEL))
    assert "whose files it is to hold" in said and not (docs / "notes.idx").exists()
    hidden = docs / ".index"
    assert run("index", "add", hidden, docs / "brake.md", docs, "-m", MODEL).exit_code == 0


def test_pooling_stores_fewer_vectors_and_highlights_all_the_same(
    run: Run, made: tuple[Path, Path], tmp_path: Path
) -> None:
    tokens = []
    for factor in (1, 2):
        notes = tmp_path / f"{factor}.idx"
        added = run(
            "index", "add", notes, made[0] / "brake.md", "-m", MODEL, "--json",
            "--pool-factor", factor,
        )  # fmt: skip
        tokens.append(json.loads(added.stdout)["tokens"])
        found = json.loads(run("search", notes, "brake", "--json").stdout)["hits"]
        assert "brake" in [hit["text"][a:b] for hit in found for a, b, _ in hit["spans"]]
    assert tokens[1] < 0.7 * tokens[0]
    # an index remembers: what is added later is pooled, too, and nothing else is accepted
    again = run("index", "add", notes, made[0] / "library.txt", "-m", MODEL, "--json")
    alone = run(
        "index", "add", tmp_path / "alone.idx", made[0] / "library.txt", "-m", MODEL, "--json"
    )
    assert json.loads(again.stdout)["tokens"] < 0.7 * json.loads(alone.stdout)["tokens"]
    said = sentence(run("index", "add", notes, made[0], "-m", MODEL, "--pool-factor", 3))
    assert "was made with pool factor 2, not 3; leave the pool factor out, or make a new" in said


def test_a_bar_shows_on_a_terminal_only(
    run: Run, made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: stream is sys.stderr)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich believes it, so the bar is drawn
    args = ("index", "add", tmp_path / "notes.idx", made[0] / "library.txt", "-m", MODEL)
    result = run(*args)
    assert result.exit_code == 0 and "indexing" in result.stderr and "passages/s" in result.stderr
    assert result.stdout.startswith("documents: 1 added; 1 passage, ")
    assert run(*args, "-q").stderr == ""


def test_watch_follows_changes(
    run: Run, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lfm2_retrieval.documents as documents

    docs = write_documents(tmp_path / "docs")
    seen: list[list[str]] = []

    def watched(paths: Any, on_change: Any) -> None:
        assert paths == [docs]
        (docs / "new.txt").write_text("A wheel without spokes is no wheel.\n")
        (docs / "brake.md").unlink()
        shutil.rmtree(docs / "manual")
        with WriterLock(notes):
            on_change(Changes(("new.txt",), ("brake.md",)))
        seen.append(ids(notes))
        on_change(Changes(("new.txt",), ("brake.md", "manual")))
        seen.append(ids(notes))

    monkeypatch.setattr(documents, "watch", watched, raising=False)
    result = run("index", "add", notes, docs, "--watch")
    assert result.exit_code == 0
    assert seen == [IDS, ["library.txt", "new.txt", "plants.csv#1", "plants.csv#2"]]
    assert "watching for changes; Ctrl-C ends\n" in result.stderr
    assert "warning: process " in result.stderr and "2 documents removed; " in result.stderr


def test_rm_takes_documents_rows_folders_and_patterns(run: Run, notes: Path) -> None:
    assert run("index", "rm", notes, "plants.csv", "manual/").stdout == "3 documents removed\n"
    assert ids(notes) == ["brake.md", "library.txt"]
    found = run("index", "rm", notes, "*.md", "--json")
    assert json.loads(found.stdout)["removed"] == ["brake.md"]
    result = run("index", "rm", notes, "library.txt", "nope.txt")
    assert result.exit_code == 1 and "holds no document 'nope.txt'" in result.stderr
    assert ids(notes) == []


def test_ls_status_and_compact(run: Run, notes: Path) -> None:
    listed = run("index", "ls", notes)
    assert [line.split()[2] for line in listed.stdout.splitlines()] == IDS
    rows = json.loads(run("index", "ls", notes, "--json").stdout)
    assert [row["id"] for row in rows] == IDS and rows[0]["passages"] == 1
    assert f"model      {MODEL} (32 dimensions" in run("index", "status", notes).stdout
    assert "every file has its checksum" in run("index", "status", notes, "--verify").stdout
    run("index", "rm", notes, "brake.md")
    before = json.loads(run("index", "status", notes, "--json").stdout)
    assert (before["documents"], before["deleted"], before["verified"]) == (4, 1, False)
    assert run("index", "compact", notes).exit_code == 0
    after = json.loads(run("index", "status", notes, "--json", "--verify").stdout)
    assert (after["deleted"], after["verified"]) == (0, True)
    assert after["bytes"] < before["bytes"]


def test_search_shows_where_what_and_how_well(run: Run, made: tuple[Path, Path]) -> None:
    result = run("search", made[1], "brake squeals", "-k", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    first, text = result.stdout.splitlines()[:2]
    assert first.startswith("1. brake.md, line 1 · The brake · ")
    assert text.endswith("When the **brake** **squeals**, clean the rim and the pads.")
    found = json.loads(run("search", made[1], "brake squeals", "-k", 2, "--json").stdout)
    assert (found["query"], found["model"], len(found["hits"])) == ("brake squeals", MODEL, 2)
    hit = found["hits"][0]
    assert (hit["id"], hit["path"], hit["line"], hit["rank"]) == ("brake.md#0", "brake.md", 1, 1)
    assert {hit["text"][a:b] for a, b, _ in hit["spans"]} == {"brake", "squeals"}
    assert all(0 < weight <= 1 for _, _, weight in hit["spans"])


def test_search_modes_and_filters(run: Run, made: tuple[Path, Path]) -> None:
    def hits(*args: str) -> list[Any]:
        result = run("search", made[1], "water the basil", "--json", *args)
        return list(json.loads(result.stdout)["hits"])

    assert len(hits()) == 5 and hits("--exact") == hits()
    fused, alone = hits("--hybrid"), hits("--no-hybrid")
    assert max(hit["score"] for hit in fused) <= 2 / 61 < min(hit["score"] for hit in alone)
    only = hits("--filter", "path~*.txt", "--filter", "lang=es")
    assert [hit["path"] for hit in only] == ["library.txt"]
    none = run("search", made[1], "water", "--filter", "lang=xx")
    assert (none.exit_code, none.stdout) == (0, "")
    assert none.stderr == "nothing was found: no passage fits the filter\n"
    assert "cannot be understood" in sentence(run("search", made[1], "water", "--filter", "lang"))


def test_on_a_terminal_words_are_coloured(
    run: Run, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: stream is sys.stdout)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    styled = run("search", made[1], "brake squeals", "-k", 1).stdout
    assert "**" not in styled and "\x1b[1;33mbrake\x1b[0m \x1b[1;33msqueals" in styled
    monkeypatch.setenv("NO_COLOR", "1")
    assert "**brake**" in run("search", made[1], "brake squeals", "-k", 1).stdout


def test_nothing_a_document_says_steers_the_terminal(run: Run, tmp_path: Path) -> None:
    evil = "the brake \x1b[2J\x1b]0;owned\x07 \x9b31m \u202eesrever \u2066 <b>squeals</b>"
    with Index.open(tmp_path / "e.idx", lfm2_mm.load(MODEL)) as index:
        index.add_texts([evil], ["evil"])
    plain = run("search", tmp_path / "e.idx", "brake squeals")
    raw = run("search", tmp_path / "e.idx", "brake squeals", "--json").stdout
    for text in (plain.stdout, raw, run("index", "ls", tmp_path / "e.idx").stdout):
        assert not any(sign in text for sign in "\x1b\x07\x9b\u202e\u2066")
    assert json.loads(raw)["hits"][0]["text"] == evil
    page = tmp_path / "e.html"
    result = run("search", tmp_path / "e.idx", "brake squeals", "--explain", page)
    assert result.stderr == f"explained: {page}\n"
    written = page.read_text(encoding="utf-8")
    assert "<b>" not in written and "\x1b" not in written and "\u202e" not in written
    bad = sentence(run("search", tmp_path / "e.idx", "a", "--explain", tmp_path / "no" / "e.html"))
    assert "which is not there" in bad


def test_an_index_of_another_model_is_refused_with_both_names(
    run: Run, made: tuple[Path, Path]
) -> None:
    other = str(folder("plain"))
    for verb in (("search", made[1], "brake"), ("index", "add", made[1], made[0])):
        said = sentence(run(*verb, "-m", other))
        assert repr(MODEL) in said and repr(other) in said


def test_a_locked_index_names_the_process(run: Run, notes: Path, made: tuple[Path, Path]) -> None:
    with WriterLock(notes):
        for verb in (("add", notes, made[0] / "brake.md"), ("rm", notes, "*.md")):
            assert "is writing to the index" in sentence(run("index", *verb))
        assert run("search", notes, "brake", "-k", 1).exit_code == 0


def test_a_damaged_file_is_named(run: Run, notes: Path) -> None:
    victim = max((notes / "segments").rglob("*.bin"), key=lambda path: path.stat().st_size)
    data = victim.read_bytes()
    victim.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    assert victim.name in sentence(run("index", "status", notes, "--verify"))
    victim.write_bytes(data[:-1])
    for verb in (("search", notes, "brake"), ("index", "ls", notes), ("index", "compact", notes)):
        assert victim.name in sentence(run(*verb))


@pytest.mark.parametrize("verb", [("search", "brake"), ("index", "ls"), ("index", "status")])
def test_an_index_that_is_not_there(run: Run, tmp_path: Path, verb: tuple[str, ...]) -> None:
    name, rest = (verb[:2], ()) if verb[0] == "index" else (verb[:1], verb[1:])
    said = sentence(run(*name, tmp_path / "no.idx", *rest))
    assert "there is no index at" in said and not (tmp_path / "no.idx").exists()


def test_an_empty_query_is_refused(run: Run, made: tuple[Path, Path]) -> None:
    assert sentence(run("search", made[1], " ")) == "the query is ' '; write what to look for"


@pytest.mark.parametrize(
    "args",
    [
        ("search",),
        ("search", "a.idx"),
        ("search", "a.idx", "q", "-k", "0"),
        ("index", "add", "a.idx"),
        ("index", "add", "a.idx", ".", "--pool-factor", "0"),
        ("index", "nope"),
        ("index", "rm", "a.idx"),
    ],
)
def test_wrong_usage_exits_2(run: Run, args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and "--help explains" in result.stderr


def test_the_plugin_is_what_the_command_line_expects() -> None:
    from lfm2_retrieval.commands import plugin

    assert isinstance(plugin, plugins.Plugin)
    assert [command.name for command in plugin.commands] == ["index", "search"]
    assert "LiquidAI/LFM2" in plugin.notes["nano-colbert"]
    assert list(plugin.recipes) == ["nano-colbert", "nano-colbert-more"]


def test_the_demo_asks_the_shipped_documents(
    tmp_path: Path, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_retrieval import demo

    known = demo.questions()
    assert set(demo.QUESTIONS) <= set(known)
    shipped = {path.name for path in demo.documents().iterdir()}
    assert {name.partition("#")[0] for name in known.values()} <= shipped
    monkeypatch.setattr(demo, "documents", lambda: made[0])
    monkeypatch.setattr(demo, "questions", lambda: {"brake squeals": "brake.md", "pads": "x.md"})
    for _ in range(2):  # a second run begins anew
        found = list(demo.run(1, tmp_path, asked=("brake squeals", "pads"), encoder=WordEncoder()))
    assert [item.right for item in found] == [True, False]
    assert found[0].about.startswith("search.idx: 5 documents in ")
    assert found[0].answer.startswith("brake.md: ") and "**brake**" in found[0].answer
    assert found[0].files == ("search.html",) and found[1].files == ()
    assert {path.name for path in tmp_path.iterdir()} == {"search.idx", "search.html"}
