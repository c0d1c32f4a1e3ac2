"""The encoder alone: batches, order, lengths, tokens and their places, fingerprint, refusals."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lfm2_mm
from lfm2_mm.errors import MissingExtra, SettingError, TensorMismatch
from lfm2_retrieval.encoder import Encoder
from tests.retrieval.colbert_checkpoints import (
    DIM,
    DOCUMENTS,
    HIDDEN,
    QUERIES,
    VARIANTS,
    edit,
    folder,
    write,
)

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


def load(place: Path, **options: Any) -> Encoder:
    found = lfm2_mm.load(place, threads=1, **options)
    assert isinstance(found, Encoder)
    return found


@cache
def encoder(name: str) -> Encoder:
    return load(folder(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_gives_what_each_gives_alone(name: str) -> None:
    net = encoder(name)
    for encode, texts in (
        (net.encode_queries, QUERIES),
        (net.encode_documents, DOCUMENTS),
    ):
        together = encode(texts)
        small = encode(texts, batch_tokens=40)
        for text, vectors, other in zip(texts, together, small, strict=True):
            torch.testing.assert_close(vectors, encode([text])[0], **CLOSE)
            torch.testing.assert_close(vectors, other, **CLOSE)


@pytest.mark.parametrize("name", VARIANTS)
def test_vectors_are_unit_fp32_and_the_callers_own(name: str) -> None:
    net = encoder(name)
    assert net.dim == (HIDDEN if name == "embedding" else DIM)
    for vectors in (*net.encode_queries(QUERIES), *net.encode_documents(DOCUMENTS)):
        assert vectors.dtype == torch.float32 and vectors.shape[1] == net.dim
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
        assert vectors.untyped_storage().nbytes() == vectors.nbytes
        vectors.mul_(2)  # not allowed on tensors of inference mode


@settings(max_examples=10)
@given(texts=st.lists(st.text(max_size=40), max_size=5))
def test_any_text_has_vectors_and_as_many_tokens(texts: list[str]) -> None:
    net = encoder("bidirectional")
    queries, documents = net.encode_queries(texts), net.encode_documents(texts)
    assert len(queries) == len(documents) == len(texts)
    for text, query, document in zip(texts, queries, documents, strict=True):
        assert len(net.query_tokens(text)) == len(query) == 32
        tokens = net.document_tokens(text)
        assert len(tokens) == len(document)
        for piece, start, end in tokens:
            assert (start, end) == (-1, -1) or text[start:end] == piece


def test_tokens_and_where_they_stand() -> None:
    net = encoder("causal")
    assert net.document_tokens("  the capital, of France!") == [
        ("<|startoftext|>", -1, -1),
        ("[D] ", -1, -1),
        ("the", 2, 5),
        ("capital", 6, 13),
        ("of", 15, 17),
        ("France", 18, 24),
    ]
    query = net.query_tokens("the capital, of")
    assert query[:6] == [
        ("<|startoftext|>", -1, -1),
        ("[Q] ", -1, -1),
        ("the", 0, 3),
        ("capital", 4, 11),
        (",", 11, 12),
        ("of", 13, 15),
    ]
    assert query[6:] == [("<|im_end|>", -1, -1)] * 26
    assert encoder("plain").query_tokens("the capital")[-2:] == [("the", 0, 3), ("capital", 4, 11)]
    assert encoder("embedding").document_tokens("the capital") == [("<|startoftext|>", -1, -1)]
    assert net.count_tokens("the capital, of") == 4 and net.count_tokens("") == 0


def test_long_texts_are_cut_and_whitespace_around_is_dropped() -> None:
    net = encoder("causal")
    long = "capital " * 1000
    assert len(net.encode_documents([long])[0]) == len(net.document_tokens(long)) == 256
    assert len(net.encode_queries([long])[0]) == 32
    bare, spaced = net.encode_documents(["Paris", " \n Paris\t"])
    torch.testing.assert_close(bare, spaced, **CLOSE)


def test_lone_surrogates_and_control_characters_are_text_too() -> None:
    found = encoder("causal").encode_documents(["a\ud800b", "a?b", "\x00\x07"])
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_no_texts_and_one_text() -> None:
    net = encoder("causal")
    assert net.encode_queries([]) == [] and net.encode_documents([]) == []
    with pytest.raises(SettingError, match=r"one text was given .* use \[text\]"):
        net.encode_queries("Paris")


def test_bf16_is_near_fp32() -> None:
    half = load(folder("bidirectional"), dtype="bfloat16")
    assert half.backbone.embed_tokens.weight.dtype == torch.bfloat16
    for mine, other in zip(
        half.encode_documents(DOCUMENTS),
        encoder("bidirectional").encode_documents(DOCUMENTS),
        strict=True,
    ):
        assert mine.dtype == torch.float32
        assert (mine * other).sum(1).min() > 0.97


def test_the_fingerprint_follows_what_is_stored(tmp_path: Path) -> None:
    own = encoder("causal").fingerprint
    assert len(own) == 16 and int(own, 16) >= 0
    assert load(folder("causal"), dtype="bfloat16").fingerprint == own
    encoder("causal").save(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == own
    assert encoder("attend").fingerprint != own
    write(tmp_path / "it", "causal")
    assert load(tmp_path / "it").fingerprint == own
    edit(tmp_path / "it", "config_sentence_transformers.json", document_length=200)
    rules = load(tmp_path / "it").fingerprint
    path = tmp_path / "it" / "1_Dense" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["linear.weight"][0, 0] += 1
    save_file(tensors, path)
    assert len({own, rules, load(tmp_path / "it").fingerprint}) == 3


def test_a_packed_model_is_known_as_what_it_was_packed_from(tmp_path: Path) -> None:
    own = encoder("causal").fingerprint
    for form, wanted in (("int8", own), ("int4", f"{own}-int4")):
        on_the_fly = load(folder("causal"), quantize=form)
        assert on_the_fly.fingerprint == wanted and on_the_fly.packed
        on_the_fly.save(tmp_path / form)
        again = load(tmp_path / form)
        assert again.fingerprint == wanted and again.origin == own
        mine, other = (net.encode_documents(DOCUMENTS)[0] for net in (again, on_the_fly))
        assert torch.equal(mine, other)
    assert not encoder("causal").packed
    said = json.loads((tmp_path / "int8" / "config.json").read_text("utf-8"))
    assert said["packed_from"] == own
    edit(tmp_path / "int8", "config.json", packed_from="mine")
    assert load(tmp_path / "int8").fingerprint not in (own, "mine")


def test_pooled_documents_are_shorter() -> None:
    net = encoder("causal")
    whole, half = net.encode_documents(DOCUMENTS), net.encode_documents(DOCUMENTS, pool_factor=2)
    for vectors, pooled in zip(whole, half, strict=True):
        assert 1 <= len(pooled) <= 1 + max(1, (len(vectors) - 1) // 2)
        torch.testing.assert_close(pooled[0], vectors[0])
    with pytest.raises(SettingError, match="pool_factor is 0; use 1"):
        net.encode_documents(DOCUMENTS, pool_factor=0)
    single = encoder("embedding").encode_documents(DOCUMENTS, pool_factor=4)
    assert all(len(vectors) == 1 for vectors in single)


def test_pooling_without_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.cluster", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lfm2-mm\[retrieval\]'"):
        encoder("causal").encode_documents(DOCUMENTS, pool_factor=2)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "it", "causal")
    path = tmp_path / "it" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:100].clone()
    save_file(tensors, path)
    edit(tmp_path / "it", "config.json", vocab_size=100)
    with pytest.raises(TensorMismatch, match="only 100 rows"):
        load(tmp_path / "it")
