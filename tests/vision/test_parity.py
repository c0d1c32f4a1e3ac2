"""Vision-language models against transformers 5.23 and against themselves: warm, batched, saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import lfm2_mm
from lfm2_mm.chat import Prompt
from lfm2_mm.events import Done
from lfm2_mm.model import Model
from lfm2_mm.request import Handle, Request
from lfm2_vision.frontend import ImageEncoder
from tests import oracle
from tests.oracle import Recorder, chat, endless, ours, picture

CLOSE: dict[str, Any] = {"atol": oracle.CLOSE, "rtol": 0}


def encoder(model: Model) -> ImageEncoder:
    found = model.encoders["image"]
    assert isinstance(found, ImageEncoder)
    return found


def talk(model: Model) -> Prompt:
    """Two messages, three pictures, one of them tiled, one seen twice."""
    first = {"type": "image", "image": picture(40, 30)}
    return model.prompt(
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Media-1\n"},
                    first,
                    {"type": "text", "text": "Media-2"},
                    {"type": "image", "image": picture(210, 150, seed=1)},
                ],
            },
            {"role": "assistant", "content": "fine"},
            {"role": "user", "content": [first, {"type": "text", "text": "and now?"}]},
        ]
    )


def submit(model: Model, prompt: Prompt, n: int = 12, *, reuse: bool = True) -> Handle:
    return model.engine.submit(Request(prompt=prompt, max_tokens=n, reuse=reuse))


def done(handle: Handle) -> Done:
    handle.text()
    assert handle.done is not None
    return handle.done


# --- transformers


@pytest.mark.parametrize("name", oracle.VISION_VARIANTS)
def test_logits_equal_transformers(name: str) -> None:
    model = oracle.shared(name)
    prompt = talk(model)
    assert [slot.prepared.info["views"] for slot in prompt.slots] == [1, 5, 1]
    mine, theirs = model.engine.logits(prompt), oracle.their_logits(name, prompt)
    torch.testing.assert_close(mine, theirs, **CLOSE)
    blind = model.logits(prompt.ids)
    assert (blind - theirs).abs().max() > 0.1  # the pictures matter


@pytest.mark.parametrize("name", oracle.VISION_VARIANTS)
def test_64_greedy_tokens_equal_transformers(name: str) -> None:
    model = endless(ours(name))
    model.engine.prefill_chunk = 23
    prompt, heard = talk(model), Recorder(model)
    usage = done(submit(model, prompt, 64)).usage
    assert heard.tokens() == oracle.their_tokens(name, prompt)
    assert len(set(heard.tokens())) > 5
    torch.testing.assert_close(heard.scores()[:1], oracle.their_logits(name, prompt)[-1:], **CLOSE)
    assert usage.attachment_tokens == sum(slot.prepared.n_positions for slot in prompt.slots)
    assert usage.encoded_parts == 2  # the picture that comes twice is encoded once


def test_the_prompt_is_what_transformers_renders() -> None:
    model = oracle.shared("vl")
    prompt = talk(model)
    blocks = iter(slot.prepared.text for slot in prompt.slots)
    pieces = prompt.text.split("<image>")
    text = pieces[0] + "".join(next(blocks) + piece for piece in pieces[1:])
    assert prompt.ids.tolist() == oracle.hf_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert int((prompt.ids == oracle.IMAGE_ID).sum()) == prompt.n_attachment_positions


def test_bf16_stays_close() -> None:
    exact, half = oracle.shared("vl"), ours("vl", dtype=torch.bfloat16)
    prompt = talk(exact)
    mine = half.engine.logits(talk(half))
    wanted = exact.engine.logits(prompt)
    assert F.cosine_similarity(mine.flatten(), wanted.flatten(), dim=0) > 0.99
    assert not torch.equal(mine, wanted)


# --- batches


@pytest.mark.parametrize(("name", "chunk"), [("vl", 2048), ("vl_odd", 31), ("vl_moe", 31)])
def test_mixed_prompts_at_once_equal_each_alone(name: str, chunk: int) -> None:
    model = endless(ours(name))
    model.engine.prefill_chunk = chunk
    prompts = [
        chat(model, "what is it?", picture(40, 30)),
        chat(model, "hello"),
        chat(model, "which one? " * 20, picture(210, 150, seed=1), picture(20, 60, seed=2)),
        Prompt.from_ids(oracle.ids(1)),
    ]
    heard = Recorder(model)
    for prompt in prompts:
        submit(model, prompt, 24, reuse=False).text()
    handles = [submit(model, prompt, 24, reuse=False) for prompt in prompts]
    model.engine.run_until_idle()
    for i, handle in enumerate(handles):
        assert heard.tokens(4 + i) == heard.tokens(i)
        torch.testing.assert_close(heard.scores(4 + i), heard.scores(i), **CLOSE)
        assert handle.text() == model.tokenizer.decode_output(heard.tokens(i))
        assert heard.tokens(i)[:8] == oracle.their_tokens(name, prompts[i], 8)


# --- the second question


@pytest.mark.parametrize("name", ["vl", "vl_odd", "vl_moe"])
def test_a_second_question_starts_behind_the_picture(name: str) -> None:
    shown = picture(210, 150, seed=1)
    questions = ["what colour is it?", "how many are there?", "what colour was it?"]
    cold: list[tuple[list[int], torch.Tensor]] = []
    for question in questions:
        fresh = endless(ours(name))
        heard = Recorder(fresh)
        usage = done(submit(fresh, chat(fresh, question, shown), reuse=False)).usage
        assert (usage.cached_tokens, usage.encoded_parts) == (0, 1)
        cold.append((heard.tokens(), heard.scores()))

    model = endless(ours(name))
    heard = Recorder(model)
    seen = []
    for question in questions:
        prompt = chat(model, question, shown)
        usage = done(submit(model, prompt)).usage
        seen.append((usage.cached_tokens, usage.encoded_parts))
    end = prompt.slots[0].end
    assert seen == [(0, 1), (end, 0), (end, 0)]
    assert encoder(model).views_encoded == 5
    assert model.engine.features.encoded == 1
    for i, (tokens, scores) in enumerate(cold):
        assert heard.tokens(i) == tokens
        torch.testing.assert_close(heard.scores(i), scores, **CLOSE)
    assert len({tuple(tokens) for tokens, _ in cold}) > 1  # the question matters


def test_another_picture_of_the_same_size_is_not_taken_for_it() -> None:
    model = endless(ours("vl"))
    done(submit(model, chat(model, "what?", picture(40, 30))))
    other = chat(model, "what?", picture(40, 30, seed=9))
    heard = Recorder(model)
    warm = done(submit(model, other)).usage
    done(submit(model, other, reuse=False))
    assert warm.encoded_parts == 1
    assert warm.cached_tokens < other.slots[0].positions[0]
    assert encoder(model).views_encoded == 2
    assert heard.tokens(0) == heard.tokens(1)


def test_features_are_kept_even_where_prefixes_are_not() -> None:
    model = endless(ours("vl"))
    for _ in range(2):
        last = done(submit(model, chat(model, "what?", picture(40, 30)), reuse=False))
    assert (last.usage.cached_tokens, last.usage.encoded_parts) == (0, 0)
    assert encoder(model).views_encoded == 1
    model.engine.features.clear()
    done(submit(model, chat(model, "what?", picture(40, 30)), reuse=False))
    assert encoder(model).views_encoded == 2


def test_two_questions_about_one_picture_at_once() -> None:
    model = endless(ours("vl_odd"))
    prompts = [chat(model, text, picture(210, 150, seed=1)) for text in ("what?", "how many?")]
    cold = [submit(model, prompt, reuse=False).text() for prompt in prompts]
    for _ in range(2):  # the second time both continue one boundary in one step
        handles = [submit(model, prompt) for prompt in prompts]
        model.engine.run_until_idle()
        assert [handle.text() for handle in handles] == cold
    assert [done(handle).usage.cached_tokens for handle in handles] == [prompts[0].slots[0].end] * 2
    assert encoder(model).views_encoded == 5


def test_by_hand_through_the_cache() -> None:
    """Snapshot behind the picture, two follow-ups, without the engine's help."""
    from lfm2_mm.cache import SequenceCache
    from lfm2_mm.mixing import Ragged

    model = oracle.shared("vl")
    prompts = [chat(model, text, picture(40, 30)) for text in ("what colour?", "how many?")]
    end = prompts[0].slots[0].end
    cache = SequenceCache(model.backbone.config)
    features = dict(enumerate(encoder(model).encode([prompts[0].slots[0].prepared])))

    def run(prompt: Prompt, start: int, stop: int) -> torch.Tensor:
        with torch.no_grad():
            mixing = Ragged([(cache, stop - start)])
            rows = model.engine._embed(prompt, features, start, stop)
            hidden = model.backbone(rows, mixing)
            mixing.commit()
            return model.head.logits(hidden)

    run(prompts[0], 0, end)
    boundary = cache.snapshot()
    for prompt in prompts:
        cache.restore(boundary)
        scores = run(prompt, end, len(prompt))
        torch.testing.assert_close(scores, oracle.their_logits("vl", prompt)[end:], **CLOSE)


# --- files


def opened(folder: Path) -> Any:
    """The checkpoint in transformers, which must miss nothing and find nothing unknown."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    net, info = loaded
    assert not any(info.values()), info
    return net.eval()


@pytest.mark.parametrize("name", oracle.VISION_VARIANTS)
def test_what_is_saved_loads_in_transformers_and_here(name: str, tmp_path: Path) -> None:
    model = ours(name)
    prompt = talk(model)
    model.save(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    with torch.no_grad():
        theirs = again(prompt.ids[None], **oracle.image_inputs(prompt)).logits[0]
    assert torch.equal(theirs, oracle.their_logits(name, prompt))
    reloaded = lfm2_mm.load(tmp_path / "saved", threads=1)
    assert torch.equal(reloaded.engine.logits(talk(reloaded)), model.engine.logits(prompt))
    stored = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert any(key.startswith("model.vision_tower.vision_model.encoder.") for key in stored)
    assert ("lm_head.weight" in stored) is (name == "vl_odd")


LAYOUTS = {
    "official": [("model.vision_tower.", "model.vision_tower.vision_model.")],
    "transformers 5": [("model.vision_tower.", "model.vision_tower.")],
    "old": [
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.language_model.", "language_model.model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ],
    "mlx": [
        ("model.vision_tower.", "vision_tower."),
        ("model.language_model.", "language_model.model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["vl", "vl_odd"])
def test_every_key_layout_loads(layout: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(oracle.folder(name), folder)
    stored = {}
    for key, value in load_file(folder / "model.safetensors").items():
        old, new = next((pair for pair in LAYOUTS[layout] if key.startswith(pair[0])), ("", ""))
        stored[new + key.removeprefix(old)] = value
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    model = lfm2_mm.load(folder, threads=1)
    prompt = talk(model)
    assert torch.equal(model.engine.logits(prompt), oracle.shared(name).engine.logits(prompt))


def test_a_config_that_is_wrong_about_the_layer_norm(tmp_path: Path) -> None:
    """Old spellings and a LayerNorm that is not there, as in files that circulate."""
    folder = oracle.changed("vl", tmp_path / "m", {"model_type": "lfm2-vl"})
    config = json.loads((folder / "config.json").read_text())
    del config["projector_use_layernorm"]
    config["image_token_index"] = config.pop("image_token_id")
    (folder / "config.json").write_text(json.dumps(config))
    model = lfm2_mm.load(folder, threads=1)
    prompt = talk(model)
    torch.testing.assert_close(
        model.engine.logits(prompt), oracle.their_logits("vl", prompt), **CLOSE
    )
    model.save(tmp_path / "saved")
    assert opened(tmp_path / "saved").config.image_token_id == oracle.IMAGE_ID
