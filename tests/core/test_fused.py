"""Fused and packed layers: as near to fp32 as the plain composition, and plain wherever asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lfm2_mm import fused
from lfm2_mm.chat import Prompt
from lfm2_mm.loading import load
from lfm2_mm.pages import CleanPages
from tests import oracle

Op = Callable[[Tensor, nn.Linear, nn.Linear], Tensor]
FUSED: dict[str, Op] = {
    "linear": lambda x, a, _: fused.linear(x, a),
    "gelu_linear": lambda x, a, _: fused.gelu_linear(x, a),
    "swiglu": lambda x, a, b: fused.swiglu(x, a, b),
}
PLAIN: dict[str, Op] = {
    "linear": lambda x, a, _: a(x),
    "gelu_linear": lambda x, a, _: F.gelu(a(x), approximate="tanh"),
    "swiglu": lambda x, a, b: F.silu(a(x)) * b(x),
}
SUPPORTED = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def layers(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(48, 64, bias=bias), nn.Linear(48, 64, bias=bias)


def rows(n: int) -> Tensor:
    return torch.randn(n, 48, generator=torch.Generator().manual_seed(1))


def mapped(folder: Path, *modules: nn.Module) -> Path:
    """Give these modules weights that lie in a mapped file, as `load` does."""
    path = folder / "layers.safetensors"
    save_file(nn.ModuleList(modules).state_dict(), path)
    nn.ModuleList(modules).requires_grad_(False).load_state_dict(load_file(path), assign=True)
    return path


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("n", [1, 5, 1001])
def test_bf16_is_as_near_to_fp32_as_the_plain_composition(
    name: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # so that 1001 rows come in halves
    a, b = layers()
    x = rows(n).bfloat16()
    for layer in (a, b):
        layer.bfloat16().float()
    with torch.inference_mode():
        exact = PLAIN[name](x.float(), a, b)
        plain = PLAIN[name](x, a.bfloat16(), b.bfloat16())
        found = FUSED[name](x, a, b)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    allowed = (plain.float() - exact).abs().max()
    assert allowed > 0
    assert (found.float() - exact).abs().max() <= allowed * 1.01


@pytest.mark.parametrize("name", FUSED)
def test_fp32_and_gradients_take_the_plain_way(name: str) -> None:
    a, b = layers()
    with torch.inference_mode():
        assert torch.equal(FUSED[name](rows(9), a, b), PLAIN[name](rows(9), a, b))
    a, b, x = a.bfloat16(), b.bfloat16(), rows(9).bfloat16().requires_grad_()
    out = FUSED[name](x, a, b)
    assert torch.equal(out, PLAIN[name](x, a, b))
    torch.autograd.backward(out.float().sum())
    assert x.grad is not None and a.weight.grad is not None


@pytest.mark.parametrize("name", FUSED)
def test_other_kinds_of_layers_are_called(name: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    a, b = Doubled(48, 64).bfloat16(), Doubled(48, 64).bfloat16()
    with torch.inference_mode():
        x = rows(3).bfloat16()
        assert torch.equal(FUSED[name](x, a, b), PLAIN[name](x, a, b))


def test_without_the_operators_all_is_plain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fused, "_works", lambda: False)
    a, b = (layer.bfloat16() for layer in layers())
    mapped(tmp_path, a, b)
    assert fused.pack([a, b]) == 0
    with torch.inference_mode():
        x = rows(1001).bfloat16()
        for name, plain in PLAIN.items():
            assert torch.equal(FUSED[name](x, a, b), plain(x, a, b))


def test_an_operator_of_another_signature_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*_: object) -> Tensor:
        raise TypeError("it takes something else now")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", changed)
    assert fused._works.__wrapped__() is False


def test_rms_norm_of_many_rows_is_as_near_to_fp32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(700, 64).bfloat16() * 3, torch.rand(64).bfloat16()
    exact = F.rms_norm(x.float(), (64,), weight.float(), 1e-5)
    with torch.inference_mode():
        found = fused.rms_norm(x, weight, 1e-5)
        assert torch.equal(found[:9], fused.rms_norm(x[:9], weight, 1e-5))
    plain = F.rms_norm(x, (64,), weight, 1e-5)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() <= (plain.float() - exact).abs().max() * 1.01


# -- packed weights ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_give_the_same_and_keep_their_parameters(tmp_path: Path, bias: bool) -> None:
    a, b = (layer.bfloat16() for layer in layers(bias))
    mapped(tmp_path, a, b)
    before = {name: value.clone() for name, value in a.state_dict().items()}
    x = rows(7).bfloat16()
    with torch.inference_mode():
        wanted = [op(x, a, b) for op in FUSED.values()]
        assert fused.pack([a, nn.ReLU(), b]) == (2 if SUPPORTED else 0)
        assert fused.pack([a, b]) == 0  # once is enough
        found = [op(x, a, b) for op in FUSED.values()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert a.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in a.state_dict().items())


def test_a_changed_weight_is_used_as_it_is(tmp_path: Path) -> None:
    a, b = (layer.bfloat16() for layer in layers())
    mapped(tmp_path, a, b)
    fused.pack([a, b])
    x = rows(7).bfloat16()
    with torch.no_grad():
        a.weight.mul_(2)
        b.weight = nn.Parameter(a.weight * 3, requires_grad=False)
        for layer in (a, b):
            assert torch.equal(fused.linear(x, layer), F.linear(x, layer.weight, layer.bias))


def test_only_weights_of_mapped_files_are_packed(tmp_path: Path) -> None:
    own, trained = (layer.bfloat16() for layer in layers())
    own.requires_grad_(False)
    mapped(tmp_path, trained)
    trained.requires_grad_(True)
    wide = nn.Linear(48, 64)
    mapped(tmp_path, wide)
    assert fused.pack([own, trained, wide]) == 0


def test_pages_come_back_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    values = torch.arange(300_000, dtype=torch.float32)
    save_file({"values": values}, path)
    tensor = load_file(path)["values"]
    assert torch.equal(tensor, values)
    clean = CleanPages.find()
    assert clean.hold(tensor) == Path("/proc/self/smaps").exists()
    if clean.ranges:
        clean.release(tensor)
    assert torch.equal(tensor, values)
    assert not clean.hold(values)
    with pytest.raises(ValueError, match="not lie in a clean mapping"):
        clean.release(values)


def test_mappings_that_were_written_to_are_not_clean(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    entry = "{} rw-p 00000000 fe:00 {}  /a file\nRss:  8 kB\nAnonymous:  {} kB\nVmFlags: rd wr\n"
    smaps.write_text(
        entry.format("1000-2000", 7, 0)
        + entry.format("2000-3000", 7, 4)
        + entry.format("3000-4000", 0, 0)
        + entry.format("f000-10000", 9, 0)
    )
    assert CleanPages.find(smaps).ranges == ((0x1000, 0x2000), (0xF000, 0x10000))
    assert CleanPages.find(tmp_path / "none").ranges == ()


# -- in a model ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
def test_a_packed_model_answers_the_same(name: str, tmp_path: Path) -> None:
    oracle.ours(name, dtype=torch.bfloat16).save(tmp_path / name)
    model = load(tmp_path / name, dtype="bfloat16")
    ids = oracle.ids(37, seed=1)
    before = model.logits(ids)
    packed = 0
    for block, _ in zip(model.backbone.layers, model.backbone.pack(), strict=True):
        packed += sum(layer in fused._packed for layer in block.modules())
        for layer in getattr(block.feed_forward, "experts", nn.ModuleList()).modules():
            assert layer not in fused._packed
    assert (packed > 0) == SUPPORTED
    torch.testing.assert_close(model.logits(ids), before, atol=0.02, rtol=0.02)
    model.save(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again", dtype="bfloat16").logits(ids), before)


def test_an_answer_packs_the_model_a_block_a_token(tmp_path: Path) -> None:
    oracle.ours("dense", dtype=torch.bfloat16).save(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype="bfloat16")
    blocks = list(model.backbone.layers)

    def packed() -> list[bool]:
        return [any(part in fused._packed for part in block.modules()) for block in blocks]

    def answer(tokens: int) -> None:
        stream = model.generate(Prompt.from_ids(oracle.ids(9)), max_tokens=tokens, reuse=False)
        assert stream.answer.done.usage.completion_tokens == tokens

    answer(1)
    assert packed() == [False] * len(blocks)
    answer(3)
    assert packed() == [SUPPORTED] * 2 + [False] * (len(blocks) - 2)
