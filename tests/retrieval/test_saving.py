"""What is written: the files and words of the layout, the number format, the model file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lfm2_mm
from lfm2_mm.errors import InputError
from lfm2_retrieval.encoder import Encoder
from lfm2_retrieval.layout import Expansion
from lfm2_retrieval.saving import save_retriever
from tests.retrieval.colbert_checkpoints import DOCUMENTS, QUERIES, VARIANTS, folder


def load(place: Path, **options: Any) -> Encoder:
    found = lfm2_mm.load(place, threads=1, **options)
    assert isinstance(found, Encoder)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_saved_loads_the_same(name: str, tmp_path: Path) -> None:
    before = load(folder(name))
    before.save(tmp_path / "saved")
    after = load(tmp_path / "saved")
    assert after.spec == before.spec and after.fingerprint == before.fingerprint
    for encode, texts in (("encode_queries", QUERIES), ("encode_documents", DOCUMENTS)):
        pairs = zip(getattr(before, encode)(texts), getattr(after, encode)(texts), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_files_of_pylates_layout(tmp_path: Path) -> None:
    load(folder("chain")).save(tmp_path / "saved")
    modules = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert [(m["path"], m["type"].rpartition(".")[2]) for m in modules] == [
        ("", "Transformer"),
        ("1_Dense", "Dense"),
        ("2_Dense", "Dense"),
        ("3_Dense", "Dense"),
    ]
    old, new = (
        json.loads((place / "config_sentence_transformers.json").read_text())
        for place in (folder("chain"), tmp_path / "saved")
    )
    assert new == old
    for number in (1, 2, 3):
        old, new = (
            json.loads((place / f"{number}_Dense" / "config.json").read_text())
            for place in (folder("chain"), tmp_path / "saved")
        )
        assert new == old
    assert set(load_file(tmp_path / "saved" / "1_Dense" / "model.safetensors")) == {
        *("linear.weight", "linear.bias", "residual.weight")
    }
    assert not list((tmp_path / "saved").glob("*.py"))


def test_bidirectional_models_take_their_code_along(tmp_path: Path) -> None:
    load(folder("bidirectional")).save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["Lfm2BidirectionalModel"]
    module, _, name = config["auto_map"]["AutoModel"].partition(".")
    code = (tmp_path / "saved" / f"{module}.py").read_text()
    assert f"class {name}(" in code and "lfm2_mm" not in code and "lfm2_retrieval" not in code


def test_bf16_and_further_files(tmp_path: Path) -> None:
    half = load(folder("causal"), dtype="bfloat16")
    save_retriever(tmp_path / "saved", half, extra_files={"README.md": "a card"})
    assert (tmp_path / "saved" / "README.md").read_text() == "a card"
    for file in ("model.safetensors", "1_Dense/model.safetensors"):
        tensors = load_file(tmp_path / "saved" / file).values()
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_refusals(tmp_path: Path) -> None:
    net = load(folder("causal"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not empty and holds no checkpoint"):
        net.save(tmp_path / "full")
    net.spec = replace(net.spec, expansion=Expansion(token="<|pad|>"))
    with pytest.raises(InputError, match="cannot be said in PyLate's layout"):
        net.save(tmp_path / "new")
    net.folder = None
    with pytest.raises(InputError, match="no folder with tokenizer files"):
        net.save(tmp_path / "new")
