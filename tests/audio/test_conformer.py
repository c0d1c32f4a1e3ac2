"""Conformer and adapter against the official code, alone and in batches."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm2_audio import conformer as module
from lfm2_audio import subsampling
from lfm2_audio.adapter import Adapter
from lfm2_audio.checkpoint import ADAPTER, CONFORMER, part_tensors
from lfm2_audio.config import AudioConfig
from lfm2_audio.conformer import BatchNorm, Conformer, Convolution, relative_positions
from lfm2_audio.subsampling import n_rows
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.weights import load_weights
from tests.audio import official

CLOSE = 1e-4
CONFIG = AudioConfig.from_dict(official.CONFIG)


@cache
def encoder(dtype: torch.dtype = torch.float32) -> Conformer:
    made = Conformer(CONFIG.encoder)
    fill(made, CONFORMER, dtype)
    return made.eval()


@cache
def adapter() -> Adapter:
    made = Adapter(CONFIG.encoder.hidden_size, CONFIG.backbone.hidden_size)
    fill(made, ADAPTER, torch.float32)
    return made.eval()


def fill(net: torch.nn.Module, part: str, dtype: torch.dtype) -> None:
    tensors = part_tensors(Checkpoint.open(official.folder()), part)
    load_weights(net, tensors, dtype=dtype, device="cpu", where="official")


def noise(name: str, frames: int) -> Tensor:
    return official.numbers(name, 128, frames)


@pytest.mark.parametrize("name", official.ENCODED)
def test_parity(name: str) -> None:
    golden, mel = official.golden("encoder"), official.golden("mel")[name]
    short = encoder().pre_encode(mel)
    torch.testing.assert_close(short, golden[f"{name}.subsampling"], atol=CLOSE, rtol=0)
    (rows,) = encoder()([mel])
    torch.testing.assert_close(rows, golden[f"{name}.encoder"], atol=CLOSE, rtol=0)
    torch.testing.assert_close(adapter()(rows), golden[f"{name}.adapter"], atol=CLOSE, rtol=0)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=5))
@settings(max_examples=30)
def test_a_batch_equals_each_alone(frames: list[int]) -> None:
    mels = [noise(f"mel {i}", n) for i, n in enumerate(frames)]
    for mel, rows in zip(mels, encoder()(mels), strict=True):
        assert len(rows) == n_rows(mel.shape[1], 8)
        torch.testing.assert_close(rows, encoder()([mel])[0], atol=CLOSE, rtol=0)


def test_equal_lengths_share_a_call() -> None:
    mels = [noise(f"equal {i}", n) for i, n in enumerate((40, 40, 17, 40))]
    for mel, rows in zip(mels, encoder()(mels), strict=True):
        torch.testing.assert_close(rows, encoder()([mel])[0], atol=CLOSE, rtol=0)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mels = [noise("long", 333), noise("short", 60)]
    whole = encoder()(mels)
    monkeypatch.setattr(module, "_SCORES", 1700)
    for rows, wanted in zip(encoder()(mels), whole, strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=0)


def test_pieces_of_a_long_recording_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = encoder().pre_encode
    mels = [noise(f"pieces {n}", n) for n in (8 * 20, 8 * 20 + 1, 8 * 19 - 1, 9, 1)]
    whole = [net(mel) for mel in mels]
    for rows_at_once in (1, 3, 7, 19):
        monkeypatch.setattr(subsampling, "_ROWS_AT_ONCE", rows_at_once)
        for mel, wanted in zip(mels, whole, strict=True):
            torch.testing.assert_close(net(mel), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n", "start", "end"), [(7, 2, 5), (7, 0, 7), (7, 3, 4), (1, 0, 1)])
def test_scores_slide_to_their_keys(n: int, start: int, end: int) -> None:
    """Every pair of query and key gets the score of its distance."""
    by_distance = torch.arange(n - 1, -n, -1.0)[n - end : 2 * n - 1 - start]
    slid = module._slide(by_distance.expand(1, 1, end - start, -1).contiguous(), n)
    wanted = torch.arange(start, end)[:, None] - torch.arange(n)
    torch.testing.assert_close(slid[0, 0], wanted.float())


def test_positions() -> None:
    table = relative_positions(3, 4, torch.empty(0))
    assert table.shape == (5, 4)
    torch.testing.assert_close(table[2], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(
        table[0, :2],
        torch.tensor([2.0, 2.0]).sin() * torch.tensor([1, 0])
        + torch.tensor([2.0, 2.0]).cos() * torch.tensor([0, 1]),
    )
    torch.testing.assert_close(table[0, ::2], -table[4, ::2])


def test_far_rows_see_each_other() -> None:
    """Attention is not local, and later frames change earlier rows: no streaming (trap 11)."""
    mel = noise("far", 300)
    other = torch.cat([mel[:, :-8], noise("other end", 8)], 1)
    (rows,), (changed,) = encoder()([mel]), encoder()([other])
    assert (rows[0] - changed[0]).abs().max() > 1e-4


def test_training_normalises_by_real_rows_only() -> None:
    norm = BatchNorm(4).train()
    x = official.numbers("rows", 50, 4) * 3 + 1
    out = norm(x)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0), atol=1e-5, rtol=0)


def test_gradients_reach_every_weight() -> None:
    net = Conformer(CONFIG.encoder).train()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    total = sum(rows.square().sum() for rows in net([noise("a", 40), noise("b", 77)]))
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_bfloat16_stays_close() -> None:
    net = encoder(torch.bfloat16)
    mels = [noise("half", 200), noise("half too", 64)]
    with torch.inference_mode():
        for rows, wanted in zip(net(mels), encoder()(mels), strict=True):
            assert rows.dtype == torch.bfloat16
            assert torch.cosine_similarity(rows.float(), wanted).min() > 0.99


def test_recordings_do_not_leak_through_the_convolution() -> None:
    layer = encoder().layers[0].conv
    assert isinstance(layer, Convolution)
    a, b = official.numbers("rows a", 3, 32), official.numbers("rows b", 9, 32)
    both = layer(torch.cat([a, b]), [3, 9])
    torch.testing.assert_close(both[:3], layer(a, [3]), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[3:], layer(b, [9]), atol=1e-5, rtol=0)


def test_released_size() -> None:
    """As many parameters as the released encoder has, and their stored names."""
    config = AudioConfig.from_dict(
        {
            **official.CONFIG,
            "encoder": {
                **official.CONFIG["encoder"],
                "n_layers": 17,
                "d_model": 512,
                "n_heads": 8,
                "subsampling_conv_channels": 256,
            },
        }
    )
    with torch.device("meta"):
        net, middle = Conformer(config.encoder), Adapter(512, 2048)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 109.55
    assert round(sum(p.numel() for p in middle.parameters()) / 1e6, 2) == 5.25
