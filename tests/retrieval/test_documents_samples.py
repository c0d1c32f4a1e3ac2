"""The sample documents say what their list says, and every sample query names one of them."""

from __future__ import annotations

import json
import re
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import lfm2_retrieval
from lfm2_retrieval.documents import Document, read_documents

SAMPLES = Path(lfm2_retrieval.__file__).parent / "samples"
TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_samples.py"


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    found = list(
        read_documents([SAMPLES / "documents"], count_tokens=lambda text: len(text) // 3 + 1)
    )
    assert all(isinstance(item, Document) for item in found), found
    return {item.path: item for item in found if isinstance(item, Document)}


def listed() -> dict[str, str]:
    """File to language, as SOURCES.md says."""
    text = (SAMPLES / "SOURCES.md").read_text("utf-8")
    return dict(re.findall(r"^\| (\S+\.\w+) \| (\w\w) \|", text, re.M))


def test_every_sample_is_listed_with_its_language(documents: dict[str, Document]) -> None:
    assert {path.partition("#")[0]: d.language for path, d in documents.items()} == listed()
    assert set(listed().values()) == {"en", "de", "fr", "es", "ja", "ko", "zh", "ar"}
    assert all(document.title and document.chunks for document in documents.values())


def test_every_query_is_in_another_language_or_english(documents: dict[str, Document]) -> None:
    queries = json.loads((SAMPLES / "queries.json").read_text("utf-8"))
    assert {query["document"].partition("#")[0] for query in queries} == set(listed())
    assert {query["document"] for query in queries} <= set(documents)
    crossing = [q for q in queries if documents[q["document"]].language != q["lang"]]
    assert len(crossing) >= 40


def test_samples_are_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 300_000


def tool() -> ModuleType:
    spec = spec_from_file_location("make_samples", TOOL)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_made_samples_are_what_the_tool_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["make_samples.py", str(tmp_path)])
    tool().main()
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["levain.pdf", "ryokucha.docx", "waschmaschine.docx"]
    assert (tmp_path / "levain.pdf").read_bytes() == (
        SAMPLES / "documents" / "levain.pdf"
    ).read_bytes()
    for name in made[1:]:
        assert (
            members(tmp_path / name)["word/document.xml"]
            == (members(SAMPLES / "documents" / name)["word/document.xml"])
        )
