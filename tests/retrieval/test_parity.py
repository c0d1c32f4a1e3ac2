"""Vectors, scores and rankings equal those of sentence-transformers 6.2 and of transformers 5.23.

Bidirectional models are compared with a patched `Lfm2Model` (mask full, convolutions centred); that
this is what the official remote code computes is unverified until that code has been seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from torch import Tensor
from transformers import AutoTokenizer, Lfm2Model
from transformers.masking_utils import create_causal_mask

import lfm2_mm
from lfm2_retrieval.encoder import Encoder
from lfm2_retrieval.layout import read_spec
from lfm2_retrieval.scoring import maxsim
from tests.retrieval.colbert_checkpoints import DOCUMENTS, QUERIES, dump, edit, folder, write

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
CAUSAL = ("causal", "chain", "plain", "attend")


def load(place: Path, states: str = "keep") -> Encoder:
    found = lfm2_mm.load(place, threads=1, expansion_states=states)
    assert isinstance(found, Encoder)
    return found


@cache
def ours(name: str, states: str = "keep") -> Encoder:
    return load(folder(name), states)


@cache
def theirs(name: str) -> MultiVectorEncoder:
    return MultiVectorEncoder(str(folder(name)), device="cpu")


def check_equal(found: Sequence[Tensor], wanted: Sequence[Tensor] | Tensor) -> None:
    assert [x.shape for x in found] == [x.shape for x in wanted]
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize("name", CAUSAL)
def test_zeroed_states_equal_sentence_transformers(name: str) -> None:
    mine, other = ours(name, "zero"), theirs(name)
    queries, documents = mine.encode_queries(QUERIES), mine.encode_documents(DOCUMENTS)
    their_queries = other.encode_query(QUERIES, batch_size=3)
    their_documents = other.encode_document(DOCUMENTS, batch_size=3)
    check_equal(queries, their_queries)
    check_equal(documents, their_documents)
    scores = torch.stack([maxsim(query, documents) for query in queries])
    wanted = other.similarity(their_queries, their_documents)
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=0)
    assert torch.equal(scores.argsort(descending=True), wanted.argsort(descending=True))


# --- a reference of one text at a time, on transformers' own layers


class Reference:
    """PyLate's rules over `Lfm2Model`, with the masks that the case asks for."""

    def __init__(self, place: Path, *, both: bool, keep: bool) -> None:
        self.spec = read_spec(place, {})
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(place))
        model: Any = Lfm2Model
        self.net = model.from_pretrained(str(place), dtype=torch.float32).eval()
        self.both, self.keep = both, keep
        if both:
            for layer in self.net.layers:
                if hasattr(layer, "conv"):
                    layer.conv.forward = Centred(layer.conv)

    @torch.no_grad()
    def states(self, ids: list[int], seen: list[bool]) -> Tensor:
        x, mask = self.net.embed_tokens(torch.tensor([ids])), torch.tensor([seen])
        where = torch.arange(len(ids))[None]
        full: Any = mask[:, None, None, :].expand(1, 1, len(ids), len(ids))
        if not self.both:
            full = create_causal_mask(
                config=self.net.config,
                inputs_embeds=x,
                attention_mask=mask.long(),
                past_key_values=None,
                position_ids=where,
            )
        masks = {"full_attention": full, "conv": None if self.keep else mask.long()}
        out = self.net(inputs_embeds=x, attention_mask=masks, position_ids=where, use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def query(self, text: str) -> tuple[list[int], list[bool]]:
        ids = self.tokenizer(text, truncation=True, max_length=31)["input_ids"]
        ids.insert(1, self.tokenizer.convert_tokens_to_ids("[Q] "))
        n = 32 - len(ids)
        return ids + [7] * n, [True] * len(ids) + [False] * n

    def document(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=255)["input_ids"]
        ids.insert(1, self.tokenizer.convert_tokens_to_ids("[D] "))
        return ids

    def skipped(self) -> set[int]:
        return set(self.tokenizer.convert_tokens_to_ids(list(self.spec.skiplist)))


class Centred:
    """What stands in for `Lfm2ShortConv.forward`: as many taps on one side as on the other."""

    def __init__(self, conv: Any) -> None:
        self.conv = conv

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None]
        b, c, x = self.conv.in_proj(hidden_states).transpose(1, 2).chunk(3, dim=1)
        y = F.conv1d(b * x, self.conv.conv.weight, padding=1, groups=len(self.conv.conv.weight))
        out: Tensor = self.conv.out_proj((c * y).transpose(1, 2))
        return out


@pytest.mark.parametrize("states", ["keep", "zero"])
@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_both_modes_and_directions_equal_transformers_layers(name: str, states: str) -> None:
    place = folder(name)
    reference = Reference(place, both=name == "bidirectional", keep=states == "keep")
    weight = load_file(place / "1_Dense" / "model.safetensors")["linear.weight"]

    def vectors(hidden: Tensor) -> Tensor:
        return F.normalize(hidden @ weight.T, dim=-1)

    queries = [vectors(reference.states(*reference.query(text))) for text in QUERIES]
    skipped = reference.skipped()
    documents = []
    for text in DOCUMENTS:
        ids = reference.document(text)
        kept = torch.tensor([i not in skipped for i in ids])
        documents.append(vectors(reference.states(ids, [True] * len(ids)))[kept])
    mine = ours(name, states)
    found = mine.encode_queries(QUERIES)
    check_equal(found, queries)
    check_equal(mine.encode_documents(DOCUMENTS), documents)
    scores = torch.stack([maxsim(query, documents) for query in found])
    wanted = torch.stack([sum_of_best(query, documents) for query in queries])
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=0)
    assert torch.equal(scores.argsort(descending=True), wanted.argsort(descending=True))


def sum_of_best(query: Tensor, documents: list[Tensor]) -> Tensor:
    return torch.stack([(query @ document.T).max(dim=1).values.sum() for document in documents])


def test_the_modes_differ_on_the_expansion_alone() -> None:
    keep, zero = ours("causal"), ours("causal", "zero")
    first, second = keep.encode_queries(QUERIES[:1])[0], zero.encode_queries(QUERIES[:1])[0]
    real = sum(start >= 0 for _, start, _ in keep.query_tokens(QUERIES[0])) + 2
    torch.testing.assert_close(first[:real], second[:real], **CLOSE)
    assert (first[real:] - second[real:]).abs().max() > 1e-2
    assert keep.fingerprint == zero.fingerprint


# --- one vector per text


def test_the_embedding_is_the_state_of_the_begin_token() -> None:
    place = folder("embedding")
    reference = Reference(place, both=True, keep=True)
    mine = ours("embedding")
    for texts, prompt, found in (
        (QUERIES, "query: ", mine.encode_queries(QUERIES)),
        (DOCUMENTS, "document: ", mine.encode_documents(DOCUMENTS)),
    ):
        for text, vector in zip(texts, found, strict=True):
            ids = reference.tokenizer(prompt + text, truncation=True, max_length=128)["input_ids"]
            wanted = F.normalize(reference.states(ids, [True] * len(ids))[:1], dim=-1)
            torch.testing.assert_close(vector, wanted, **CLOSE)


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
def test_other_pooling_equals_sentence_transformers(mode: str, tmp_path: Path) -> None:
    place = tmp_path / "it"
    write(place, "embedding")
    edit(place, "config.json", architectures=["Lfm2Model"])
    dump({"embedding_dimension": 64, "pooling_mode": mode}, place / "1_Pooling" / "config.json")
    other = SentenceTransformer(str(place), device="cpu")
    mine = load(place)
    wanted = other.encode_query(QUERIES, convert_to_tensor=True)
    torch.testing.assert_close(torch.cat(mine.encode_queries(QUERIES)), wanted, **CLOSE)
    wanted = other.encode_document(DOCUMENTS, convert_to_tensor=True)
    torch.testing.assert_close(torch.cat(mine.encode_documents(DOCUMENTS)), wanted, **CLOSE)


# --- pooling, and what we save


@pytest.mark.parametrize("factor", [2, 3, 7])
def test_token_pooling_equals_sentence_transformers(factor: int) -> None:
    rule = HierarchicalTokenPooling(factor, normalize_embeddings=False)
    wanted = theirs("causal").encode_document(DOCUMENTS, token_pooling=rule)
    check_equal(ours("causal").encode_documents(DOCUMENTS, pool_factor=factor), wanted)


@pytest.mark.parametrize("name", ["causal", "chain", "bidirectional"])
def test_what_we_save_loads_in_sentence_transformers(name: str, tmp_path: Path) -> None:
    ours(name).save(tmp_path / "saved")
    other = MultiVectorEncoder(
        str(tmp_path / "saved"), device="cpu", trust_remote_code=name == "bidirectional"
    )
    # the saved bidirectional model leaves its convolutions unmasked: it keeps the states
    mine = ours(name, "keep" if name == "bidirectional" else "zero")
    check_equal(mine.encode_queries(QUERIES), other.encode_query(QUERIES, batch_size=8))
    check_equal(mine.encode_documents(DOCUMENTS), other.encode_document(DOCUMENTS, batch_size=1))


def test_what_sentence_transformers_saves_loads_here(tmp_path: Path) -> None:
    theirs("causal").save(str(tmp_path / "native"))
    native = load(tmp_path / "native", "zero")
    assert native.spec.query_prompt == "[Q] " and native.spec.query_prefix == ""
    check_equal(native.encode_queries(QUERIES), theirs("causal").encode_query(QUERIES))
    check_equal(native.encode_documents(DOCUMENTS), theirs("causal").encode_document(DOCUMENTS))
    native.save(tmp_path / "again")  # the prompt becomes PyLate's prefix
    again = load(tmp_path / "again", "zero")
    assert again.spec.query_prefix == "[Q] "
    check_equal(again.encode_queries(QUERIES), native.encode_queries(QUERIES))
