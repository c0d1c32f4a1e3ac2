from __future__ import annotations

from html.parser import HTMLParser

from lfm2_retrieval.explain import explain_page
from lfm2_retrieval.index.model import Hit
from tests.retrieval.word_encoder import WordEncoder

HOSTILE = "<script>alert(1)</script> brake \x1b[31m \u202e \"'&<img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.warm: dict[str, float] = {}
        self._heat: float | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        style = dict(attrs).get("style") or ""
        self._heat = float(style.removeprefix("--w:")) if tag == "mark" else None

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._heat is not None:
            self.warm[data] = self._heat
            self._heat = None


def page(query: str, *texts: str, **facts: object) -> Page:
    hits = [Hit(id=f"{i}#0", score=1.5, path=None, text=t) for i, t in enumerate(texts)]
    if facts:
        hits = [Hit(**{**vars(hit), **facts}) for hit in hits]
    return Page(explain_page(query, hits, WordEncoder()))


def test_matching_tokens_are_warm_and_everyday_words_are_not() -> None:
    found = page("Is it the Bremse?", "the brake is warm")
    assert found.warm["brake"] > 0.9
    assert not {"the", "is", "warm"} & set(found.warm)
    assert "Bremse" in found.words and "similarity 1.00" in str(found.attributes)


def test_what_documents_say_is_escaped() -> None:
    found = page(HOSTILE, HOSTILE, path=HOSTILE, title=HOSTILE, language="<b>")
    assert not {"script", "img", "b", "a", "link"} & set(found.tags)
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in found.attributes)
    assert "<script>alert(1)</script>" in found.words
    raw = explain_page(HOSTILE, [], WordEncoder())
    assert "\x1b" not in raw and "\u202e" not in raw and "Nothing was found" in raw
    assert "\x1b" not in found.words and "\u202e" not in found.words


def test_the_page_needs_nothing_else() -> None:
    raw = explain_page("brake", [Hit(id="a#0", score=1, path="a.md", text="brake")], WordEncoder())
    assert "default-src 'none'" in raw and "prefers-color-scheme: dark" in raw
    assert "http" not in raw.replace("http-equiv", "") and "url(" not in raw


def test_the_table_adds_up_to_maxsim() -> None:
    found = page("brake wheel", "a brake", path="m.pdf", page=3, line=7, language="en")
    assert "m.pdf" in found.words and "page 3 · line 7 · en" in found.words
    assert "1 special and filling tokens" in found.words


def test_the_whole_passage_is_there_once() -> None:
    text = "The brake,\n\nthe  wheel — und die Bremse."
    assert text in page("brake", text).words
    assert page("brake", "").tags.count("section") == 1
