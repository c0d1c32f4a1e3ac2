"""The depthformer: the official code's scores and codes, whole and step by step, alone or many."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from lfm2_audio import depthformer
from lfm2_audio.config import AudioConfig, DepthformerConfig
from lfm2_audio.depthformer import Codebook, Depthformer, rotate_pairs
from lfm2_audio.frames import FrameEmbedding, FrameEncoder, frame_identities
from lfm2_mm.errors import InputError
from lfm2_mm.kernels import native
from lfm2_mm.quantize.fitting import fit
from lfm2_mm.quantize.recipes import recipe
from tests.audio import official

CONFIG = AudioConfig.from_dict(official.CONFIG)
CLOSE = 1e-4


def made(config: AudioConfig = CONFIG) -> Depthformer:
    module = Depthformer(config)
    stored = official.state("model")
    module.load_state_dict({name: stored[name] for name in module.state_dict()})
    return module.eval().requires_grad_(False)


@cache
def whole() -> Depthformer:
    return made()


def hidden() -> Tensor:
    return official.numbers("depth hidden", 3, 64)


def greedy(book: int, scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def walked(module: Depthformer, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy frames and the scores they were chosen by."""
    seen: list[Tensor] = []

    def choose(book: int, scores: Tensor) -> Tensor:
        assert book == len(seen)
        seen.append(scores)
        return scores.argmax(-1)

    return module.frames(rows, choose), torch.stack(seen, 1)


def test_frames_and_scores_equal_the_official_ones() -> None:
    golden = official.golden("depthformer")
    frames, scores = walked(whole(), hidden())
    assert torch.equal(frames, golden["frames"])
    torch.testing.assert_close(scores, golden["logits"], atol=CLOSE, rtol=0)
    whole_scores = whole()(hidden(), golden["frames"])
    torch.testing.assert_close(whole_scores, golden["logits"], atol=CLOSE, rtol=0)


def wide() -> Depthformer:
    """Heads of four pairs, each of an angle of its own."""
    module = Depthformer(
        replace(CONFIG, depthformer=DepthformerConfig(**official.WIDE_DEPTHFORMER))
    )
    state = {name: official.tensor(name, tuple(t.shape)) for name, t in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def wide_off_by(module: Depthformer) -> float:
    golden = official.golden("depthformer_wide")
    scores = module(hidden(), golden["frames"])[..., :: official.EVERY]
    return float((scores - golden["logits"]).abs().max())


def test_wide_heads_turn_as_the_official_ones() -> None:
    golden = official.golden("depthformer_wide")
    frames, scores = walked(wide(), hidden())
    assert torch.equal(frames, golden["frames"])
    torch.testing.assert_close(
        scores[..., :: official.EVERY], golden["logits"], atol=CLOSE, rtol=1e-5
    )
    assert wide_off_by(wide()) < CLOSE


def test_names_are_the_official_ones() -> None:
    names = set(official.layout()["model"])
    ours = set(whole().state_dict())
    prefixes = ("depth_linear.", "depthformer.", "depth_embeddings.")
    assert {name for name in names if name.startswith(prefixes)} - ours == {
        f"depth_embeddings.{k}.to_logits.weight" for k in range(8)
    }
    untied = Depthformer(replace(CONFIG, depthformer=replace(CONFIG.depthformer, tie=False)))
    assert set(untied.state_dict()) == {name for name in names if name.startswith(prefixes)}


def test_an_untied_head_scores_by_its_own_matrix() -> None:
    untied = made(replace(CONFIG, depthformer=replace(CONFIG.depthformer, tie=False)))
    golden = official.golden("depthformer")
    assert torch.equal(untied.frames(hidden(), greedy), golden["frames"])
    book = untied.depth_embeddings[0]
    assert isinstance(book, Codebook) and book.to_logits is not None
    book.to_logits.weight.neg_()
    _, scores = walked(untied, hidden())
    torch.testing.assert_close(scores[:, 0], -golden["logits"][:, 0], atol=CLOSE, rtol=0)


def test_many_frames_equal_each_alone() -> None:
    rows = official.numbers("many hidden", 9, 64)
    frames, scores = walked(whole(), rows)
    for i in range(9):
        one, alone = walked(whole(), rows[i : i + 1])
        assert torch.equal(one[0], frames[i])
        torch.testing.assert_close(alone[0], scores[i, : alone.shape[1]], atol=CLOSE, rtol=0)


def test_the_end_fills_its_frame_and_stops_early() -> None:
    asked: list[int] = []

    def end(book: int, scores: Tensor) -> Tensor:
        asked.append(book)
        return torch.full((len(scores),), 2048)

    assert whole().frames(hidden(), end).tolist() == [[2048] * 8] * 3
    assert asked == [0]

    def second_ends(book: int, scores: Tensor) -> Tensor:
        codes = scores.argmax(-1)
        codes[1] = 2048 if book == 0 else codes[1]
        return codes

    frames, alone = whole().frames(hidden(), second_ends), official.golden("depthformer")["frames"]
    assert frames[1].tolist() == [2048] * 8
    assert torch.equal(frames[[0, 2]], alone[[0, 2]])


def test_codes_of_2048_elsewhere_end_nothing() -> None:
    def odd(book: int, scores: Tensor) -> Tensor:
        return torch.full((len(scores),), 2048 if book == 3 else 5)

    assert whole().frames(hidden(), odd).tolist() == [[5, 5, 5, 2048, 5, 5, 5, 5]] * 3


def test_gradients_reach_every_weight() -> None:
    module = made().requires_grad_(True)
    module(hidden(), official.golden("depthformer")["frames"]).square().mean().backward()
    for name, weight in module.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_bf16_stays_close() -> None:
    golden = official.golden("depthformer")
    scores = made().bfloat16()(hidden().bfloat16(), golden["frames"]).float()
    assert (scores - golden["logits"]).abs().max() < 0.05 * golden["logits"].abs().max()


# --- bugs of earlier ports: each would be noticed


def off_by(module: Depthformer) -> float:
    golden = official.golden("depthformer")
    return float((module(hidden(), golden["frames"]) - golden["logits"]).abs().max())


def test_the_norm_before_the_scores_counts() -> None:
    module = made()
    for book in module.depth_embeddings:
        assert isinstance(book, Codebook)
        book.embedding_norm = torch.nn.Identity()  # type: ignore[assignment]
    assert off_by(module) > 100 * CLOSE


def test_the_angle_of_a_codebook_comes_of_theta_1e6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthformer, "_THETA", 1e4)
    assert wide_off_by(wide()) > 100 * CLOSE


def test_halves_instead_of_pairs_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 2: the backbone turns halves, the depthformer neighbours."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    back = order.argsort()

    def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate_pairs(x[..., back], cos, sin)[..., order]

    monkeypatch.setattr(depthformer, "rotate_pairs", halves)
    assert wide_off_by(wide()) > 100 * CLOSE


def test_pairs_are_neighbours() -> None:
    angle = torch.tensor([0.3, 0.3, 1.1, 1.1])
    sin = angle.sin() * torch.tensor([-1.0, 1.0, -1.0, 1.0])
    turned = rotate_pairs(torch.tensor([1.0, 0.0, 0.0, 2.0]), angle.cos(), sin)
    wanted = [angle[0].cos(), angle[0].sin(), -2 * angle[2].sin(), 2 * angle[2].cos()]
    torch.testing.assert_close(turned, torch.stack(wanted))


def test_the_position_is_the_codebook_and_not_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Depthformer._angles

    def still(self: Depthformer, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = real(self, like)
        return cos[:1].expand_as(cos), sin[:1].expand_as(sin)

    monkeypatch.setattr(Depthformer, "_angles", still)
    assert off_by(whole()) > 10 * CLOSE


def test_frames_know_nothing_of_each_other() -> None:
    rows = hidden()
    first = whole().frames(rows, greedy)[0]
    rows[1:] = 100.0
    assert torch.equal(whole().frames(rows, greedy)[0], first)


# --- frames as input


def embedding() -> FrameEmbedding:
    module = FrameEmbedding(CONFIG)
    table = official.state("model")["audio_embedding.embedding.weight"]
    module.load_state_dict({"embedding.weight": table})
    return module.requires_grad_(False)


def test_a_frame_is_the_sum_of_its_codes_each_from_its_own_2049_rows() -> None:
    codes = official.codes("frame", 2)
    codes[1] = 2048
    table = official.state("model")["audio_embedding.embedding.weight"]
    wanted = [sum(table[2049 * k + int(code)] for k, code in enumerate(row)) for row in codes]
    torch.testing.assert_close(embedding()(codes), torch.stack(wanted))  # type: ignore[arg-type]


def test_frames_have_an_identity() -> None:
    codes = official.codes("identity", 50)
    found = frame_identities(codes)
    assert len(set(found)) == 50
    assert all(-(1 << 62) <= number < 0 for number in found)
    assert frame_identities(codes.clone()[7:9]) == found[7:9]
    codes[7, 7] += 1
    assert frame_identities(codes)[7] != found[7]


def test_the_encoder_of_frames() -> None:
    encoder = FrameEncoder(embedding(), token_id=3)
    a, b = official.codes("a", 4), official.codes("b", 1)
    prepared = [encoder.prepare({"frames": codes}) for codes in (a, b)]
    assert [(p.n_positions, p.text) for p in prepared] == [(4, ""), (1, "")]
    rows = encoder.encode(prepared)
    torch.testing.assert_close(rows[0], embedding()(a))
    torch.testing.assert_close(rows[1], embedding()(b))
    assert prepared[0].key != prepared[1].key == encoder.prepare({"frames": b.clone()}).key
    assert not encoder.accepts("frames.pt")


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (torch.zeros(8), "have the shape [8], but this model's are [frames, 8]"),
        (torch.zeros(2, 4), "have the shape [2, 4], but this model's are [frames, 8]"),
        (torch.full((1, 8), 2049), "hold codes from 2049 to 2049, but this model's go from 0 to"),
        (torch.full((1, 8), -1), "hold codes from -1 to -1, but this model's go from 0 to 2048"),
    ],
)
def test_what_are_no_frames_is_refused(frames: Tensor, said: str) -> None:
    with pytest.raises(InputError, match="frames of speech") as caught:
        FrameEncoder(embedding(), token_id=0).prepare({"frames": frames})
    assert said in str(caught.value)


def packed() -> Depthformer:
    module = made()
    schemes = recipe("int8").backbone
    left = fit(module, module.state_dict(), schemes, dtype=torch.float32, where="here")
    module.load_state_dict(left, strict=False)
    return module


@torch.inference_mode()
def test_one_native_call_a_codebook_gives_what_the_layers_give() -> None:
    module, plain = packed(), packed()
    plain._steps.append(None)  # nobody looks for the native ones any more
    frames, scores = walked(module, hidden())
    wanted, by_layers = walked(plain, hidden())
    assert torch.equal(frames, wanted)
    torch.testing.assert_close(scores, by_layers, atol=CLOSE, rtol=1e-4)
    assert (module._steps[0] is not None) == (native.library() is not None)
    alone, _ = walked(module, hidden()[1:2])
    assert torch.equal(alone, frames[1:2])


@torch.inference_mode()
def test_packed_codes_are_nearly_as_likely_as_before() -> None:
    seen = whole()(hidden(), official.golden("depthformer")["frames"])
    rounded = packed()(hidden(), official.golden("depthformer")["frames"])
    assert torch.cosine_similarity(seen, rounded, dim=-1).min() > 0.99


def test_a_depthformer_that_is_not_packed_has_no_native_step() -> None:
    module = made()
    with torch.inference_mode():
        walked(module, hidden())
    assert module._steps == [None]
