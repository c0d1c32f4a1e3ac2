"""Runs the official LFM2-Audio code on tiny checkpoints and keeps what it makes as golden fixtures.

The official package (liquid-audio, LFM Open License) is never part of this repository: this driver
reads a wheel that somebody unpacked, in an environment of its own, on a CPU. How to:

    python -m venv oracle && oracle/bin/pip install torch==2.13.0 transformers==5.23.0 \
        accelerate einops safetensors sentencepiece librosa
    oracle/bin/pip download --no-deps --python-version 3.12 --only-binary=:all: liquid-audio==1.3.0
    python -m zipfile -e liquid_audio-1.3.0-*.whl wheel
    oracle/bin/python tools/audio_oracle.py wheel                # writes tests/audio/golden
    oracle/bin/python tools/audio_oracle.py wheel --load FOLDER  # a checkpoint that we saved
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent.parent
STEPS = 200


def load_module(path: str) -> Any:
    """A module of this project by its path, importing nothing else of the project."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, HERE / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    """Name -> shape of everything a state dict holds."""
    return {name: list(t.shape) for name, t in module.state_dict().items()}


def build_model(recipe: Any) -> Any:
    """The official model with the recipe's weights, fp32."""
    from liquid_audio.model import lfm2_audio as la
    from transformers import Lfm2Config

    config = json.loads(json.dumps(recipe.CONFIG))
    lfm = Lfm2Config(**config.pop("lfm"))
    lfm._attn_implementation = "sdpa"
    model = la.LFM2AudioModel(
        la.LFM2AudioConfig(
            lfm=lfm,
            encoder=la.ConformerEncoderConfig(**config.pop("encoder")),
            depthformer=la.DepthformerConfig(**config.pop("depthformer")),
            preprocessor=la.PreprocessorConfig(**config.pop("preprocessor")),
            **config,
        )
    )
    fill(recipe, model)
    return model.float().eval()


def fill(recipe: Any, module: torch.nn.Module) -> None:
    """Give every tensor of a module the recipe's values."""
    state = {name: recipe.tensor(name, tuple(t.shape)) for name, t in module.state_dict().items()}
    module.load_state_dict(state, strict=True)


def build_detokenizer(recipe: Any) -> Any:
    """The official detokenizer with the recipe's weights; layer kinds named as it does."""
    from liquid_audio import LFM2AudioDetokenizer
    from transformers import Lfm2Config

    config = json.loads(json.dumps(recipe.DETOKENIZER_CONFIG))
    kinds = config.pop("layer_types")
    window = config.pop("sliding_window")
    lfm = Lfm2Config(
        **config, layer_types=["conv" if k == "conv" else "full_attention" for k in kinds]
    )
    lfm.sliding_window, lfm._attn_implementation = window, "sdpa"
    module = LFM2AudioDetokenizer(lfm)
    fill(recipe, module)
    return module.float().eval()


def build_mimi(recipe: Any) -> Any:
    """A small Mimi of the bundled kyutai code with the recipe's weights."""
    from liquid_audio.moshi.models import loaders

    small = recipe.MIMI_CONFIG
    loaders._seanet_kwargs |= {"dimension": small["hidden_size"], "n_filters": small["num_filters"]}
    loaders._quantizer_kwargs |= {
        "dimension": small["codebook_dim"],
        "n_q": small["num_quantizers"],
        "bins": small["codebook_size"],
        "input_dimension": small["hidden_size"],
        "output_dimension": small["hidden_size"],
    }
    loaders._transformer_kwargs |= {
        "d_model": small["hidden_size"],
        "num_heads": small["num_attention_heads"],
        "num_layers": small["num_hidden_layers"],
        "context": small["sliding_window"],
        "dim_feedforward": small["intermediate_size"],
        "input_dimension": small["hidden_size"],
        "output_dimensions": [small["hidden_size"]],
    }
    mimi = loaders.get_mimi(None, device="cpu", num_codebooks=recipe.N_CODEBOOKS)
    fill(recipe, mimi)
    return mimi


class Margins:
    """How far the best score lay above the second, so that no golden choice hangs on rounding."""

    def __init__(self) -> None:
        self.least = float("inf")
        self._argmax = torch.Tensor.argmax
        owner = self

        def argmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            best = scores.topk(2).values
            owner.least = min(owner.least, float(best[0] - best[1]))
            return owner._argmax(scores, *args, **kwargs)

        torch.Tensor.argmax = argmax  # type: ignore[method-assign,assignment]

    def taken(self) -> float:
        """The least margin since the last time it was taken."""
        least, self.least = self.least, float("inf")
        return least


def as_events(steps: list[Tensor]) -> list[Any]:
    """Text tokens as numbers, audio frames as lists of codes, in order."""
    return [int(s) if s.numel() == 1 else s.tolist() for s in steps]


def pattern(events: list[Any]) -> str:
    """A letter per step: t(ext), A(udio), E(nd of audio)."""
    return "".join("t" if isinstance(e, int) else "E" if e[0] == 2048 else "A" for e in events)


def mels(recipe: Any, front: Any) -> dict[str, Tensor]:
    """Features of signals of several lengths and kinds."""
    made = {}
    for name, wave in recipe.signals().items():
        features, _ = front(wave[None], torch.tensor([len(wave)]))
        made[name] = features[0].contiguous()
    return made


def conversation(
    recipe: Any, processor: Any, model: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Two turns through the official ChatState: speech in, interleaved answer, speech in again."""
    from liquid_audio.processor import ChatState

    chat = ChatState(processor, codebooks=recipe.N_CODEBOOKS, dtype=torch.float32)
    chat.new_turn("system")
    chat.add_text("Respond with interleaved text and audio.")
    chat.end_turn()
    first, second = recipe.signal("turn one", 9000), recipe.signal("turn two", 7777)
    facts: dict[str, Any] = {}
    for number, wave in enumerate((first, second), start=1):
        chat.new_turn("user")
        chat.add_audio(wave[None], recipe.RATE)
        chat.end_turn()
        chat.new_turn("assistant")
        facts[f"turn{number}"] = {
            "text": chat.text[0].tolist(),
            "audio_in_lens": chat.audio_in_lens.tolist(),
            "modality": chat.modality_flag[0].tolist(),
        }
        answer = list(model.generate_interleaved(**chat, max_new_tokens=40))
        facts[f"turn{number}"]["answer"] = as_events(answer)
        text = torch.stack([s for s in answer if s.numel() == 1], 1)
        audio = torch.stack([s for s in answer if s.numel() > 1], 1)
        flags = torch.tensor([1 if s.numel() == 1 else 3 for s in answer])
        chat.append(text=text, audio_out=audio, modality_flag=flags)
        chat.end_turn()
    prefill = model._prefill(**chat)[0].contiguous()
    facts["audio_out"] = chat.audio_out.tolist()
    facts["modality"] = chat.modality_flag[0].tolist()
    facts["text"] = chat.text[0].tolist()
    return facts, {"prefill": prefill}


def prompt(recipe: Any, front: Any, which: int) -> dict[str, Tensor]:
    """Inputs of one generation: ten text tokens around a recording."""
    wave = recipe.signal(f"prompt {which}", 12000)
    features, _ = front(wave[None], torch.tensor([len(wave)]))
    n_mel = features.shape[-1]
    n_rows = -(-n_mel // 8)
    text = recipe.prompt_text(which)
    return {
        "text": text[None],
        "audio_in": features[0],
        "audio_in_lens": torch.tensor([n_mel]),
        "audio_out": torch.empty((recipe.N_CODEBOOKS, 0), dtype=torch.long),
        "modality_flag": torch.tensor([[1] * 5 + [2] * n_rows + [1] * 5]),
    }


def explore(recipe: Any, model: Any, front: Any, count: int) -> None:
    """Print what prompts lead to, so that some with all events can be chosen in the recipe."""
    margins = Margins()
    for which in range(count):
        turn = prompt(recipe, front, which)
        for mode in ("sequential", "interleaved"):
            run = getattr(model, f"generate_{mode}")
            events = as_events(list(run(**turn, max_new_tokens=STEPS)))
            distinct = len({json.dumps(e) for e in events})
            print(which, mode, len(events), distinct, f"{margins.taken():.1e}", pattern(events))


def generate(recipe: Any, model: Any, front: Any) -> dict[str, Any]:
    """Greedy answers in both modes, from the recipe's prompts."""
    margins = Margins()
    made: dict[str, Any] = {"sequential": {}, "interleaved": {}}
    for mode, chosen in recipe.CHOSEN.items():
        for which in chosen:
            run = getattr(model, f"generate_{mode}")
            events = as_events(list(run(**prompt(recipe, front, which), max_new_tokens=STEPS)))
            margin = margins.taken()
            print(mode, which, f"margin {margin:.1e}", pattern(events))
            assert margin > 1e-3, "a choice of this run hangs on rounding: choose another prompt"
            made[mode][str(which)] = events
    return made


def depth(recipe: Any, model: Any) -> dict[str, Tensor]:
    """Scores of every codebook, greedy, for a few hidden states."""
    hidden = recipe.numbers("depth hidden", 3, 64)
    frames, scores = [], []
    for row in hidden:
        seen: list[Tensor] = []

        def keep(module: Any, given: Any, out: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(out.reshape(-1).clone())

        hooks = [e.to_logits.register_forward_hook(keep) for e in model.depth_embeddings]
        frames.append(model._sample_audio_frame(row))
        for hook in hooks:
            hook.remove()
        scores.append(torch.stack(seen))
    return {"frames": torch.stack(frames), "logits": torch.stack(scores)}


def wide_depth(recipe: Any) -> dict[str, Tensor]:
    """The same of wider heads, a part of the scores."""
    narrow, recipe.CONFIG = recipe.CONFIG, recipe.CONFIG | {"depthformer": recipe.WIDE_DEPTHFORMER}
    made = depth(recipe, build_model(recipe))
    recipe.CONFIG = narrow
    return {**made, "logits": made["logits"][..., :: recipe.EVERY].contiguous()}


def losses(recipe: Any, model: Any, front: Any) -> dict[str, Any]:
    """What a training step would see on one example."""
    from liquid_audio.data.types import LFM2AudioModelInput

    turn = prompt(recipe, front, 0)
    flags = torch.cat([turn["modality_flag"], torch.full((1, 12), 3)], 1)
    supervised = torch.zeros_like(flags, dtype=torch.bool)
    supervised[:, -14:] = True
    codes = recipe.codes("loss codes", 12).T
    out = model(
        LFM2AudioModelInput(
            **{**turn, "audio_out": codes, "modality_flag": flags}, supervision_mask=supervised
        )
    )
    return {k: float(getattr(out, k)) for k in ("loss", "text_loss", "audio_loss")}


def write_golden(recipe: Any, target: Path) -> None:
    """Regenerate everything."""
    from liquid_audio import LFM2AudioDetokenizer
    from liquid_audio.model.conformer.processor import AudioToMelSpectrogramPreprocessor
    from liquid_audio.processor import LFM2AudioProcessor, PreprocessorConfig
    from transformers import Lfm2Config

    target.mkdir(parents=True, exist_ok=True)
    model = build_model(recipe)
    detokenizer, mimi = build_detokenizer(recipe), build_mimi(recipe)
    parts = {"model": model, "detokenizer": detokenizer, "mimi": mimi}
    layout = {name: shapes(part) for name, part in parts.items()}
    (target / "layout.json").write_text(json.dumps(layout, indent=0) + "\n")

    front = AudioToMelSpectrogramPreprocessor(**recipe.CONFIG["preprocessor"]).eval()
    features = mels(recipe, front)
    save_file(features, target / "mel.safetensors")
    save_file(
        {"window": front.featurizer.window, "filters": front.featurizer.fb[0].contiguous()},
        target / "mel_tables.safetensors",
    )

    encoded: dict[str, Tensor] = {}
    clips = [features[name] for name in recipe.ENCODED]
    lengths = torch.tensor([clip.shape[1] for clip in clips])
    padded = torch.nn.utils.rnn.pad_sequence([c.T for c in clips], batch_first=True).mT
    batch, sizes = model.conformer(padded, lengths)
    for row, name in enumerate(recipe.ENCODED):
        rows = batch[row, :, : sizes[row]].T
        alone, _ = model.conformer(clips[row][None], lengths[row : row + 1])
        print("encoder", name, "batch against alone", float((alone[0].T - rows).abs().max()))
        encoded[f"{name}.encoder"] = alone[0].T.contiguous()
        encoded[f"{name}.adapter"] = model.audio_adapter(alone[0].T).contiguous()
        short, _ = model.conformer.pre_encode(clips[row].T[None], lengths[row : row + 1])
        encoded[f"{name}.subsampling"] = short[0].contiguous()
    encoded["prefill"] = model._prefill(**prompt(recipe, front, 0))[0].contiguous()
    save_file(encoded, target / "encoder.safetensors")

    save_file(depth(recipe, model), target / "depthformer.safetensors")
    save_file(wide_depth(recipe), target / "depthformer_wide.safetensors")

    with tempfile.TemporaryDirectory() as scratch:
        recipe.write_tokenizer(Path(scratch))
        processor = LFM2AudioProcessor(scratch, PreprocessorConfig(**recipe.CONFIG["preprocessor"]))
        chat_facts, chat_tensors = conversation(recipe, processor, model)
    save_file(chat_tensors, target / "conversation.safetensors")

    codes = recipe.codes("detokenizer codes", 24)
    wave = detokenizer(codes.T[None])[0]
    save_file({"codes": codes, "wave": wave.contiguous()}, target / "detokenizer.safetensors")

    codes = recipe.codes("mimi codes", 12)
    wave = mimi.decode(codes.T[None])[0, 0]
    source = recipe.signal("mimi source", 24000)
    save_file(
        {
            "codes": codes,
            "wave": wave.contiguous(),
            "encoded": mimi.encode(source[None, None])[0].T.contiguous(),
        },
        target / "mimi.safetensors",
    )

    released: dict[str, Any] = recipe.DETOKENIZER_CONFIG | {
        "block_ff_dim": 3328,
        "block_multiple_of": 256,
        "num_hidden_layers": 1,
        "layer_types": ["conv"],
    }
    width = (
        LFM2AudioDetokenizer(Lfm2Config(**released)).lfm.layers[0].feed_forward.w1.weight.shape[0]
    )
    facts = {
        "liquid_audio": "1.3.0",
        "torch": torch.__version__,
        "detokenizer_ffn_of_3328": width,
        "losses": losses(recipe, model, front),
        "conversation": chat_facts,
        "generation": generate(recipe, model, front),
    }
    (target / "facts.json").write_text(json.dumps(facts, separators=(",", ":")) + "\n")
    for file in target.iterdir():
        file.chmod(0o644)


def check_saved(recipe: Any, folder: Path) -> None:
    """Load a checkpoint that this project saved, and compare with the golden answers."""
    from liquid_audio.model.conformer.processor import AudioToMelSpectrogramPreprocessor
    from liquid_audio.model.lfm2_audio import LFM2AudioModel
    from liquid_audio.processor import LFM2AudioProcessor

    model = LFM2AudioModel.from_pretrained(folder, dtype=torch.float32, device="cpu").eval()
    front = AudioToMelSpectrogramPreprocessor(**recipe.CONFIG["preprocessor"]).eval()
    wanted = recipe.facts()["generation"]
    processor = LFM2AudioProcessor.from_pretrained(folder, device="cpu")
    if processor.detokenizer_path is not None:
        golden = recipe.golden("detokenizer")
        wave = processor.decode(golden["codes"].T[None])[0]
        torch.testing.assert_close(wave, golden["wave"], atol=1e-5, rtol=0)
        print("detokenizer equal over", len(wave), "samples")
    for mode, runs in wanted.items():
        for which, events in runs.items():
            run = getattr(model, f"generate_{mode}")
            made = as_events(list(run(**prompt(recipe, front, int(which)), max_new_tokens=STEPS)))
            assert made == events, f"{mode} {which} differs: {pattern(made)}"
            print(mode, which, "equal over", len(made), "steps")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path, help="folder with the unpacked liquid-audio wheel")
    parser.add_argument("--out", type=Path, default=HERE / "tests/audio/golden")
    parser.add_argument("--load", type=Path, help="check a saved checkpoint instead")
    parser.add_argument("--explore", type=int, help="print where so many prompts lead instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    load_module("evals/lfm2_evals/bench/official_worker.py").prepare_import(args.wheel)
    recipe = load_module("tests/audio/official.py")
    if args.load is not None:
        check_saved(recipe, args.load.resolve())
    elif args.explore is not None:
        from liquid_audio.model.conformer.processor import AudioToMelSpectrogramPreprocessor

        front = AudioToMelSpectrogramPreprocessor(**recipe.CONFIG["preprocessor"]).eval()
        explore(recipe, build_model(recipe), front, args.explore)
    else:
        write_golden(recipe, args.out)


if __name__ == "__main__":
    main()
