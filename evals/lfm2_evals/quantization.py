"""The task `quantization`: what packing costs, beside llama.cpp's own rounding of the same weights.

`divergence` compares next-token chances with those of fp32; `answers`, `rankings` and `speech`
count held-out items on which nothing changes. llama.cpp's Q4_0 and Q8_0 are computed by the `gguf`
library; inputs of products are rounded as llama.cpp rounds them on a CPU, to Q8_0. Knows no command
line.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_evals.report import markdown_table, write_files
from lfm2_evals.stats import wilson
from lfm2_mm.errors import MissingExtra, SettingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lfm2_mm.model import Model

__all__ = ["FORMS", "TIERS", "QuantizationReport", "Row", "evaluate", "rank_correlation"]

TIERS = ("divergence", "answers", "rankings", "speech")
FORMS = ("int4", "int4 calibrated", "Q4_0", "int8", "Q8_0")
_KV = "int8 KV cache"  # weights as they are
_FLOORS = {"int4": 0.95, "int4 calibrated": 0.95, "int8": 0.98, _KV: 0.98}
_QUERIES = "{} queries"  # packed; documents as they were
_GGUF = ("Q4_0", "Q8_0")
_GROUP = 32  # numbers that share a scale there


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one form of one model gave.

    Attributes:
        tier: What was measured.
        model: Of what.
        form: How its weights were rounded.
        n: Positions, questions or queries.
        divergence: Mean Kullback-Leibler divergence from fp32, in nats; None elsewhere.
        same: Share of positions with the same likeliest token, or of items with the same answer.
        floor: What that share should reach; None demands nothing.
        correlation: Mean Spearman correlation with the ranking of fp32; None elsewhere.
    """

    tier: str
    model: str
    form: str
    n: int
    divergence: float | None
    same: float
    floor: float | None = None
    correlation: float | None = None

    def cells(self) -> list[str]:
        """A line of the report's table."""
        interval = wilson(round(self.same * self.n), self.n)
        mark = ""
        if self.floor is not None:
            reached = "reached" if self.same >= self.floor else "missed"
            mark = f"{100 * self.floor:.0f} %, {reached}"
        return [
            self.tier,
            self.model,
            self.form,
            str(self.n),
            "" if self.divergence is None else f"{self.divergence:.5f}",
            f"{100 * self.same:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})",
            mark,
            "" if self.correlation is None else f"{self.correlation:.4f}",
        ]


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """All rows, for people and programs.

    Attributes:
        facts: What was run.
        rows: In order.
    """

    facts: Mapping[str, str]
    rows: Sequence[Row]

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        header = ["tier", "model", "form", "items", "divergence, nats", "same as fp32", "floor"]
        header.append("rank correlation")
        table = markdown_table(header, [row.cells() for row in self.rows])
        note = (
            "Same as fp32: the likeliest next token, the whole greedy answer, or the first of the "
            "ranking; 95 % Wilson intervals. Rank correlation: Spearman's, of the scores of all "
            "candidates of a query, mean over queries. Heavy tails: random weights, Student's t "
            "with 3 degrees of freedom. Q4_0 and Q8_0 (the gguf library) round the inputs of "
            "products to Q8_0, as llama.cpp does; heads and encoders are 8 bit everywhere."
        )
        return "\n\n".join(["# What packing costs", facts, table, note]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"facts": dict(self.facts), "rows": [asdict(row) for row in self.rows]}

    def write(self, folder: str | Path, name: str) -> list[Path]:
        """Write `name.md` and `name.json`."""
        content = json.dumps(self.to_dict(), indent=1) + "\n"
        return write_files(folder, {f"{name}.md": self.markdown(), f"{name}.json": content})


def evaluate(
    tiers: Sequence[str],
    *,
    count: int,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Measure some tiers.

    Args:
        tiers: Some of `TIERS`.
        count: Scenes, queries and candidates.
        threads: CPU threads.
        progress: Told the rows done and the rows in all.

    Raises:
        SettingError: if a tier is unknown or the count is below 2.
        MissingExtra: if the `gguf` library is not installed.
    """
    if strange := [tier for tier in tiers if tier not in TIERS]:
        raise SettingError(f"there is no tier {strange[0]!r}; choose from {', '.join(TIERS)}")
    if count < 2:
        raise SettingError(f"the count is {count}; ask for at least 2")
    works = {
        "divergence": _divergence,
        "answers": _answers,
        "rankings": _rankings,
        "speech": _speech,
    }
    totals = {"divergence": 2 * len(FORMS), "answers": 4, "rankings": 4, "speech": 4}
    rows: list[Row] = []
    for tier in tiers:
        for row in works[tier](count, threads):
            rows.append(row)
            if progress is not None:
                progress(len(rows), sum(totals[one] for one in tiers))
    return rows


# -- the forms of a model ----------------------------------------------------------------------


def _form(name: str, form: str, threads: int | None, texts: Sequence[Sequence[int]]) -> Model:
    """A text model whose weights are rounded in one way; `texts` serve to calibrate."""
    import lfm2_mm
    from lfm2_mm.quantize.calibration import pack_model
    from lfm2_mm.quantize.recipes import recipe

    model: Model
    if form in ("int4", "int8"):
        model = lfm2_mm.load(name, device="cpu", threads=threads, quantize=form)
        return model
    model = lfm2_mm.load(name, device="cpu", dtype="float32", threads=threads, quantize="none")
    if form == "int4 calibrated":
        pack_model(model, recipe("int4"), texts)
    elif form in _GGUF:
        _round_as_gguf(model, form)
    return model


def _round_as_gguf(model: Model, kind: str) -> None:
    """Give a model the numbers that GGUF files of it would hold, and inputs as llama.cpp's."""
    from torch import nn

    encoders = {id(one): one for one in model.encoders.values()}.values()
    towers = [
        part for one in encoders for part in vars(one).values() if isinstance(part, nn.Module)
    ]
    for module, form in ((model.backbone, kind), *((tower, "Q8_0") for tower in towers)):
        for name, part in module.named_modules():
            wanted = isinstance(part, nn.Linear) and not name.endswith("feed_forward.gate")
            if wanted and part.in_features % _GROUP == 0:
                part.weight.data = _as_gguf(part.weight, form)
                part.register_forward_pre_hook(_rounded_inputs)
    model.backbone.embed_tokens.weight.data = _as_gguf(model.backbone.embed_tokens.weight, "Q8_0")


def _rounded_inputs(part: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows in groups of 32 bytes with a scale in fp16, as ggml's `quantize_row_q8_0` makes them."""
    import torch

    x = inputs[0]
    groups = x.float().reshape(-1, _GROUP)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, groups / scales, 0.0).round()
    return ((codes * scales.half().float()).view(x.shape).to(x.dtype), *inputs[1:])


def _as_gguf(weight: Tensor, kind: str) -> Tensor:
    import torch

    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise MissingExtra(
            "llama.cpp's rounding needs the gguf library; pip install 'lfm2-mm[gguf]'"
        ) from None
    own = GGMLQuantizationType[kind]
    rounded = quants.dequantize(quants.quantize(weight.detach().float().numpy(), own), own)
    return torch.from_numpy(rounded)


# -- divergence --------------------------------------------------------------------------------


def _divergence(count: int, threads: int | None) -> Iterator[Row]:
    from lfm2_evals.scenes import Scenes

    task = Scenes("core", count=count)
    examples = [task.example(i) for i in range(0, len(task), 5)]

    def seen(model: Model) -> torch.Tensor:
        """Scores at the text positions of questions and answers."""
        import torch

        scores = []
        for example in examples:
            turn = {"role": "assistant", "content": example.answer}
            messages = [*task.messages(example), turn]
            prompt = model.prompt(messages, add_generation_prompt=False)
            text = torch.ones(len(prompt), dtype=torch.bool)
            for slot in prompt.slots:
                text[slot.positions] = False
            scores.append(model.engine.logits(prompt)[text])
        return torch.cat(scores)

    yield from _compared("nano-vl", "nano-vl", seen, threads)
    with _heavy_tails() as folder:
        import torch

        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(300, 1000, (max(2, count // 10), 64), generator=draw).tolist()

        def drawn(model: Model) -> torch.Tensor:
            return torch.cat([model.logits(row) for row in ids])

        yield from _compared("heavy tails", str(folder), drawn, threads)


def _compared(
    title: str, name: str, scores: Callable[[Model], torch.Tensor], threads: int | None
) -> Iterator[Row]:
    from lfm2_mm.quantize.calibration import own_words

    whole = _form(name, "fp32", threads, ())
    wanted = scores(whole).log_softmax(-1)
    texts = own_words(whole)
    for form in FORMS:
        found = scores(_form(name, form, threads, texts)).log_softmax(-1)
        each = (wanted.exp() * (wanted - found)).sum(-1)
        same = (wanted.argmax(-1) == found.argmax(-1)).float()
        yield Row(
            tier="divergence",
            model=title,
            form=form,
            n=len(wanted),
            divergence=float(each.mean()),
            same=float(same.mean()),
        )


@contextmanager
def _heavy_tails() -> Iterator[Path]:
    """A checkpoint of random weights with outliers, as trained ones have."""
    import torch

    from lfm2_evals.bench.text_models import write_random
    from lfm2_mm.config import BackboneConfig

    config = BackboneConfig(
        vocab_size=1024,
        hidden_size=256,
        ffn_size=512,
        layer_types=("conv", "full_attention") * 3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        max_positions=512,
        eos_ids=(),
    )
    draw = torch.Generator().manual_seed(0)

    def student(shape: Sequence[int], std: float) -> torch.Tensor:
        """Student's t with 3 degrees of freedom, whose variance is 3."""
        normal = torch.randn(*shape, generator=draw)
        chi = torch.randn(3, *shape, generator=draw).square().sum(0)
        return normal * (3 / chi).sqrt() * (std / 3**0.5)

    with tempfile.TemporaryDirectory(prefix="lfm2-mm-eval-") as scratch:
        folder = Path(scratch) / "heavy"
        write_random(config, folder, student)
        yield folder


# -- what people notice ------------------------------------------------------------------------


def _answers(count: int, threads: int | None) -> Iterator[Row]:
    from lfm2_evals.scenes import Scenes
    from lfm2_evals.task import run
    from lfm2_mm.quantize.calibration import own_words

    task = Scenes("core", count=count)
    whole = _form("nano-vl", "fp32", threads, ())
    wanted = [outcome.given for outcome in run(task, whole).outcomes]
    whole.engine.kv_cache_dtype = "int8"
    whole.engine.prefixes.clear()  # kept otherwise
    yield _share("answers", "nano-vl", _KV, [o.given for o in run(task, whole).outcomes], wanted)
    texts = own_words(whole)
    for form in ("int8", "int4", "int4 calibrated"):
        model = _form("nano-vl", form, threads, texts)
        given = [outcome.given for outcome in run(task, model).outcomes]
        yield _share("answers", "nano-vl", form, given, wanted)


def _rankings(count: int, threads: int | None) -> Iterator[Row]:
    import torch

    import lfm2_mm
    from lfm2_evals.retrieval import Directions
    from lfm2_retrieval.scoring import maxsim

    asked = Directions("packages", count=count).direction("en", "de")

    def encoded(form: str) -> tuple[list[Tensor], list[Tensor]]:
        encoder = lfm2_mm.load("nano-colbert", device="cpu", threads=threads, quantize=form)
        documents = encoder.encode_documents(asked.candidates)
        return encoder.encode_queries(asked.queries), documents

    def scores(queries: list[Tensor], documents: list[Tensor]) -> Tensor:
        with torch.inference_mode():
            return torch.stack([maxsim(query, documents) for query in queries])

    queries, documents = encoded("none")
    wanted = scores(queries, documents)
    first = wanted.argmax(-1).tolist()
    for form in ("int8", "int4"):
        own, packed = encoded(form)
        for name, against in ((form, packed), (_QUERIES.format(form), documents)):
            found = scores(own, against)
            row = _share("rankings", "nano-colbert", name, found.argmax(-1).tolist(), first)
            yield replace(row, correlation=rank_correlation(found, wanted))


def rank_correlation(found: Tensor, wanted: Tensor) -> float:
    """Spearman's correlation of each row of scores with its counterpart, the mean over rows."""
    import torch

    ranks = [scores.argsort(-1).argsort(-1).float() for scores in (found, wanted)]
    a, b = (one - one.mean(-1, keepdim=True) for one in ranks)
    return float(torch.cosine_similarity(a, b, dim=-1).mean())


def _speech(count: int, threads: int | None) -> Iterator[Row]:
    import lfm2_mm
    from lfm2_evals.speech import plain, utterances
    from lfm2_evals.speech_answers import LONGEST, questions

    spoken = [audio for _, _, audio in utterances("both", count)]
    asked = [one.audio for one in questions("reworded", count)]

    def texts(form: str) -> tuple[list[str], list[str]]:
        model = lfm2_mm.load("nano-audio", device="cpu", threads=threads, quantize=form)
        heard = [plain(model.transcribe(audio).text) for audio in spoken]
        replies = [model.reply(audio, temperature=0.0, max_frames=LONGEST).text for audio in asked]
        return heard, [plain(reply) for reply in replies]

    heard, answered = texts("none")
    for form in ("int8", "int4"):
        now_heard, now_answered = texts(form)
        yield _share("speech", "nano-audio, heard", form, now_heard, heard)
        yield _share("speech", "nano-audio, answered", form, now_answered, answered)


def _share(tier: str, model: str, form: str, given: list[Any], wanted: list[Any]) -> Row:
    same = sum(a == b for a, b in zip(given, wanted, strict=True))
    return Row(
        tier=tier,
        model=model,
        form=form,
        n=len(wanted),
        divergence=None,
        same=same / max(1, len(wanted)),
        floor=_FLOORS.get(form),
    )
