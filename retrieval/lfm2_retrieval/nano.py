"""nano-colbert: the shapes and the recipe of the embedded retriever.

`train` runs or resumes the recipe; `export` writes what was learnt in the official layout. Every
batch is a pure function of (seed, step). The data, the batches and the loss live elsewhere.
"""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lfm2_mm.config import BackboneConfig
from lfm2_mm.operators import RMSNorm, SwiGLU
from lfm2_mm.saving import save_checkpoint
from lfm2_mm.train.runs import CHECKPOINT
from lfm2_mm.train.trainer import Schedule, Trainer
from lfm2_retrieval.corpus.build import Concept
from lfm2_retrieval.corpus.tokenizer import DOCUMENT_PREFIX, QUERY_PREFIX, tokenizer_files
from lfm2_retrieval.encoder import Encoder
from lfm2_retrieval.layout import DenseSpec, RetrieverSpec
from lfm2_retrieval.pairs import Batches, Mix, Tokenized
from lfm2_retrieval.saving import save_retriever, side_files
from lfm2_retrieval.start import shared_space
from lfm2_retrieval.training import PairBatch, Retriever, in_batch_scores, pad_side, pair_loss

__all__ = [
    "MORE_STEPS",
    "STEPS",
    "Recipe",
    "build",
    "export",
    "held_out_scores",
    "more",
    "recipe",
    "train",
]

VOCABULARY = 19_456
DIM = 128
BACKBONE = BackboneConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    ffn_size=256,
    layer_types=("conv", "full_attention", "conv", "full_attention"),
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    max_positions=512,
    eos_ids=(7,),
    causal=False,
)
SPEC = RetrieverSpec(
    dense=(DenseSpec(folder="1_Dense", in_features=BACKBONE.hidden_size, out_features=DIM),),
    query_prefix=QUERY_PREFIX,
    document_prefix=DOCUMENT_PREFIX,
    query_length=64,
    document_length=512,
    expansion=None,
    skiplist=tuple(string.punctuation),
    bidirectional=True,
)

STEPS = 8000
"""Length of the recipe: two hours on one of two cores, eight other programs beside it."""

MORE_STEPS = 1500
"""Length of the recipe that goes on from the embedded weights, as it was run last (seed 8)."""

_WATCHED = (
    *(("en", "ja"), ("ar", "en"), ("de", "zh"), ("ko", "fr"), ("de", "en"), ("fr", "es")),
    *(("de", "ja"), ("ar", "ko"), ("zh", "ar"), ("ko", "ja")),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what nano-colbert becomes, beside its texts.

    Attributes:
        seed: Of the weights and of the batches.
        schedule: Learning rates.
        mix: How batches are drawn.
        pooled: Weight of the loss over mean vectors.
        scale: Natural logarithm of what scores are multiplied with, at first.
    """

    seed: int
    schedule: Schedule
    mix: Mix = Mix()
    pooled: float = 0.3
    scale: float = 3.0


def recipe(steps: int = STEPS, seed: int = 20261121) -> Recipe:
    """The recipe, stretched to so many steps."""
    return Recipe(
        seed=seed, schedule=Schedule(steps=steps, warmup=min(100, steps // 10), peak=2e-3)
    )


def more(steps: int = MORE_STEPS, seed: int = 20261122) -> Recipe:
    """The recipe that goes on from weights that know their texts: varied, in hard batches."""
    return Recipe(
        seed=seed,
        schedule=Schedule(steps=steps, warmup=min(50, steps // 10), peak=1.5e-3),
        mix=Mix(
            english=0.35,
            near=0.4,
            varied=0.75,
            dropped=0.1,
            split=0.1,
            favoured={"ar": 2.5, "ja": 2.0, "ko": 1.5},
        ),
        scale=3.7,
    )


def build(seed: int = 0, embeddings: Tensor | None = None) -> Retriever:
    """An untrained nano-colbert.

    Args:
        seed: Of the weights.
        embeddings: Unit vectors that token embeddings begin with, `[v, d]`; None for noise.
    """
    torch.manual_seed(seed)
    model = Retriever(BACKBONE, DIM)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # what blocks add begins small beside what the embeddings already know
            gain = 0.2 if name.endswith(("out_proj", "w2")) else 0.8
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
        elif isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=0.3)
    table = model.backbone.embed_tokens.weight
    with torch.no_grad():
        if embeddings is None:
            table.normal_(std=0.25)
        else:
            table.copy_(embeddings * 0.25 * table.shape[1] ** 0.5)
        nn.init.eye_(model.dense.weight)
    return model


class _Training(nn.Module):
    """The model and the temperature under one roof, for one optimizer."""

    def __init__(self, model: Retriever, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.tensor(scale))


def prefixes(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of the query and of the document prefix."""
    query, document = (tokenizer.token_to_id(text) for text in (QUERY_PREFIX, DOCUMENT_PREFIX))
    assert query is not None and document is not None, "nano-colbert's tokenizer holds both"
    return query, document


def skipped(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of bare punctuation, whose vectors documents leave out."""
    found = (tokenizer.token_to_id(word) for word in SPEC.skiplist)
    return frozenset(token for token in found if token is not None)


def _stream(data: Batches, start: int, workers: int) -> Iterator[PairBatch]:
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(start, len(data)),
        num_workers=workers,
        collate_fn=_unbatched,
        prefetch_factor=8 if workers else None,
    )
    yield from loader


def _unbatched(batch: Any) -> Any:
    return batch


@torch.no_grad()
def held_out_scores(
    model: Retriever,
    tokenizer: Tokenizer,
    concepts: Sequence[Concept],
    *,
    count: int = 500,
) -> dict[str, float]:
    """Quick recall@1 among so many messages of held-out packages, by direction, for the log.

    The evaluation proper is in the evals.
    """
    concepts = [c for c in concepts if not c.source.startswith("frame ")]
    query, document = prefixes(tokenizer)
    skip = skipped(tokenizer)
    scores = {}
    for a, b in _WATCHED:
        chosen = [c for c in concepts if a in c.texts and b in c.texts]
        chosen = [c for c in chosen if len(c.texts["en"].split()) > 2][:count]
        if not chosen:
            continue
        rows = {}
        for lang, prefix, leave in ((a, query, frozenset[int]()), (b, document, skip)):
            encoded = tokenizer.encode_batch([c.texts[lang] for c in chosen])
            ids = [[e.ids[0], prefix, *e.ids[1:62]] for e in encoded]
            rows[prefix] = pad_side(ids, pad=0, skipped=leave)
        queries, documents = rows[query], rows[document]
        found = in_batch_scores(model(queries), queries.kept, model(documents), documents.kept)
        best = found.argmax(-1)
        scores[f"{a}-{b}"] = round(float((best == torch.arange(len(chosen))).float().mean()), 4)
    return scores


def train(
    plan: Recipe,
    folder: Path,
    tokenizer: Tokenizer,
    concepts: Sequence[Concept],
    held_out: Sequence[Concept],
    *,
    begin: Retriever | None = None,
    until: int | None = None,
    workers: int = 1,
    device: str = "cpu",
    score_every: int = 200,
    say: Callable[[str], None] = print,
) -> Retriever:
    """Run the recipe, or resume it from the folder's checkpoint; the averaged model comes back.

    Args:
        plan: The recipe.
        folder: Where checkpoints and logs go.
        tokenizer: Makes ids of texts.
        concepts: The training texts.
        held_out: Watched.
        begin: What it goes on from; by default an untrained model.
        until: Stop at this step.
        workers: Processes that make batches.
        device: Where to compute.
        score_every: Steps between two looks at what is held out, and two checkpoints.
        say: Told how it goes.
    """
    corpus = Tokenized(concepts, tokenizer)
    say(f"{len(corpus):,} concepts, {sum(len(ids) for ids in corpus.ids):,} texts")
    resuming = (folder / CHECKPOINT).exists()
    if begin is None:
        begin = build(plan.seed, None if resuming else _start(corpus))
    both = _Training(begin, plan.scale).to(device)
    for module in both.modules():
        if isinstance(module, SwiGLU | RMSNorm):
            module.compile(dynamic=True)

    def loss(batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        return pair_loss(
            both.model, batch.to(device), both.scale, pooled=plan.pooled, dtype=torch.bfloat16
        )

    trainer = Trainer(both, loss, plan.schedule, folder)
    if trainer.resume():
        say(f"resumed at step {trainer.step}")
    else:
        say(f"before training: {_listed(held_out_scores(both.model, tokenizer, held_out))}")
    data = Batches(
        corpus,
        steps=plan.schedule.steps,
        seed=plan.seed,
        mix=plan.mix,
        prefixes=prefixes(tokenizer),
        skipped=skipped(tokenizer),
    )
    end = min(until or len(data), len(data))
    source = _stream(data, trainer.step, workers)
    while trainer.step < end:
        stop = min(end, (trainer.step // score_every + 1) * score_every)
        chunk = (next(source) for _ in range(stop - trainer.step))
        trainer.run(chunk, save_every=score_every, say=say)
        scores = held_out_scores(averaged(trainer), tokenizer, held_out)
        with (folder / "scores.jsonl").open("a") as log:
            log.write(json.dumps({"step": trainer.step, **scores}) + "\n")
        say(f"held out: {_listed(scores)}")
    return averaged(trainer)


def _start(corpus: Tokenized) -> Tensor:
    texts = [list(ids.values()) for ids in corpus.ids]
    return shared_space(texts, VOCABULARY, BACKBONE.hidden_size)


def _listed(scores: Mapping[str, float]) -> str:
    return " ".join(f"{name} {score:.3f}" for name, score in scores.items())


def averaged(trainer: Trainer) -> Retriever:
    """A copy of the model that holds the averaged weights."""
    copy = build()
    wanted = {
        name.removeprefix("model."): value.detach().float().cpu()
        for name, value in trainer.averaged().items()
        if name.startswith("model.")
    }
    copy.load_state_dict(wanted, strict=True)
    return copy.eval()


def embedded() -> tuple[Retriever, Tokenizer]:
    """The embedded nano-colbert, in fp32 and ready for training, and its tokenizer."""
    import lfm2_mm

    encoder = lfm2_mm.load("nano-colbert", dtype="float32", device="cpu")
    assert isinstance(encoder, Encoder)
    model = build()
    model.backbone.load_state_dict(encoder.backbone.state_dict())
    (weight,) = encoder.head.parameters()
    with torch.no_grad():
        model.dense.weight.copy_(weight)
    return model, encoder.tokenizer.hf.backend_tokenizer


def export(model: Retriever, tokenizer: Tokenizer, folder: Path, *, card: str = "") -> None:
    """Write a checkpoint in the layout of PyLate and sentence-transformers, in bf16.

    Args:
        model: What was learnt.
        tokenizer: Its tokenizer.
        folder: Where to write.
        card: Text of its `README.md`; "" for none.
    """
    import lfm2_mm

    head = {"linear.weight": model.dense.weight.detach().to(torch.bfloat16)}
    with tempfile.TemporaryDirectory() as plain:
        save_checkpoint(
            Path(plain) / "model",
            {name: t.to(torch.bfloat16) for name, t in model.backbone.state_dict().items()},
            BACKBONE.to_dict(),
            extra_files={
                **tokenizer_files(tokenizer),
                **side_files(SPEC, [head], hidden=BACKBONE.hidden_size),
            },
        )
        encoder = lfm2_mm.load(str(Path(plain) / "model"), dtype="bfloat16", device="cpu")
        save_retriever(folder, encoder, extra_files={"README.md": card} if card else None)
