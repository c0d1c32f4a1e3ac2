from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm2_audio.istft import OverlapAdd, inverse_stft, windowed_frames

HOP, SIZE = 16, 64
WINDOW = torch.hann_window(SIZE)


def spectrum_of(samples: torch.Tensor) -> torch.Tensor:
    """Rows whose inverse is exactly these samples, taken with the same padding."""
    padded = torch.nn.functional.pad(samples, ((SIZE - HOP) // 2,) * 2)
    bins = torch.fft.rfft(padded.unfold(0, SIZE, HOP) * WINDOW)
    return torch.cat([bins.abs().clamp(min=1e-12).log(), bins.angle()], dim=-1)


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_the_inverse_of_a_transform_is_the_signal(rows: int) -> None:
    samples = torch.randn(rows * HOP, generator=torch.Generator().manual_seed(rows))
    rows_of = spectrum_of(samples)
    assert rows_of.shape == (rows, SIZE + 2)
    back = inverse_stft(rows_of[None], WINDOW, HOP)
    torch.testing.assert_close(back[0], samples, atol=1e-5, rtol=0)


def test_it_agrees_with_the_inverse_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.randn(1, 30, SIZE + 2, generator=generator)
    magnitude, phase = spectrum.chunk(2, dim=-1)
    bins = torch.polar(magnitude.exp(), phase).transpose(1, 2)
    trim = (SIZE - HOP) // 2
    theirs = torch.istft(bins, SIZE, HOP, window=WINDOW, center=True, length=29 * HOP)
    # torch cuts half a window from the front, this half a window less half a hop
    ours = inverse_stft(spectrum, WINDOW, HOP)[:, SIZE // 2 - trim :][:, : 27 * HOP]
    torch.testing.assert_close(ours, theirs[:, : 27 * HOP], atol=1e-5, rtol=1e-5)


def test_gradients_reach_magnitudes_and_phases() -> None:
    spectrum = torch.randn(2, 6, SIZE + 2, requires_grad=True)
    inverse_stft(spectrum, WINDOW, HOP).square().sum().backward()  # type: ignore[no-untyped-call]
    assert spectrum.grad is not None
    assert (spectrum.grad[..., 1 : SIZE // 2].abs() > 0).all()
    assert (spectrum.grad[..., SIZE // 2 + 2 : -1].abs() > 0).all()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.sampled_from([8, 16, 32]))
def test_bit_by_bit_equals_the_whole(sizes: list[int], hop: int) -> None:
    n = sum(sizes)
    spectrum = torch.randn(n, SIZE + 2, generator=torch.Generator().manual_seed(n))
    stream = OverlapAdd(WINDOW, hop)
    for _ in range(2):  # a flushed stream begins anew
        pieces = [stream.push(part) for part in torch.split(spectrum, sizes)]
        trim = (SIZE - hop) // 2
        if n:
            assert sum(map(len, pieces)) == max(n * hop - trim, 0)
        pieces.append(stream.flush())
        together = torch.cat(pieces)
        assert len(together) == n * hop
        if n:
            whole = inverse_stft(spectrum[None], WINDOW, hop)[0]
            torch.testing.assert_close(together, whole, atol=1e-5, rtol=1e-5)


def test_a_row_alone_is_windowed() -> None:
    row = torch.zeros(1, SIZE + 2)
    samples = windowed_frames(row, WINDOW)
    expected = torch.zeros(SIZE)  # equal magnitudes and phase 0 are one click at the beginning
    expected[0] = 1.0
    torch.testing.assert_close(samples[0], expected * WINDOW, atol=1e-6, rtol=0)
