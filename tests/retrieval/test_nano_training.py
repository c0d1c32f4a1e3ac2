"""nano-colbert's training: scores, loss, batches, the start, the recipe's guards, the export."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer

import lfm2_mm
from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import InputError
from lfm2_retrieval import nano
from lfm2_retrieval.corpus.build import Concept
from lfm2_retrieval.corpus.tokenizer import train_tokenizer
from lfm2_retrieval.pairs import Batches, Mix, Tokenized
from lfm2_retrieval.recipes import RECIPES, train_nano_colbert, train_nano_colbert_more
from lfm2_retrieval.scoring import maxsim
from lfm2_retrieval.start import shared_space
from lfm2_retrieval.training import (
    PairBatch,
    Retriever,
    in_batch_scores,
    pad_side,
    pair_loss,
)

TINY = BackboneConfig(
    vocab_size=64,
    hidden_size=16,
    ffn_size=32,
    layer_types=("conv", "full_attention"),
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    causal=False,
)
WORDS = {
    "en": ["red", "blue", "cat", "dog", "tree", "house", "water", "fire", "star", "moon"],
    "de": ["rot", "blau", "Katze", "Hund", "Baum", "Haus", "Wasser", "Feuer", "Stern", "Mond"],
    "ja": ["赤", "青", "猫", "犬", "木", "家", "水", "火", "星", "月"],
}


def concepts() -> list[Concept]:
    """Every pair of ten words, in three languages."""
    made = []
    for i in range(10):
        for j in range(10):
            texts = {lang: f"{words[i]} {words[j]}" for lang, words in WORDS.items()}
            made.append(Concept("word" if i == j else "x", texts))
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer((t for c in concepts() for t in c.texts.values()), 360)


@pytest.fixture(scope="module")
def batches(tokenizer: Tokenizer) -> Batches:
    return Batches(
        Tokenized(concepts(), tokenizer),
        steps=50,
        seed=1,
        mix=Mix(most=12, passage_every=5, passages=4),
        prefixes=nano.prefixes(tokenizer),
        skipped=nano.skipped(tokenizer),
    )


def test_scores_are_mean_maxsim() -> None:
    torch.manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(3, 4, 8), dim=-1)
    d = torch.nn.functional.normalize(torch.randn(5, 6, 8), dim=-1)
    kept, held = torch.rand(3, 4) < 0.7, torch.rand(5, 6) < 0.7
    kept[:, 0] = held[:, 0] = True
    scores = in_batch_scores(q, kept, d, held)
    for i in range(3):
        alone = maxsim(q[i][kept[i]], [d[j][held[j]] for j in range(5)]) / kept[i].sum()
        torch.testing.assert_close(scores[i], alone, atol=1e-6, rtol=0)


def test_padding_changes_no_vector() -> None:
    torch.manual_seed(0)
    model = Retriever(TINY, 8).eval()
    alone = pad_side([[1, 9, 10, 11]], pad=0, skipped=frozenset({10}))
    beside = pad_side([[1, 9, 10, 11], [1, 9, *range(20, 32)]], pad=0, skipped=frozenset({10}))
    assert alone.kept.tolist() == [[True, True, False, True]]
    with torch.no_grad():
        torch.testing.assert_close(model(alone)[0], model(beside)[0, :4], atol=1e-6, rtol=0)


def test_loss_teaches_pairs() -> None:
    torch.manual_seed(0)
    model, scale = Retriever(TINY, 8), torch.tensor(3.0)
    rows = [[1, 5 + i, 20 + i] for i in range(8)]
    others = [[1, 35 + i, 50 + i] for i in range(8)]
    none = frozenset[int]()
    batch = PairBatch(
        pad_side(rows, pad=0, skipped=none),
        pad_side(others, pad=0, skipped=none),
        torch.arange(8),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss, parts = pair_loss(model, batch, scale)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert parts["right"] == 1.0


def test_batches_are_a_function_of_seed_and_step(batches: Batches, tokenizer: Tokenizer) -> None:
    for step in (0, 1, 4):
        one, other = batches[step], batches[step]
        assert torch.equal(one.queries.ids, other.queries.ids)
        assert torch.equal(one.documents.ids, other.documents.ids)
    assert not torch.equal(batches[0].queries.ids[:1], batches[1].queries.ids[:1])
    query, document = nano.prefixes(tokenizer)
    assert batches[0].queries.ids[:, :2].tolist() == [[1, query]] * len(batches[0].queries.ids)
    assert set(batches[0].documents.ids[:, 1].tolist()) == {document}


def test_no_two_texts_of_a_batch_say_the_same(batches: Batches) -> None:
    for step in range(12):
        batch = batches[step]
        rows = [tuple(row) for row in batch.documents.ids.tolist()]
        assert len(set(rows)) == len(rows) > 1
        asked = [tuple(row) for row in batch.queries.ids.tolist()]
        assert len(set(asked)) == len(asked)


def varied(tokenizer: Tokenizer, **mix: float) -> Batches:
    return Batches(
        Tokenized(concepts(), tokenizer),
        steps=50,
        seed=1,
        mix=Mix(most=12, passage_every=0, mixed=0.0, **mix),  # type: ignore[arg-type]
        prefixes=nano.prefixes(tokenizer),
        skipped=frozenset(),
    )


def test_varied_texts_lose_tokens_or_are_spelt_in_smaller_pieces(tokenizer: Tokenizer) -> None:
    plain = varied(tokenizer)
    split = varied(tokenizer, varied=1.0, split=1.0)
    one, other = plain[3], split[3]
    for a, b in ((one.queries, other.queries), (one.documents, other.documents)):
        assert len(a.ids) == len(b.ids)
        assert b.mask.sum() > a.mask.sum()
        for row, pieces, mask, held in zip(a.ids, b.ids, a.mask, b.mask, strict=True):
            texts = [tokenizer.decode(ids.tolist()) for ids in (row[mask], pieces[held])]
            assert texts[0] == texts[1]
    batches, long = varied(tokenizer, dropped=0.5), [1, *range(40, 60)]
    short = batches._varied(Random(3), long)
    assert short[0] == 1 and 4 < len(short) < 18
    assert short == [token for token in long if token in set(short)]
    assert batches._varied(Random(3), [1, 40, 41]) == [1, 40, 41]
    # nothing but the begin token is left of none
    gone = varied(tokenizer, dropped=1.0)
    assert gone._varied(Random(3), long) == long


def test_near_batches_share_words(tokenizer: Tokenizer) -> None:
    def shared(batches: Batches) -> float:
        found = []
        for step in range(20):
            rows = [set(row.tolist()) for row in batches[step].queries.ids]
            found += [len(a & b) for i, a in enumerate(rows) for b in rows[:i]]
        return sum(found) / len(found)

    near, plain = varied(tokenizer, near=1.0), varied(tokenizer)
    assert shared(near) > shared(plain)
    for step in range(20):
        rows = [tuple(row) for row in near[step].documents.ids.tolist()]
        assert len(set(rows)) == len(rows) > 1


def test_the_embedded_weights_can_be_gone_on_from() -> None:
    model, tokenizer = nano.embedded()
    encoder = lfm2_mm.load("nano-colbert", dtype="float32", device="cpu")
    row = tokenizer.encode("Delete the file").ids
    side = pad_side([[row[0], nano.prefixes(tokenizer)[0], *row[1:]]], pad=0, skipped=frozenset())
    with torch.no_grad():
        found = model.eval()(side)[0]
    (wanted,) = encoder.encode_queries(["Delete the file"])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    plan = nano.more()
    assert plan.schedule.steps == nano.MORE_STEPS
    assert plan.mix.near and plan.mix.dropped and plan.mix.split


def test_passages_hold_what_is_asked_for(batches: Batches) -> None:
    batch = batches[4]
    assert len(batch.queries.ids) == 2 * len(batch.documents.ids)
    assert batch.answers.tolist() == [i // 2 for i in range(len(batch.queries.ids))]
    assert batch.documents.mask.sum(-1).min() > batch.queries.mask.sum(-1).float().mean()


def test_the_start_brings_translations_together(tokenizer: Tokenizer) -> None:
    corpus = Tokenized(concepts(), tokenizer)
    table = shared_space([list(ids.values()) for ids in corpus.ids], 360, 16)
    assert table.shape == (360, 16)
    torch.testing.assert_close(table.norm(dim=-1), torch.ones(360))
    cat, katze, dog = (table[tokenizer.encode(word).ids[1]] for word in ("cat", "katze", "dog"))
    assert cat @ katze > cat @ dog + 0.3


def test_the_model_is_small_and_bidirectional() -> None:
    model = nano.build()
    parameters = sum(p.numel() for p in model.parameters())
    assert 2.5e6 < parameters < 3.5e6
    assert not nano.BACKBONE.causal
    assert len(nano.SPEC.skiplist) == 32


def test_export_loads_and_encodes_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = nano.build(3)
    nano.export(model, tokenizer, tmp_path / "model", card="# Card\n")
    encoder = lfm2_mm.load(str(tmp_path / "model"), dtype="float32", device="cpu")
    text = "Katze, Hund und Baum!"
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))
        ids = tokenizer.encode(text).ids
        row = [ids[0], nano.prefixes(tokenizer)[1], *ids[1:]]
        side = pad_side([row], pad=0, skipped=nano.skipped(tokenizer))
        expected = model.eval()(side)[0][side.kept[0]]
    torch.testing.assert_close(encoder.encode_documents([text])[0], expected, atol=1e-5, rtol=0)
    assert encoder.spec.expansion is None
    assert encoder.spec.bidirectional
    assert (tmp_path / "model" / "README.md").read_text() == "# Card\n"


def test_a_run_keeps_its_length_and_seed(tmp_path: Path) -> None:
    assert RECIPES == {
        "nano-colbert": train_nano_colbert,
        "nano-colbert-more": train_nano_colbert_more,
    }
    (tmp_path / "trainer.safetensors").write_bytes(b"")
    (tmp_path / "run.json").write_text(json.dumps({"steps": 10, "seed": 1}))
    with pytest.raises(InputError, match="has steps 10, not 20; go on without --steps, or begin"):
        train_nano_colbert(tmp_path, steps=20)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read .*; begin anew with --fresh"):
        train_nano_colbert(tmp_path)


def test_a_short_run_trains_scores_and_resumes(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nano, "VOCABULARY", 360)
    monkeypatch.setattr(nano, "BACKBONE", TINY_NANO)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    said: list[str] = []
    held = [Concept("x", {"en": f"the {c.texts['en']}", "de": c.texts["de"]}) for c in concepts()]
    plan = nano.recipe(6)

    def run(folder: Path, until: int | None = None) -> Retriever:
        return nano.train(
            plan,
            folder,
            tokenizer,
            concepts(),
            held,
            until=until,
            workers=0,
            score_every=3,
            say=said.append,
        )

    whole = run(tmp_path / "a")
    run(tmp_path / "b", until=3)
    again = run(tmp_path / "b")
    assert "resumed at step 3" in said
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    rows = (tmp_path / "a" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3, 6]
    assert set(json.loads(rows[-1])) == {"step", "de-en"}


TINY_NANO = BackboneConfig(
    vocab_size=360,
    hidden_size=128,
    ffn_size=32,
    layer_types=("conv",),
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    max_positions=512,
    eos_ids=(7,),
    causal=False,
)
