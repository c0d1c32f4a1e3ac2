"""The texts of nano-colbert: cleaning, catalogs, names, frames, licences and the split."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo

from lfm2_mm.errors import InputError, MissingExtra
from lfm2_retrieval.corpus import build, cldr, frames, sources
from lfm2_retrieval.corpus.__main__ import main
from lfm2_retrieval.corpus.catalogs import LANGUAGES, messages
from lfm2_retrieval.corpus.text import clean, key, literals, strip_literals
from lfm2_retrieval.corpus.tokenizer import (
    DOCUMENT_PREFIX,
    QUERY_PREFIX,
    SPECIAL,
    tokenizer_files,
    train_tokenizer,
)

PERMISSIVE = {
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSD-3-Clause-Modification",
    "ISC",
    "MIT",
    "PostgreSQL",
    "UPL-1.0",
}


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("Delete %(name)s now", "Delete now"),
        ("Open <b>file</b> {0}…", "Open file"),
        ("ファイル(&F)", "ファイル"),
        ("&File", "File"),
        ("See [the docs](https://example.org/x) first.", "See the docs first."),
        ("{n, plural, one {# file} other {# files}}", ""),
        ("Sign in with %{name}, tilted [DIRECTION]", "Sign in with, tilted"),
        ("\u202b\u062d\u0641\u0638\u202c", "\u062d\u0641\u0638"),
        ("50% of all", "50% of all"),
        ("Save &amp; close", "Save & close"),
    ],
)
def test_messages_are_cleaned(raw: str, plain: str) -> None:
    assert clean(raw) == plain


def test_key_ignores_case_and_punctuation() -> None:
    assert key("Log in!") == key("log IN") == "login"
    assert key("削除する。") == "削除する"


def test_literals_are_what_other_scripts_leave_as_it_is() -> None:
    names = literals(["Django のバージョン", "Versão do Django"[:0]])
    assert names == {"django"}
    assert strip_literals("Django version 5.2 in /etc/hosts", names) == "version in"
    assert strip_literals("Use DAG run_id and camelCase words") == "Use and words"


def _mo(path: Path, pairs: dict[str, str]) -> None:
    catalog = Catalog()
    for message, text in pairs.items():
        catalog.add(message, text)
    stream = io.BytesIO()
    write_mo(stream, catalog)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stream.getvalue())


def test_gettext_messages_are_keyed_by_english(tmp_path: Path) -> None:
    for locale, text in (("de", "Datei löschen"), ("ja_JP", "ファイルを削除"), ("pt", "Apagar")):
        _mo(tmp_path / locale / "LC_MESSAGES" / "x.mo", {"Delete %s file": text})
    _mo(tmp_path / "pt_BR" / "LC_MESSAGES" / "x.mo", {"Delete %s file": "Excluir arquivo"})
    files = [(str(p.relative_to(tmp_path)), p) for p in tmp_path.rglob("*.mo")]
    assert list(messages(files)) == [
        {
            "de": "Datei löschen",
            "ja": "ファイルを削除",
            "pt": "Excluir arquivo",
            "en": "Delete file",
        }
    ]


def test_json_messages_need_an_english_file(tmp_path: Path) -> None:
    told = {
        "en-0123456789abcdef0123": {"ui": {"save": "Save it", "n": 3}},
        "zh-Hans-0123456789abcdef0123": {"ui": {"save": "保存"}},
        "ko-0123456789abcdef0123": {"ui": {"save": "Save it"}},
    }
    files = []
    for stem, content in told.items():
        path = tmp_path / f"{stem}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        files.append((f"static/{path.name}", path))
    assert list(messages(files)) == [{"en": "Save it", "zh": "保存"}]
    assert list(messages(files[1:])) == []


def test_every_frame_says_the_same_in_every_language() -> None:
    every = frames.frames()
    assert len(every) >= 30
    for name, sentences in every.items():
        assert set(sentences) == set(LANGUAGES), name
        slots = {lang: sorted(set(_slots(text))) for lang, text in sentences.items()}
        assert len({tuple(found) for found in slots.values()}) == 1, name


def _slots(text: str) -> list[str]:
    return [part.split("}")[0] for part in text.split("{")[1:]]


def test_words_are_there_in_every_language() -> None:
    words = frames.words()
    assert len(words) >= 190
    assert all(set(word) == set(LANGUAGES) and all(word.values()) for word in words)
    assert len({word["en"] for word in words}) == len(words)


def test_frames_are_filled_alike_each_time() -> None:
    things = cldr.names()["city"]
    first = list(frames.filled(3, 4, things))
    assert first == list(frames.filled(3, 4, things))
    assert first != list(frames.filled(4, 4, things))
    assert all("{" not in text for _, texts in first for text in texts.values())


def test_names_and_dates_come_in_all_languages() -> None:
    germany = next(n for n in cldr.names()["territory"] if n["en"] == "Germany")
    assert (germany["de"], germany["ja"], germany["zh"]) == ("Deutschland", "ドイツ", "德国")
    assert set(cldr.names()) >= {"language", "currency", "script", "month", "weekday", "unit"}
    for texts in cldr.rendered(Random(1).randrange(9), 12):
        assert set(texts) == set(LANGUAGES)


def test_only_permissive_licences_are_read() -> None:
    every = (*sources.SOURCES, *sources.MORE_SOURCES)
    assert {source.licence for source in every} <= PERMISSIVE
    pinned = sources.requirements()
    assert {source.package for source in every} | {"Babel", "emoji"} == set(pinned)
    assert all(pinned.values())
    assert set(sources.HELD_OUT_PACKAGES) < set(pinned)
    assert set(sources.HELD_OUT_FRAMES) < set(frames.frames())


def test_a_missing_package_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra) as caught:
        sources.find_packages([str(tmp_path)])
    assert str(caught.value).startswith(
        "the training texts need the package apache-airflow-core 3.3.2, but none is installed; "
        "run `pip install --no-deps --target"
    )


def test_packages_of_npm_are_read_where_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = {"packages.txt": {}, "packages-npm.txt": {"@a/b": "1.2"}}
    monkeypatch.setattr(sources, "_pinned", pinned.__getitem__)
    with pytest.raises(MissingExtra, match="npm package @a/b 1.2, but none is there; unpack `npm"):
        sources.find_packages([str(tmp_path)])
    where = tmp_path / "node_modules" / "@a" / "b"
    for name, text in (("en", "Save it"), ("zhCN", "保存"), ("ptBR", "Salvar")):
        path = where / "src" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"save": text}), encoding="utf-8")
    (where / "package.json").write_text(json.dumps({"version": "1.1"}))
    with pytest.raises(MissingExtra, match=r"@a/b 1\.2, but version 1\.1 is there"):
        sources.find_packages([str(tmp_path)])
    (where / "package.json").write_text(json.dumps({"version": "1.2"}))
    (found,) = sources.find_packages([str(tmp_path)]).values()
    files = sources.package_files(found, "src")
    assert [name for name, _ in files] == ["src/en.json", "src/ptBR.json", "src/zhCN.json"]
    assert list(messages(files)) == [{"en": "Save it", "pt": "Salvar", "zh": "保存"}]


def test_what_is_held_out_is_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"en": build.held_out()[0].texts["en"].upper(), "de": "x"}
    said = [("WTForms", told), ("WTForms", {"en": "A new one", "de": "y"})]
    monkeypatch.setattr(build, "find_packages", lambda folders: {})
    monkeypatch.setattr(build, "_every", lambda packages, seed: iter(said))
    train, kept = build.build([], say=lambda text: None)
    assert [concept.texts["en"] for concept in train] == ["A new one"]
    assert kept == []


def test_the_committed_half_is_held_out() -> None:
    concepts = build.held_out()
    assert len(concepts) > 2500
    allowed = {*sources.HELD_OUT_PACKAGES, *(f"frame {name}" for name in sources.HELD_OUT_FRAMES)}
    assert {concept.source for concept in concepts} == allowed
    trained = {key(word["en"]) for word in frames.words()}
    assert not trained & {key(concept.texts["en"]) for concept in concepts}


def test_concepts_are_read_as_written(tmp_path: Path) -> None:
    concepts = [build.Concept("word", {"en": "sea", "de": "Meer"}), build.Concept("x", {"en": "y"})]
    path = tmp_path / "c.jsonl.gz"
    build.write(path, concepts)
    first = path.read_bytes()
    build.write(path, build.read(path))
    assert build.read(path) == concepts
    assert path.read_bytes() == first
    assert [concept.weight for concept in concepts] == [6, 1]
    path.write_bytes(b"no gzip")
    with pytest.raises(InputError, match="cannot be read .*; build them again"):
        build.read(path)


def test_the_build_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["corpus"])
    assert main() == 2
    monkeypatch.setattr("sys.argv", ["corpus", str(tmp_path)])
    monkeypatch.setattr("sys.path", [])
    assert main() == 1
    assert "need the package" in capsys.readouterr().err


def test_the_tokenizer_writes_any_text_without_case() -> None:
    texts = ["Die Datenbank", "the database", "データベース", "قاعدة البيانات"] * 3
    tokenizer = train_tokenizer(texts, 420)
    assert tokenizer.get_vocab_size() <= 420
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(8))
    assert tokenizer.encode("DIE Datenbank").ids == tokenizer.encode("die datenbank").ids
    for text in ("ünknøwn ☃", "日本"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
    assert tokenizer.encode("a").ids[0] == 1
    assert None not in map(tokenizer.token_to_id, (QUERY_PREFIX, DOCUMENT_PREFIX, ",", "!"))
    assert (
        json.loads(tokenizer_files(tokenizer)["tokenizer_config.json"])["eos_token"] == SPECIAL[7]
    )
