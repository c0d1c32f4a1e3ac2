"""Properties files, JavaScript modules and gettext sources, and how file names tell a language."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfm2_retrieval.corpus import sources
from lfm2_retrieval.corpus.catalogs import messages
from lfm2_retrieval.corpus.formats import module_texts, properties_texts


def _write(folder: Path, told: dict[str, str]) -> list[tuple[str, Path]]:
    for name, text in told.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [(name, folder / name) for name in told]


def test_properties_are_read_without_escapes() -> None:
    text = "# a note\n! another\nSAVE=Save it\n  the\\ key : Don''t \\\n    stop\n"
    text += "u=\\u0646\\u0639\\u0645\nnone=\n"
    assert list(properties_texts(text)) == [
        ("SAVE", "Save it"),
        ("the key", "Don't stop"),
        ("u", "نعم"),
    ]


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("export const ar = {a: {b: 'x'}, 'c': \"y\"};", [("a\0b", "x"), ("c", "y")]),
        ("define({root:{'oj-a':{b:\"x\"}},ar:1});", [("oj-a\0b", "x")]),
        ("define({'oj-a':{b:\"x\"}});", [("oj-a\0b", "x")]),
        ('var t={a:"\\u0646\\x41\\n"},u={b:`x`};export{t as a};', [("a", "نA\n"), ("b", "x")]),
        ('B.Msg["ONE"] = "x";  // ONE: "y"\nB.Msg["TWO"] = "z";', [("ONE", "x"), ("TWO", "z")]),
        (
            "x = {a: 'long ' +\n 'text', /* b: 'n' */ c: 'it\\'s'}",
            [("a", "long text"), ("c", "it's")],
        ),
        ("x = {a: ['p', 'q'], b(n) { return 'r' }, c: f('s'), d: void 0, e: 'z'}", [("e", "z")]),
        ('var Email = "x";\nvar Role = "y";', [("Email", "x"), ("Role", "y")]),
    ],
)
def test_modules_are_read_as_tokens(module: str, told: list[tuple[str, str]]) -> None:
    assert list(module_texts(module)) == told


def test_names_tell_the_language_and_what_belongs_together(tmp_path: Path) -> None:
    told = {
        "src/m/messagebundle.properties": "k=Save it",
        "src/m/messagebundle_en.properties": "k=Keep it",
        "src/m/messagebundle_ar.properties": "k=حفظ",
        "src/f/messagebundle.properties": "k=Delete it",
        "src/f/messagebundle_zh_CN.properties": "k=删除",
        "src/f/messagebundle_xx.properties": "k=nothing",
        "src/f/other_zh_CN.properties": "k=别的",
    }
    names = r"(?P<at>.*)/messagebundle_?(?P<locale>\w+)?\.properties"
    assert list(messages(_write(tmp_path, told), names)) == [
        {"en": "Delete it", "zh": "删除"},
        {"en": "Save it", "ar": "حفظ"},
    ]


def test_gettext_sources_are_read_but_for_what_is_fuzzy(tmp_path: Path) -> None:
    entry = 'msgid "{}"\nmsgstr "{}"\n\n'
    text = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
    text += entry.format("Save it", "保存する") + "#, fuzzy\n" + entry.format("Delete it", "保存")
    text += 'msgid "One file"\nmsgid_plural "Many files"\nmsgstr[0] "ファイル"\n\n'
    files = _write(tmp_path, {"locale/ja/LC_MESSAGES/x.po": text})
    names = r"locale/(?P<locale>\w+)/LC_MESSAGES/\w+\.po"
    assert list(messages(files, names)) == [
        {"ja": "保存する", "en": "Save it"},
        {"ja": "ファイル", "en": "One file"},
    ]
    assert list(messages(files)) == []


def test_the_outermost_language_and_lists_of_words_are_left_out(tmp_path: Path) -> None:
    told = {
        f"{name}.json": json.dumps({name: {"bus": {"name": text, "terms": terms}}})
        for name, text, terms in (("en", "Bus Stop", "bus,stop"), ("ar", "موقف حافلات", "حافلة"))
    }
    files = _write(tmp_path, told)
    assert list(messages(files)) == [{"en": "Bus Stop", "ar": "موقف حافلات"}]
    assert list(messages(files, without="bus")) == []
    assert len(list(messages(files, without="bu"))) == 1


def test_json_in_a_module_is_read(tmp_path: Path) -> None:
    told = {
        f"dist/{name}.js": f"var {name} = {json.dumps(json.dumps({'a': text}, indent=1))};"
        for name, text in (("en_US", "Connect wallet"), ("ko_KR", "지갑 연결"))
    }
    names = r"dist/(?P<locale>\w+)\.js"
    assert list(messages(_write(tmp_path, told), names)) == [
        {"en": "Connect wallet", "ko": "지갑 연결"}
    ]


def test_what_is_not_in_the_languages_script_is_not_translated(tmp_path: Path) -> None:
    told = {
        "en.json": '{"a": "Remixing & Copying"}',
        "ar.json": '{"a": "Remixing and Copying"}',
        "de.json": '{"a": "Remix und Kopie"}',
    }
    assert list(messages(_write(tmp_path, told))) == [
        {"en": "Remixing & Copying", "de": "Remix und Kopie"}
    ]


def test_patterns_of_sources_name_a_locale() -> None:
    every = (*sources.SOURCES, *sources.MORE_SOURCES)
    with_names = {s.package: s.names for s in every if s.names}
    assert all("(?P<locale>" in names for names in with_names.values())
    assert not {s.package for s in every if s.names} & set(sources.HELD_OUT_PACKAGES)
    files = [("dist/prod/chunk-6U3AYISY.js", Path("en")), ("dist/prod/chunk-X.js", Path("no"))]
    assert list(messages(files[1:], with_names["@excalidraw/excalidraw"])) == []
